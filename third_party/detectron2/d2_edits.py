"""What the build changes in Detectron2 v0.5 and why; the wheel carries it as CHANGES.md."""

from pathlib import Path
from typing import List, NamedTuple


class BuildError(SystemExit):
    """Stops the build with one line where any other exception would print a traceback."""


class Edit(NamedTuple):
    """Replace `old` by `new` in `file`. Any other number of places than `count` stops the build."""

    reason: str
    file: str
    old: str
    new: str
    count: int = 1


_NUMPY = "numpy 1.24 removed its aliases of Python's types"
_RESOURCES = "setuptools 82 removed pkg_resources"
_NO_EXT = "detectron2._C is not compiled here"

EDITS: List[Edit] = [
    Edit(_NUMPY, "detectron2/data/build.py", "np.int)", "int)"),
    Edit(_NUMPY, "detectron2/data/build.py", "np.int\n", "int\n"),
    Edit(_NUMPY, "detectron2/data/datasets/pascal_voc.py", "np.str)", "str)"),
    Edit(_NUMPY, "detectron2/evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2),
    Edit(_NUMPY, "detectron2/evaluation/sem_seg_evaluation.py", "np.int)", "int)", 2),
    Edit(_NUMPY, "detectron2/evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5),
    Edit(_NUMPY, "detectron2/structures/masks.py", "np.bool)", "bool)", 2),
    Edit(_NUMPY, "detectron2/utils/visualizer.py", "np.bool)", "bool)", 3),
    Edit(_NUMPY, "detectron2/utils/video_visualizer.py", "np.bool)", "bool)"),
    Edit(
        "Pillow 10 removed LINEAR, another name of BILINEAR",
        "detectron2/data/transforms/transform.py",
        "Image.LINEAR",
        "Image.BILINEAR",
    ),
    Edit(
        _RESOURCES,
        "detectron2/model_zoo/model_zoo.py",
        "import pkg_resources\n",
        "from importlib import resources\n",
    ),
    Edit(
        _RESOURCES,
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", ',
        'str(\n        resources.files("detectron2.model_zoo") / ',
    ),
    Edit(
        "Python 3.11 no longer samples from a set",
        "detectron2/data/common.py",
        "sample(self._fallback_candidates, k=1)",
        "sample(list(self._fallback_candidates), k=1)",
    ),
    Edit(
        "torch 2.0 renamed the base class; under the old name torch's own schedules are not saved",
        "detectron2/engine/hooks.py",
        "lr_scheduler._LRScheduler)",
        "lr_scheduler.LRScheduler)",
        2,
    ),
    Edit(
        "torch 2 has no Caffe2",
        "detectron2/export/__init__.py",
        "from .api import *\n",
        "",
    ),
    Edit(
        "torch warns that the default of meshgrid will change",
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
    *(
        Edit(
            _NO_EXT,
            f"detectron2/layers/{name}.py",
            "from detectron2 import _C\n",
            "from detectron2._no_ext import _C\n",
        )
        for name in ("deform_conv", "roi_align_rotated", "rotated_boxes")
    ),
    Edit(
        _NO_EXT,
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "\nCOCOeval_opt = COCOeval\n\n",
    ),
]

NOTICE = "# Modified by d2kd's build of Detectron2: CHANGES.md in the wheel's licenses tells how\n"


def apply_edits(tree: Path, edits: List[Edit]) -> None:
    """Edit the files under `tree` and mark each edited one, as section 4(b) of the licence asks."""
    for edit in edits:
        path = tree / edit.file
        text = path.read_text(encoding="utf-8")
        found = text.count(edit.old)
        if found != edit.count:
            raise BuildError(f"{edit.file}: expected {edit.old!r} {edit.count} x, found {found} x")
        text = text.replace(edit.old, edit.new)
        path.write_text(text if text.startswith(NOTICE) else NOTICE + text, encoding="utf-8")


def describe(edits: List[Edit], requirement: str) -> str:
    """Return the text of CHANGES.md: every difference from upstream's v0.5."""
    head = (
        f"# Changes from Detectron2 v0.5\n\nBuilt from the sdist of {requirement}. Left out: the "
        "compiled extension. Added:\n`detectron2/_no_ext.py`, which names a missing operator when "
        "one is used. Edited, each file marked in its first line:\n\n"
    )
    return head + "".join(
        f"- {e.file}: {e.reason}. `{e.old!r}` became `{e.new!r}` ({e.count} x)\n" for e in edits
    )

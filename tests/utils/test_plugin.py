"""The README's head in one file works as it is printed there."""

import re
from pathlib import Path

import pytest

from detectron2.config.defaults import _C
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd import DISTILL_HEAD_REGISTRY, load_config
from d2kd.utils.plugin import import_file
from tests.helpers.toys import ROOT, batch, distill_config, write_teacher


@pytest.fixture
def my_head(tmp_path: Path):
    """The README's example as a file; what it registers is gone after the test."""
    readme = (Path(ROOT) / "README.md").read_text()
    code = re.search(r"```python\n(# my_head\.py\n.*?)```", readme, re.DOTALL).group(1)
    path = tmp_path / "my_head.py"
    path.write_text(code)
    yield path
    DISTILL_HEAD_REGISTRY._obj_map.pop("CosineHead", None)


def test_head_of_the_readme_distils(my_head: Path, tmp_path: Path) -> None:
    import_file(str(my_head))
    cfg = distill_config("retinanet", write_teacher(tmp_path, "faster_rcnn"), ["Cosine"])
    assert cfg.DISTILL.Cosine.SCHEDULE.STOP_ITER == -1
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch())
    # Four common levels (P3 to P6), each 1 - cosine, which is in [0, 2].
    assert 0 < losses["loss_cosine"] < 8
    losses["loss_cosine"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.parameters())


def test_importing_twice_registers_once(my_head: Path) -> None:
    import_file(str(my_head))
    import_file(str(my_head))
    assert "CosineHead" in DISTILL_HEAD_REGISTRY


def test_keys_of_a_detector_are_those_that_its_file_adds_to_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "my_detector.py").write_text(
        "from detectron2.config import CfgNode\n"
        "import detectron2.config.defaults\n"
        "detectron2.config.defaults._C.MODEL.MINE = CfgNode({'NUM_CLASSES': 80})\n"
    )
    opts = ["MODEL.MINE.NUM_CLASSES", "4"]
    with pytest.raises(ValueError, match="unknown keys"):
        load_config(opts=opts)
    import_file(str(tmp_path / "my_detector.py"))
    try:
        assert load_config(opts=opts).MODEL.MINE.NUM_CLASSES == 4
    finally:
        del _C.MODEL["MINE"]


def test_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="--plugin: there is no file .*nowhere.py"):
        import_file("nowhere.py")


def test_broken_file_may_be_mended_and_imported_again(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('not yet')")
    with pytest.raises(RuntimeError, match="not yet"):
        import_file(str(path))
    path.write_text("import torch\nassert torch.ones(1)")
    import_file(str(path))

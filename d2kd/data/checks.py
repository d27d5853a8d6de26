"""Check what Detectron2 checks late or never: data set files, proposals, evaluators."""

import importlib.util
import os

from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.utils.file_io import PathManager

from ..weights.safe_load import read_arrays

# Field of a data set's metadata -> what its path is
PATHS = {
    "json_file": "annotation file",
    "image_root": "image folder",
    "dirname": "folder",
}
# Keys of a proposal file; the second spelling is Detectron1's
PROPOSAL_KEYS = (("ids", "indexes"), ("boxes",), ("objectness_logits", "scores"))
EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")


def check_files(metadata: Metadata, key: str) -> None:
    """
    Args:
        metadata: of a registered set; only the paths that it has are checked
        key: the config key to blame
    """
    for field, what in PATHS.items():
        path = metadata.get(field)
        is_one = PathManager.isfile if field == "json_file" else PathManager.isdir
        if path and not is_one(path):
            problem = f"is no {what.split()[-1]}" if PathManager.exists(path) else "is missing"
            raise FileNotFoundError(
                f"{key}: the {what} of {metadata.name} {problem}: {os.path.abspath(path)}. "
                + _where_paths_start(key)
            )


def _where_paths_start(key: str) -> str:
    if key.startswith("DATASETS.COCO_FORMAT"):
        return "Its paths start at the folder you start in, not at that of the YAML."
    return "The paths of Detectron2's own sets start at $DETECTRON2_DATASETS or ./datasets."


def check_evaluator(metadata: Metadata) -> None:
    """
    Raises:
        ValueError: d2kd cannot evaluate this test set
    """
    kind = metadata.get("evaluator_type")
    if kind not in EVALUATOR_TYPES:
        raise ValueError(
            f"DATASETS.TEST: {metadata.name!r} has the evaluator type {kind!r}; d2kd evaluates "
            "'coco', 'lvis' and 'pascal_voc' sets."
        )
    if kind == "lvis" and importlib.util.find_spec("lvis") is None:
        raise ValueError(
            f"DATASETS.TEST: {metadata.name!r} is evaluated by the package lvis, which is not "
            "installed: pip install lvis."
        )


def check_proposals(cfg: CfgNode, part: str) -> None:
    """
    Read the files of MODEL.LOAD_PROPOSALS safely, before Detectron2 unpickles them and runs any
    code in them.

    Args:
        part: "TRAIN" or "TEST"
    """
    key = f"PROPOSAL_FILES_{part}"
    for path in cfg.DATASETS[key] if cfg.MODEL.LOAD_PROPOSALS else ():
        try:
            with PathManager.open(path, "rb") as file:
                content = read_arrays(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"DATASETS.{key}: there is no file {path!r}.") from None
        except Exception as error:  # whatever the bytes look like to the reader
            raise ValueError(f"DATASETS.{key}: {path!r} is not a proposal file: {error}") from error
        for names in PROPOSAL_KEYS:
            if not isinstance(content, dict) or not set(names) & set(content):
                raise ValueError(
                    f"DATASETS.{key}: {path!r} is not a proposal file: it has no {names[0]!r}"
                )

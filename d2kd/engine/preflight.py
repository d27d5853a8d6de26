"""Everything that can be found wrong with a config before a model is built."""

import torch

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

from ..heads import head_class
from ..inherit import PARTS
from ..schedule import WeightSchedule
from ..teacher import resolve_teacher
from ..weights_file import read_arrays
from .stages import plan_stages


def check_config(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError, FileNotFoundError: naming the key, its value and what would be right
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but PyTorch sees no GPU. Leave the key out to "
            "take a GPU where there is one, or set it to cpu."
        )
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ValueError(
            "SOLVER.AMP.ENABLED is True, which Detectron2 has for GPUs only; MODEL.DEVICE is "
            f"{cfg.MODEL.DEVICE!r}. Set it to False."
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        _check_proposals(cfg)
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        _check_meta_architecture("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)
        return
    _check_meta_architecture(
        "DISTILL.STUDENT_META_ARCHITECTURE", cfg.DISTILL.STUDENT_META_ARCHITECTURE
    )
    if cfg.DISTILL.ENABLED:
        for stage in plan_stages(cfg):
            with stage.in_errors():
                _check_distillation(stage.cfg)


def _check_proposals(cfg: CfgNode) -> None:
    """Detectron2 unpickles these files, and runs what is in them."""
    for part in ("TRAIN", "TEST"):
        key = f"DATASETS.PROPOSAL_FILES_{part}"
        for path in cfg.DATASETS[key.split(".")[1]]:
            try:
                with PathManager.open(path, "rb") as file:
                    read_arrays(file)
            except FileNotFoundError:
                raise FileNotFoundError(f"{key}: there is no file {path!r}.") from None
            except Exception as error:  # whatever the bytes look like to the reader
                raise ValueError(f"{key}: {path!r} holds no proposals: {error}") from error


def _check_meta_architecture(key: str, name: str) -> None:
    known = sorted(k for k, _ in META_ARCH_REGISTRY if k != "Distiller")
    if name not in known:
        raise ValueError(f"{key} is {name!r}; registered are {', '.join(known)}.")


def _check_distillation(cfg: CfgNode) -> None:
    if not cfg.DISTILL.HEADS:
        raise ValueError(
            "DISTILL.HEADS is empty: nothing would be distilled. Name a head, or set "
            "DISTILL.ENABLED False to train the student alone."
        )
    if len(set(map(str, cfg.DISTILL.HEADS))) < len(cfg.DISTILL.HEADS):
        raise ValueError(f"DISTILL.HEADS names a head twice: {list(cfg.DISTILL.HEADS)}.")
    for name in cfg.DISTILL.HEADS:
        head_class(name)
        WeightSchedule.from_config(name, cfg)
    for part in cfg.DISTILL.INHERIT:
        if part not in PARTS:
            raise ValueError(f"DISTILL.INHERIT has {part!r}; it may list {', '.join(PARTS)}.")
    resolve_teacher(cfg)

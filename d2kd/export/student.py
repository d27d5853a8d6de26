"""Write the student alone: what a machine with stock Detectron2 needs, and nothing else."""

import os
from typing import Any, Dict, List

import torch
import yaml
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from ..checkpoint import load_whole_detector
from ..config import student_config
from ..whole_files import last_whole_checkpoint, write_whole

WEIGHTS, CONFIG = "student.pth", "student.yaml"


def export_student(cfg: CfgNode, weights: str, folder: str) -> nn.Module:
    """
    Write the student's weights and its stock YAML.

    Args:
        cfg: of a distillation run, or of a plain detector
        weights: any checkpoint of the run, also one from the middle of it
        folder: receives student.pth and student.yaml

    Returns:
        the student, in eval mode, on the CPU

    Raises:
        ValueError: a checkpoint that is none or does not cover the student, or a student that
            Detectron2 cannot build from YAML
    """
    cfg = student_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    values = stock_config(cfg)
    student = build_model(cfg).eval()
    load_whole_detector(student, weights, "--weights")
    os.makedirs(folder, exist_ok=True)
    with write_whole(os.path.join(folder, WEIGHTS)) as file:
        torch.save({"model": student.state_dict()}, file)
    with write_whole(os.path.join(folder, CONFIG), "w") as file:
        yaml.safe_dump({**values, "VERSION": 2}, file, sort_keys=False)
    return student


def stock_config(cfg: CfgNode) -> Dict[str, Any]:
    """
    What a student's config says beyond Detectron2's defaults, without d2kd's keys.

    Raises:
        ValueError: the detector is one that Detectron2 itself cannot build from YAML
    """
    _check_stock(cfg)
    values = _differences(cfg, get_cfg())
    values.setdefault("MODEL", {})["WEIGHTS"] = WEIGHTS
    values["MODEL"].pop("DEVICE", None)  # where it is to run is for its user to say
    for key in ("OUTPUT_DIR", "SEED", "DATASETS", "DATALOADER", "SOLVER", "VIS_PERIOD"):
        values.pop(key, None)  # of how it was trained
    return values


def _check_stock(cfg: CfgNode) -> None:
    names = {
        "MODEL.META_ARCHITECTURE": cfg.MODEL.META_ARCHITECTURE,
        "MODEL.BACKBONE.NAME": cfg.MODEL.BACKBONE.NAME,
    }
    ours = [f"{k}: {v}" for k, v in names.items() if not _is_stock(v)]
    if ours:
        raise ValueError(
            f"{', '.join(ours)}: Detectron2 builds this from LazyConfig only, so there is no stock "
            "YAML of the student. Its checkpoint is plain, and --formats torchscript alone runs "
            "without d2kd."
        )


def _is_stock(name: str) -> bool:
    from detectron2.modeling import BACKBONE_REGISTRY

    registry = META_ARCH_REGISTRY if name in META_ARCH_REGISTRY else BACKBONE_REGISTRY
    return registry.get(name).__module__.startswith("detectron2.")


def _differences(cfg: CfgNode, defaults: CfgNode) -> Dict[str, Any]:
    """Keys that `defaults` has too, with other values."""
    found: Dict[str, Any] = {}
    for key, default in defaults.items():
        value = cfg.get(key)
        if isinstance(default, CfgNode):
            inner = _differences(value, default)
            if inner:
                found[key] = inner
        elif value != default:
            found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """YAML without Python's own types: tuples as lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value


def find_weights(cfg: CfgNode) -> str:
    """
    The last checkpoint in OUTPUT_DIR.

    Raises:
        ValueError: there is none
    """
    path = last_whole_checkpoint(cfg.OUTPUT_DIR)
    if not path:
        raise ValueError(
            f"There is no checkpoint in {cfg.OUTPUT_DIR!r} (OUTPUT_DIR): name one with --weights."
        )
    return path


def fixed_images(cfg: CfgNode, count: int = 2) -> List[Dict[str, Any]]:
    """Detectron2's inference input: images of smooth noise, the same each time, at test size."""
    height = cfg.INPUT.MIN_SIZE_TEST or 320
    generator, inputs = torch.Generator().manual_seed(0), []
    for i in range(count):
        width = height + 32 * i
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        fine = torch.rand(1, 3, height, width, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        image = (255 * (0.7 * smooth + 0.3 * fine))[0].round()
        inputs.append({"image": image, "height": height, "width": width})
    return inputs

"""Write the student alone, as weights and YAML for stock Detectron2."""

import os
from typing import Any, Dict, List

import torch
import yaml
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances

from ..checkpoint import load_whole_detector
from ..config import student_config
from ..utils.atomic_file import atomic_write
from ..weights.run_checkpoints import last_whole_checkpoint

WEIGHTS, CONFIG = "student.pth", "student.yaml"


# Set to 0 for verification, so that there are detections to compare even on noise images.
SCORE_KEYS = ("MODEL.RETINANET.SCORE_THRESH_TEST", "MODEL.ROI_HEADS.SCORE_THRESH_TEST")


def export_student(cfg: CfgNode, weights: str, folder: str) -> None:
    """
    Write the student's weights and, if there is one, its stock YAML.

    Args:
        cfg: config of a distillation run or of a plain detector
        weights: any checkpoint of the run, including intermediate ones
        folder: output folder for student.pth and student.yaml

    Raises:
        ValueError: not a checkpoint, or it does not cover the student
    """
    student = load_student(cfg, weights)
    os.makedirs(folder, exist_ok=True)
    with atomic_write(os.path.join(folder, WEIGHTS)) as file:
        torch.save({"model": student.state_dict()}, file)
    if not why_no_yaml(cfg):
        with atomic_write(os.path.join(folder, CONFIG), "w") as file:
            yaml.safe_dump({**stock_config(cfg), "VERSION": 2}, file, sort_keys=False)


def load_student(cfg: CfgNode, weights: str, any_score: bool = False) -> nn.Module:
    """
    The student of a checkpoint, in eval mode, on the CPU.

    Args:
        any_score: set its score threshold to 0
    """
    cfg = student_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    if any_score:
        ours = ("MODEL.FCOS.SCORE_THRESH_TEST", "MODEL.REPPOINTS.SCORE_THRESH_TEST")
        keys = [*SCORE_KEYS, *ours]
        cfg.merge_from_list([x for key in keys for x in (key, 0.0)])
    student = build_model(cfg).eval()
    load_whole_detector(student, weights, "--weights", cfg)
    return student


def why_no_yaml(cfg: CfgNode) -> str:
    """Why stock Detectron2 cannot build the student from YAML; "" if it can."""
    cfg = student_config(cfg)
    names = {
        "MODEL.META_ARCHITECTURE": (META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE),
        "MODEL.BACKBONE.NAME": (BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME),
    }
    ours = {k: r.get(v).__module__ for k, (r, v) in names.items()}
    ours = {k: v for k, v in ours.items() if not v.startswith("detectron2.")}
    if not ours:
        return ""
    listed = ", ".join(f"{k} {names[k][1]}" for k in ours)
    if all(v.startswith("d2kd.") for v in ours.values()):
        return f"{listed}: Detectron2 builds this from LazyConfig only, or not at all"
    return f"{listed}: built by your plug-in, not by Detectron2"


def stock_config(cfg: CfgNode) -> Dict[str, Any]:
    """The student's values that differ from Detectron2's defaults, without d2kd's keys."""
    values = _differences(student_config(cfg), get_cfg())
    values.setdefault("MODEL", {})["WEIGHTS"] = WEIGHTS
    values["MODEL"].pop("DEVICE", None)  # chosen by whoever runs it
    for key in ("OUTPUT_DIR", "SEED", "DATASETS", "DATALOADER", "SOLVER", "VIS_PERIOD"):
        values.pop(key, None)  # only for training
    return values


def _differences(cfg: CfgNode, defaults: CfgNode) -> Dict[str, Any]:
    """Keys of `defaults` whose values differ in `cfg`."""
    found: Dict[str, Any] = {}
    for key, default in defaults.items():
        value = cfg.get(key)
        if isinstance(default, CfgNode):
            inner = _differences(value, default)
            if inner:
                found[key] = inner
        elif value != default:
            found[key] = plain(value)
    return found


def plain(value: Any) -> Any:
    """A value for plain YAML: tuples become lists."""
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
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
            f"There is no checkpoint in {cfg.OUTPUT_DIR!r} (OUTPUT_DIR): give one with --weights."
        )
    return path


def fixed_images(cfg: CfgNode) -> List[Dict[str, Any]]:
    """
    Detectron2's inference input: two fixed images of smooth noise at test size, and boxes in them
    as proposals, where MODEL.LOAD_PROPOSALS wants some.
    """
    height = cfg.INPUT.MIN_SIZE_TEST or 320
    generator, inputs = torch.Generator().manual_seed(0), []
    for width in (height, height + 32):
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        fine = torch.rand(1, 3, height, width, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        image = (255 * (0.7 * smooth + 0.3 * fine))[0].round()
        inputs.append({"image": image, "height": height, "width": width})
        if cfg.MODEL.LOAD_PROPOSALS:
            corner = torch.rand(50, 2, generator=generator) * torch.tensor([width, height]) / 2
            size = (0.1 + 0.4 * torch.rand(50, 2, generator=generator)) * height
            inputs[-1]["proposals"] = Instances(
                (height, width),
                proposal_boxes=Boxes(torch.cat([corner, corner + size], dim=1)),
                objectness_logits=torch.zeros(50),
            )
    return inputs

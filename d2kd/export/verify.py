"""Verify in a process without d2kd that an exported student equals the run's student."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List

import torch
from torch import nn

from detectron2.config import CfgNode

from ..config import student_config
from .student import SCORE_KEYS, WEIGHTS, fixed_images, load_student, plain


def verify(cfg: CfgNode, weights: str, folder: str) -> Dict[str, Any]:
    """
    Build and load the export in a fresh process and compare it bitwise with the run's student.

    Args:
        cfg: config of the run
        weights: the exported checkpoint
        folder: folder of the export

    Returns:
        "verified": whether all checks passed; "missing_keys", "unexpected_keys": of the weights;
        "different_weights", "different_config", "different_outputs": weights, config keys and
        detection fields that are not equal to the bit; "imported_d2kd": imported modules of d2kd;
        "detections": number of compared detections; "error": of the fresh process, or ""
    """
    inputs = fixed_images(cfg)
    found = _in_fresh_process(folder, inputs)
    if isinstance(found, str):
        return {"verified": False, "error": found}
    student = load_student(cfg, weights, any_score=True)
    expected = detect(student, inputs)
    count = sum(len(x["scores"]) for x in expected)
    trained = student.state_dict()
    report = {
        "missing_keys": found["keys"]["missing"],
        "unexpected_keys": found["keys"]["unexpected"],
        "different_weights": [
            k for k, v in found["loaded"].items() if k in trained and not v.equal(trained[k])
        ],
        "different_config": _other_values(found["config"], student_config(cfg)),
        "different_outputs": different_fields(found["outputs"], expected),
        "imported_d2kd": found["imported"],
    }
    verified = not any(report.values()) and count > 0
    return {"verified": verified, **report, "detections": count, "error": ""}


def _in_fresh_process(folder: str, inputs: List[Dict[str, Any]]) -> Any:
    """The result of fresh_process.py; its error output, a string, if it failed."""
    with TemporaryDirectory() as scratch:
        images, result = os.path.join(scratch, "images.pth"), os.path.join(scratch, "result.pth")
        given = {"inputs": inputs, "score_keys": SCORE_KEYS, "threads": torch.get_num_threads()}
        torch.save(given, images)
        script = Path(__file__).with_name("fresh_process.py")
        words = [sys.executable, str(script), os.path.abspath(folder), images, result]
        process = subprocess.run(words, capture_output=True, text=True)
        if process.returncode:
            return process.stderr[-2000:]
        return torch.load(result, weights_only=True)


def detect(student: nn.Module, inputs: List[Dict[str, Any]]) -> List[Dict[str, torch.Tensor]]:
    """Fields of the detections in each image."""
    with torch.no_grad():
        instances = [x["instances"] for x in student(inputs)]
    return [{k: getattr(v, "tensor", v) for k, v in x.get_fields().items()} for x in instances]


def different_fields(
    found: List[Dict[str, torch.Tensor]], expected: List[Dict[str, torch.Tensor]]
) -> List[str]:
    names = []
    for i, (ours, theirs) in enumerate(zip(expected, found)):
        for key in sorted({*ours, *theirs}):
            if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key]):
                names.append(f"image {i}: {key}")
    return names


def _other_values(found: Dict[str, Any], expected: Dict[str, Any], prefix: str = "") -> List[str]:
    """Keys of the stock config whose values are not those of the run."""
    names = []
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            names += _other_values(value, expected[key], f"{name}.")
        elif name == "MODEL.WEIGHTS":
            names += [name] if value != WEIGHTS else []  # else the wrong file was compared
        elif value != plain(expected[key]) and name != "MODEL.DEVICE":
            names.append(name)
    return names

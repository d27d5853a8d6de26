"""Prove that an exported student is the student, in a process that has no d2kd."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..checkpoint import load_whole_detector
from ..config import student_config
from .student import fixed_images

# Detections of any score, so that there is something to compare on images of noise.
ALL_SCORES = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]


def verify(cfg: CfgNode, weights: str, folder: str) -> Dict[str, Any]:
    """
    Build and load the export in a fresh process and compare it with the run's student, exactly.

    Args:
        cfg: of the run
        weights: the checkpoint that was exported
        folder: of the export

    Returns:
        "verified": nothing is wrong; "missing_keys", "unexpected_keys": of the export;
        "different_weights", "different_outputs": entries, and fields of detections, that are not
        equal to the bit; "imported_d2kd": modules that were; "detections": how many were compared;
        "error": of the fresh process, "" without
    """
    inputs = fixed_images(cfg)
    with TemporaryDirectory() as scratch:
        images, result = os.path.join(scratch, "images.pth"), os.path.join(scratch, "result.pth")
        threads = torch.get_num_threads()
        torch.save({"inputs": inputs, "opts": ALL_SCORES, "threads": threads}, images)
        script = Path(__file__).with_name("fresh_process.py")
        words = [sys.executable, str(script), os.path.abspath(folder), images, result]
        process = subprocess.run(words, capture_output=True, text=True, cwd=scratch)
        if process.returncode:
            return {"verified": False, "error": process.stderr[-2000:]}
        found = torch.load(result, weights_only=True)
    student = _student_at_any_score(cfg, weights)
    expected = _detect(student, inputs)
    exported, trained = found["loaded"], student.state_dict()
    report = {
        "missing_keys": found["keys"]["missing"],
        "unexpected_keys": found["keys"]["unexpected"],
        "different_weights": [
            k for k, v in exported.items() if k in trained and not torch.equal(v, trained[k])
        ],
        "different_outputs": _different(found["outputs"], expected),
        "imported_d2kd": found["imported"],
    }
    return {
        "verified": not any(report.values()),
        **report,
        "detections": sum(len(x["scores"]) for x in expected),
        "error": "",
    }


def _student_at_any_score(cfg: CfgNode, weights: str) -> nn.Module:
    cfg = student_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *ALL_SCORES])
    student = build_model(cfg).eval()
    load_whole_detector(student, weights, "--weights")
    return student


def _detect(student: nn.Module, inputs: List[Dict[str, Any]]) -> List[Dict[str, torch.Tensor]]:
    """Fields of the detections in each image."""
    with torch.no_grad():
        instances = [x["instances"] for x in student(inputs)]
    return [{k: getattr(v, "tensor", v) for k, v in x.get_fields().items()} for x in instances]


def _different(
    found: List[Dict[str, torch.Tensor]], expected: List[Dict[str, torch.Tensor]]
) -> List[str]:
    names = []
    for i, (ours, theirs) in enumerate(zip(expected, found)):
        for key in sorted({*ours, *theirs}):
            if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key]):
                names.append(f"image {i}: {key}")
    return names

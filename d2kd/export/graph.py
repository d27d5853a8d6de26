"""TorchScript and ONNX of a student, through Detectron2's own exporters."""

import os
from typing import Any, Dict, List

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode

from .student import fixed_images, load_student

FORMATS = ("torchscript", "onnx")


def export_graph(cfg: CfgNode, weights: str, name: str, folder: str) -> Dict[str, Any]:
    """
    Trace a student on one image: image (3, H, W) in INPUT.FORMAT -> what Detectron2's
    TracingAdapter makes of its detections, boxes in pixels of that image.

    Args:
        cfg: of the run
        weights: the checkpoint to export
        name: one of FORMATS
        folder: receives student.ts or student.onnx

    Returns:
        "file"; of TorchScript also "verified" and "detections": a trace of the student that detects
        at any score gives the student's detections, so many, on another image than the traced one
        too. "error" where the export failed
    """
    try:
        from detectron2.export import TracingAdapter
    except ImportError:
        return {"error": "the installed Detectron2 has no TracingAdapter"}
    images = [x["image"] for x in fixed_images(cfg)]

    def adapter(any_score: bool) -> nn.Module:
        student = load_student(cfg, weights, any_score)
        return TracingAdapter(student, [{"image": images[0]}], _detect)

    try:
        with torch.no_grad():
            if name == "onnx":
                return _to_onnx(adapter(False), images[0], folder)
            return {
                **_to_torchscript(adapter(False), images[0], folder),
                **_compare(adapter(True), images),
            }
    except Exception as error:  # whatever the installed torch and its exporters say
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _detect(student: nn.Module, inputs: List[Dict[str, Tensor]]) -> List[Dict[str, Any]]:
    """Detections in pixels of what was given: nothing is known of an image before its resizing."""
    if hasattr(student, "roi_heads"):
        return [{"instances": x} for x in student.inference(inputs, do_postprocess=False)]
    return student(inputs)


def _to_torchscript(adapter: nn.Module, image: Tensor, folder: str) -> Dict[str, Any]:
    path = os.path.join(folder, "student.ts")
    torch.jit.save(torch.jit.trace(adapter, (image,)), path)
    torch.jit.load(path)
    return {"file": path}


def _compare(adapter: nn.Module, images: List[Tensor]) -> Dict[str, Any]:
    traced, same, count = torch.jit.trace(adapter, (images[0],)), True, 0
    for image in images:
        found, expected = traced(image), adapter(image)
        same = same and all(torch.equal(a, b) for a, b in zip(found, expected))
        count += len(expected[0])
    return {"verified": same and count > 0, "detections": count}


def _to_onnx(adapter: nn.Module, image: Tensor, folder: str) -> Dict[str, Any]:
    path = os.path.join(folder, "student.onnx")
    torch.onnx.export(adapter, (image,), path, opset_version=16)
    return {"file": path}

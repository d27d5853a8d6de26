"""TorchScript and ONNX of a student, through Detectron2's own exporters."""

import os
from typing import Any, Dict, List

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode

from .student import fixed_images

FORMATS = ("torchscript", "onnx")


def export_graph(student: nn.Module, cfg: CfgNode, name: str, folder: str) -> Dict[str, Any]:
    """
    Trace a student on one image: image (3, H, W) in INPUT.FORMAT -> boxes, classes, scores and the
    image's size, flattened as Detectron2's TracingAdapter does.

    Args:
        student: in eval mode, on the CPU
        cfg: of the run
        name: one of FORMATS
        folder: receives student.ts or student.onnx

    Returns:
        "file", and of TorchScript "verified": on another image than the traced one it detects what
        the student does; "error" where the export failed
    """
    try:
        from detectron2.export import TracingAdapter
    except ImportError:
        return {"error": "the installed Detectron2 has no TracingAdapter"}
    inputs = [{"image": x["image"]} for x in fixed_images(cfg)]

    with torch.no_grad():
        adapter = TracingAdapter(student, inputs[:1], _detect)
        try:
            export = _to_torchscript if name == "torchscript" else _to_onnx
            return export(adapter, [x["image"] for x in inputs], folder)
        except Exception as error:  # whatever the installed torch and its exporters say
            return {"error": f"{type(error).__name__}: {error}"[:500]}


def _detect(student: nn.Module, inputs: List[Dict[str, Tensor]]) -> List[Dict[str, Any]]:
    """Detections in pixels of what was given: nothing is known of an image before its resizing."""
    if hasattr(student, "roi_heads"):
        return [{"instances": x} for x in student.inference(inputs, do_postprocess=False)]
    return student(inputs)


def _to_torchscript(adapter: nn.Module, images: List[Tensor], folder: str) -> Dict[str, Any]:
    traced, path = torch.jit.trace(adapter, (images[0],)), os.path.join(folder, "student.ts")
    torch.jit.save(traced, path)
    again = torch.jit.load(path)
    same = [
        all(torch.equal(a, b) for a, b in zip(again(image), adapter(image))) for image in images
    ]
    return {"file": path, "verified": all(same)}


def _to_onnx(adapter: nn.Module, images: List[Tensor], folder: str) -> Dict[str, Any]:
    path = os.path.join(folder, "student.onnx")
    torch.onnx.export(adapter, (images[0],), path, opset_version=16)
    return {"file": path}

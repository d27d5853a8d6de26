"""TorchScript and ONNX of a student, through Detectron2's own exporters."""

import inspect
import os
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.structures import Instances

from .student import fixed_images, load_student

FORMATS = ("torchscript", "onnx")

# Of two detections that are the same one: pixels of each coordinate, and score. ONNX's runtimes
# round otherwise than PyTorch.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.05, 1e-3
# And so a box at the edge of a threshold may be kept by one of them alone.
WANTED_SHARE = 0.95


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
        "file"; "verified": a graph of the student that detects at any score gives the student's
        detections, on another size of image than the traced one too: TorchScript to the bit, ONNX
        in onnxruntime all but a few, and these nearly; "detections", "equal": how many there were
        and were the same. "not_run" where there is no onnxruntime, "error" where the export failed
    """
    try:
        from detectron2.export import TracingAdapter
    except ImportError:
        return {"error": "the installed Detectron2 has no TracingAdapter"}
    images = [x["image"] for x in fixed_images(cfg)]

    def adapter(any_score: bool) -> nn.Module:
        student = load_student(cfg, weights, any_score)
        return TracingAdapter(student, [{"image": images[0]}], _detect).eval()

    export, compare = {
        "torchscript": (_to_torchscript, _compare_torchscript),
        "onnx": (_to_onnx, _compare_onnx),
    }[name]
    try:
        with torch.no_grad():
            path = export(adapter(any_score=False), images[0], folder)
            return {"file": path, **compare(adapter(any_score=True), images)}
    except Exception as error:  # whatever the installed torch and its exporters say
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _detect(student: nn.Module, inputs: List[Dict[str, Tensor]]) -> List[Dict[str, Any]]:
    """Detections in pixels of what was given: nothing is known of an image before its resizing."""
    if hasattr(student, "roi_heads"):
        return [{"instances": x} for x in student.inference(inputs, do_postprocess=False)]
    return student(inputs)


def _to_torchscript(adapter: nn.Module, image: Tensor, folder: str) -> str:
    path = os.path.join(folder, "student.ts")
    torch.jit.save(torch.jit.trace(adapter, (image,)), path)
    torch.jit.load(path)
    return path


def _to_onnx(adapter: nn.Module, image: Tensor, folder: str) -> str:
    path = os.path.join(folder, "student.onnx")
    # Detectron2's adapter is made for tracing; torch.export, the default of newer PyTorch, cannot
    # follow it.
    traced = (
        {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    )
    torch.onnx.export(
        adapter,
        (image,),
        path,
        opset_version=16,
        input_names=["image"],
        dynamic_axes={"image": {1: "height", 2: "width"}},
        **traced,
    )
    return path


def _compare_torchscript(adapter: nn.Module, images: Sequence[Tensor]) -> Dict[str, Any]:
    traced, total, equal = torch.jit.trace(adapter, (images[0],)), 0, 0
    for image in images:
        found, expected = traced(image), adapter(image)
        total += len(expected[0])
        equal += len(expected[0]) * all(torch.equal(a, b) for a, b in zip(found, expected))
    return {"verified": equal == total > 0, "detections": total, "equal": equal}


def _compare_onnx(adapter: nn.Module, images: Sequence[Tensor]) -> Dict[str, Any]:
    try:
        import onnxruntime
    except ImportError:
        return {"not_run": "onnxruntime is not installed"}
    with TemporaryDirectory() as scratch:
        path = _to_onnx(adapter, images[0], scratch)
        # A runtime that also knows GPUs wants to be told.
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    total, equal = 0, 0
    for image in images:
        expected = _instances(adapter, adapter(image))
        outputs = session.run(None, {"image": image.numpy()})
        found = _instances(adapter, [torch.from_numpy(x) for x in outputs])
        total += max(len(expected), len(found))
        equal += count_equal(found, expected)
    verified = total > 0 and equal >= WANTED_SHARE * total
    return {"verified": verified, "detections": total, "equal": equal}


def _instances(adapter: nn.Module, flattened: Sequence[Tensor]) -> Instances:
    return adapter.outputs_schema(tuple(flattened))[0]["instances"]


def count_equal(found: Instances, expected: Instances) -> int:
    """How many of the expected detections were found, in whatever order, within the tolerances."""
    if not (len(found) and len(expected)):
        return 0
    scaled = [
        torch.cat(
            [
                x.pred_boxes.tensor / BOX_TOLERANCE,
                x.scores[:, None] / SCORE_TOLERANCE,
                x.pred_classes[:, None] * 2.0,  # another class is beyond any tolerance
            ],
            dim=1,
        )
        for x in (expected, found)
    ]
    return int((torch.cdist(*scaled, p=float("inf")).amin(dim=1) <= 1).sum())

"""Export a student to TorchScript and ONNX with Detectron2's exporters."""

import inspect
import os
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Sequence

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import cascade_rcnn
from detectron2.structures import Instances

from ..modeling.deform_conv2d import as_traced
from .onnx_operators import opset_of
from .student import fixed_images, load_student

FORMATS = ("torchscript", "onnx")

# image (3, H, W) -> the tensors of its detections
Graph = Callable[[Tensor], Sequence[Tensor]]

# Tolerances within which two detections are equal: pixels per coordinate, score, and probabilities
# of its mask. ONNX runtimes round differently from PyTorch.
BOX_TOLERANCE, SCORE_TOLERANCE, MASK_TOLERANCE = 0.05, 1e-3, 0.01
TOLERANCES = {
    "scores": SCORE_TOLERANCE,
    "pred_classes": 0.5,  # another class is beyond any tolerance
    "pred_masks": MASK_TOLERANCE,
}
# Share of detections that must be equal: boxes near a threshold may be kept by only one of them.
WANTED_SHARE = 0.95


def export_graph(cfg: CfgNode, weights: str, name: str, folder: str) -> Dict[str, Any]:
    """
    Trace a student on one image: image (3, H, W) in INPUT.FORMAT -> its detections as flattened by
    Detectron2's TracingAdapter, boxes in pixels of that image. Verify the file on images of two
    sizes, together with a second graph without score threshold, because random images may have no
    detection above it.

    Args:
        cfg: config of the run
        weights: the checkpoint to export
        name: one of FORMATS
        folder: output folder for student.ts or student.onnx

    Returns:
        "file"; "verified": the graphs reproduce the student's detections, TorchScript to the bit,
        ONNX in onnxruntime within tolerances and except for a few; "detections", "equal": number of
        detections, and how many were equal. "error" if the export failed or the graph does not run
    """
    images = [x["image"] for x in fixed_images(cfg)]
    export, run, count, wanted, suffix = {
        "torchscript": (_to_torchscript, _torchscript, _count_same, 1.0, "ts"),
        "onnx": (_to_onnx, _onnx, _count_alike, WANTED_SHARE, "onnx"),
    }[name]
    path, total, equal = os.path.join(folder, f"student.{suffix}"), 0, 0
    try:
        from detectron2.export import TracingAdapter  # which may import packages for Caffe2

        with torch.no_grad(), as_traced(), TemporaryDirectory() as scratch:
            other = os.path.join(scratch, os.path.basename(path))
            for file, any_score in ((path, False), (other, True)):
                student = load_student(cfg, weights, any_score)
                adapter = TracingAdapter(student, [{"image": images[0]}], _detect).eval()
                export(adapter, images[0], file)
                graph = run(file)
                for image in images:
                    found, expected = graph(image), adapter(image)
                    found, expected = (_instances(adapter, x) for x in (found, expected))
                    total += max(len(found), len(expected))
                    equal += count(found, expected)
    except Exception as error:  # the exporters raise many types
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    verified = total > 0 and equal >= wanted * total
    return {"file": path, "verified": verified, "detections": total, "equal": equal}


def _detect(student: nn.Module, inputs: List[Dict[str, Tensor]]) -> List[Dict[str, Any]]:
    """Detections in pixels of the input: the graph does not know the size before resizing."""
    if hasattr(student, "roi_heads"):
        return [{"instances": x} for x in student.inference(inputs, do_postprocess=False)]
    return student(inputs)


def _to_torchscript(adapter: nn.Module, image: Tensor, path: str) -> None:
    with _without_scaled_gradients():
        torch.jit.save(torch.jit.trace(adapter, (image,)), path)


@contextmanager
def _without_scaled_gradients() -> Iterator[None]:
    """
    Detectron2 0.5 scales a cascade's gradients in eval mode too, by a Function that gives back its
    input and that TorchScript cannot save.
    """
    scale = cascade_rcnn._ScaleGradient
    cascade_rcnn._ScaleGradient = SimpleNamespace(apply=lambda x, factor: x)
    try:
        yield
    finally:
        cascade_rcnn._ScaleGradient = scale


def _to_onnx(adapter: nn.Module, image: Tensor, path: str) -> None:
    fields = _instances(adapter, adapter(image)).get_fields()  # "pred_boxes", ...
    # Detectron2's adapter needs tracing; torch.export, the default of newer PyTorch, does not
    # support it.
    traced = (
        {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    )
    torch.onnx.export(
        adapter,
        (image,),
        path,
        opset_version=opset_of(adapter),
        input_names=["image"],
        output_names=[*(x.replace("pred_", "") for x in fields), "image_size"],
        dynamic_axes={"image": {1: "height", 2: "width"}},
        **traced,
    )


def _torchscript(path: str) -> Graph:
    return torch.jit.load(path)


def _onnx(path: str) -> Graph:
    import onnxruntime

    # Builds with GPU support require explicit providers.
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]


def _instances(adapter: nn.Module, flattened: Sequence[Tensor]) -> Instances:
    return adapter.outputs_schema(tuple(flattened))[0]["instances"]


def _count_same(found: Instances, expected: Instances) -> int:
    """All detections if every field is equal to the bit and in the same order, else 0."""
    ours, theirs = (
        [getattr(v, "tensor", v) for v in x.get_fields().values()] for x in (found, expected)
    )
    return len(expected) * all(torch.equal(a, b) for a, b in zip(ours, theirs))


def _count_alike(found: Instances, expected: Instances) -> int:
    """Number of expected detections that were found, in any order, within the tolerances."""
    if not (len(found) and len(expected)):
        return 0
    alike = torch.ones(len(expected), len(found), dtype=torch.bool)
    for name, values in expected.get_fields().items():  # whatever a graph returns is compared
        ours, theirs = (
            getattr(x, "tensor", x).float().reshape(len(x), -1) for x in (values, found.get(name))
        )
        alike &= torch.cdist(ours, theirs, p=float("inf")) <= TOLERANCES.get(name, BOX_TOLERANCE)
    return int(alike.any(dim=1).sum())

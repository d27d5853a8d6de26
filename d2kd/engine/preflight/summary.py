"""Summary of what was built, logged before the first step."""

from dataclasses import asdict
from typing import Any, Dict, List

from tabulate import tabulate
from torch import nn

from detectron2.config import CfgNode

from ...distiller import Distiller
from ...pairing.levels import describe_plan
from ...pairing.pair import DistillPair
from ...teacher.square_pad import square_pad

MODULE_HEADERS = ("", "class", "parameters", "of which")


def summary(distiller: Distiller) -> str:
    """Modules with their sizes, which level learns from which, which class is which."""
    pair = distiller.pair
    plan = describe_plan(pair.levels, pair.student.shapes, pair.teacher.shapes)
    return (
        f"Distilling {pair.teacher.name} -> {pair.student.name}\n\n"
        f"{_modules(distiller)}\n\nLevels, student's <- teacher's:\n{plan}\n{_padding(distiller)}\n"
        f"Classes, student's <- teacher's:\n{pair.classes or _unnamed_classes(pair)}"
    )


def summary_facts(cfg: CfgNode, distiller: Distiller) -> Dict[str, Any]:
    """The same as plain values, and where the teacher is from, for the run's facts."""
    pair, node = distiller.pair, cfg.DISTILL
    return {
        "heads": list(node.HEADS),
        "config_file": node.TEACHER.CONFIG_FILE or node.TEACHER.BACKBONE,
        "weights": node.TEACHER.WEIGHTS,
        "weights_sha256": distiller.teacher.manifest["weights_sha256"],
        "modules": _module_rows(distiller),
        "levels": [asdict(x) for x in pair.levels],
        "classes": str(pair.classes or _unnamed_classes(pair)),
    }


def _padding(distiller: Distiller) -> str:
    side = square_pad(distiller.teacher.model)
    if not side:
        return ""
    return (
        f"  the teacher pads every image to {side} x {side}, which is what it costs however small\n"
        "  they are; its larger maps are cropped to the student's\n"
    )


def _unnamed_classes(pair: DistillPair) -> str:
    ours, theirs = pair.student.num_classes, pair.teacher.num_classes
    if not theirs:
        return "  the teacher has features and no classes"
    names = "  their names are not known of both"
    if ours == theirs:
        return f"{names}: class i is taken for class i"
    return f"{names}, and there are {ours} and {theirs}: logits cannot be compared"


def _modules(distiller: Distiller) -> str:
    aligned = ("left", "left", "right", "left")
    return tabulate(_module_rows(distiller), MODULE_HEADERS, colalign=aligned)


def _module_rows(distiller: Distiller) -> List[List[str]]:
    modules = {
        "student": (distiller.student, "the product"),
        "teacher": (distiller.teacher.model, "frozen, in no checkpoint"),
    }
    for name, head in distiller.heads.items():
        trained = {k: x for k, x in head.named_children() if any(True for _ in x.parameters())}
        parts = ", ".join(f"{k} {_size(x)}" for k, x in trained.items())
        modules[f"head {name}"] = head, parts or "nothing to train"
    return [[k, type(x).__name__, _size(x), note] for k, (x, note) in modules.items()]


def _size(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"

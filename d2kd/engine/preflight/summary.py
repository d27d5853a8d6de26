"""Summary of what was built, logged before the first step."""

from dataclasses import asdict
from typing import Any, Dict, List

from tabulate import tabulate
from torch import nn

from detectron2.config import CfgNode

from ...config.lessons import lesson_configs
from ...distiller import Distiller
from ...lesson import Lesson
from ...pairing.levels import describe_plan
from ...pairing.pair import DistillPair
from ...teacher.square_pad import square_pad

MODULE_HEADERS = ("", "class", "parameters", "of which")


def summary(distiller: Distiller) -> str:
    """Modules with their sizes, which level learns from which, which class is which."""
    teachers = ", ".join(x.pair.teacher.name for x in distiller.lessons)
    student = distiller.pair.student.name
    plans = "\n\n".join(map(_plan, distiller.lessons))
    return f"Distilling {teachers} -> {student}\n\n{_modules(distiller)}\n\n{plans}"


def summary_facts(cfg: CfgNode, distiller: Distiller) -> List[Dict[str, Any]]:
    """The same as plain values, and where each teacher is from, for the run's facts."""
    facts = []
    for lesson, own in zip(distiller.lessons, lesson_configs(cfg)):
        pair, node = lesson.pair, own.cfg.DISTILL
        facts.append(
            {
                "teacher": lesson.name,
                "heads": list(node.HEADS),
                "config_file": node.TEACHER.CONFIG_FILE or node.TEACHER.BACKBONE,
                "weights": node.TEACHER.WEIGHTS,
                "weights_sha256": lesson.teacher.manifest["weights_sha256"],
                "modules": _module_rows(distiller),
                "levels": [asdict(x) for x in pair.levels],
                "classes": str(pair.classes or _unnamed_classes(pair)),
            }
        )
    return facts


def _plan(lesson: Lesson) -> str:
    pair = lesson.pair
    levels = describe_plan(pair.levels, pair.student.shapes, pair.teacher.shapes)
    title = f"Teacher {lesson.name}\n" if lesson.name else ""
    return (
        f"{title}Levels, student's <- teacher's:\n{levels}\n{_padding(lesson)}\n"
        f"Classes, student's <- teacher's:\n{pair.classes or _unnamed_classes(pair)}"
    )


def _padding(lesson: Lesson) -> str:
    side = square_pad(lesson.teacher.model)
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
    modules = {"student": (distiller.student, "the product")}
    for lesson in distiller.lessons:
        key = f"teacher {lesson.name}".strip()
        modules[key] = lesson.teacher.model, "frozen, in no checkpoint"
    for name, head in distiller.heads.items():
        trained = {k: x for k, x in head.named_children() if any(True for _ in x.parameters())}
        parts = ", ".join(f"{k} {_size(x)}" for k, x in trained.items())
        modules[f"head {name}"] = head, parts or "nothing to train"
    return [[k, type(x).__name__, _size(x), note] for k, (x, note) in modules.items()]


def _size(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"

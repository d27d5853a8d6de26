"""Summary of what was built, logged before the first step."""

from tabulate import tabulate
from torch import nn

from ...distiller import Distiller
from ...pairing.levels import describe_plan
from ...pairing.pair import DistillPair


def summary(distiller: Distiller) -> str:
    """Modules with their sizes, which level learns from which, which class is which."""
    pair = distiller.pair
    plan = describe_plan(pair.levels, pair.student.shapes, pair.teacher.shapes)
    return (
        f"Distilling {pair.teacher.name} -> {pair.student.name}\n\n"
        f"{_modules(distiller)}\n\nLevels, student's <- teacher's:\n{plan}\n\n"
        f"Classes, student's <- teacher's:\n{pair.classes or _unnamed_classes(pair)}"
    )


def _unnamed_classes(pair: DistillPair) -> str:
    ours, theirs = pair.student.num_classes, pair.teacher.num_classes
    names = "  their names are not known of both"
    if ours == theirs:
        return f"{names}: class i is taken for class i"
    return f"{names}, and there are {ours} and {theirs}: logits cannot be compared"


def _modules(distiller: Distiller) -> str:
    modules = {
        "student": (distiller.student, "the product"),
        "teacher": (distiller.teacher.model, "frozen, in no checkpoint"),
    }
    for name, head in distiller.heads.items():
        trained = {k: x for k, x in head.named_children() if any(True for _ in x.parameters())}
        parts = ", ".join(f"{k} {_size(x)}" for k, x in trained.items())
        modules[f"head {name}"] = head, parts or "nothing to train"
    rows = [(k, type(x).__name__, _size(x), note) for k, (x, note) in modules.items()]
    aligned = ("left", "left", "right", "left")
    return tabulate(rows, ["", "class", "parameters", "of which"], colalign=aligned)


def _size(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"

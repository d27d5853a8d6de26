"""What a run with a teacher tells of it."""

from typing import Any, Dict, List, Tuple

from ..engine.monitor.loss_gradients import LossGradient, LossGradients, table
from ..engine.preflight.disagreement import HEADERS, MOST_CLASSES
from ..engine.preflight.summary import MODULE_HEADERS
from .blocks import Facts, Part, Picture, Section, Table, Text
from .charts import data_uri
from .panels import latest_panel
from .run import Run

ALONE = "Teacher: there is none, the student was trained alone."
NOT_BUILT = "Teacher, levels and classes: the run did not build its model, or is of an older d2kd."
SIDES = ("student", "teacher")
LEVEL_HEADERS = [x for side in SIDES for x in (f"{side}'s level", "stride", "channels")]


def teacher(run: Run) -> Part:
    if not run.distils:
        return ALONE
    checks = {x["weights_sha256"]: x for x in run.facts_of("teacher_ap")}
    blocks, lessons = [], run.lessons()
    for lesson in lessons:
        what, name = _whose(lesson)
        rows = [
            *([[what, f"{name}, heads {', '.join(lesson['heads'])}"]] if len(lessons) > 1 else []),
            ["config", lesson["config_file"]],
            ["weights", lesson["weights"] or "of the model zoo"],
            ["sha256", lesson["weights_sha256"] or "random weights"],
            ["AP", _teacher_ap(checks.get(lesson["weights_sha256"], {}))],
        ]
        blocks.append(Facts(rows))
        errors = checks.get(lesson["weights_sha256"], {}).get("by_class")
        if errors:
            caption = "Teacher and labels, at an IoU of 0.5, classes with most errors first."
            blocks.append(Table(HEADERS, errors[:MOST_CLASSES], [1, 2, 3, 4], caption))
    return Section("Teacher", blocks) if blocks else NOT_BUILT


def levels(run: Run) -> Part:
    if not run.distils:
        return ALONE
    blocks: List[Any] = []
    lessons = run.lessons()
    for lesson in lessons:
        if len(lessons) > 1:
            blocks.append(Facts([_whose(lesson)]))
        rows = [
            [x[f"{side}{what}"] for side in SIDES for what in ("", "_stride", "_channels")]
            for x in lesson["levels"]
        ]
        blocks += [
            Table(LEVEL_HEADERS, rows, numbers=[1, 2, 4, 5]),
            Text(f"Classes, student's <- teacher's:\n{lesson['classes']}"),
            Table(MODULE_HEADERS, lesson["modules"], numbers=[2]),
        ]
    return Section("What learns from what", blocks) if blocks else NOT_BUILT


def _whose(lesson: Dict[str, Any]) -> Tuple[str, Any]:
    """What tells a lesson from the others of its run: its teacher's name, or its stage."""
    what = "teacher" if lesson.get("teacher") else "stage"
    return what, lesson[what]


def gradients(run: Run) -> Part:
    if not run.distils:
        return ALONE
    facts = run.facts_of("gradients")
    if not facts:
        return "Gradients: no step was monitored yet, or DISTILL.LIVENESS.ENABLED is False."
    fact = facts[-1]
    found = {name: LossGradient(**x) for name, x in fact["losses"].items()}
    headers, *rows = table(LossGradients(found, fact["heads"]))
    caption = (
        f"In iteration {fact['iteration']}: the norm of each loss's gradient at the levels of the "
        "student's pyramid, its share of all losses', and the cosine with the student's own."
    )
    numbers = range(1, len(headers))
    return Section("Gradients", [Table(headers, rows, numbers, caption), Text(fact["hint"])])


def pictures(run: Run) -> Part:
    if not run.distils:
        return ALONE
    panel = latest_panel(run.folder)
    if panel is None:
        return f"Pictures: none was drawn yet (VIS_PERIOD {run.config['VIS_PERIOD']})."
    iteration, png = panel
    title = (
        f"An image of iteration {iteration}: where the teacher attends, what the heads mask, and "
        "how strongly both respond, level by level."
    )
    return Section("Pictures", [Picture(title, data_uri(png, "image/png"), wide=True)])


def _teacher_ap(check: Dict[str, Any]) -> str:
    if "ap" in check:
        masks = "" if check.get("mask_ap") is None else f", {check['mask_ap']:.1f} of masks,"
        return f"{check['ap']:.1f}{masks} {check['where']}"
    return f"not evaluated: {check.get('not_evaluated', 'not yet, or EVAL_IMAGES is 0')}"

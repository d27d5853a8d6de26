"""What a changed value of a key means for a resumed run."""

from fnmatch import fnmatchcase
from typing import NamedTuple, Tuple

from ..teacher import TeacherOptions

REFUSED = "refused"  # the run would be neither the old one nor a new one
TAKEN = "taken"  # this run's value counts from here on
UNUSED = "no effect"  # is read before the first step only, which is over
PASSED_OVER = "passed over"  # where things are and how they are fetched, not what is trained


class Rule(NamedTuple):
    """`patterns`: of keys, as in a shell; `why`: for the log and the error, may be empty."""

    patterns: Tuple[str, ...]
    action: str
    why: str


# The first rule that matches a key counts; the last one matches all.
RULES = (
    Rule(("VERSION", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS"), PASSED_OVER, ""),
    # Paths may be others on another machine. What is behind them is compared: the images of
    # DATASETS.TRAIN and without labels by their fingerprint, the teacher by its manifest.
    Rule(
        ("DATASETS.COCO_FORMAT", "DATASETS.SHAPES.ROOT", "DISTILL.UNLABELLED.SETS"), PASSED_OVER, ""
    ),
    Rule(
        tuple(f"DISTILL.TEACHER.{x}" for x in ("CONFIG_FILE", "BACKBONE*", "WEIGHTS", "OPTS")),
        PASSED_OVER,
        "",
    ),
    # Compared by what they build: the checkpoint's heads and the student's meta-architecture.
    Rule(("DISTILL.ENABLED", "DISTILL.HEADS", "*.STUDENT_META_ARCHITECTURE"), PASSED_OVER, ""),
    # Compared by what the checkpoint's optimizer remembers.
    Rule(("SOLVER.OPTIMIZER",), PASSED_OVER, ""),
    Rule(("MODEL.WEIGHTS", "DISTILL.INHERIT"), UNUSED, "the checkpoint has the weights"),
    Rule(
        ("*.TEACHER.EVAL_IMAGES", "*.TEACHER.MIN_AP", "*.TEACHER.ALLOW_*"),
        UNUSED,
        "read before the first step of a run or stage",
    ),
    Rule(("DATASETS.TEST", "DATASETS.*_TEST", "DATASETS.SHAPES.NUM_VAL"), TAKEN, ""),
    Rule(("MODEL.*_TEST",), TAKEN, ""),
    Rule(("MODEL.DEVICE",), TAKEN, "other devices round otherwise"),
    # Refused before the first step where more than rounding would change.
    Rule(
        tuple(f"*.TEACHER.{x.upper()}" for x in TeacherOptions._fields),
        TAKEN,
        "the same teacher, rounded otherwise",
    ),
    Rule(("DATASETS.PROPOSAL_FILES_TRAIN",), TAKEN, "not compared, so they must be the same"),
    # A changed seed or batch size could be taken, but a pass over the images would then have some
    # twice and others never, and no config would give the same run again.
    Rule(
        ("SEED", "SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE", "DATASETS.*")
        + ("DATALOADER.*", "DISTILL.UNLABELLED.SHARE"),
        REFUSED,
        "the images and random draws of each iteration follow from it",
    ),
    Rule(
        ("MODEL.*", "INPUT.FORMAT"),
        REFUSED,
        "the checkpoint's weights were trained as that detector",
    ),
    Rule(
        ("DISTILL.STAGES", "DISTILL.TEACHERS", "DISTILL.LEVELS", "DISTILL.TEACHER.*")
        + ("DISTILL.ADAPT_EQUAL_CHANNELS",),
        REFUSED,
        "student and heads have learnt with it so far",
    ),
    Rule(("SOLVER.*", "*WEIGHT", "*.SCHEDULE.*", "DISTILL.STAGE_LR"), TAKEN, ""),
    Rule(("DISTILL.LIVENESS.*", "DISTILL.REGIONS.*"), TAKEN, ""),
    Rule(("DISTILL.*",), REFUSED, "the head has learnt with it so far"),
    Rule(("*",), TAKEN, ""),
)


def rule_of(key: str) -> Rule:
    """Of a key by its dotted name."""
    return next(x for x in RULES if any(fnmatchcase(key, pattern) for pattern in x.patterns))

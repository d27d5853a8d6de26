"""DISTILL.TEACHERS: several teachers at once, each as the config of a run that has it alone."""

import re
from contextlib import contextmanager, nullcontext
from typing import Any, ContextManager, Dict, Iterator, List, NamedTuple, Sequence

from detectron2.config import CfgNode

from ..heads.registry import head_names
from .load import merge_mapping, merge_opts
from .unread import refuse_unread

# What belongs to one teacher and not to another, when an entry names another
OF_ONE_TEACHER = ("CONFIG_FILE", "BACKBONE", "WEIGHTS", "OPTS", "CLASSES", "ALIASES", "FOR_CLASSES")


class LessonConfig(NamedTuple):
    """
    `name`: of the teacher, "" of a run with one; `cfg`: the run's, with this teacher, its heads and
    their keys.
    """

    name: str
    cfg: CfgNode

    def in_errors(self) -> ContextManager[None]:
        """Prefix errors with the teacher, where the run has several."""
        return prefixed(f"DISTILL.TEACHERS, {self.name}") if self.name else nullcontext()


def lesson_configs(cfg: CfgNode) -> List[LessonConfig]:
    """
    Args:
        cfg: of a run or a stage that distils

    Raises:
        ValueError: an entry of DISTILL.TEACHERS that is not sound
    """
    entries = cfg.DISTILL.TEACHERS
    if not entries:
        return [LessonConfig("", cfg)]
    found = []
    for index, entry in enumerate(entries):
        with prefixed(f"DISTILL.TEACHERS[{index}]"):
            found.append(_lesson(cfg, entry, index))
    _check_distinct(found)
    return found


def read_entry(cfg: CfgNode, entry: Any, own: Dict[str, Any], is_first: bool) -> CfgNode:
    """
    An entry of DISTILL.TEACHERS or DISTILL.STAGES.

    Args:
        own: keys that only one of the two has, with their defaults
        is_first: its student has learnt nothing yet

    Returns:
        TEACHER, HEADS, INHERIT, OPTS and `own`: the entry's, or else the run's

    Raises:
        ValueError: a key that nobody reads, or a value of the wrong type
    """
    distill = cfg.DISTILL
    if not isinstance(entry, dict):
        raise ValueError(f"must be a mapping of {', '.join(own)} and other keys, got {entry!r}.")
    teacher, said = distill.TEACHER.clone(), entry.get("TEACHER")
    teacher.defrost()
    if isinstance(said, dict) and {"CONFIG_FILE", "BACKBONE"} & set(said):
        for key in OF_ONE_TEACHER:  # the run's would not fit it
            teacher[key] = type(teacher[key])()
    node = CfgNode(own)
    node.TEACHER, node.HEADS, node.OPTS = teacher, list(distill.HEADS), []
    # Of a student that has learnt already, or inherits already, that would be thrown away.
    node.INHERIT = list(distill.INHERIT) if is_first else []
    merge_mapping(node, entry, "The entry")
    return node


def with_entry(cfg: CfgNode, node: CfgNode) -> CfgNode:
    """
    A config with what an entry changes, but for its OPTS.

    Args:
        node: from :func:`read_entry`
    """
    changed = cfg.clone()
    changed.defrost()
    changed.DISTILL.TEACHERS, changed.DISTILL.STAGES = [], []
    changed.DISTILL.TEACHER.merge_from_other_cfg(node.TEACHER)
    changed.DISTILL.HEADS, changed.DISTILL.INHERIT = node.HEADS, node.INHERIT
    return changed


def is_of_heads(key: str) -> bool:
    """Whether a key says how heads compare student and teacher."""
    nodes = ("REGIONS", *head_names())
    of_levels = key in ("DISTILL.LEVELS", "DISTILL.ADAPT_EQUAL_CHANNELS")
    return of_levels or key.startswith(tuple(f"DISTILL.{x}." for x in nodes))


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Prefix ValueError and FileNotFoundError with where they come from."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{where}: {error}") from error


def _lesson(cfg: CfgNode, entry: Any, index: int) -> LessonConfig:
    node = read_entry(cfg, entry, {"NAME": f"teacher{index + 1}"}, is_first=index == 0)
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", node.NAME):
        raise ValueError(
            f"NAME is {node.NAME!r}; it becomes part of the names of losses, and must be a letter "
            "followed by letters, digits and _."
        )
    own = with_entry(cfg, node)
    merge_opts(own, node.OPTS, "OPTS")
    for key in map(str, node.OPTS[0::2]):
        if not is_of_heads(key):
            raise ValueError(
                f"OPTS has {key}. For one of several teachers it may change DISTILL.<HEAD>.*, "
                "DISTILL.REGIONS.*, DISTILL.LEVELS and DISTILL.ADAPT_EQUAL_CHANNELS; its own keys "
                "are under TEACHER."
            )
    refuse_unread(own, node.OPTS, "OPTS")
    return LessonConfig(node.NAME, own)


def _check_distinct(lessons: Sequence[LessonConfig]) -> None:
    names = [x.name.lower() for x in lessons]
    twice = [x for x in names if names.count(x) > 1]
    if twice:
        raise ValueError(f"DISTILL.TEACHERS has two entries with the NAME {twice[0]!r}.")
    heirs: Dict[str, str] = {}
    for name, cfg in lessons:
        for part in map(str, cfg.DISTILL.INHERIT):
            if part in heirs:
                raise ValueError(
                    f"DISTILL.TEACHERS: the student would inherit its {part} from both "
                    f"{heirs[part]} and {name}. Leave {part!r} in one INHERIT alone."
                )
            heirs[part] = name

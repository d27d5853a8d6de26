"""Read the explanations of config keys from the comments and docstrings in the code."""

import ast
import inspect
import re
import textwrap
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import detectron2.config.defaults

from ..data.data_keys import add_data_config
from ..data.unlabelled import add_unlabelled_config
from ..modeling.model_keys import add_model_config
from ..schedule import add_schedule_config
from ..views import RegionSampler
from .distill_keys import add_distill_config

# An entry of a Google-style docstring: names, a colon, and lines that are indented deeper.
ENTRY = re.compile(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def meanings() -> Dict[str, str]:
    """
    Comment of each key, and node of keys, of d2kd and Detectron2. Consecutive lines without their
    own comment share the one above them. Keys of schedules are DISTILL.<HEAD>.SCHEDULE.*
    """
    defaults = inspect.getsource(detectron2.config.defaults)
    texts = dict(_assignment_comments(defaults, ast.parse(defaults).body, {"_C": ""}))
    texts.update({f"DISTILL.REGIONS.{k}": v for k, v in documented(RegionSampler).items()})
    for add in (add_distill_config, add_data_config, add_model_config):
        texts.update(_function_comments(add, ""))
    texts.update(_function_comments(add_unlabelled_config, "DISTILL."))
    texts.update(_function_comments(add_schedule_config, "DISTILL.<HEAD>."))
    return texts


def documented(cls: type) -> Dict[str, str]:
    """What stands under Attributes: of a class and under Args: of its constructor, by key."""
    found: Dict[str, str] = {}
    docs: List[Optional[str]] = [inspect.getdoc(cls), inspect.getdoc(cls.__init__)]
    for doc in filter(None, docs):
        section = re.search(r"^(?:Attributes|Args):\n((?: {4}.*\n?|\n)+)", doc, re.MULTILINE)
        for names, text in ENTRY.findall(section[1] if section else ""):
            found.update({x.strip().upper(): " ".join(text.split()) for x in names.split(",")})
    return found


def _function_comments(add: Callable[[Any], None], prefix: str) -> Iterator[Tuple[str, str]]:
    """
    Args:
        add: assigns to attributes of its argument, or of variables that hold its nodes
        prefix: prefix of the keys below its argument
    """
    source = textwrap.dedent(inspect.getsource(add))
    nodes = {next(iter(inspect.signature(add).parameters)): prefix}
    return _assignment_comments(source, ast.parse(source).body[0].body, nodes)


def _assignment_comments(
    source: str, statements: List[ast.stmt], nodes: Dict[str, str]
) -> Iterator[Tuple[str, str]]:
    """
    Args:
        statements: the statements of `source`
        nodes: variable that holds a node -> prefix of the keys below it
    """
    lines, shared, last = source.splitlines(), "", 0
    for statement in statements:
        if not isinstance(statement, ast.Assign) or isinstance(statement.targets[-1], ast.Name):
            continue
        above, beside = _comments(lines, statement.lineno - 1)
        shared = above or (shared if statement.lineno == last + 1 else "")
        last = statement.end_lineno
        target = next(x for x in statement.targets if isinstance(x, ast.Attribute))
        root, _, path = ast.unparse(target).partition(".")
        key = nodes[root] + path
        names = [x.id for x in statement.targets if isinstance(x, ast.Name)]
        nodes.update(dict.fromkeys(names, f"{key}."))
        yield key, beside or shared
        if beside or ast.unparse(statement.value) in ("CfgNode()", "CN()"):
            shared = ""


def _comments(lines: List[str], index: int) -> Tuple[str, str]:
    """The comments above a line, and the one at its end."""
    above: List[str] = []
    while re.match(r"\s*# .*\w", lines[index - 1 - len(above)]):  # skips separator lines
        above.insert(0, lines[index - 1 - len(above)].strip(" #"))
    beside = re.search(r"  # (.*)$", lines[index])
    return " ".join(above), beside[1] if beside else ""

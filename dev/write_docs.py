#!/usr/bin/env python
"""Write the parts of docs/ that follow from the code: python dev/write_docs.py"""

import inspect
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

from detectron2.config import CfgNode, get_cfg

from d2kd.config.distill_keys import add_distill_config
from d2kd.config.key_comments import meanings
from d2kd.config.load import leaves
from d2kd.heads.__main__ import describe_keys
from d2kd.heads.fit import unlabelled_misfit
from d2kd.heads.registry import compares_logits, head_class, head_names
from d2kd.pairing.pair import ANY_PAIR, DENSE, DistillPair
from d2kd.views import DetectorInfo, DetectorView

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKED = re.compile(r"(<!-- generated: dev/write_docs.py -->\n).*?(<!-- /generated -->)", re.DOTALL)
OTHER_PAIRS = ("two-stage -> two-stage", "two-stage -> dense", "dense -> two-stage")
SCHEDULE = "DISTILL.<HEAD>.SCHEDULE"

INTRO = """\
# Keys

<!-- All of this page is written by dev/write_docs.py from the code; edit the comments there. -->

Every key that d2kd adds to Detectron2's config, with its default.
[Detectron2's own](https://detectron2.readthedocs.io/en/latest/modules/config.html) remain. Those of
one head, also of one of yours (`--plugin`), are printed by

    d2kd heads MGD

"""


class Key(NamedTuple):
    name: str
    default: Any
    text: str


def main() -> None:
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")


def documents() -> Dict[Path, str]:
    """Path of each document with generated parts to its whole text."""
    parts = {
        DOCS / "add_a_detector.md": f"\n```text\n{members_of_views()}\n```\n\n",
        DOCS / "methods.md": f"\n{table_of_pairs()}\n\n",
        DOCS / "unlabelled.md": f"\n{table_without_labels()}\n\n",
    }
    written = {
        path: MARKED.sub(lambda x: x[1] + part + x[2], path.read_text(encoding="utf-8"))
        for path, part in parts.items()
    }
    return {DOCS / "keys.md": keys_page(), **written}


def table_of_pairs() -> str:
    """Which heads take which pairs; those that take the same are one row."""
    rows: Dict[Tuple[str, ...], List[str]] = {}
    for name in head_names():
        head = head_class(name)
        kinds = getattr(head, "pairs", ANY_PAIR)
        alike = "anchors or points alike" if compares_logits(head) else "any"
        of_dense = alike if kinds & DENSE else ""
        others = ["yes" if kind in kinds else "" for kind in OTHER_PAIRS]
        rows.setdefault((of_dense, *others), []).append(f"`{name}`")
    lines = [f"| heads | dense → dense | {' | '.join(OTHER_PAIRS).replace('->', '→')} |"]
    lines += ["|---" * (2 + len(OTHER_PAIRS)) + "|"]
    for taken, names in sorted(rows.items(), key=lambda row: -len(row[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(x or 'no' for x in taken)} |")
    return "\n".join(lines)


def table_without_labels() -> str:
    """Which heads learn from images without labels, by the kind of the student."""
    cfg = get_cfg()
    add_distill_config(cfg)
    rows: Dict[Tuple[str, ...], List[str]] = {}
    for name in head_names():
        learns = tuple(_learns_without_labels(name, cfg, kind) for kind in ("dense", "two-stage"))
        rows.setdefault(learns, []).append(f"`{name}`")
    lines = ["| heads | dense student | two-stage student |", "|---|---|---|"]
    for learns, names in sorted(rows.items(), key=lambda row: -len(row[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(learns)} |")
    return "\n".join(lines)


def _learns_without_labels(name: str, cfg: CfgNode, kind: str) -> str:
    kinds = getattr(head_class(name), "pairs", ANY_PAIR)
    if not any(x.endswith(f"-> {kind}") for x in kinds):
        return "no such pair"
    student, teacher = (
        DetectorInfo("", {}, 1, frozenset(), two_stage=x) for x in (kind == "two-stage", False)
    )
    pair = DistillPair(student, teacher, ())
    for score, answer in ((0.0, "yes"), (0.5, "with `BOX_SCORE`")):
        cfg.DISTILL.UNLABELLED.BOX_SCORE = score
        if unlabelled_misfit(name, cfg, pair) is None:
            return answer
    return "no"


def members_of_views() -> str:
    """The list in the docstring of DetectorView."""
    text = inspect.getdoc(DetectorView)
    return text[text.index("always  ") : text.index("Attributes:")].strip()


def keys_page() -> str:
    """All keys that d2kd adds: the common ones, those of a schedule, those of each head."""
    texts, groups = {**meanings(), **head_texts()}, groups_of_keys()
    texts[SCHEDULE] = "Of every head. Iterations count from the start of the run, or of its stage."
    heads = [f"DISTILL.{x}" for x in head_names()]
    # By name: Detectron2's order of nodes is another in each version.
    in_order = sorted(groups, key=lambda x: (x in heads, x[:7] != "DISTILL", x))
    sections = []
    for node in in_order:
        keys = [Key(name, default, texts.get(name, "")) for name, default in groups[node].items()]
        title = "Schedule of every head" if node == SCHEDULE else node
        sections.append(section(title, keys, texts.get(node, "")))
    return INTRO + "\n".join(sections)


def groups_of_keys() -> Dict[str, Dict[str, Any]]:
    """Node to its keys with defaults: a head's together, its schedule's once for all heads."""
    theirs, ours = get_cfg(), get_cfg()
    add_distill_config(ours)
    known = dict(leaves(theirs))
    groups: Dict[str, Dict[str, Any]] = {}
    for key, default in leaves(ours):
        if key not in known:
            key = re.sub(r"^DISTILL\.\w+\.SCHEDULE", SCHEDULE, key)
            parts = key.split(".")
            node = ".".join(parts[:2] if parts[1] in head_names() else parts[:-1])
            groups.setdefault(node, {})[key] = default
    return groups


def head_texts() -> Dict[str, str]:
    """Key of a head to what `d2kd heads` says of it."""
    described = "\n".join(map(describe_keys, head_names()))
    found = re.findall(r"^(DISTILL\S+): .*\n?((?:    .*\n?)*)", described, re.MULTILINE)
    return {key: " ".join(text.split()) for key, text in found}


def section(title: str, keys: List[Key], text: str = "") -> str:
    lines = [f"## {title}", "", *([escape(text), ""] if text else [])]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{x.name}` | `{x.default!r}` | {escape(x.text)} |" for x in keys]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Markdown of plain text: what would be markup, or end a table's cell, is shown as it is."""
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    main()

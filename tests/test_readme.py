"""The tables of methods, in the README and in docs/methods.md, say what the code says."""

import re
from pathlib import Path
from typing import Dict, List

import pytest

from d2kd import load_config
from d2kd.heads.registry import head_class, head_names
from d2kd.pairing.pair import ANY_PAIR, DENSE, SAME_KIND, TWO_STAGE
from tests.helpers.toys import ROOT

PAIRS = {
    "any": ANY_PAIR,
    "dense": DENSE,
    "two-stage": TWO_STAGE,
    "same kind": SAME_KIND,
    "not dense → two-stage": ANY_PAIR - {"dense -> two-stage"},
}


def table(document: str, heading: str) -> Dict[str, List[str]]:
    """Name of a head to the other cells of its row in the table under a heading."""
    text = (Path(ROOT) / document).read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
    rows: Dict[str, List[str]] = {}
    for line in text.splitlines():
        cells = [x.strip() for x in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            rows.update({name: cells[1:] for name in re.findall(r"`(\w+)`", cells[0])})
    return rows


TABLES = {"README.md": "## Methods", "docs/methods.md": "## All methods"}


@pytest.mark.parametrize("document, heading", TABLES.items())
def test_every_head_has_a_row_and_every_row_a_head(document: str, heading: str) -> None:
    rows = table(document, heading)
    assert sorted(rows) == head_names()
    assert {len(cells) for cells in rows.values()} == {4}


@pytest.mark.parametrize("name", head_names())
def test_readme_says_what_the_code_says(name: str) -> None:
    _, _, pairs, status = table("README.md", "## Methods")[name]
    assert PAIRS[pairs] == getattr(head_class(name), "pairs", ANY_PAIR)
    marks = {"RECONSTRUCTED": "reconstructed", "OUR OWN": "ours"}
    said = [word for mark, word in marks.items() if mark in head_class(name).__doc__]
    assert [status] == (said or ["exact"])


@pytest.mark.parametrize("name", head_names())
def test_methods_page_names_configs_and_figures(name: str) -> None:
    title, configs, published, measured = table("docs/methods.md", "## All methods")[name]
    # Who copies a figure from here copies the mark.
    assert ("(reconstructed)" in title) == ("RECONSTRUCTED" in head_class(name).__doc__)
    for config in re.findall(r"`(\w+)`", configs):
        cfg = load_config(str(Path(ROOT) / "configs" / "quickstart" / f"{config}.yaml"))
        assert name in cfg.DISTILL.HEADS
    assert published and re.search(r"\d\.\d → \d+\.\d|^not run yet$", measured)


def test_every_head_has_a_coco_size_config() -> None:
    configs = (Path(ROOT) / "configs" / "COCO").glob("*/*.yaml")
    served = {name for x in configs for name in load_config(str(x)).DISTILL.HEADS}
    assert set(head_names()) - served == {"RoIFI"}  # an ablation's baseline

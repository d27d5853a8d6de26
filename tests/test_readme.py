"""The README's table of methods says of each head what the code says."""

import re
from pathlib import Path
from typing import Dict, List

import pytest

from d2kd import load_config
from d2kd.heads.registry import head_class, head_names
from d2kd.pairing.pair import ANY_PAIR, DENSE, SAME_KIND, TWO_STAGE

from toys import ROOT

PAIRS = {
    "any": ANY_PAIR,
    "dense": DENSE,
    "two-stage": TWO_STAGE,
    "same kind": SAME_KIND,
    "not dense → two-stage": ANY_PAIR - {"dense -> two-stage"},
}


def table() -> Dict[str, List[str]]:
    """Name of a head to the other cells of its row."""
    readme = (Path(ROOT) / "README.md").read_text()
    rows: Dict[str, List[str]] = {}
    for line in readme.split("### Methods")[1].split("\n### ")[0].splitlines():
        cells = [x.strip() for x in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            rows.update({name: cells[1:] for name in re.findall(r"`(\w+)`", cells[0])})
    return rows


def test_every_head_has_a_row_and_every_row_a_head() -> None:
    assert sorted(table()) == head_names()
    assert len({len(cells) for cells in table().values()}) == 1


@pytest.mark.parametrize("name", head_names())
def test_row_says_what_the_code_says(name: str) -> None:
    _, _, pairs, status, configs, published, measured = table()[name]
    assert PAIRS[pairs.split(",")[0]] == getattr(head_class(name), "pairs", ANY_PAIR)
    reconstructed = "RECONSTRUCTED" in head_class(name).__doc__
    assert ("reconstructed" in status) == reconstructed != status.startswith("exact")
    for config in re.findall(r"`(\w+)`", configs):
        cfg = load_config(str(Path(ROOT) / "configs" / "quickstart" / f"{config}.yaml"))
        assert name in cfg.DISTILL.HEADS
    assert published and re.search(r"\d\.\d → \d+\.\d", measured)


@pytest.mark.parametrize("name", head_names())
def test_every_head_has_a_coco_size_config(name: str) -> None:
    configs = (Path(ROOT) / "configs" / "COCO").glob("*/*.yaml")
    without = ("RoIFI",)  # an ablation's baseline
    assert name in without or any(name in load_config(str(x)).DISTILL.HEADS for x in configs)

"""The tutorial notebook: its code runs in order, and it is stored without outputs."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2kd import DISTILL_HEAD_REGISTRY
from tests.helpers.toys import ROOT

NOTEBOOK = Path(ROOT, "docs", "tutorial.ipynb")


@pytest.fixture
def cells() -> List[Dict[str, Any]]:
    return [x for x in json.loads(NOTEBOOK.read_text())["cells"] if x["cell_type"] == "code"]


@pytest.fixture
def clean() -> Iterator[None]:
    """What the notebook registers is gone afterwards."""
    heads, sets = dict(DISTILL_HEAD_REGISTRY._obj_map), DatasetCatalog.list()
    handlers = list(logging.getLogger("d2kd").handlers)
    yield
    DISTILL_HEAD_REGISTRY._obj_map = heads
    logging.getLogger("d2kd").handlers = handlers
    for name in set(DatasetCatalog.list()) - set(sets):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_notebook_runs_at_a_tiny_size(
    cells: List[Dict[str, Any]], clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: Dict[str, Any] = {"__name__": "tutorial"}
    first, *rest = ("".join(x["source"]) for x in cells)
    exec(first, names)
    assert names["ITERATIONS"] > 100 and not Path(names["FOLDER"]).is_absolute()
    names.update(ITERATIONS=4, IMAGES=8)
    for source in rest:
        exec(source, names)
    assert list(names["results"]) == ["alone", "CWD", "Cosine"]
    assert all("AP" in x for x in names["results"].values())


def test_notebook_has_no_outputs(cells: List[Dict[str, Any]]) -> None:
    assert all(x["outputs"] == [] and x["execution_count"] is None for x in cells)

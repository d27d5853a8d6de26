"""The paired comparison scores what the run's own evaluation scores."""

from pathlib import Path
from typing import Callable

import pytest

from tests.helpers.toy_sets import config_of, every, write_set


def test_objects_whose_ids_begin_at_0_are_found(
    tool: Callable, tmp_path: Path, forget_sets: None
) -> None:
    write_set(
        tmp_path, "a", every("annotations", lambda x: x.update(id=x["id"] - 1) or x.pop("area"))
    )
    truth = tool("paired_baseline").truth_of(config_of(tmp_path, [], ["a"]))
    keys = ("image_id", "category_id", "bbox")
    found = [{**{k: x[k] for k in keys}, "score": 0.9} for x in truth.dataset["annotations"]]
    assert tool("paired_ap").ImageAP(truth, found)(range(8)) == pytest.approx(100)

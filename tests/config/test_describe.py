"""Keys are explained by the comments at their declarations."""

import pytest

from detectron2.config import get_cfg

from d2kd.config import leaves
from d2kd.config.describe import describe
from d2kd.config.key_comments import meanings
from d2kd.config.load import load_config
from d2kd.heads.registry import head_names


def test_without_patterns_all_keys_of_ours_are_there_but_for_those_of_heads() -> None:
    lines = [x for x in describe().splitlines() if not x.startswith(" ")]
    found = [x.split(":")[0] for x in lines]
    heads = tuple(f"DISTILL.{name}." for name in head_names())
    ours = {k for k, _ in leaves(load_config())} - {k for k, _ in leaves(get_cfg())}
    assert set(found) == {x for x in ours if not x.startswith(heads)}
    assert len(found) == len(set(found)) > 50


def test_keys_are_explained() -> None:
    texts = meanings()
    keys = [x.split(":")[0] for x in describe().splitlines() if not x.startswith(" ")]
    assert len(keys) > 50
    # What a group is for stands above it.
    assert [k for k in keys if not texts.get(k)] == ["DISTILL.LIVENESS.ENABLED"]


def test_comment_of_one_key_is_not_that_of_a_later_one() -> None:
    texts = meanings()
    assert texts["MODEL.REPPOINTS.SCORE_THRESH_TEST"] == "of the class score"
    assert "stays frozen" in texts["MODEL.TIMM.FREEZE_TO_STRIDE"]
    assert "BatchNorms" in texts["MODEL.TIMM.NORM"]


def test_default_and_meaning_of_a_key() -> None:
    assert describe(["DISTILL.TEACHER.MIN_AP"]) == (
        "DISTILL.TEACHER.MIN_AP: 1.0\n"
        "    Smallest box AP (COCO, percent) of this evaluation with which training starts"
    )
    text = describe(["DISTILL.MGD.SCHEDULE", "SOLVER.CHECKPOINT_PERIOD"])
    assert "DISTILL.MGD.SCHEDULE.STOP_ITER: -1\n    iteration from which" in text
    assert "SOLVER.CHECKPOINT_PERIOD: 5000\n    Save a checkpoint" in text


@pytest.mark.parametrize("pattern", ["DISTILL.*.LOSS_WEIGHT", "SOLVER"])
def test_patterns_and_groups(pattern: str) -> None:
    keys = [x.split(":")[0] for x in describe([pattern]).splitlines() if not x.startswith(" ")]
    assert len(keys) >= 20
    assert all(x.startswith("SOLVER.") or x.endswith(".LOSS_WEIGHT") for x in keys)


def test_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="'DISTILL.TEACHR'.* Did you mean DISTILL.TEACHER?"):
        describe(["DISTILL.TEACHR"])

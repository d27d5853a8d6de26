"""A student that is trained already and shall follow the teacher channel by channel."""

from pathlib import Path
from typing import Any, Sequence

import pytest
from torch import nn

from detectron2.modeling import build_model

from d2kd import build_adapters
from d2kd.engine.preflight.own_pyramid import compares_channels, warn_of_own_pyramid
from tests.helpers.toys import distill_config, level_pairs, write_teacher


def warned(
    heads: Sequence[str],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    missing: str = "none",
    **values: Any,
) -> str:
    opts = write_teacher(folder, "retinanet")
    distiller = build_model(distill_config("retinanet", opts, heads, **values))
    caplog.clear()
    parameters = [name for name, _ in distiller.student.named_parameters()]
    warn_of_own_pyramid(distiller, [x for x in parameters if x.startswith(missing)])
    return "\n".join(x for x in caplog.messages if "channel i" in x)


@pytest.mark.parametrize("head", ["PKD", "CWD", "CanKD", "DCSFKD", "FGD", "ACAMKD"])
def test_heads_without_a_layer_in_between_are_named(
    head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = warned([head, "MLD"], tmp_path, caplog)
    assert f"channel i {head} will compare" in said and "ADAPT_EQUAL_CHANNELS" in said


@pytest.mark.parametrize("head", ["MGD", "DMKD", "DFMSD", "ReviewKD", "MAR", "MLD", "BCKD"])
def test_heads_with_a_layer_in_between_and_those_of_logits_are_not(
    head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not warned([head], tmp_path, caplog)


def test_adapters_are_found_by_what_they_are() -> None:
    # The README's example of a head calls them `adapters`, d2kd's own heads `adapter`.
    head = nn.Module()
    head.adapters = build_adapters(level_pairs(p3=(4, 8), p4=(4, 4)))
    assert compares_channels(head)
    head.adapters = build_adapters(level_pairs(p3=(4, 8), p4=(4, 4)), always=True)
    assert not compares_channels(head)


@pytest.mark.parametrize(
    "values, missing, is_warned",
    [
        ({"DISTILL__ADAPT_EQUAL_CHANNELS": True}, "none", False),
        ({"DISTILL__INHERIT": ["neck"]}, "none", False),
        ({"DISTILL__INHERIT": ["head"]}, "none", True),
        ({}, "head", True),  # a detector of another kind
        ({}, "backbone.fpn_lateral3", True),  # one without this level
        ({}, "backbone.fpn", False),  # an ImageNet backbone
    ],
)
def test_what_the_student_starts_from_decides(
    values: Any,
    missing: str,
    is_warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert bool(warned(["PKD"], tmp_path, caplog, missing, **values)) == is_warned


@pytest.mark.parametrize("head", ["PKD", "CWD", "FGD", "ACAMKD", "MGD", "SAMKD", "AMD", "DMKD"])
@pytest.mark.parametrize("adapt", [False, True])
def test_adapters_lie_between_equally_many_channels_where_asked_for(
    head: str, adapt: bool, tmp_path: Path
) -> None:
    opts = write_teacher(tmp_path, "retinanet")
    cfg = distill_config("retinanet", opts, [head], DISTILL__ADAPT_EQUAL_CHANNELS=adapt)
    adapters = build_model(cfg).heads[head].adapter.values()
    assert {isinstance(x, nn.Conv2d) for x in adapters} == {adapt}


def test_pairs_by_index_are_adapted_too(tmp_path: Path) -> None:
    opts = write_teacher(tmp_path, "retinanet")
    values = {"DISTILL__ADAPT_EQUAL_CHANNELS": True, "DISTILL__PKD__MATCH": "index"}
    head = build_model(distill_config("retinanet", opts, ["PKD"], **values)).heads["PKD"]
    assert all(isinstance(x, nn.Conv2d) for x in head.adapter.values())

"""What the student's own losses say of both arms of a comparison."""

import json
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Tuple[str, str]]:
    """Writes the metrics of both arms of a seed, from their losses in the last iteration."""

    def write(alone: Any, distilled: Any) -> Tuple[str, str]:
        made: List[str] = []
        for losses in (alone, distilled):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            line = {"iteration": 9, "total_loss": sum(losses.values()), **losses}
            (folder / "metrics.json").write_text(json.dumps(line))
            made.append(str(folder))
        return made[0], made[1]

    return write


def test_losses_of_heads_do_not_count(tool: Callable, folders: Callable) -> None:
    """Alone 0.2 + 0.3 = 0.5; with the teacher 0.1 + 0.3 = 0.4, the head's 7 left out."""
    alone, head = {"loss_cls": 0.2, "loss_box": 0.3}, {"loss_pkd": 7.0}
    runs = [folders(alone, {"loss_cls": 0.1, "loss_box": 0.3, **head})]
    said = tool("paired_fit").describe_fit(runs)
    assert "0.500 alone, 0.400 distilled, lower:\nthe teacher helps" in said


@pytest.mark.parametrize(
    "ends, said",
    [
        ([(0.5, 0.4), (0.7, 0.6)], "0.500 distilled, lower with each seed:\nthe teacher helps"),
        ([(0.5, 0.6), (0.7, 0.8)], "0.700 distilled, higher with each seed:\nthe teacher keeps"),
        ([(0.5, 0.6), (0.7, 0.2)], "0.400 distilled."),
        ([(0.5, 0.5), (0.5, 0.4)], "0.450 distilled."),
    ],
)
def test_what_all_seeds_say_is_told(
    ends: List[Tuple[float, float]], said: str, tool: Callable, folders: Callable
) -> None:
    runs = [folders({"loss_cls": a}, {"loss_cls": b, "loss_x": 1.0}) for a, b in ends]
    assert said in tool("paired_fit").describe_fit(runs)


def test_nothing_is_said_where_a_run_has_no_loss_of_its_own(
    tool: Callable, folders: Callable
) -> None:
    """As one that learns from images without labels."""
    describe = tool("paired_fit").describe_fit
    assert describe([folders({"loss_cls": 1.0}, {"loss_pkd": 1.0})]) == ""
    assert describe([folders({}, {"loss_pkd": 1.0})]) == ""

"""How well students fit their training images, beside their AP: what is kept of a bench's runs."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import pytest
import yaml

from tests.helpers.runs import run_config
from tests.helpers.toys import ROOT

PKD = str(Path(ROOT) / "configs" / "quickstart" / "pkd.yaml")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A table of a student alone and with PKD, two seeds each."""
    (tmp_path / "student.yaml").write_text(run_config(tmp_path).dump())
    rows: List[Dict[str, Any]] = [
        {"NAME": "alone", "CONFIG": str(tmp_path / "student.yaml")},
        {"NAME": "PKD", "CONFIG": PKD},
    ]
    table = {
        "RESULTS": str(tmp_path / "x.csv"),
        "OUTPUT_DIR": str(tmp_path / "runs"),
        "SEEDS": [1, 2],
        "ITERATIONS": [4],
        "BASELINE": "alone",
        "ROWS": rows,
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    return str(tmp_path / "table.yaml")


def finish(
    tool: Callable, path: str, losses: Dict[str, Dict[str, float]], monitored: Sequence[str] = ()
) -> None:
    """Write what finished runs leave: AP is 100 less 10 for a loss_cls of 1, and less the seed."""
    table = tool("bench_cells").read_table(path)
    for cell in table.cells:
        folder, values = Path(table.folder(cell)), losses[cell.row]
        folder.mkdir(parents=True)
        line = {"iteration": 3, "total_loss": sum(values.values()), **values}
        (folder / "metrics.json").write_text(json.dumps(line))
        ap = 100 - 10 * values["loss_cls"] - cell.seed
        (folder / "val.json").write_text(json.dumps({"AP": ap}))
        if monitored and cell.row == "PKD":
            fact = {"kind": "gradients", "losses": dict.fromkeys(["student's own", *monitored])}
            (folder / "facts.jsonl").write_text(json.dumps(fact) + "\n")


@pytest.mark.parametrize("monitored", [[], ["loss_pkd"]])
def test_losses_of_the_heads_are_left_out_monitored_or_not(
    monitored: List[str], path: str, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    losses = {"alone": {"loss_cls": 2.0}, "PKD": {"loss_cls": 1.0, "loss_pkd": 7.0}}
    finish(tool, path, losses, monitored)
    tool("bench_losses").main([path])
    said = capsys.readouterr().out
    # AP: 100 - 10 - 1.5 with PKD, 100 - 20 - 1.5 alone; the best first.
    lines = [[x.strip() for x in line.split("|")[1:-1]] for line in said.splitlines()]
    rows = [x for x in lines if x and x[0] in ("PKD", "alone")]
    assert rows == [["PKD", "2", "1.000", "88.5"], ["alone", "2", "2.000", "78.5"]]


def test_loss_that_only_begins_as_a_head_is_called_is_the_students(
    path: str, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    """What liveness saw decides, not names."""
    losses = {"alone": {"loss_cls": 1.0}, "PKD": {"loss_cls": 1.0, "loss_pkd_of_mine": 2.0}}
    finish(tool, path, losses, ["loss_pkd"])
    tool("bench_losses").main([path, "--rows", "PKD"])
    said = capsys.readouterr().out
    assert "| PKD" in said and "3.000" in said and "alone" not in said


def test_what_is_kept_needs_no_run_and_is_kept_once(path: str, tool: Callable) -> None:
    finish(tool, path, {"alone": {"loss_cls": 2.0}, "PKD": {"loss_cls": 1.0, "loss_pkd": 7.0}})
    module, table = tool("bench_losses"), tool("bench_cells").read_table(path)
    module.keep_losses(table, ["alone"])
    module.keep_losses(table, table.rows)
    module.keep_losses(table, table.rows)
    kept = Path(path).parent / "x_losses.csv"
    assert len(kept.read_text().splitlines()) == 1 + 4
    elsewhere = table._replace(output=str(Path(path).parent / "nowhere"))
    assert module.read_losses(elsewhere) == {
        ("alone", 4): [(2.0, 79.0), (2.0, 78.0)],
        ("PKD", 4): [(1.0, 89.0), (1.0, 88.0)],
    }


def test_correlation_is_pearsons_over_all_runs_of_a_budget(path: str, tool: Callable) -> None:
    """Losses (1, 1, 3, 3) and AP (9, 7, 5, 3) / 10: -2 * 2 / sqrt(4 * 5) = -0.894."""
    module, table = tool("bench_losses"), tool("bench_cells").read_table(path)
    found = {("a", 4): [(1, 0.9), (1, 0.7)], ("b", 4): [(3, 0.5), (3, 0.3)], ("a", 8): [(1, 0.1)]}
    found = {k: [module.Fit(*x) for x in v] for k, v in found.items()}
    lines = module.losses_by_budget(table, found).splitlines()[2:]
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in lines]
    assert cells == [
        ["4", "4", "1.000 to 3.000", "0.3 to 0.9", "-0.89"],
        ["8", "1", "1.000 to 1.000", "0.1 to 0.1", ""],
    ]


def test_run_without_labels_has_no_loss_to_keep(path: str, tool: Callable, tmp_path: Path) -> None:
    table = tool("bench_cells").read_table(path)
    for cell in table.cells:
        folder = Path(table.folder(cell))
        folder.mkdir(parents=True)
        (folder / "val.json").write_text('{"AP": 1.0}')
        line = {"iteration": 3, "total_loss": 1.0} | (
            {"loss_pkd": 1.0} if cell.row == "PKD" else {}
        )
        (folder / "metrics.json").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="no finished run"):
        tool("bench_losses").main([path])
    assert not (tmp_path / "x_losses.csv").exists()


def test_picture_has_a_point_for_each_run_and_a_colour_for_each_budget(
    path: str, tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: List[Any] = []
    scatter = Axes.scatter

    def spy(self: Axes, x: Any, y: Any, **said: Any) -> Any:
        drawn.append((said["label"], said["color"], list(zip(x, y))))
        return scatter(self, x, y, **said)

    monkeypatch.setattr(Axes, "scatter", spy)
    module, table = tool("bench_losses"), tool("bench_cells").read_table(path)
    runs = {("alone", 4): [(2, 1), (3, 1)], ("PKD", 4): [(1, 2)], ("alone", 8): [(1, 3)]}
    found = {k: [module.Fit(*x) for x in v] for k, v in runs.items()}
    module.draw(found, table, str(tmp_path / "losses.png"))
    assert drawn == [
        ("4 iterations", "C0", [(1, 2)]),
        ("4 iterations, alone", "C0", [(2, 1), (3, 1)]),
        ("8 iterations, alone", "C1", [(1, 3)]),
    ]
    assert (tmp_path / "losses.png").stat().st_size > 1000

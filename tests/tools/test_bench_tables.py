"""The documents say what the CSVs say; a figure that was typed or is out of date is found."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List

import cv2
import pytest
import yaml

from tests.helpers.toys import ROOT

CHOSEN = re.compile(r"LOSS_WEIGHT: (\S+)  # .*the best on val of ([^;\n]*)")
CONFIGS = sorted(Path(ROOT, "configs", "quickstart").glob("*.yaml"))


@pytest.fixture
def tables(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("bench_tables")


def test_documents_say_what_the_csv_says(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("path", [x for x in CONFIGS if CHOSEN.search(x.read_text())], ids=str)
def test_weight_that_a_yaml_calls_the_best_on_val_is(path: Path, tool: Callable) -> None:
    """Of those that the comment names, which are all that were tried on the YAML's levels."""
    chosen, named = CHOSEN.search(path.read_text()).groups()
    results = tool("bench_results").read_results(str(Path(ROOT, "configs/bench/weights.csv")))
    found = {
        float(x["row"].split()[-1]): float(x["val_AP"])
        for x in results
        if x["config"].endswith(f"/{path.name}") and " on " not in x["row"]  # on other levels
    }
    assert {float(x) for x in re.findall(r"[\d.]+", named)} == set(found)
    assert found[float(chosen)] == max(found.values())


def result(row: str, seed: int, ap: float, iterations: int = 100, **said: Any) -> Dict[str, Any]:
    figures = {"val_AP": ap, "val_AP50": 2 * ap, "test_AP": ap - 1, "test_AP50": 2 * ap - 1}
    place = {"row": row, "config": f"{row}.yaml", "seed": seed, "iterations": iterations}
    return {**place, **figures, "seconds": 90, "recipe": f"{row}{iterations}", **said}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "configs" / "bench").mkdir(parents=True)
    rows = [{"NAME": x, "CONFIG": f"{x}.yaml"} for x in ("alone", "mgd", "later")]
    said = {"TEST": "d2kd_shapes_test", "SEEDS": [1], "ITERATIONS": [100], "BASELINE": "alone"}
    table = tmp_path / "configs" / "bench" / "pairs.yaml"
    table.write_text(yaml.dump({**said, "ROWS": rows}))
    text = "Before.\n\n<!-- bench:pairs -->\n<!-- /bench -->\n\nBehind.\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


@pytest.fixture
def add(tool: Callable[[str], ModuleType], folder: Path) -> Callable[[List[Dict[str, Any]]], None]:
    def add(rows: List[Dict[str, Any]]) -> None:
        for row in rows:
            tool("bench_results").append_result(str(folder / "configs/bench/pairs.csv"), row)

    return add


def cells_of(path: Path) -> List[List[str]]:
    lines = [x for x in path.read_text().splitlines() if x.startswith("|")]
    return [[x.strip() for x in line.strip("|").split("|")] for line in lines]


def test_run_without_a_figure_on_the_tables_test_set_is_left_out(
    tables: ModuleType, folder: Path, add: Callable, tool: Callable
) -> None:
    add([result("mgd", 1, 30.0), result("alone", 1, 20.0, test_AP="", test_AP50="")])
    tables.main(["--root", str(folder)])
    assert [x[0] for x in cells_of(folder / "README.md")[2:]] == ["mgd"]
    rows = tool("bench_results").read_results(str(folder / "configs/bench/pairs.csv"))
    curves = tool("bench_curves").curves
    assert list(curves(["alone", "mgd"], rows, "test")) == ["mgd"]
    assert list(curves(["alone", "mgd"], rows, "val")) == ["alone", "mgd"]


def test_documents_may_be_named_from_another_folder(
    tables: ModuleType, folder: Path, add: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    add([result("mgd", 1, 30.0)])
    monkeypatch.chdir(folder.parent)
    assert tables.main(["--root", folder.name]) == 0
    assert [x[0] for x in cells_of(folder / "README.md")[2:]] == ["mgd"]


def test_table_has_means_intervals_and_paired_gains(
    tables: ModuleType, folder: Path, add: Callable
) -> None:
    add([result("mgd", seed, 30 + seed) for seed in (1, 2, 3)])
    add([result("alone", seed, 20 + seed) for seed in (3, 2)])
    add([result("alone", 1, 5.0, iterations=50), result("of another table", 1, 1.0)])
    assert tables.main(["--root", str(folder)]) == 0
    head, _, *rows = cells_of(folder / "README.md")
    assert head[:4] == ["run", "YAML", "iterations", "seeds"]
    assert head[4:] == ["AP on test", "AP on val", "gain on test", "AP50", "minutes"]
    # Three seeds: a standard deviation of 1, so 4.303 / sqrt(3); two: 12.706 / 2
    assert rows == [
        ["alone", "`alone.yaml`", "50", "1", "4.0", "5.0", "", "9.0", "1.5"],
        ["alone", "`alone.yaml`", "100", "2", "21.5 ± 6.4", "22.5 ± 6.4", "", "44.0 ± 12.7", "1.5"],
        ["mgd", "`mgd.yaml`", "100", "3", "31.0 ± 2.5", "32.0 ± 2.5", "+10.0 ± 0.0"]
        + ["63.0 ± 5.0", "1.5"],
    ]
    text = (folder / "README.md").read_text()
    assert text.startswith("Before.\n") and text.endswith("<!-- /bench -->\n\nBehind.\n")


def test_gain_that_rounds_to_zero_has_no_minus(
    tables: ModuleType, folder: Path, add: Callable
) -> None:
    add([result("alone", 1, 20.04), result("mgd", 1, 20.0)])
    tables.main(["--root", str(folder)])
    assert cells_of(folder / "README.md")[3][6] == "+0.0"


def test_runs_of_one_budget_are_in_the_order_of_their_ap(
    tables: ModuleType, folder: Path, add: Callable
) -> None:
    (folder / "README.md").write_text("<!-- bench:pairs at 100 -->\n<!-- /bench -->\n")
    add([result("alone", seed, 9 + seed) for seed in (1, 2)])
    add([result("mgd", 1, 8.0), result("later", 1, 30.0), result("later", 1, 50.0, iterations=50)])
    assert tables.main(["--root", str(folder)]) == 0
    head, _, *rows = cells_of(folder / "README.md")
    assert head[:4] == ["run", "YAML", "seeds", "AP on test"]
    assert [x[0] for x in rows] == ["later", "alone", "mgd"]
    assert [x[3] for x in rows] == ["29.0", "9.5 ± 6.4", "7.0"]


def test_mask_ap_has_a_column_that_is_empty_of_detectors_without_masks(
    tables: ModuleType, folder: Path, add: Callable
) -> None:
    add([result("mgd", seed, 30.0, test_mask_AP=10 + seed) for seed in (1, 2)])
    add([result("alone", 1, 20.0)])
    tables.main(["--root", str(folder)])
    head, _, *rows = cells_of(folder / "README.md")
    assert head[-2] == "mask AP"
    assert [x[-2] for x in rows] == ["", "11.5 ± 6.4"]


def test_settings_of_a_grid_share_a_line(tables: ModuleType, folder: Path, add: Callable) -> None:
    path = folder / "configs" / "bench" / "pairs.yaml"
    said = yaml.safe_load(path.read_text())
    said["ROWS"][1]["GRID"] = {"DISTILL.MGD.LOSS_WEIGHT": [1.0, 10.0, 0.2]}
    said["ROWS"][2]["GRID"] = {"DISTILL.MGD.MASK": ["sampled", "most"]}
    path.write_text(yaml.dump(said))
    (folder / "README.md").write_text("<!-- bench:pairs by grid -->\n<!-- /bench -->\n")
    weights = [result(f"mgd, LOSS_WEIGHT {w}", 1, 20 + w) for w in (1.0, 10.0, 0.2)]
    masks = [result("later, MASK sampled", 1, 7.0), result("later, MASK most", 1, 6.0)]
    add([*weights, *masks, result("alone", 1, 5.0), result("mgd, LOSS_WEIGHT 9.0", 1, 50.0)])
    assert tables.main(["--root", str(folder)]) == 0
    head, _, *rows = cells_of(folder / "README.md")
    assert head == ["run", "YAML", "iterations", "seeds", "AP on val by setting", "minutes"]
    assert [(x[0], x[4]) for x in rows] == [
        ("alone", "5.0"),
        ("mgd", "LOSS_WEIGHT 0.2: 20.2, 1.0: 21.0, 10.0: **30.0**"),
        ("later", "MASK sampled: **7.0**, most: 6.0"),
    ]


def test_verdicts_are_those_on_the_samples_that_are_kept(
    tables: ModuleType, tool: Callable, folder: Path
) -> None:
    """
    Two seeds that gain 8 and 12, on each sample of the images the same: a standard deviation of
    2.83, so 10 +- 12.7 x 2.83 / sqrt(2).
    """
    samples = tool("bench_samples")
    text = "<!-- bench:pairs verdicts against alone | mgd -->\n<!-- /bench -->\n"
    (folder / "README.md").write_text(text)
    tables.main(["--root", str(folder)])
    assert "No verdict of this table is there." in (folder / "README.md").read_text()
    for row, seed, ap in [("alone", 1, 20), ("alone", 2, 20), ("mgd", 1, 28), ("mgd", 2, 32)] + [
        ("later", 1, 32),
        ("later", 2, 36),
        ("gone", 1, 1),
        ("gone", 2, 1),
    ]:
        said = {"row": row, "seed": seed, "iterations": 100, "task": "bbox", "AP": ap}
        drawn = " ".join(f"{ap + x:.2f}" for x in range(200))
        row_of = {**said, "samples": drawn, "key": f"{row}{seed}", "recipe": row}
        path = str(folder / "configs/bench/pairs_samples.csv")
        tool("bench_results").append_result(path, row_of, samples.COLUMNS)
    tables.main(["--root", str(folder)])
    head, _, *rows = cells_of(folder / "README.md")
    assert head == ["run", "iterations", "seeds", "against alone", "against mgd"]
    assert rows == [
        ["alone", "100", "2", "", "INCONCLUSIVE -10.0 (-35.4 to +15.4)"],
        ["mgd", "100", "2", "INCONCLUSIVE +10.0 (-15.4 to +35.4)", ""],
        [
            "later",
            "100",
            "2",
            "INCONCLUSIVE +14.0 (-11.4 to +39.4)",
            "**GAIN** +4.0 (+4.0 to +4.0)",
        ],
    ]
    (folder / "README.md").write_text(text.replace("against", "at 100 against"))
    tables.main(["--root", str(folder)])
    of_budget = cells_of(folder / "README.md")[2:]
    # By the first verdict that a row has; "alone" has one against mgd only.
    assert of_budget == [[row[0], *row[2:]] for row in (rows[2], rows[1], rows[0])]
    (folder / "README.md").write_text(text.replace("against", "at 200 against"))
    tables.main(["--root", str(folder)])
    assert "No verdict of this table is there." in (folder / "README.md").read_text()


def test_single_seed_beside_a_baseline_has_no_verdict_in_the_table(
    tables: ModuleType, tool: Callable, folder: Path
) -> None:
    """Of two baselines one has two seeds in common with the run, one a single seed."""
    samples = tool("bench_samples")
    text = "<!-- bench:pairs verdicts against alone | later -->\n<!-- /bench -->\n"
    (folder / "README.md").write_text(text)
    for row, seed in [("mgd", 1), ("mgd", 2), ("alone", 1), ("alone", 2), ("later", 2)]:
        said = {"row": row, "seed": seed, "iterations": 100, "task": "bbox", "AP": 20}
        row_of = {**said, "samples": "20 20", "key": f"{row}{seed}", "recipe": row}
        path = str(folder / "configs/bench/pairs_samples.csv")
        tool("bench_results").append_result(path, row_of, samples.COLUMNS)
    tables.main(["--root", str(folder)])
    rows = {x[0]: x[2:] for x in cells_of(folder / "README.md")[2:]}
    assert rows["mgd"] == ["2", "**NO GAIN** +0.0 (+0.0 to +0.0)", ""]
    assert "later" not in rows


def test_losses_are_those_that_are_kept_by_budget_or_of_one_by_row(
    tables: ModuleType, tool: Callable, folder: Path
) -> None:
    """Losses (3, 2, 1) with AP (10, 20, 30): on a line, so -1."""
    losses = tool("bench_losses")
    for row, seed, loss, ap in [("alone", 1, 3, 10), ("mgd", 1, 2, 20), ("mgd", 2, 1, 30)]:
        said = {"row": row, "seed": seed, "iterations": 100, "own_loss": loss, "AP": ap}
        path = str(folder / "configs/bench/pairs_losses.csv")
        row_of = {**said, "key": f"{row}{seed}", "recipe": row}
        tool("bench_results").append_result(path, row_of, losses.COLUMNS)
    (folder / "README.md").write_text("<!-- bench:pairs losses -->\n<!-- /bench -->\n")
    tables.main(["--root", str(folder)])
    (by_budget,) = cells_of(folder / "README.md")[2:]
    assert by_budget == ["100", "3", "1.000 to 3.000", "10.0 to 30.0", "-1.00"]
    (folder / "README.md").write_text("<!-- bench:pairs losses at 100 -->\n<!-- /bench -->\n")
    tables.main(["--root", str(folder)])
    by_row = cells_of(folder / "README.md")[2:]
    assert by_row == [["mgd", "2", "1.500", "25.0"], ["alone", "1", "3.000", "10.0"]]


def test_verdict_against_a_row_that_is_not_in_the_table_is_refused(
    tables: ModuleType, folder: Path
) -> None:
    (folder / "README.md").write_text("<!-- bench:pairs verdicts against alon -->\n<!-- /bench -->")
    with pytest.raises(
        ValueError, match="against: 'alon' is no row of pairs. Did you mean 'alone'"
    ):
        tables.main(["--root", str(folder)])


def test_table_without_a_run_says_so(tables: ModuleType, folder: Path) -> None:
    tables.main(["--root", str(folder)])
    assert "No run of this table is finished." in (folder / "README.md").read_text()


def test_text_that_is_not_the_csvs_is_found_and_put_right(
    tables: ModuleType, folder: Path, add: Callable, capsys: pytest.CaptureFixture
) -> None:
    add([result("alone", 1, 20.0)])
    words = ["--root", str(folder), "--check"]
    assert tables.main(words) == 1
    tables.main(words[:2])
    assert tables.main(words) == 0
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("19.0", "29.0"))
    assert tables.main(words) == 1 and "README.md is not what the CSV" in capsys.readouterr().out
    tables.main(words[:2])
    add([result("alone", 2, 21.0)])
    assert tables.main(words) == 1, "a new figure"


def test_figures_of_two_recipes_make_no_mean(
    tables: ModuleType, folder: Path, add: Callable
) -> None:
    add([result("alone", seed, 20.0, recipe="old") for seed in (1, 2)])
    add([result("alone", 1, 30.0, recipe="new")])
    tables.main(["--root", str(folder)])
    (row,) = cells_of(folder / "README.md")[2:]
    assert row[3:5] == ["1", "29.0"]


def test_mark_without_an_end_is_refused(tables: ModuleType, folder: Path) -> None:
    (folder / "README.md").write_text("<!-- bench:pairs -->\n")
    with pytest.raises(ValueError, match="README.md: a <!-- bench:NAME --> has no <!-- /bench -->"):
        tables.main(["--root", str(folder)])


def test_csv_of_other_columns_is_refused(tool: Callable, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x.csv has the columns \['a', 'b'\]"):
        tool("bench_results").read_results(str(tmp_path / "x.csv"))


def test_csv_whose_first_row_is_being_written_has_none_yet(tool: Callable, tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    assert tool("bench_results").read_results(str(tmp_path / "x.csv")) == []


def test_line_is_dotted_where_the_row_left_a_budget_out(
    tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    plot, styles = axes.plot, []

    def note(self: Any, x: Any, *args: Any, linestyle: str, **kwargs: Any) -> Any:
        styles.append((*x, linestyle))
        return plot(self, x, *args, linestyle=linestyle, **kwargs)

    monkeypatch.setattr(axes, "plot", note)
    point = (1.0, 2.0, 3.0)
    found = {"all": dict.fromkeys((10, 20, 40), point), "some": dict.fromkeys((10, 40), point)}
    tool("bench_curves").draw(found, "AP", str(tmp_path / "curves.png"))
    assert styles == [(10, 20, "-"), (20, 40, "-"), (10, 40, ":")]


def test_curves_are_lowest_mean_and_highest_of_the_seeds(
    tool: Callable[[str], ModuleType], folder: Path, add: Callable
) -> None:
    add([result("mgd", seed, 30 + seed) for seed in (1, 2, 6)])
    add([result("mgd", 1, 20, iterations=50), result("alone", 1, 10)])
    tables, curves = tool("bench_cells"), tool("bench_curves")
    path = str(folder / "configs" / "bench" / "pairs.yaml")
    table = tables.read_table(path)
    rows = tool("bench_results").read_results(table.results)
    found = curves.curves(table.rows, rows, "test")
    assert found == {"alone": {100: (9, 9, 9)}, "mgd": {100: (30, 32, 35), 50: (19, 19, 19)}}
    assert list(curves.curves(["mgd"], rows, "val")) == ["mgd"]
    picture = str(folder / "curves.png")
    curves.main([path, picture, "--rows", "mgd", "alone"])
    assert cv2.imread(picture) is not None
    with pytest.raises(ValueError, match="--rows: 'mgt' is no row of pairs. Did you mean 'mgd'"):
        curves.main([path, picture, "--rows", "mgt"])

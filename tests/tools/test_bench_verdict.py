"""The verdict on runs of a bench: which runs it takes, and of which set."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List

import numpy as np
import pycocotools.mask
import pytest
import yaml

from detectron2.data import MetadataCatalog

from d2kd import load_config
from d2kd.data import register_datasets
from tests.helpers.runs import run_config


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A table of two rows and three seeds, whose runs have finished but one."""
    cfg = run_config(tmp_path, DATASETS__SHAPES__NUM_VAL=6, DATASETS__SHAPES__NUM_TEST=6)
    cfg.DATASETS.TEST = ("d2kd_shapes_val",)
    (tmp_path / "student.yaml").write_text(cfg.dump())
    return tmp_path


def truth(place: Path, name: str) -> Dict[str, Any]:
    cfg = load_config(str(place / "student.yaml"), ["DATASETS.TEST", repr((name,))])
    register_datasets(cfg, "", parts=("TEST",))
    return json.loads(Path(MetadataCatalog.get(name).json_file).read_text())


def finish(
    tool: Callable[[str], ModuleType], path: str, name: str, right: Dict[str, float]
) -> None:
    """Write what finished runs leave: of each row, this share of all objects, found exactly."""
    table = tool("bench_cells").read_table(path)
    objects = truth(Path(path).parent, name)["annotations"]
    for cell in table.cells:
        folder = Path(table.folder(cell))
        inference = folder / ("test" if table.test else "") / "inference"
        inference.mkdir(parents=True)
        found = objects[cell.seed : cell.seed + round(right[cell.row] * len(objects))]
        detections = [
            {k: x[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for x in found
        ]
        (inference / "coco_instances_results.json").write_text(json.dumps(detections))
        (folder / ("test.json" if table.test else "val.json")).write_text("{}")


def write(place: Path, **said: Any) -> str:
    rows = [
        {"NAME": "alone", "CONFIG": str(place / "student.yaml")},
        {"NAME": "better", "CONFIG": str(place / "student.yaml"), "OPTS": ["SOLVER.BASE_LR", 0.1]},
        {"NAME": "same", "CONFIG": str(place / "student.yaml"), "OPTS": ["SOLVER.BASE_LR", 0.2]},
    ]
    table = {
        "RESULTS": str(place / "x.csv"),
        "OUTPUT_DIR": str(place / "runs"),
        "SEEDS": [1, 2, 3],
        "ITERATIONS": [4],
        "BASELINE": "alone",
        "ROWS": rows,
        **said,
    }
    (place / "table.yaml").write_text(yaml.safe_dump(table))
    return str(place / "table.yaml")


@pytest.mark.parametrize("test", ["", "d2kd_shapes_test"])
def test_rows_are_compared_with_the_baseline_on_the_set_of_the_table(
    test: str, place: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write(place, **({"TEST": test} if test else {}))
    shares = {"alone": 0.2, "better": 0.8, "same": 0.2}
    finish(tool, path, test or "d2kd_shapes_val", shares)
    tool("bench_verdict").main([path, "--samples", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("better, 4 iterations, 3 seeds: GAIN: +")
    assert lines[1].startswith("same, 4 iterations, 3 seeds: NO GAIN: +0.0 AP")
    tool("bench_verdict").main([path, "--samples", "20", "--baseline", "better"])
    lines = capsys.readouterr().out.splitlines()
    assert [x.split(",")[0] for x in lines] == ["alone", "same"]
    assert all("NO GAIN: -" in x for x in lines)


def test_threshold_and_number_of_samples_are_the_user_s(
    place: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write(place)
    finish(tool, path, "d2kd_shapes_val", {"alone": 0.2, "better": 0.8, "same": 0.2})
    said = []
    for words in (["--samples", "20"], ["--samples", "2"], ["--threshold", "99"]):
        tool("bench_verdict").main([path, "--rows", "better", *words])
        said.append(capsys.readouterr().out)
    assert "GAIN: +" in said[0] and "NO GAIN: +" not in said[0]
    assert said[0] != said[1], "the interval is that of so many samples"
    assert "NO GAIN: +" in said[2] and "threshold +99.0" in said[2]


def test_each_budget_is_compared_by_itself(
    place: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write(place, ITERATIONS=[4, 8], SEEDS=[1, 2])
    finish(tool, path, "d2kd_shapes_val", {"alone": 0.2, "better": 0.8, "same": 0.2})
    tool("bench_verdict").main([path, "--rows", "better", "--samples", "2"])
    found = [x.partition(":")[0] for x in capsys.readouterr().out.splitlines()]
    assert found == [f"better, {x} iterations, 2 seeds" for x in (4, 8)]


def test_run_that_is_not_finished_is_left_out(
    place: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write(place)
    finish(tool, path, "d2kd_shapes_val", {"alone": 0.2, "better": 0.8, "same": 0.2})
    table = tool("bench_cells").read_table(path)
    folders: List[Path] = [
        Path(table.folder(x)) for x in table.cells if x.row == "better" and x.seed > 1
    ]
    for folder in folders:
        (folder / "val.json").unlink()
    tool("bench_verdict").main([path, "--rows", "better", "--samples", "20"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("better, 4 iterations, one seed: INCONCLUSIVE")


def test_table_whose_runs_are_not_there_says_so(place: Path, tool: Callable) -> None:
    """As in a fresh clone, where the CSV has figures but no detections."""
    path = write(place)
    with pytest.raises(ValueError, match="has no finished run .* baseline 'alone' .*d2kd bench"):
        tool("bench_verdict").main([path])


def test_verdict_is_told_again_without_the_runs_and_against_another_baseline(
    place: Path, tool: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(place)
    finish(tool, path, "d2kd_shapes_val", {"alone": 0.2, "better": 0.8, "same": 0.3})
    verdict = tool("bench_verdict")
    verdict.main([path, "--rows", "better"])
    first = capsys.readouterr().out
    kept = (place / "x_samples.csv").read_text()
    assert len(kept.splitlines()) == 1 + 2 * 3, "of the row and of the baseline"
    verdict.main([path])
    assert first in capsys.readouterr().out
    # What is kept is not measured again.
    assert (place / "x_samples.csv").read_text().startswith(kept)
    shutil.rmtree(place / "runs")
    verdict.main([path, "--rows", "better"])
    assert capsys.readouterr().out == first
    verdict.main([path, "--rows", "same", "--baseline", "better"])
    assert "same, 4 iterations, 3 seeds: NO GAIN: -" in capsys.readouterr().out


@pytest.mark.parametrize("baseline", ["alone", ""])
def test_bench_keeps_of_each_run_what_a_verdict_and_a_look_at_losses_need(
    baseline: str, place: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = write(place, BASELINE=baseline)
    finish(tool, path, "d2kd_shapes_val", {"alone": 0.2, "better": 0.8, "same": 0.3})
    for done in place.glob("runs/*/val.json"):  # trained and evaluated, but not yet in the CSV
        done.write_text('{"AP": %d}' % (80 if done.parent.name.startswith("better") else 20))
        line = {"iteration": 3, "total_loss": 0.5, "loss_cls": 0.5}
        (done.parent / "metrics.json").write_text(json.dumps(line))
    assert tool("bench").main([path, "--rows", "alone", "better"]) == 0
    for kept in ("x_samples.csv", "x_losses.csv"):
        assert (place / kept).exists() == bool(baseline), "without, there is nothing to compare"
    shutil.rmtree(place / "runs")
    capsys.readouterr()
    if baseline:
        tool("bench_verdict").main([path, "--rows", "better"])
        assert "better, 4 iterations, 3 seeds: GAIN" in capsys.readouterr().out
        tool("bench_losses").main([path, "--rows", "better"])
        assert "| better | 3       | 0.500 " in capsys.readouterr().out


def test_what_is_kept_gives_the_verdict_of_the_runs(place: Path, tool: Callable) -> None:
    """Beside ImageAP on the detections themselves: kept are two decimals."""
    path = write(place, SEEDS=[1, 2])
    finish(tool, path, "d2kd_shapes_val", {"alone": 0.2, "better": 0.8, "same": 0.2})
    ap, samples, table = (
        tool("paired_ap"),
        tool("bench_samples"),
        tool("bench_cells").read_table(path),
    )
    samples.keep_samples(table, table.rows)
    found = samples.read_kept(table)
    measures: Dict[str, List[Any]] = {"alone": [], "better": []}
    coco = tool("paired_baseline").truth_of(table.cells[0].cfg)
    for cell in table.cells:
        if cell.row in measures:
            inference = Path(table.folder(cell), "inference", "coco_instances_results.json")
            measures[cell.row].append(ap.ImageAP(coco, ap.read_detections(str(inference))))
    everything = range(6)
    gains = [b(everything) - a(everything) for a, b in zip(*measures.values())]
    drawn = {k: [x.samples(50) for x in v] for k, v in measures.items()}
    expected = tool("paired_verdict").decide(gains, ap.image_error(*drawn.values()), 2.0)
    told = samples.verdict_on(found["better", 4], found["alone", 4], 2.0, 50)
    assert told.count == "2" and told.verdict.decision == expected.decision
    assert list(told.verdict[1:4]) == pytest.approx(list(expected[1:4]), abs=0.02)


def test_runs_without_samples_count_with_the_image_error_of_those_that_have_them(
    place: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    """
    Gains of 4, 4 and 7 are 5 on average, with a deviation of sqrt(3) over seeds. Samples are kept
    of the first seed alone, 1 and 3 AP better: a deviation of sqrt(2) over images.
    """
    path, results, samples = write(place), tool("bench_results"), tool("bench_samples")
    blank = dict.fromkeys(results.COLUMNS, "")
    for row, values in {"alone": [20, 21, 22], "better": [24, 25, 29], "same": [9]}.items():
        for seed, ap in enumerate(values, 1):
            said = {"row": row, "seed": str(seed), "iterations": "4", "recipe": row}
            results.append_result(str(place / "x.csv"), {**blank, **said, "val_AP": str(ap)})
    for row, drawn in {"alone": "20 20", "better": "21 23"}.items():
        # Its AP is of another machine, and the table's counts.
        said = {"row": row, "seed": "1", "iterations": "4", "recipe": row, "key": row}
        said.update(task="bbox", AP="50", samples=drawn)
        results.append_result(str(place / "x_samples.csv"), said, samples.COLUMNS)
    tool("bench_verdict").main([path])
    # t of 2 degrees of freedom is 4.303: (3 / 3 x 4.303 + 2 x 1.96) / sqrt(3 / 3 + 2) is 4.75.
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("better, 4 iterations, 3 (1) seeds: INCONCLUSIVE: +5.0 AP")
    assert "seeds and images +0.3 to +9.7, " in line


@pytest.mark.parametrize("ap, is_of_this_run", [("20", True), ("50", False)])
def test_samples_of_another_recipe_are_taken_where_they_are_of_the_same_run(
    ap: str, is_of_this_run: bool, place: Path, tool: Callable
) -> None:
    """A teacher that was trained again to the same weights is another file."""
    path, results, samples = write(place), tool("bench_results"), tool("bench_samples")
    said = {"row": "alone", "seed": "1", "iterations": "4", "recipe": "new"}
    blank = dict.fromkeys(results.COLUMNS, "")
    results.append_result(str(place / "x.csv"), {**blank, **said, "val_AP": "20"})
    said.update(recipe="old", key="old", task="bbox", AP=ap, samples="50 50")
    results.append_result(str(place / "x_samples.csv"), said, samples.COLUMNS)
    (kept,) = samples.read_kept(tool("bench_cells").read_table(path)).values()
    assert kept.ap == {1: 20.0} and bool(kept.samples) == is_of_this_run


def test_masks_are_kept_beside_boxes_with_an_ap_of_their_own(place: Path, tool: Callable) -> None:
    cfg = load_config(str(place / "student.yaml"), ["DATASETS.SHAPES.MASKS", True])
    (place / "student.yaml").write_text(cfg.dump())
    path = write(place, SEEDS=[0])
    finish(tool, path, "d2kd_shapes_val", {"alone": 1.0, "better": 0.0, "same": 0.0})
    samples, table = tool("bench_samples"), tool("bench_cells").read_table(path)
    (cell,) = [x for x in table.cells if x.row == "alone"]
    file = Path(table.folder(cell), "inference", "coco_instances_results.json")
    found = json.loads(file.read_text())
    size = [cfg.DATASETS.SHAPES.IMAGE_SIZE] * 2
    blank = pycocotools.mask.encode(np.zeros(size, dtype=np.uint8, order="F"))
    for x in found:  # all boxes are right, and no mask is
        x["segmentation"] = {"size": size, "counts": blank["counts"].decode()}
    file.write_text(json.dumps(found))
    samples.keep_samples(table, ["alone"])
    for task, expected in ((samples.BOXES, 100), (samples.MASKS, 0)):
        kept = samples.read_kept(table, task)["alone", 4]
        assert kept.ap == {0: expected} and set(kept.samples[0]) == {expected}


def test_each_row_is_measured_on_its_own_set(place: Path, tool: Callable) -> None:
    """As rows of data with more noise, or with masks, beside those without."""
    others = {"alone": [], "other images": ["SEED", 1], "masks": ["MASKS", True]}
    rows = [
        {
            "NAME": name,
            "CONFIG": str(place / "student.yaml"),
            "OPTS": [f"DATASETS.SHAPES.{x}" if i == 0 else x for i, x in enumerate(opts)],
        }
        for name, opts in others.items()
    ]
    table = tool("bench_cells").read_table(write(place, ROWS=rows, SEEDS=[0]))
    for cell in table.cells:
        register_datasets(cell.cfg, "", parts=("TEST",))
        path = Path(MetadataCatalog.get("d2kd_shapes_val").json_file)
        inference = Path(table.folder(cell), "inference")
        inference.mkdir(parents=True)
        found = [{**x, "score": 0.9} for x in json.loads(path.read_text())["annotations"]]
        (inference / "coco_instances_results.json").write_text(json.dumps(found))
        Path(table.folder(cell), "val.json").write_text("{}")
    samples = tool("bench_samples")
    samples.keep_samples(table, table.rows)
    for task, names in ((samples.BOXES, list(others)), (samples.MASKS, ["masks"])):
        found = samples.read_kept(table, task)
        assert {row: x.ap[0] for (row, _), x in found.items()} == dict.fromkeys(names, 100)


@pytest.mark.parametrize("words", [["--samples", "1"], ["--threshold", "-1"], ["--samples", "201"]])
def test_what_makes_no_verdict_is_refused(
    words: List[str], place: Path, tool: Callable, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        tool("bench_verdict").main([write(place), *words])
    said = capsys.readouterr().err
    assert f"{words[0]} must be" in said or "--samples: 200 are kept of each run, got 201" in said


def test_unknown_row_is_refused_with_those_there_are(place: Path, tool: Callable) -> None:
    with pytest.raises(
        ValueError, match="--rows: 'best' is no row of .*There are alone, better, same"
    ):
        tool("bench_verdict").main([write(place), "--rows", "best"])
    with pytest.raises(ValueError, match="--baseline: 'best' is no row"):
        tool("bench_verdict").main([write(place), "--baseline", "best"])


def test_masks_of_detectors_without_any_are_refused(place: Path, tool: Callable) -> None:
    path = write(place)
    finish(tool, path, "d2kd_shapes_val", {"alone": 0.2, "better": 0.8, "same": 0.2})
    with pytest.raises(ValueError, match="--masks: alone detects boxes alone"):
        tool("bench_verdict").main([path, "--masks"])

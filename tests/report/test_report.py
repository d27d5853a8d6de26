"""A run on one page: what it tells, what it says is absent, and that it needs no other file."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

import pytest

from detectron2.config import CfgNode

import d2kd_cli
from d2kd.cli import report, train
from d2kd.engine.metrics import Metrics
from d2kd.report import charts, gather, render
from d2kd.report.blocks import Facts, Picture, Section
from d2kd.report.outside import export_proof, verdict
from tests.helpers.runs import interrupt, run, run_config
from tests.helpers.toys import write_teacher

DRAWN = {"VIS_PERIOD": 2, "DATASETS__TEST": ("d2kd_shapes_val",), "TEST__EVAL_PERIOD": 2}


class Page(HTMLParser):
    """A page whose tags are all closed; `text`, and `sources` of what it would load."""

    def __init__(self, html: str):
        super().__init__()
        self.open: List[str] = []
        self.text: List[str] = []
        self.sources: List[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def __contains__(self, words: str) -> bool:
        return words in " ".join(" ".join(self.text).split())


def written(cfg: CfgNode) -> Path:
    """OUTPUT_DIR of a run, with its config as Detectron2 leaves it there."""
    folder = Path(cfg.OUTPUT_DIR)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs share data and a teacher."""
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def teacher(place: Path) -> List[Any]:
    values = {"MODEL__RETINANET__NUM_CLASSES": 6, "MODEL__RETINANET__NORM": ""}  # as the student's
    return write_teacher(place, "retinanet", **values)


@pytest.fixture(scope="module")
def finished(place: Path, teacher: List[Any]) -> Path:
    values = {"DISTILL__TEACHER__EVAL_IMAGES": 2, "DISTILL__TEACHER__MIN_AP": 0.0}
    cfg = run_config(place, teacher, ["CWD"], OUTPUT_DIR=str(place / "finished"), **values, **DRAWN)
    (place / "run.yaml").write_text(cfg.dump())
    train.main(["--config-file", str(place / "run.yaml")])
    return place / "finished"


def test_finished_run_tells_everything(finished: Path) -> None:
    contents = gather(str(finished))
    page = Page(render(contents))
    facts = [json.loads(x) for x in (finished / "facts.jsonl").read_text().splitlines()]
    sha256 = next(x["weights_sha256"] for x in facts if x["kind"] == "distillation")
    for words in (
        "finished, 4 iterations",
        f"d2kd train --config-file {finished.parent}/run.yaml",
        f"sha256 {sha256}",
        "on 2 images of d2kd_shapes_val",
        "class i is taken for class i",
        "student's own",
        "For a share of 0.5",
        "An image of iteration 2",
        "SOLVER.MAX_ITER 4",
    ):
        assert words in page, words
    sections = {x.title: x.blocks for x in contents.sections}
    levels = sections["What learns from what"][0]
    assert [row[0] for row in levels.rows] == [row[3] for row in levels.rows]
    assert {x.title for x in sections["Losses"]} >= {"total_loss", "loss_cwd"}
    assert [x.split(":")[0] for x in contents.absent] == ["Verdict", "Export"]


def test_several_teachers_are_told_apart_and_the_heads_of_all_are_listed(
    finished: Path, tmp_path: Path
) -> None:
    facts = [json.loads(x) for x in (finished / "facts.jsonl").read_text().splitlines()]
    lesson = next(x for x in facts if x["kind"] == "distillation")
    left = {**lesson, "teacher": "left", "heads": ["FGD"]}
    right = {**lesson, "teacher": "right", "heads": ["PKD", "FGD"]}
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, (left, right))))
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())  # has CWD
    sections = {x.title: x.blocks for x in gather(str(tmp_path)).sections}
    assert ["heads", "FGD, PKD"] in sections[""][0].rows
    facts = [x for x in sections["What learns from what"] if isinstance(x, Facts)]
    assert [list(*x.rows) for x in facts] == [["teacher", "left"], ["teacher", "right"]]


def test_table_has_the_latest_evaluation_with_its_iterations_and_the_usual_time(
    finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    # The last one is logged after the last of 4 iterations, 0 to 3; a step waited for the disk.
    lines = [{"iteration": i, "total_loss": 1.0, "time": x} for i, x in enumerate((0.1, 9.0, 0.1))]
    lines.append({"iteration": 1, "bbox/AP": 10.0, "bbox/AP50": 20.0, "bbox/APs": 5.0})
    lines += [{"iteration": 3, "total_loss": 1.0, "time": 0.1}]
    lines += [{"iteration": 4, "bbox/AP": 30.0, "bbox/AP50": 50.0, "bbox/APs": math.nan}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    sections = {x.title: x.blocks for x in gather(str(tmp_path)).sections}
    table, curve = sections["AP of the student"]
    # AP, AP50, AP75, which was not measured, APs, of which there is no object, APm, APl
    assert table.rows == [["bbox", 4, "30.0", "50.0", "-", "-", "-", "-"]]
    assert curve.title == "AP, bbox"
    assert ["time", "0.10 s per iteration"] in sections[""][0].rows


def test_what_a_resumed_run_built_and_measured_last_is_told(finished: Path, tmp_path: Path) -> None:
    facts = [json.loads(x) for x in (finished / "facts.jsonl").read_text().splitlines()]
    (command,) = [x for x in facts if x["kind"] == "command"]
    built = next(x for x in facts if x["kind"] == "distillation")
    measured = next(x for x in facts if x["kind"] == "gradients")
    facts += [
        {**command, "resume": True},
        {**built, "config_file": "moved.yaml"},
        {**measured, "iteration": 77},
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    sections = {x.title: x.blocks for x in gather(str(tmp_path)).sections}
    assert ["config", "moved.yaml"] in sections["Teacher"][0].rows
    assert sections["Gradients"][0].caption.startswith("In iteration 77: ")


def test_curve_of_many_points_is_drawn_by_the_means_of_neighbours() -> None:
    # 0, 1, 2, 3 have the mean 1.5, and so on: 250 means of 1000 values.
    assert charts._means(range(1000)).tolist() == [1.5 + 4 * i for i in range(charts.POINTS)]
    assert charts._means([3.0, 1.0]).tolist() == [3.0, 1.0]


def test_page_is_one_file(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert d2kd_cli.main(["report", str(finished), "--output", str(path)]) == 0
    page = Page(path.read_text())
    assert len(page.sources) > 4 and all(x.startswith("data:image/") for x in page.sources)
    assert "<script" not in path.read_text() and "url(" not in path.read_text()


def test_unfinished_run_says_how_far_it_is(place: Path, teacher: List[Any]) -> None:
    cfg = run_config(place, teacher, ["CWD"], OUTPUT_DIR=str(place / "unfinished"))
    interrupt(cfg, 2)
    contents = gather(str(written(cfg)))
    page = Page(render(contents))
    assert "3 of 4 iterations" in page and "Gradients" in page
    assert "AP: nothing was evaluated yet" in page
    assert "Pictures: none was drawn yet (VIS_PERIOD 0)." in contents.absent
    assert "not evaluated: not yet, or EVAL_IMAGES is 0" in page


def test_run_that_has_just_begun_has_a_page(place: Path, teacher: List[Any]) -> None:
    cfg = run_config(place, teacher, ["CWD"], OUTPUT_DIR=str(place / "begun"))
    Path(cfg.OUTPUT_DIR).mkdir()
    contents = gather(str(written(cfg)))
    assert [x.title for x in contents.sections] == ["", "Config"]
    assert "0 of 4 iterations" in Page(render(contents)) and len(contents.absent) > 5


def test_student_alone_has_no_part_of_a_teacher(place: Path) -> None:
    cfg = run_config(place, OUTPUT_DIR=str(place / "alone"))
    run(cfg)
    contents = gather(str(written(cfg)))
    titles = {x.title for x in contents.sections}
    assert titles == {"", "Losses", "Command and versions", "Config"}
    assert sum(x.startswith("Teacher: ") for x in contents.absent) == 1


def test_values_are_escaped(finished: Path, tmp_path: Path) -> None:
    config = (finished / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("d2kd_shapes_train", "<b>set</b> & more"))
    html = render(gather(str(tmp_path)))
    assert "<b>" not in html and "&lt;b&gt;set&lt;/b&gt; &amp; more" in html
    Page(html)


def test_verdict_and_export_are_found_or_named(tmp_path: Path) -> None:
    run, paired, exported = (tmp_path / x for x in ("run", "paired", "exported"))
    for folder in (run, paired, exported):
        folder.mkdir()
    (paired / "results.csv").write_text("arm,seed,AP\n")
    (paired / "table.md").write_text(
        "|    |   AP |\n|----|------|\n| gain | +1.0 |\n\nGAIN: +1.0 AP"
    )
    (paired / "gain.png").write_bytes(b"png")
    proof = {"weights": "a.pth", "verified": True, "detections": 7, "error": ""}
    (exported / "report.json").write_text(json.dumps({**proof, "onnx": {"error": "no onnx"}}))
    assert verdict(str(run)).startswith("Verdict: ")
    assert export_proof(str(run)).startswith("Export: ")
    table, text, picture = verdict(str(run), str(paired)).blocks
    assert table.rows == [["gain", "+1.0"]] and text.text == "GAIN: +1.0 AP"
    assert isinstance(picture, Picture)
    rows = dict(export_proof(str(run), str(exported)).blocks[0].rows)
    assert rows["student.pth, student.yaml"] == "verified: the same to the bit (7 detections)"
    assert rows["onnx"] == "not proved: no onnx"
    paired.rename(f"{run}_paired")
    exported.rename(run / "exported")
    assert isinstance(verdict(f"{run}/"), Section) and isinstance(export_proof(str(run)), Section)


@pytest.mark.parametrize(
    "found, words",
    [
        ({"verified": False}, "NOT the student of the run (7 detections)"),
        ({"verified": False, "equal": 3}, "NOT the student of the run (7 detections)"),
        ({"verified": True, "equal": 6}, "verified: 6 of 7 detections are the same"),
        ({"verified": True, "equal": 7}, "verified: the same to the bit (7 detections)"),
        ({"no_yaml": "of timm"}, "not proved: of timm"),
    ],
)
def test_export_that_is_not_proved_is_not_told_as_one(
    found: Any, words: str, tmp_path: Path
) -> None:
    report = {"weights": "a.pth", "detections": 7, "error": "", **found}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (facts,) = export_proof(str(tmp_path), str(tmp_path)).blocks
    assert dict(facts.rows)["student.pth, student.yaml"] == words


@pytest.mark.parametrize("find, option", [(verdict, "--compare"), (export_proof, "--export")])
def test_folder_of_another_kind_is_refused(
    find: Callable[[str, str], Any], option: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=f"{option}: there is no "):
        find(str(tmp_path), str(tmp_path))


def test_folder_without_a_run_is_refused(finished: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"Runs below it: .*{finished}"):
        report.main([str(finished.parent)])


def test_resumed_iterations_take_the_place_of_those_that_were_lost(tmp_path: Path) -> None:
    values = [(19, 4.0), (39, 3.0), (59, 2.0), (39, 3.5), (59, 2.5)]
    lines = [json.dumps({"iteration": i, "total_loss": x}) for i, x in values]
    lines.insert(1, json.dumps({"iteration": 2, "gradient_share/cwd": 0.5}))  # in no order
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert Metrics(str(tmp_path)).curve("total_loss") == ([19, 39, 59], [4.0, 3.5, 2.5])


def test_ap_of_a_class_is_no_loss_whatever_it_is_called(tmp_path: Path) -> None:
    line = {"iteration": 19, "loss_cls": 1.0, "total_loss": 1.0, "bbox/AP": 3.0}
    line["bbox/AP-loss of hair"] = 2.0
    (tmp_path / "metrics.json").write_text(json.dumps(line))
    assert Metrics(str(tmp_path)).losses() == ["total_loss", "loss_cls"]


def test_losses_at_the_end_are_means_over_the_last_tenth(tmp_path: Path) -> None:
    """Of iterations 0 to 99 that is 90 to 99: (90 + ... + 99) / 10 = 94.5, and 0.5 of the other."""
    lines = [{"iteration": i, "total_loss": 0.0, "loss_a": float(i)} for i in range(100)]
    lines += [{"iteration": i, "loss_b": 0.5} for i in (19, 39, 59, 79, 99)]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    metrics = Metrics(str(tmp_path))
    assert metrics.at_end(["loss_a", "loss_b"]) == 95.0
    assert metrics.at_end([]) == 0.0


def test_losses_at_the_end_of_a_short_run_are_the_last_ones(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"iteration": 4, "loss_a": 3.0}))
    assert Metrics(str(tmp_path)).at_end(["loss_a"]) == 3.0


def test_begun_run_has_nothing_of_the_one_whose_folder_it_took(tmp_path: Path) -> None:
    old = [{"iteration": i, "total_loss": 2.0, "loss_mgd": 1.0} for i in range(19, 100, 20)]
    new = [{"iteration": 2, "gradient_share/pkd": 0.5}, {"iteration": 19, "total_loss": 3.0}]
    lines = [*old, {"iteration": 100, "bbox/AP": 40.0}, *new]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    metrics = Metrics(str(tmp_path))
    assert metrics.losses() == ["total_loss"] and not metrics.evaluations()
    assert metrics.done == 20 and metrics.curve("gradient_share/pkd") == ([2], [0.5])


def test_ap_at_the_end_of_a_stage_is_kept_where_the_next_one_logs_in_its_first_step(
    tmp_path: Path,
) -> None:
    lines = [{"iteration": i, "total_loss": 2.0} for i in (18, 19, 39)]
    lines.insert(1, {"iteration": 19, "bbox/AP": 9.0})
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert Metrics(str(tmp_path)).curve("bbox/AP") == ([19], [9.0])


def test_resumed_run_keeps_what_was_evaluated_before_and_not_what_was_lost(tmp_path: Path) -> None:
    lines = [{"iteration": i, "total_loss": 2.0, "bbox/AP": i / 10} for i in (19, 39, 59)]
    (tmp_path / "metrics.json").write_text(
        "\n".join(map(json.dumps, [*lines, {"iteration": 39, "total_loss": 1.0}]))
    )
    assert Metrics(str(tmp_path)).curve("bbox/AP") == ([19], [1.9])

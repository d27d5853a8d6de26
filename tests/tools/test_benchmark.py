"""The benchmark on toy detectors: what it measures belongs to the machine, how it sums up to us."""

import json
import multiprocessing
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Callable, Dict, List

import pytest
import torch


@pytest.fixture
def benchmark(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("benchmark")


@pytest.fixture
def run(benchmark: ModuleType, small: List[str], tmp_path: Path) -> Callable[..., Dict[str, Any]]:
    def run(*words: str) -> Dict[str, Any]:
        benchmark.main([*small, "--json", str(tmp_path / "cost.json"), *words])
        return json.loads((tmp_path / "cost.json").read_text())

    return run


def test_ratios_are_those_of_the_rounds(
    run: Callable[..., Dict[str, Any]], config_file: Callable[[str, str], str]
) -> None:
    report = run("--config-file", config_file("retinanet", "faster_rcnn"))
    seconds = report["seconds"]
    assert list(seconds) == [
        "student",
        "teacher",
        "head MGD",
        "with MGD",
        "head PKD",
        "with PKD",
    ]
    assert all(len(x) == 2 and min(x) > 0 for x in seconds.values())
    assert list(report["ratios"]) == ["MGD", "PKD"]
    for name, ratios in report["ratios"].items():
        arms = [seconds[k] for k in ("student", "teacher", f"head {name}", f"with {name}")]
        expected = [c / (a + b + h) for a, b, h, c in zip(*arms)]
        assert ratios["c/(a+b+h)"] == [median(expected), min(expected), max(expected)]
        assert ratios["c/(a+b)"][0] > ratios["c/(a+b+h)"][0]
        assert 0 < ratios["teacher share"][0] < 1
    # Of two rounds, the median is the mean.
    mgd, pkd = seconds["head MGD"], seconds["head PKD"]
    heads = report["heads"]
    assert heads["PKD"]["milliseconds"] == pytest.approx(
        [500 * sum(pkd), 1e3 * min(pkd), 1e3 * max(pkd)]
    )
    assert heads["PKD"]["of MGD"][0] == pytest.approx((pkd[0] / mgd[0] + pkd[1] / mgd[1]) / 2)
    assert heads["MGD"]["of MGD"] == [1, 1, 1]
    # Between pyramids of equal channels PKD has no adapter, so nothing to train and to multiply.
    assert heads["PKD"]["parameters"] == heads["PKD"]["flops"] == 0 < heads["PKD"]["saved_bytes"]
    assert heads["MGD"]["parameters"] > 0 and heads["MGD"]["flops"] > 0


def test_report_says_what_was_measured_where(
    run: Callable[..., Dict[str, Any]],
    config_file: Callable[[str, str], str],
    capsys: pytest.CaptureFixture,
) -> None:
    path = config_file("mask_rcnn", "faster_rcnn")
    report = run("--config-file", path, "--heads", "PKD", "--cpu-seconds", "--look")
    assert report["pair"] == path
    seconds = report["seconds"]
    looks = [x / y for x, y in zip(seconds["look PKD"], seconds["with PKD"])]
    assert report["ratios"]["PKD"]["l/c"] == [median(looks), min(looks), max(looks)]
    assert (report["size"], report["images"], report["boxes"]) == ("64x96", 2, 4)
    assert (report["rounds"], report["clock"]) == (2, "CPU")
    assert "1 of" in report["hardware"] and report["torch"] == torch.__version__
    assert report["detectron2"] and report["peak_mib"] == {}
    assert report["heads"]["PKD"]["of MGD"] is None
    printed = capsys.readouterr().out
    assert report["hardware"] in printed and "c/(a+b+h)" in printed and "with PKD" in printed
    assert "saved MiB" in printed and "of MGD" in printed


@pytest.mark.process
def test_memory_of_student_and_each_step(
    run: Callable[..., Dict[str, Any]],
    config_file: Callable[[str, str], str],
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Processes that import nothing anew are as good here.
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(benchmark, "get_context", lambda method: context)
    path = config_file("retinanet", "retinanet")
    report = run("--config-file", path, "--heads", "PKD", "--memory")
    assert list(report["peak_mib"]) == ["student", "with PKD"]
    assert all(x > 50 for x in report["peak_mib"].values())


def test_row_of_a_head(benchmark: ModuleType) -> None:
    head = {
        "milliseconds": [12.34, 12.0, 13.0],
        "of MGD": [0.5, 0.25, 1.0],
        "flops": 1_500_000_000,
        "parameters": 5_901_312,
        "saved_bytes": 3 * 2**19,  # 1.5 MiB
    }
    row = ["AMD", "12.3 [12.0, 13.0]", "0.500 [0.250, 1.000]", "1.500", "5,901,312", "1.50"]
    assert benchmark._head_row("AMD", head) == row
    unknown = {**head, "of MGD": None, "flops": None}
    assert benchmark._head_row("AMD", unknown)[2:4] == ["-", "-"]


@pytest.mark.parametrize("words", [["--size", "320"], ["--rounds", "0"], ["--pair", "none"]])
def test_wrong_words_are_refused(benchmark: ModuleType, words: list) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_args(words)

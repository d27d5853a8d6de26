"""The benchmark on toy detectors: what it measures belongs to the machine, how it sums up to us."""

import importlib
import json
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Callable, Dict

import pytest
import torch
from torch import nn

from d2kd import load_config

from toys import detector_config, distill_config

ROOT = Path(__file__).parents[2]
SMALL = ["--size", "64x96", "--rounds", "2", "--warmup", "1"]
SMALL += ["--device", "cpu", "--threads", "1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # By name, so that the processes that --memory starts can import it too.
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("benchmark")


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str, str], str]:
    def write(student: str, teacher: str) -> str:
        teacher_file, path = tmp_path / "teacher.yaml", tmp_path / "distill.yaml"
        teacher_file.write_text(detector_config(teacher).dump())
        opts = ["DISTILL.TEACHER.CONFIG_FILE", str(teacher_file)]
        cfg = distill_config(student, opts, ["MGD", "PKD"])
        path.write_text(cfg.dump())
        return str(path)

    return write


def run(benchmark: ModuleType, tmp_path: Path, *words: str) -> Dict[str, Any]:
    benchmark.main([*SMALL, "--json", str(tmp_path / "cost.json"), *words])
    return json.loads((tmp_path / "cost.json").read_text())


def test_ratios_are_those_of_the_rounds(
    benchmark: ModuleType, config_file: Callable[[str, str], str], tmp_path: Path
) -> None:
    report = run(benchmark, tmp_path, "--config-file", config_file("retinanet", "faster_rcnn"))
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


def test_report_says_what_was_measured_where(
    benchmark: ModuleType,
    config_file: Callable[[str, str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = config_file("mask_rcnn", "faster_rcnn")
    report = run(benchmark, tmp_path, "--config-file", path, "--heads", "PKD", "--cpu-seconds")
    assert report["pair"] == path
    assert (report["size"], report["images"], report["boxes"]) == ("64x96", 2, 4)
    assert (report["rounds"], report["clock"]) == (2, "CPU")
    assert "1 of" in report["hardware"] and report["torch"] == torch.__version__
    assert report["detectron2"] and report["peak_mib"] == {}
    printed = capsys.readouterr().out
    assert report["hardware"] in printed and "c/(a+b+h)" in printed and "with PKD" in printed


def test_memory_of_student_and_each_step(
    benchmark: ModuleType, config_file: Callable[[str, str], str], tmp_path: Path
) -> None:
    path = config_file("retinanet", "retinanet")
    report = run(benchmark, tmp_path, "--config-file", path, "--heads", "PKD", "--memory")
    assert list(report["peak_mib"]) == ["student", "with PKD"]
    assert all(x > 50 for x in report["peak_mib"].values())


def test_one_student_and_one_teacher_for_all_arms(
    benchmark: ModuleType, config_file: Callable[[str, str], str]
) -> None:
    args = benchmark.parse_args([*SMALL, "--config-file", config_file("retinanet", "retinanet")])
    cfg = benchmark.build_config(args, "")
    whole = benchmark.build_model(cfg)
    ones = [benchmark.with_one_head(whole, name) for name in ("MGD", "PKD")]
    assert all(x.student is whole.student and x.teacher is whole.teacher for x in ones)
    assert [list(x.heads) for x in ones] == [["MGD"], ["PKD"]]


def test_head_alone_reaches_the_head_and_not_the_student(
    benchmark: ModuleType, config_file: Callable[[str, str], str]
) -> None:
    args = benchmark.parse_args([*SMALL, "--config-file", config_file("retinanet", "retinanet")])
    cfg = benchmark.build_config(args, "")
    whole = benchmark.build_model(cfg).train()
    benchmark.calm(whole)
    with benchmark.EventStorage():
        distiller = benchmark.with_one_head(whole, "MGD")
        batch = benchmark.random_batch(whole.student, args)
        benchmark.head_step(cfg, distiller, batch)()
    assert all(p.grad is not None for p in distiller.heads.parameters())
    assert all(p.grad is None for p in whole.student.parameters())


@pytest.mark.parametrize("pair", ["retinanet_R_101-R_50", "faster_rcnn_R_101-R_18"])
def test_pairs_have_the_zoos_sizes(benchmark: ModuleType, pair: str, tmp_path: Path) -> None:
    args = benchmark.parse_args(["--pair", pair])
    cfg = benchmark.build_config(args, str(tmp_path))
    teacher = load_config(cfg.DISTILL.TEACHER.CONFIG_FILE)
    assert (teacher.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.OUT_CHANNELS) == (101, 256)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert cfg.DISTILL.HEADS == ["MGD", "PKD"]


@pytest.mark.parametrize("words", [["--size", "320"], ["--rounds", "0"], ["--pair", "none"]])
def test_wrong_words_are_refused(benchmark: ModuleType, words: list) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_args(words)


def test_calm_shrinks_the_last_norm_of_a_block(benchmark: ModuleType) -> None:
    block = benchmark.BasicBlock(8, 8, norm="FrozenBN")
    distiller = nn.Module()
    distiller.student, distiller.teacher = block, None
    benchmark.calm(distiller)
    assert torch.allclose(block.conv2.norm.weight, torch.tensor(0.1))
    assert torch.allclose(block.conv1.norm.weight, torch.tensor(1.0))

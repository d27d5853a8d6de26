"""The command line, as users run it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
import torch

from tests.helpers.runs import run_config
from tests.helpers.toys import ROOT, stock_backbone, write_teacher

pytestmark = pytest.mark.process


def train_net(*args: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", os.path.join(ROOT, "train_net.py")]
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT_DIR of a distilled run of 4 iterations; its config is ../config.yaml."""
    folder = tmp_path_factory.mktemp("train_net")
    stock = stock_backbone("retinanet")
    teacher = write_teacher(folder, "retinanet", MODEL__FPN__OUT_CHANNELS=64, **stock)
    cfg = run_config(folder, teacher, DATASETS__TEST=("d2kd_shapes_val",), **stock)
    (folder / "config.yaml").write_text(cfg.dump())
    done = train_net("--config-file", folder / "config.yaml")
    assert done.returncode == 0, done.stdout[-3000:]
    (folder / "run" / "stdout").write_text(done.stdout)
    return folder / "run"


def metrics(output: Path) -> List[Any]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_help_teaches_the_first_commands(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(os.path.join(ROOT, "train_net.py"), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("--config-file", "--resume", "--eval-only", "--num-gpus", "DISTILL.", "teacher"):
        assert word in text, word
    assert "configs/quickstart/" in text


def test_run_leaves_checkpoints_metrics_events_config_and_log(output: Path) -> None:
    files = {x.name for x in output.iterdir()}
    expected = {"model_final.pth", "last_checkpoint", "metrics.json", "config.yaml", "log.txt"}
    assert expected <= files
    assert any(x.startswith("events.out.tfevents") for x in files)
    written = set().union(*metrics(output))
    assert {"total_loss", "loss_cls", "loss_mgd", "MGD/weight", "lr", "bbox/AP"} <= written


def test_log_tells_what_is_distilled_from_what(output: Path) -> None:
    for name in ("stdout", "log.txt"):
        log = (output / name).read_text()
        assert "Distilling RetinaNet -> RetinaNet" in log, name
        assert "p3 (stride 8, 32 channels) <- p3 (stride 8, 64 channels)" in log, name


def test_evaluation_needs_no_teacher_and_then_the_run_goes_on(output: Path) -> None:
    weights = output / "model_final.pth"
    config = ["--config-file", output.parent / "config.yaml"]
    kept = {x: x.read_bytes() for x in (output / "config.yaml", *output.glob("*.pth"))}
    gone = ["DISTILL.TEACHER.WEIGHTS", "gone.pth", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    done = train_net(*config, "--eval-only", "MODEL.WEIGHTS", weights, *gone)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Evaluation results for bbox" in done.stdout
    assert {x: x.read_bytes() for x in (output / "config.yaml", *output.glob("*.pth"))} == kept

    before = torch.load(weights, weights_only=True)["model"]
    done = train_net(*config, "--resume", "SOLVER.MAX_ITER", 6)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Resuming at iteration 4." in done.stdout
    checkpoint = torch.load(weights, weights_only=True)
    assert checkpoint["iteration"] == 5
    key = "backbone.fpn_output3.weight"
    assert not torch.equal(checkpoint["model"][key], before[key])

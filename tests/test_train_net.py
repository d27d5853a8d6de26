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

from tests.helpers.forks import python
from tests.helpers.runs import run_config
from tests.helpers.toys import ROOT, stock_backbone, write_teacher

pytestmark = pytest.mark.process

TRAIN_NET = os.path.join(ROOT, "train_net.py")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT_DIR of a distilled run of 4 iterations; its config is ../config.yaml."""
    folder = tmp_path_factory.mktemp("train_net")
    stock = stock_backbone("retinanet")
    teacher = write_teacher(folder, "retinanet", MODEL__FPN__OUT_CHANNELS=64, **stock)
    cfg = run_config(folder, teacher, DATASETS__TEST=("d2kd_shapes_val",), **stock)
    (folder / "config.yaml").write_text(cfg.dump())
    # As a user starts it, which the runs below are not.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TRAIN_NET, "--config-file", folder / "config.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
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
        runpy.run_path(TRAIN_NET, run_name="__main__")
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


def test_evaluation_needs_no_teacher_and_then_the_run_goes_on(output: Path, tmp_path: Path) -> None:
    weights = output / "model_final.pth"
    config = ["--config-file", output.parent / "config.yaml"]
    kept = {x: x.read_bytes() for x in (output / "config.yaml", *output.glob("*.pth"))}
    gone = ["DISTILL.TEACHER.WEIGHTS", "gone.pth", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    said = tmp_path / "said"
    code = python([TRAIN_NET, *config, "--eval-only", "MODEL.WEIGHTS", weights, *gone], said)
    assert code == 0, said.read_text()[-3000:]
    assert "Evaluation results for bbox" in said.read_text()
    assert {x: x.read_bytes() for x in (output / "config.yaml", *output.glob("*.pth"))} == kept

    before = torch.load(weights, weights_only=True)["model"]
    code = python([TRAIN_NET, *config, "--resume", "SOLVER.MAX_ITER", 6], said)
    assert code == 0, said.read_text()[-3000:]
    assert "Resuming at iteration 4." in said.read_text()
    checkpoint = torch.load(weights, weights_only=True)
    assert checkpoint["iteration"] == 5
    key = "backbone.fpn_output3.weight"
    assert not torch.equal(checkpoint["model"][key], before[key])

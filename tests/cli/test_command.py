"""`d2kd`: fast, helpful, from any folder, and one line for a user's mistake."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

import d2kd
import d2kd_cli
from d2kd.cli import train
from tests.helpers.forks import cheap_processes
from tests.helpers.toys import ROOT

PKD = ["--config-file", "quickstart/pkd.yaml"]
FEW = ["DATASETS.SHAPES.NUM_TRAIN", "4", "DATASETS.SHAPES.NUM_VAL", "2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.process
def test_help_and_version_import_no_torch_and_no_detectron2() -> None:
    code = (
        "import sys, d2kd_cli\n"
        "assert d2kd_cli.main(['--help']) == d2kd_cli.main(['--version']) == 0\n"
        "assert not {'torch', 'detectron2', 'd2kd'} & set(sys.modules)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, command in d2kd_cli.COMMANDS.items():
        assert f"  {name} " in done.stdout and command.summary in done.stdout
    assert done.stdout.splitlines()[-1] == f"d2kd {d2kd.__version__}"


def test_bash_completes_what_the_help_tells_it_to() -> None:
    line = d2kd_cli.help_text().splitlines()[-1]
    done = subprocess.run(["bash", "-c", f"{line} && complete -p d2kd"], capture_output=True)
    assert done.returncode == 0 and b"draw-detections" in done.stdout


@pytest.mark.parametrize("name", d2kd_cli.COMMANDS)
def test_each_command_has_a_help_with_examples(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        d2kd_cli.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "xample" in text and "--traceback" in text
    assert f"usage: d2kd {name} " in text and f"  d2kd {name}" in text


# How it is wrong, and what the line says
MISTAKES = {
    "unknown key": (["train", *PKD, "SOLVER.BASE_LRR", "1"], "did you mean SOLVER.BASE_LR?"),
    "key without effect": (
        ["train", *PKD, "DISTILL.MGD.LOSS_WEIGHT", "1.0"],
        "would have no effect",
    ),
    "no such YAML": (["train", "--config-file", "no.yaml"], "'no.yaml' does not exist"),
    "no such weights": (
        ["train", *PKD, "DISTILL.TEACHER.WEIGHTS", "gone.pth"],
        "DISTILL.TEACHER.WEIGHTS: there is no file 'gone.pth'",
    ),
    "no such plug-in": (["train", *PKD, "--plugin", "no.py"], "--plugin: there is no file"),
    "wrong classes": (
        ["train", *PKD, *FEW, "MODEL.RETINANET.NUM_CLASSES", "3"],
        "MODEL.RETINANET.NUM_CLASSES is 3, but data set d2kd_shapes_train has 6 classes",
    ),
    "nothing to evaluate": (
        ["eval", "--config-file", "quickstart/student.yaml", *FEW],
        "MODEL.WEIGHTS is empty",
    ),
    "nothing to export": (["export", *PKD, "--output", "x"], "give one with --weights"),
    "unknown head": (["heads", "crosskd"], "Did you mean 'CrossKD'?"),
    "unknown key to look up": (["keys", "SOLVER.BASELR"], "Did you mean SOLVER.BASE_LR?"),
    "doctor": (["doctor", *PKD, "DISTILL.HEADS", "['DKD']"], "DKD takes two-stage -> two-stage"),
    "unknown command": (["trian"], "did you mean train?"),
    "list without brackets": (
        ["train", *PKD, "DISTILL.HEADS", "PKD"],
        "A list is written DISTILL.HEADS \"['PKD']\"",
    ),
    "JSON that is a folder": (
        [
            *("train", "--config-file", "quickstart/student.yaml", "DATASETS.TRAIN", "('mine',)"),
            *("DATASETS.COCO_FORMAT", "[{'NAME': 'mine', 'JSON': '.', 'IMAGES': '.'}]"),
        ],
        "the annotation file of mine is no file",
    ),
    "nothing to compare": (
        ["compare", "--config-file", "quickstart/student.yaml"],
        "there is nothing to compare it with",
    ),
    "no such table": (["bench", "no.yaml"], "There is no table 'no.yaml'"),
}


@pytest.mark.parametrize("words, told", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(
    words: List[str],
    told: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    forget_sets: Any,
) -> None:
    # Its log handlers would outlive the test.
    monkeypatch.setattr(train, "prepare_output", lambda cfg, args: None)
    assert d2kd_cli.main(words) == 2
    text = capsys.readouterr().err
    lines = [x for x in text.splitlines() if "Warning" not in x and not x.startswith("  ")]
    assert len(lines) == 1 and told in lines[0]
    assert lines[0].startswith("d2kd") and ": error: " in lines[0]
    assert not Path("output").exists(), "nothing is written"


@pytest.mark.parametrize(
    "words, told",
    [
        (["train", "--resmue"], "did you mean --resume?"),
        (["train", *PKD, "--num-gpus", "0"], "--num-gpus 0 --num-machines 1: both count processes"),
        (["eval", *PKD, "--machine-rank", "1"], "--machine-rank 1: of --num-machines 1 the last"),
        (["doctor", *PKD, "--images", "0"], "--images: must be 1 or more, got 0"),
        (["draw-detections", "a.txt", "--detector", "a", "b", "c"], "'a.txt' is no name of a pict"),
    ],
)
def test_wrong_option_is_one_line_and_exit_code_2(
    words: List[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        d2kd_cli.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and told in lines[0]


def test_traceback_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    assert d2kd_cli.main(["train", *PKD, "--traceback", "SOLVER.BASE_LRR", "1"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and "did you mean SOLVER.BASE_LR?" in text


@pytest.mark.process
def test_train_net_and_its_processes_end_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    several = ["--num-gpus", "2", "MODEL.DEVICE", "cpu"]
    words = ["train_net.py", *PKD, *several, "DISTILL.TEACHER.WEIGHTS", "gone.pth"]
    monkeypatch.setattr(sys, "argv", words)
    with cheap_processes(), pytest.raises(SystemExit) as ended:
        runpy.run_path(f"{ROOT}/train_net.py", run_name="__main__")
    text = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in text
    told = "d2kd train: error: DISTILL.TEACHER.WEIGHTS: there is no file 'gone.pth'."
    assert text.splitlines()[-1] == told


def test_bug_in_a_plugin_is_no_mistake_of_the_command_line() -> None:
    """Python shows its traceback and ends with 1."""
    Path("bug.py").write_text("raise ValueError('a bug')\n")
    with pytest.raises(ValueError, match="a bug"):
        d2kd_cli.main(["train", *PKD, "--plugin", "bug.py"])

"""Options and overrides in any order, the same in every command."""

from pathlib import Path
from typing import Dict, List

import pytest

from tests.helpers.commands import COMMANDS, files_with_parsers, parse

# What each command cannot do without.
REQUIRED: Dict[str, List[str]] = {
    "d2kd train": [],
    "d2kd eval": [],
    "d2kd doctor": ["--config-file", "run.yaml"],
    "d2kd export": ["--config-file", "run.yaml", "--output", "out"],
    "d2kd.data.preview": ["preview.png"],
    "tools/benchmark.py": [],
    "d2kd label": ["--config-file", "run.yaml", "--images", "folder", "--output", "out.json"],
    "d2kd draw-detections": ["picture.png", "--detector", "title", "x.yaml", "x.pth"],
    "d2kd draw": ["--config-file", "x", "--weights", "x", "--output", "x"],
    "tools/paired_baseline.py": ["--config-file", "run.yaml", "--output", "out"],
    "d2kd quickstart": [],
}
FLAGS = {
    "d2kd train": "--resume",
    "d2kd quickstart": "--fresh",
    "d2kd label": "--teacher",
    "tools/benchmark.py": "--amp",
}
OVERRIDES = ["SOLVER.MAX_ITER", "1000", "SEED", "-1", "DISTILL.MGD.LOSS_WEIGHT", "-1e-5"]
WITHOUT_OVERRIDES = {"d2kd check", "d2kd heads", "d2kd keys", "tools/shrink_checkpoint.py"}
WITHOUT_OVERRIDES |= {"d2kd report", "tools/bench.py", "tools/bench_curves.py"}
WITHOUT_OVERRIDES |= {"tools/bench_losses.py"}
WITHOUT_OVERRIDES |= {"tools/bench_tables.py", "tools/gpu_check.py", "tools/bench_verdict.py"}
WITHOUT_OVERRIDES |= {"tools/efficientnet_lite.py", "tools/choose_classes.py"}


def test_every_command_is_tried() -> None:
    assert sorted(COMMANDS.values()) == files_with_parsers()
    assert set(REQUIRED) == set(COMMANDS) - WITHOUT_OVERRIDES


@pytest.mark.parametrize("command", REQUIRED)
def test_overrides_may_stand_before_between_and_behind_options(command: str) -> None:
    required, flag = REQUIRED[command], [FLAGS[command]] if command in FLAGS else []
    positional = [x for x in required[:1] if not x.startswith("-")]  # comes before any override
    options = required[len(positional) :]
    for words in (
        [*required, *flag, *OVERRIDES],
        [*positional, *OVERRIDES, *options, *flag],
        [*positional, *OVERRIDES[:2], *options, *OVERRIDES[2:4], *flag, *OVERRIDES[4:]],
    ):
        args = parse(command, words)
        assert args.opts == OVERRIDES
        assert all(getattr(args, x[2:]) is True for x in flag)
        assert parse(command, [*required, *flag]).opts == []


LISTS = [
    ("tools/paired_baseline.py", "seeds", ["1", "2"], [1, 2]),
    ("d2kd export", "formats", ["torchscript", "onnx"], ["torchscript", "onnx"]),
    ("tools/benchmark.py", "heads", ["MGD", "FGD+DKD"], ["MGD", "FGD+DKD"]),
]


@pytest.mark.parametrize("command, name, words, expected", LISTS)
@pytest.mark.parametrize("count", [1, 2])
def test_list_ends_where_a_config_key_begins(
    command: str, name: str, words: List[str], expected: List[object], count: int
) -> None:
    option = [f"--{name}", *words[:count]]
    for overrides in (OVERRIDES[:2], OVERRIDES[2:4], ["DISTILL.ReviewKD.LOSS_WEIGHT", "1"]):
        for line in ([*option, *overrides], [*overrides, *option]):
            args = parse(command, [*REQUIRED[command], *line])
            assert getattr(args, name) == expected[:count] and args.opts == overrides


@pytest.mark.parametrize("command, name, words, expected", LISTS[:2])
def test_wrong_value_of_a_list_is_told_and_not_taken_for_a_key(
    command: str, name: str, words: List[str], expected: object, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse(command, [*REQUIRED[command], f"--{name}", words[0], "onxn"])
    assert "onxn" in capsys.readouterr().err


@pytest.mark.parametrize("command", REQUIRED)
@pytest.mark.parametrize(
    "words, expected",
    [
        (["SOLVER.MAX_ITER"], "the config key SOLVER.MAX_ITER has no value"),
        (["SEED", "1", "SOLVER.MAX_ITER"], "the config key SOLVER.MAX_ITER has no value"),
        (["SOLVER.MAX_ITER", "1", "--confg-file", "x"], "there is no option --confg-file"),
        (["--resmue"], "there is no option --resmue"),
        (["SOLVER.MAX_ITER", "--help"], "SOLVER.MAX_ITER has no value: --help is an option"),
        (["SOLVER.MAX_ITER=1000"], "are written KEY VALUE: SOLVER.MAX_ITER 1000"),
        (["SOLVER.STEPS", "(1,", "2)"], r"2) is neither an option nor a config key"),
        (["other.yaml", "SEED", "1"], "other.yaml is neither an option nor a config key"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_told_alike(
    command: str, words: List[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(command, [*REQUIRED[command], *words])
    assert error.value.code == 2 and expected in capsys.readouterr().err


def test_nearest_option_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("d2kd train", ["SEED", "1", "--resmue"])
    assert "--resmue (did you mean --resume?)" in capsys.readouterr().err


def test_shortened_and_joined_options_are_understood(tmp_path: Path) -> None:
    args = parse("d2kd train", ["SEED", "1", "--config-file=a.yaml", "--num-g", "2", "--eval"])
    assert (args.config_file, args.num_gpus, args.eval_only) == ("a.yaml", 2, True)
    assert args.opts == ["SEED", "1"]

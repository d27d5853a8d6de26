"""The check on a GPU goes through all its parts, whatever becomes of one of them."""

import json
from pathlib import Path
from types import ModuleType
from typing import Callable

import pytest


@pytest.mark.process
def test_part_that_fails_does_not_stop_the_others(
    tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_check = tool("gpu_check")
    codes = {"fails": "raise SystemExit('no such kernel')", "works": "print(5)"}

    def parts(output: Path, rehearse: bool) -> list:
        return [
            gpu_check.Part(x, ["-c", code], lambda text: [{"found": int(text)}])
            for x, code in codes.items()
        ]

    monkeypatch.setattr(gpu_check, "parts_of", parts)
    assert gpu_check.main(["--rehearse", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [x["state"] for x in found] == ["failed", "ok"]
    assert [x["rows"] for x in found] == [[{"last line": "no such kernel"}], [{"found": 5}]]


@pytest.mark.process
def test_part_that_fails_has_no_rows_of_an_earlier_check(
    tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_check = tool("gpu_check")
    monkeypatch.setattr(gpu_check.sys, "executable", "false")
    for part in gpu_check.parts_of(tmp_path, rehearse=True):
        if part.file:
            part.file.parent.mkdir(exist_ok=True)
            if part.name == "training":
                part.file.write_text('{"iteration": 1, "time": 0.1, "total_loss": 1, "bbox/AP": 9}')
            else:
                part.file.write_text('{"seconds": {"student": [0.2]}, "peak_mib": {}}')
            assert part.read("")[0] not in ({"AP": None}, {})
        gpu_check.run(part, tmp_path, 60.0)
        assert part.state == "failed"
        assert part.rows in ([{"last line": "none"}], [{"AP": None}], [{"which": []}])


@pytest.mark.process
def test_part_that_hangs_is_ended(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    gpu_check = tool("gpu_check")
    part = gpu_check.Part("hangs", ["-c", "import time; time.sleep(600)"], lambda text: [])
    gpu_check.run(part, tmp_path, 1.0)
    assert part.state == "out of time"


def test_no_part_begins_after_the_end(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    gpu_check = tool("gpu_check")
    part = gpu_check.Part("late", ["no such file"], lambda text: [])
    gpu_check.run(part, tmp_path, 0.0)
    assert part.state == "out of time" and not list(tmp_path.iterdir())


def test_rows_are_the_whole_steps_beside_the_student(tool: Callable[[str], ModuleType]) -> None:
    seconds = {"student": [0.2, 0.4], "head PKD": [9.0, 9.0], "with PKD": [0.3, 0.5]}
    report = {"seconds": seconds, "peak_mib": {"with PKD": 2048.0}}
    assert tool("gpu_check").benchmark_rows(report) == [
        {"step": "student", "ms": 300.0, "of the student's": 1.0},
        {"step": "with PKD", "ms": 400.0, "of the student's": 1.375, "GiB": 2.0},
    ]


@pytest.mark.parametrize("rehearse", [True, False])
def test_words_of_the_benchmark_are_read_by_it(
    rehearse: bool, tool: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    benchmark = tool("benchmark")
    parts = tool("gpu_check").parts_of(tmp_path, rehearse)
    assert len({x.name for x in parts}) == len(parts)
    words = [x.words[1:] for x in parts if x.words[0] == "tools/benchmark.py"]
    assert len(words) == (3 if rehearse else 10)
    for x in words:
        args = benchmark.parse_args(x)
        assert args.heads and args.opts == []


def test_a_machine_without_a_gpu_is_a_mistake_in_one_line(
    tool: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    gpu_check = tool("gpu_check")
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.run_command("gpu_check.py", gpu_check.main, []) == 2
    assert capsys.readouterr().err.startswith("gpu_check.py: error: PyTorch sees no GPU.")

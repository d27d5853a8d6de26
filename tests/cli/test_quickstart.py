"""The quickstart: both students at once, one mistake ends both, busy cores are told."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Sequence

import pytest

from d2kd.cli import quickstart
from d2kd.cli.steps import METRICS, Steps

STUDENTS = {
    "student alone": "configs/quickstart/student.yaml",
    "student distilled": "configs/quickstart/cwd.yaml",
}
FOUND = ["copypaste: Task: bbox", "copypaste: " + ",".join(METRICS), "copypaste: 1,2,3,4,5"]


def test_both_students_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=20)

    class Together(Steps):
        def run(self, config_file: str, opts: Sequence[str], **rest: Any) -> Dict[str, float]:
            both.wait()
            return {"AP": len(opts)}

    opts = ["SEED", "2", "DISTILL.CWD.LOSS_WEIGHT", "3"]
    found = quickstart.run_students(Together(), STUDENTS, opts, jobs=2)
    assert found == {"student alone": {"AP": 2}, "student distilled": {"AP": 4}}
    assert list(found) == list(STUDENTS)


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that runs in place of `python -m d2kd`; the folder is where output goes."""
    script = tmp_path / "script"
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def write(script: Path, *lines: str) -> None:
    script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    script.chmod(0o755)


def test_a_mistake_in_one_ends_the_other(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mistake = 'case "$*" in *cwd*) sleep 1; echo "DISTILL.X is wrong"; exit 2;; esac'
    write(scripted, mistake, "exec sleep 100")
    begin = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        opts = ["OUTPUT_DIR", str(tmp_path)]
        quickstart.run_students(Steps(), STUDENTS, opts, jobs=2)
    assert ended.value.code == 2 and time.monotonic() - begin < 50
    assert capsys.readouterr().err == "DISTILL.X is wrong\n"


def test_a_finished_step_is_not_repeated(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(scripted, *(f"echo '{x}'" for x in FOUND), "echo $OMP_NUM_THREADS > threads")
    monkeypatch.chdir(tmp_path)
    opts = ["OUTPUT_DIR", str(tmp_path)]
    found = Steps().run(STUDENTS["student alone"], opts)
    assert found == dict(zip(METRICS, [1, 2, 3, 4, 5]))
    write(scripted, "exit 1")
    assert Steps().run(STUDENTS["student alone"], opts) == found
    with pytest.raises(SystemExit, match="failed"):
        Steps(fresh=True).run(STUDENTS["student alone"], opts)
    with pytest.raises(SystemExit, match="failed"):
        Steps().run(STUDENTS["student alone"], [*opts, "SEED", "9"])


@pytest.mark.parametrize(
    "device, cores, load, jobs, told",
    [
        ("cpu", 2, 0.2, 2, False),
        ("cpu", 2, 1.2, 2, True),
        ("cpu", 8, 5.0, 2, False),
        ("cpu", 1, 0.0, 1, False),
        ("cuda", 8, 8.0, 1, False),
    ],
)
def test_busy_cores_are_told(
    device: str,
    cores: int,
    load: float,
    jobs: int,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert quickstart.runs_at_once(device) == jobs
    assert ("busy" in capsys.readouterr().out) == told

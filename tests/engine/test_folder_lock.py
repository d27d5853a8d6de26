"""An OUTPUT_DIR has one run at a time."""

import errno
import multiprocessing
import os
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import pytest

from detectron2.utils import comm

from d2kd.engine import train
from d2kd.engine.folder_lock import hold_folder
from tests.helpers.forks import launch_two
from tests.helpers.runs import at, run_config


@contextmanager
def held(folder: Any) -> Iterator[multiprocessing.Process]:
    """By another process, killed at the end; a data loader's worker of it lives on."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(str(folder), theirs))
    process.start()
    worker = ours.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        os.kill(worker, 0)  # still there
        ours.close()  # its sign to end


def hold(folder: str, told: Connection) -> None:
    with hold_folder(folder):
        worker = os.fork()
        if not worker:
            try:
                told.recv()
            except EOFError:
                os._exit(0)
        told.send(worker)
        multiprocessing.Event().wait()


def test_second_run_is_refused_before_it_begins_and_a_killed_one_holds_nothing(
    tmp_path: Path,
) -> None:
    cfg = at(run_config(tmp_path), tmp_path, "run")
    os.makedirs(cfg.OUTPUT_DIR)
    with held(cfg.OUTPUT_DIR) as first:
        in_use = rf"OUTPUT_DIR: '.*run' is in use by another run \(process {first.pid} on "
        for _ in range(2):  # to be refused takes nothing from the first
            with pytest.raises(ValueError, match=in_use):
                train(cfg)
        assert os.listdir(cfg.OUTPUT_DIR) == ["run.lock"], "nothing was built or evaluated"
    train(cfg)
    assert Path(cfg.OUTPUT_DIR, "model_final.pth").exists()
    train(cfg)  # nor does one that has ended


def test_all_processes_of_a_run_are_refused(tmp_path: Path) -> None:
    with held(tmp_path):
        launch_two(refused, str(tmp_path), str(tmp_path / "refused"))
    assert (tmp_path / "refused_0").exists() and (tmp_path / "refused_1").exists()


def refused(folder: str, sign: str) -> None:
    with pytest.raises(ValueError, match="in use by another run"):
        with hold_folder(folder):
            pass
    Path(f"{sign}_{comm.get_rank()}").touch()


def test_disk_that_knows_no_locks_is_used_as_it_is(tmp_path: Path) -> None:
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    with mock.patch("d2kd.engine.folder_lock.fcntl.lockf", side_effect=error):
        with hold_folder(str(tmp_path)):
            pass

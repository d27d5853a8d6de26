"""Work in processes that are fresh and cheap: forks of one that has imported and done no more."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Iterator, List, Sequence
from unittest import mock

import torch

from d2kd.engine import launch

# One for all tests of a process; it begins with the first use.
multiprocessing.set_forkserver_preload(["d2kd.engine", "d2kd.conformance"])


def in_clean_process(work: Callable[..., None], *args: Any) -> None:
    """
    Call in a new process, which may :func:`fork`. Not in that of the tests: TorchScript's functions
    are compiled there already and round otherwise, and its threads do not survive a fork.
    """
    torch.multiprocessing.start_processes(_without_rank, (work, args), start_method="forkserver")


def _without_rank(rank: int, work: Callable[..., None], args: Any) -> None:
    work(*args)


def fork(work: Callable[..., None], *args: Any) -> int:
    """
    Call in a copy of this process.

    Returns:
        0; 1 after an exception, which is printed; minus the signal that ended it
    """
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start()
    child.join()
    return child.exitcode


@contextmanager
def cheap_processes(start_method: str = "forkserver") -> Iterator[None]:
    """
    Those of d2kd.engine.launch import nothing anew.

    Args:
        start_method: "fork" in a process that in_clean_process has begun
    """
    start = torch.multiprocessing.start_processes

    def start_cheaply(*args: Any, **kwargs: Any) -> None:
        start(*args, **{**kwargs, "start_method": start_method})

    with mock.patch("d2kd.engine.parallel.mp.start_processes", start_cheaply):
        yield


def launch_two(work: Callable[..., None], *args: Any, start_method: str = "forkserver") -> None:
    """d2kd.engine.launch of two processes on the CPU; see cheap_processes."""
    with cheap_processes(start_method):
        launch(work, 2, device="cpu", args=args)


def python(words: Sequence[Any], said: Path) -> int:
    """
    What `python WORDS` does in a process that has imported all that d2kd needs.

    Args:
        words: a script or "-m", a module, and its command line
        said: file that receives what it prints

    Returns:
        exit code
    """
    args = [str(x) for x in words], str(said)
    process = multiprocessing.get_context("forkserver").Process(target=_python, args=args)
    process.start()
    process.join()
    return process.exitcode


def _python(words: List[str], said: str) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without; temporary folders stayed


def run_python(words: Sequence[str], **_: Any) -> "subprocess.CompletedProcess[str]":
    """In the place of a module's subprocess.run that captures what is printed; see python."""
    assert words[0] == sys.executable
    with TemporaryDirectory() as folder:
        said = Path(folder, "said")
        code = python(words[1:], said)
        return subprocess.CompletedProcess(words, code, said.read_text(), said.read_text())

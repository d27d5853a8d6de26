"""Work in processes that are fresh and cheap: forks of one that has imported and done no more."""

import multiprocessing
from typing import Any, Callable
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


def launch_two(work: Callable[..., None], *args: Any, start_method: str = "forkserver") -> None:
    """
    d2kd.engine.launch of two processes on the CPU, without importing everything anew.

    Args:
        start_method: "fork" in a process that in_clean_process has begun
    """
    start = torch.multiprocessing.start_processes

    def start_cheaply(*args: Any, **kwargs: Any) -> None:
        start(*args, **{**kwargs, "start_method": start_method})

    with mock.patch("d2kd.engine.parallel.mp.start_processes", start_cheaply):
        launch(work, 2, device="cpu", args=args)

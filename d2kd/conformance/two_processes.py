"""Check of distributed training: two gloo processes with different images stay in sync."""

import functools
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engine.parallel import data_parallel
from ..utils.compat import create_local_process_group
from .batches import batch
from .case import Case
from .saving import equal, step
from .terms import NORMS

NUM_PROCESSES = 2
TIMEOUT = 40.0  # seconds without progress; a toy step takes 0.05 s
DONE = "done"


def check_processes(case: Case, together: Sequence[Case] = ()) -> None:
    """
    Three steps of two processes under DistributedDataParallel, one without boxes in the second and
    with larger images in the third: no error, no deadlock, and both stay equal, what the head
    saves included.

    Args:
        together: cases to run in the same processes, including `case`
    """
    cases = tuple(together) or (case,)
    error = _errors(cases)[cases.index(case)]
    assert not error, (
        f"{case}: training in {NUM_PROCESSES} processes, of which process 1 has no boxes in step 2 "
        f"and larger images in step 3, fails.\n{error}\nEvery parameter of the head must take part "
        "in the loss of every process in every step, and every process must take part in each "
        "collective operation of the head."
    )


@functools.lru_cache(maxsize=None)
def _errors(cases: Tuple[Case, ...]) -> List[str]:
    """The error of each case, or "". After an error, new processes are started."""
    errors: List[str] = []
    while len(errors) < len(cases):
        errors += _start(cases[len(errors) :])
    return errors


def _start(cases: Sequence[Case]) -> List[str]:
    """Start the processes and return the errors of the cases up to the first that fails."""
    # Forked processes share the registered heads and the detectors of this one, and import nothing.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_in_process, args=(rank, folder, cases), daemon=True)
            for rank in range(NUM_PROCESSES)
        ]
        for process in processes:
            process.start()
        hung = _wait(processes, folder)
        return _read(folder, len(cases), hung)


def _wait(processes: Sequence[Any], folder: str) -> bool:
    """Wait until all have ended. Returns: whether they were killed for lack of progress."""
    progress, since = _progress(folder), time.monotonic()
    while any(p.is_alive() for p in processes):
        time.sleep(0.02)
        if _progress(folder) != progress:
            progress, since = _progress(folder), time.monotonic()
        if time.monotonic() - since > TIMEOUT:
            for process in processes:
                process.kill()
                process.join()
            return True
    return False


def _progress(folder: str) -> int:
    return os.stat(folder).st_mtime_ns  # changes with every report


def _read(folder: str, num_cases: int, hung: bool) -> List[str]:
    errors: List[str] = []
    for index in range(num_cases):
        found = [_report(folder, index, rank) for rank in range(NUM_PROCESSES)]
        if all(text == DONE for text in found):
            errors.append("")
            continue
        hanging = [f"No progress in {TIMEOUT:.0f} s; the processes were stopped."] if hung else []
        said = [f"process {rank}: {text}" for rank, text in enumerate(found) if text != DONE]
        return errors + ["\n".join(hanging + said)]
    return errors


def _report(folder: str, index: int, rank: int) -> str:
    try:
        with open(os.path.join(folder, f"{index}_{rank}")) as file:
            return file.read()
    except FileNotFoundError:
        return "did not start"


def _in_process(rank: int, folder: str, cases: Sequence[Case]) -> None:
    torch.set_num_threads(1)  # a forked process has no other threads
    gc.freeze()  # collection would copy the memory shared with the parent
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        world_size=NUM_PROCESSES,
        rank=rank,
        timeout=timedelta(seconds=2 * TIMEOUT),
    )
    create_local_process_group(NUM_PROCESSES, machine_rank=0)
    for index, case in enumerate(cases):
        path = os.path.join(folder, f"{index}_{rank}")
        try:
            _train(case, rank, path)
        except Exception as error:
            _write(path, f"{type(error).__name__}: {error}\n{_last_line(error)}")
            return  # a waiting peer then fails, too
        _write(path, DONE)


def _train(case: Case, rank: int, path: str) -> None:
    distiller = case.distiller  # already a copy: the process is forked
    model = data_parallel(distiller)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for i, inputs in enumerate(_batches(rank)):
        _write(path, f"still in step {i + 1}")
        step(model, optimizer, inputs, seed=10 * i + rank)
    # At the end: DistributedDataParallel reports a missing gradient in the next forward pass.
    _compare({k: p.grad for k, p in distiller.named_parameters()}, "gradient")
    _compare(dict(distiller.named_parameters()), "value after the last step")
    _compare_state(distiller.heads)


def _batches(rank: int) -> List[List[Dict[str, Any]]]:
    """The batches of this process, one per step."""
    shapes = [(2, 64, 64), (0 if rank else 2, 64, 64), (2, 64, 128 if rank else 64)]
    return [
        batch(2, boxes=boxes, height=height, width=width, seed=10 * i + rank)
        for i, (boxes, height, width) in enumerate(shapes)
    ]


def _compare(tensors: Dict[str, Tensor], what: str) -> None:
    """Raise in both processes if the tensors are not equal."""
    flat = {k: torch.zeros(0) if x is None else x.detach().flatten() for k, x in tensors.items()}
    ours = torch.cat(list(flat.values()))
    everywhere = [torch.empty_like(ours) for _ in range(NUM_PROCESSES)]
    dist.all_gather(everywhere, ours)
    sizes = [len(x) for x in flat.values()]
    for name, *values in zip(flat, *(x.split(sizes) for x in everywhere)):
        if not torch.equal(*values):
            raise AssertionError(f"the {what} of {name} is not the same in both processes")


def _compare_state(heads: nn.Module) -> None:
    """
    Raise in both processes if the heads would save other state, which all take from the main one
    when they resume. Statistics of norms are each process's own, as those of the student.
    """
    norms = {name for name, x in heads.named_modules() if isinstance(x, NORMS)}
    state = {k: x for k, x in heads.state_dict().items() if k.rpartition(".")[0] not in norms}
    states: List[Any] = [None] * NUM_PROCESSES
    dist.all_gather_object(states, state)
    for key in state:
        if not all(key in x and equal(x[key], states[0][key]) for x in states):
            raise AssertionError(
                f"{key} in the head's state_dict is not the same in both processes, which all "
                "resume from the main one's: compute it from all processes' images, by "
                "torch.distributed.all_reduce of sums and counts or by all_gather"
            )


def _write(path: str, text: str) -> None:
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def _last_line(error: Exception) -> str:
    """Where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"  {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"

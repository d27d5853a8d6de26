"""Several processes, on GPUs (NCCL) or on CPUs (gloo), on one machine or more."""

import socket
from typing import Any, Callable, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..utils.compat import create_local_process_group
from ..utils.user_mistakes import is_users_mistake

PATIENCE = 10  # seconds that a process has to end by itself after Ctrl-C


def launch(
    main_func: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    args: Tuple[Any, ...] = (),
) -> None:
    """
    Like detectron2.engine.launch, which supports only GPUs (0.5) or always prefers them.

    Args:
        main_func: called as main_func(*args) in every process
        num_processes: per machine; one per GPU on CUDA
        dist_url: of the main process; "auto" finds a free port on a single machine
        device: cfg.MODEL.DEVICE; decides between NCCL and gloo

    Raises:
        ValueError: fewer GPUs than processes, or "auto" with several machines
        Exception: a user's mistake that a process found, as it was raised there
        ProcessRaisedException: any other error of a process
    """
    world_size = num_processes * num_machines
    if world_size == 1:
        main_func(*args)
        return
    if device.startswith("cuda") and num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {num_processes}: this machine has {torch.cuda.device_count()} GPUs. With "
            "MODEL.DEVICE cpu the flag is the number of processes."
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("--dist-url auto works on one machine; name the main one's address.")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    mistakes = mp.get_context("spawn").SimpleQueue()
    run = (main_func, num_processes, world_size, machine_rank, dist_url, device, args)
    try:
        mp.start_processes(
            _worker, args=(mistakes, *run), nprocs=num_processes, start_method="spawn"
        )
    except mp.ProcessRaisedException as error:
        if mistakes.empty():
            raise
        raise mistakes.get() from error
    except KeyboardInterrupt:
        # Ctrl-C reaches all processes. A signal to this one alone would leave the others training,
        # and this one waiting for them.
        for process in mp.active_children():
            process.join(PATIENCE)
            process.terminate()
        raise


def _worker(
    local_rank: int,
    mistakes: Any,
    main_func: Callable[..., Any],
    num_processes: int,
    world_size: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    args: Tuple[Any, ...],
) -> None:
    on_gpu = device.startswith("cuda")
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        init_method=dist_url,
        world_size=world_size,
        rank=machine_rank * num_processes + local_rank,
        # PyTorch's own for GPUs is 10 minutes, which the main process may evaluate alone.
        timeout=DEFAULT_TIMEOUT,
    )
    create_local_process_group(num_processes, machine_rank)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    comm.synchronize()
    try:
        main_func(*args)
    except Exception as error:
        if is_users_mistake(error):
            mistakes.put(error)
        raise
    # Not after an error: the other processes would report a lost connection before this one could
    # report its reason.
    dist.destroy_process_group()


def data_parallel(model: nn.Module, all_used: bool = True) -> nn.Module:
    """
    Wrap for several processes; the model itself when there is one.

    Args:
        all_used: False: a step may leave parameters without a gradient
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [comm.get_local_rank()] if on_gpu else None
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        broadcast_buffers=False,
        find_unused_parameters=not all_used,
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

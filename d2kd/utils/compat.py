"""All code that depends on the installed Detectron2 version, from 0.5 to the newest."""

import importlib
from types import ModuleType

from detectron2.utils import comm


def require(module: str, wanted_by: str, came: str = "with 0.6") -> ModuleType:
    """
    Import a module that older versions of Detectron2 lack.

    Args:
        module: dotted name
        wanted_by: the config key and value that need it, for the error
        came: when, with a release or after it, for the error

    Raises:
        ValueError: the installed Detectron2 does not have it
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        import detectron2

        raise ValueError(
            f"{wanted_by} needs {module}, which the installed Detectron2 {detectron2.__version__} "
            f"does not have; it came {came}."
        ) from None


def has_compiled_operators() -> bool:
    """Whether Detectron2 was compiled, so that it has operators of its own for CUDA."""
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        return False
    return True


def create_local_process_group(processes_per_machine: int, machine_rank: int) -> None:
    """Set up detectron2.utils.comm's group of this machine's processes; call in every process."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    import torch.distributed as dist

    for machine in range(dist.get_world_size() // processes_per_machine):
        first = machine * processes_per_machine
        group = dist.new_group(list(range(first, first + processes_per_machine)))
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group

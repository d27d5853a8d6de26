"""
A GPU that is not there: tensors that say they are on cuda:0, with their data in the CPU's memory.

What only a GPU shows can then be tested without one: that tensors of two devices meet in an
operator, which raises here as it does there, and how often the host waits until the device has
done all its queued work. Autograd and GradScaler are PyTorch's own; autocast has the operator lists
of d2kd.conformance.cuda_autocast, and float16. What is not seen here: CUDA's own kernels, their
rounding and memory.

TorchScript does not know such tensors. So this works in a process that was started with
PYTORCH_JIT=0.
"""

import os
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2kd.conformance.cuda_autocast import cuda_lists

from .operators import only_makes_a_view, waits
from .toys import ROOT

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
# Where not even a number, a tensor without dimensions, may be on the CPU.
STRICT = ("cat", "stack", "_fused_sgd_", "_fused_adam_", "_fused_adamw_")


class PretendedTensor(Tensor):
    """`data_on_cpu`, as a tensor on cuda:0."""

    # PyTorch itself sees tensors on "meta": for "cuda" its autograd would ask the missing driver.
    device = property(lambda self: CUDA)
    is_cuda, is_meta = True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> "PretendedTensor":
        self = Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device="meta",
            _extra_dispatch_keys=torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA),
        )
        self.data_on_cpu = data
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _GPU[-1].run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.data_on_cpu} on {CUDA}"

    def unsqueeze_(self, dim: int) -> Tensor:
        # Not in place, as a shape cannot be changed. Detectron2 goes on with what it gets back.
        return self.unsqueeze(dim)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: Dict[int, Any]) -> "PretendedTensor":
        copied = PretendedTensor(self.data_on_cpu.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # what torch.save does, one by one


class PretendedCuda(TorchDispatchMode):
    """
    Within a `with` block torch.cuda has one device.

    Attributes:
        operators: name to how many were run on the GPU, without those that only make a view
        waits: (operator, where it was called) to how often the host waited for the GPU
    """

    def __init__(self) -> None:
        super().__init__()
        if os.environ.get("PYTORCH_JIT") != "0":
            raise RuntimeError("A pretended GPU needs PYTORCH_JIT=0 from the start of the process.")
        self.operators: Counter = Counter()
        self.waits: Counter = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> "PretendedCuda":
        casts = self._patches.enter_context(cuda_lists("AutocastCUDA"))
        for name, value in _functions(self).items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, value))
        clear = torch.clear_autocast_cache

        def clear_casts() -> None:
            casts.parameters.clear()
            clear()

        self._patches.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear_casts))
        self._patches.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self: self))
        # A parameter stays the same object when it is moved, as it does between CPU and GPU.
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch._C._ensureCUDADeviceGuardSet()
        # torch.tensor makes its result on the CPU and moves it where this mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        _GPU.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _GPU.pop()
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def count_wait(self, name: str) -> None:
        self.waits[name, _caller()] += 1

    def run(self, func: Any, args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
        """Run an operator on the CPU; its results are where the GPU's operator would have them."""
        name = func._schema.name.split("::")[1]
        on_gpu: Dict[int, PretendedTensor] = {}  # by the id of their data
        on_cpu: List[Tensor] = []

        def unwrap(x: Any) -> Any:
            if isinstance(x, PretendedTensor):
                on_gpu[id(x.data_on_cpu)] = x
                return x.data_on_cpu
            if isinstance(x, Tensor):
                on_cpu.append(x)
            return CPU if isinstance(x, torch.device) else x

        plain_args, plain_kwargs = _map(unwrap, (args, kwargs))
        to_gpu = bool(on_gpu)
        if kwargs.get("device") is not None:
            to_gpu = kwargs["device"].type in ("cuda", "meta")
        if on_gpu or to_gpu:
            self._check(func, name, args, list(on_gpu.values()), on_cpu)
            self._count(func, name, args, kwargs, bool(on_gpu), to_gpu)
        result = func(*plain_args, **plain_kwargs)
        given = {id(x): x for x in on_cpu}

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor) or id(x) in given:
                return x
            if id(x) in on_gpu:
                assert on_gpu[id(x)].shape == x.shape, f"{func} changes a shape in place"
                return on_gpu[id(x)]
            return PretendedTensor(x) if to_gpu else x

        return _map(wrap, result)

    def _check(
        self, func: Any, name: str, args: Any, on_gpu: Sequence[Tensor], on_cpu: Sequence[Tensor]
    ) -> None:
        if not (on_gpu and on_cpu) or name in COPIES:
            return
        numbers_may = name not in STRICT
        allowed = {id(x) for x in on_cpu if x.dim() == 0 and numbers_may}
        if name in INDEXING and isinstance(args[0], PretendedTensor):
            allowed |= {id(x) for x in args[1] if x is not None}
        wrong = [tuple(x.shape) for x in on_cpu if id(x) not in allowed]
        if wrong:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func}: of shape {wrong} on the CPU, "
                f"{[tuple(x.shape) for x in on_gpu]} on the GPU)"
            )

    def _count(
        self, func: Any, name: str, args: Any, kwargs: Any, from_gpu: bool, to_gpu: bool
    ) -> None:
        if not only_makes_a_view(func, name):
            self.operators[name] += 1
        if name in COPIES:
            if name == "copy_":
                from_gpu, to_gpu = (isinstance(x, PretendedTensor) for x in (args[1], args[0]))
            # From memory that is not pinned, or is to be used at once: both ways the host waits.
            later = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if later and from_gpu and not to_gpu:
                raise RuntimeError("The host does not wait for a copy: it reads what is not there.")
            if from_gpu != to_gpu and not later:
                self.count_wait("copy to the GPU" if to_gpu else "copy to the host")
        elif name in INDEXING and any(_on_cpu(x) for x in args[1]):
            self.count_wait("copy to the GPU")  # of the index
        elif name in INDEXING[1:] and args[2].numel() == 1:
            pass  # masked_fill, for which a mask need not become numbers
        elif from_gpu and waits(name, args, kwargs):
            self.count_wait(name)


_GPU: List[PretendedCuda] = []  # the one within whose block this is


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """As tree_map, for what operators take and return; in a fraction of the time."""
    if isinstance(x, (list, tuple)):
        return type(x)([_map(function, y) for y in x])
    if isinstance(x, dict):
        return {k: _map(function, y) for k, y in x.items()}
    return function(x)


def _on_cpu(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, PretendedTensor)


def _functions(gpu: PretendedCuda) -> Dict[str, Any]:
    """What torch.cuda answers."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretended GPU",
        "max_memory_allocated": 0,
        **dict.fromkeys(("_lazy_init", "empty_cache", "manual_seed_all", "set_device")),
        "reset_peak_memory_stats": None,
    }
    functions = {name: (lambda *_, value=x, **__: value) for name, x in answers.items()}
    return {**functions, "synchronize": lambda *_, **__: gpu.count_wait("synchronize")}


def _caller() -> str:
    """The innermost line of d2kd that runs; of Detectron2 where there is none."""
    frame, outside = sys._getframe(2), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(os.path.join(ROOT, "d2kd")):
            return f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}"
        if not outside and "detectron2" in path:
            outside = f"{path[path.rindex('detectron2'):]}:{frame.f_lineno}"
        frame = frame.f_back
    return outside

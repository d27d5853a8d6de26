"""What a distillation head costs by itself, whatever the machine: counted, not timed."""

from typing import Any, Callable, Dict, Iterable, Optional
from weakref import WeakSet

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmark_parts import HeadAlone

try:
    from torch.utils.flop_counter import FlopCounterMode
except ImportError:  # torch 2.0
    FlopCounterMode = None


def head_costs(alone: HeadAlone) -> Dict[str, Any]:
    """
    Returns:
        "flops" of a step, None where torch cannot count them; "parameters", their number;
        "saved_bytes": what the forward keeps for the backward beside what was there before
    """
    return {
        "flops": count_flops(alone),
        "parameters": sum(p.numel() for p in alone.heads.parameters()),
        "saved_bytes": saved_bytes(alone.loss, alone.given()),
    }


def count_flops(step: Callable[[], Any]) -> Optional[int]:
    """Of convolutions and matrix products, 2 for a multiply-add; None with torch 2.0."""
    if FlopCounterMode is None:
        return None
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class _Saved:
    """Dropped by autograd together with the graph that the tensor was saved for."""

    def __init__(self, tensor: Tensor):
        # A result that knows its graph would keep it alive, and with it what leads to no loss.
        self.tensor = tensor.detach()


def saved_bytes(forward: Callable[[], Tensor], leave_out: Iterable[Tensor] = ()) -> int:
    """
    Bytes that autograd holds for the backward of forward(), each storage counted once and whole: a
    saved slice keeps all of what it was cut from.

    Args:
        forward: returns the loss
        leave_out: tensors whose storages are not counted, such as parameters
    """
    alive = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    known = {x.untyped_storage().data_ptr() for x in leave_out}
    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = forward()  # held: what it was computed from stays alive, and nothing else does
    storages = [saved.tensor.untyped_storage() for saved in alive]
    del loss
    return sum({x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in known}.values())

"""Numbers and sizes at which a loss may break: mixed precision, certain classifiers, padding."""

import torch
from torch import nn

from detectron2.utils.events import EventStorage

from .batches import batch
from .case import Case
from .detectors import classifier
from .gradients import backward, check_head_gradients


def check_mixed_precision(case: Case) -> None:
    """Under autocast (bfloat16) losses and gradients are finite, the losses float32 and close."""
    # Then P6 has four cells. Of a single one oneDNN's gradient of P7's convolution, 3x3 with stride
    # 2, has entries of uninitialised memory in bfloat16 (seen with torch 2.14).
    inputs = batch(height=96, width=96)
    exact = backward(case, case.fresh(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backward(case, case.fresh(), inputs, " under torch.autocast, in bfloat16")
    for key, x in found.items():
        assert x.dtype in (torch.float32, torch.float64), (
            f"{case}: {key} is {x.dtype} under torch.autocast, in which sums overflow or lose "
            "their small addends. Compute the loss on x.float(); matrix products of it, which "
            "autocast turns back, under torch.autocast(x.device.type, enabled=False)."
        )
        a, b = exact[key].item(), x.item()
        # Of a two-stage student other proposals are sampled, and their loss is another one.
        assert case.pair.student == "faster_rcnn" or abs(a - b) <= max(0.05, 0.2 * abs(a)), (
            f"{case}: {key} is {a:.4g} in float32 and {b:.4g} under torch.autocast. Compute "
            "softmax, logarithms, norms and sums on x.float()."
        )


def runs_in_bfloat16(case: Case) -> bool:
    """Whether the student's own losses do; FCOS's generalised IoU does not on a CPU."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage():
            case.fresh().student(batch())
    except RuntimeError:
        return False
    return True


def check_extreme_logits(case: Case) -> None:
    """Class logits of +120 and -120, of equal and of opposite detectors, leave all finite."""
    distiller = case.fresh(own_teacher=True)
    saturate(distiller.teacher.model, 1)
    for sign, what in ((1, "equal to"), (-1, "the opposite of")):
        saturate(distiller.student, sign)
        backward(
            case,
            distiller,
            what=f" when all class logits are +120 or -120, the student's {what} the teacher's. "
            "In float32 softmax and sigmoid are then exactly 0 and 1: take log_softmax, "
            "F.logsigmoid or the losses with logits",
        )


def saturate(detector: nn.Module, sign: int) -> None:
    """Make a detector sure of everything: class logits +120, -120, +120, ... times `sign`."""
    score = classifier(detector)
    with torch.no_grad():
        score.weight.zero_()
        score.bias.fill_(120.0 * sign)
        score.bias[1::2] *= -1


def check_image_sizes(case: Case) -> None:
    """Images of several sizes, padded to one, give finite losses and gradients."""
    inputs = batch(1, height=64, width=64) + batch(1, height=48, width=80, seed=1)
    distiller, what = case.fresh(), " for a batch of a 64 x 64 and a 48 x 80 image"
    backward(case, distiller, inputs, what)
    check_head_gradients(case, distiller, what)

"""Checks of gradients: a head's loss trains student and head, never the teacher."""

from typing import Any, Dict

import torch
from torch import Tensor, nn

from ..distiller import Distiller
from ..utils.checks import shown
from .batches import batch
from .case import Case


def check_gradients(case: Case) -> None:
    """
    The loss has gradients for the student, by every image of the batch, and for every parameter of
    the head; the teacher stays unchanged to the bit, frozen and in eval mode.
    """
    distiller = case.fresh(own_teacher=True)
    teacher = distiller.teacher.model
    distiller.heads[case.name].register_forward_pre_hook(lambda *_: _retain(distiller))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    backward(case, distiller)
    grads = [(k, p.grad) for k, p in distiller.student.named_parameters() if p.grad is not None]
    assert any(g.abs().sum() > 0 for _, g in grads), (
        f"{case}: all gradients of the student from the head's loss are missing or 0. Look for "
        ".detach() or torch.no_grad() on the student's side."
    )
    _check_images(case, distiller)
    check_head_gradients(case, distiller)
    _check_teacher(case, teacher, before)


def check_other_channels(case: Case) -> None:
    """As check_gradients, with a teacher whose pyramid has other channels than the student's."""
    try:
        check_gradients(case)
    except RuntimeError as error:
        level = case.distiller.pair.levels[0]
        raise AssertionError(
            f"{case}: {error}. The student's pyramid has {level.student_channels} channels here, "
            f"the teacher's {level.teacher_channels}. d2kd.build_adapters(levels) makes them as "
            "many as the teacher's; or refuse the pair in from_config."
        ) from error


def backward(case: Case, distiller: Distiller, inputs: Any = (), what: str = "") -> Dict:
    """
    Backpropagate the head's losses alone, and check that losses and gradients are finite.

    Args:
        what: the condition under test, for the error
    """
    distiller.zero_grad()
    try:
        terms = case.terms(distiller, inputs)
    except ValueError as error:
        raise AssertionError(f"{case}{what}: {error}") from error
    assert terms, (
        f"{case}: forward returns no loss{what}. Return a zero that is connected to the student, "
        "`(x * 0).sum()`, or a sum over a possibly empty selection."
    )
    for key, x in terms.items():
        assert x.isfinite(), f"{case}: {key} is {x.item()}{what}."
        assert x.requires_grad, (
            f"{case}: {key} is not connected to the student{what}. Even a loss of 0 must be: use "
            "`(x * 0).sum()`, or a sum over a possibly empty selection."
        )
    sum(terms.values()).backward()
    for key, p in distiller.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), (
            f"{case}: the gradient of {key} has {(~p.grad.isfinite()).sum()} entries that are "
            f"not finite{what}. Look for sqrt(0), x / x.norm(), 0 * inf or log of a softmax."
        )
    return terms


def check_head_gradients(case: Case, distiller: Distiller, what: str = "") -> None:
    head = distiller.heads[case.name]
    idle = [k for k, p in head.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, (
        f"{case}: {shown(idle)} of the head got no gradient{what}. DistributedDataParallel would "
        "hang. Remove unused parameters; a loss without samples must be a zero that is connected "
        "to every parameter."
    )


def _retain(distiller: Distiller) -> None:
    for x in distiller.last_step.student.features.values():
        x.retain_grad()


def _check_images(case: Case, distiller: Distiller) -> None:
    grads = [x.grad for x in distiller.last_step.student.features.values() if x.grad is not None]
    taught = torch.stack([g.abs().flatten(1).sum(dim=1) for g in grads]).sum(dim=0) > 0
    assert taught.all(), (
        f"{case}: the loss has no gradient by the images {(~taught).nonzero().flatten().tolist()} "
        f"of a batch of {len(taught)}, all with boxes. Look for an index [0] where the batch is "
        "meant, and for a loop that returns in its first round."
    )


def _check_teacher(case: Case, teacher: nn.Module, before: Dict[str, Tensor]) -> None:
    trained = [k for k, p in teacher.named_parameters() if p.grad is not None]
    assert not trained, (
        f"{case}: the loss has a gradient for {shown(trained)} of the teacher. Detach everything "
        "that the head reads from the teacher, and do not change its requires_grad."
    )
    thawed = [k for k, p in teacher.named_parameters() if p.requires_grad]
    assert not thawed, f"{case}: the head unfreezes {shown(thawed)} of the teacher."
    after = teacher.state_dict()
    moved = [k for k in after if k not in before or not torch.equal(after[k], before[k])]
    assert not moved and len(after) == len(before), (
        f"{case}: the head changes {shown(moved) or 'the modules'} of the teacher. BatchNorm "
        "statistics change in training mode: keep the teacher in eval mode."
    )
    training = [k for k, m in teacher.named_modules() if m.training]
    assert not training, f"{case}: the head leaves the teacher's {shown(training)} in train mode."


def check_without_boxes(case: Case) -> None:
    """
    Without boxes the losses have the same names, are finite and connected to the student and the
    whole head.
    """
    distiller, none, some = case.fresh(), batch(1, boxes=0), batch(1)
    names = list(case.terms(distiller))
    for inputs, what in (
        (batch(2, boxes=0), " when no image has a box"),
        (none + some, " when one of two images has no box"),
    ):
        found = list(backward(case, distiller, inputs, what))
        assert sorted(found) == sorted(names), (
            f"{case}: forward returns {', '.join(found)}{what}, else {', '.join(names)}. Return "
            "the same names in every step, with a zero that is connected to the student: of "
            "several processes, the main one looks for each of its losses in all others."
        )
        check_head_gradients(case, distiller, what)

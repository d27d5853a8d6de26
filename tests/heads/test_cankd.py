"""CanKDHead beside its equations in loops, and its limits."""

import copy

import pytest
import torch
from torch import Tensor, nn

from d2kd.heads import CanKDHead
from d2kd.heads.cankd import NonLocalRead
from tests.helpers.toys import feature_view, level_pairs, noise


def new_head(student: int, teacher: int, learnt: bool = False) -> CanKDHead:
    """`learnt`: with a read that is not 0 any more."""
    torch.manual_seed(0)
    head = CanKDHead(levels=level_pairs(p3=(student, teacher)))
    if learnt:
        nn.init.uniform_(head.read["p3"].norm.weight)
        nn.init.uniform_(head.read["p3"].norm.bias)
    return head


def loss_of(head: CanKDHead, student: Tensor, teacher: Tensor) -> Tensor:
    return head(feature_view({"p3": student}), feature_view({"p3": teacher}))["loss_cankd"]["p3"]


def read_in_loops(block: NonLocalRead, x: Tensor, memory: Tensor) -> Tensor:
    """Cell i reads sum over j of <query_i, key_j> / J value_j, with the map of all pairs i, j."""
    query, found = block.query(x), torch.zeros_like(x)
    for n in range(len(x)):
        keys, values = [], []
        key, value = block.key(memory)[n], block.value(memory)[n]
        for i in range(0, memory.shape[2] - 1, 2):  # the largest of 2 x 2 cells, odd ones left out
            for j in range(0, memory.shape[3] - 1, 2):
                keys.append(key[:, i : i + 2, j : j + 2].amax(dim=(1, 2)))
                values.append(value[:, i : i + 2, j : j + 2].amax(dim=(1, 2)))
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                shares = [(query[n, :, i, j] @ k) / len(keys) for k in keys]
                read = sum(share * v for share, v in zip(shares, values))
                found[n, :, i, j] = block.project.weight[:, :, 0, 0] @ read + block.project.bias
    mean, variance = found.mean((0, 2, 3)), found.var((0, 2, 3), unbiased=False)
    scale = block.norm.weight / (variance + 1e-5).sqrt()
    return (found - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + block.norm.bias.view(-1, 1, 1)


def cankd_in_loops(head: CanKDHead, student: Tensor, teacher: Tensor) -> float:
    """In float64."""
    head, student, teacher = copy.deepcopy(head).double(), student.double(), teacher.double()
    x = head.adapter["p3"](student)
    x, total = x + read_in_loops(head.read["p3"], x, teacher), 0.0
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            one, other = (
                (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
                for y in (x[n, c], teacher[n, c])
            )
            total += ((one - other) ** 2).sum().item()
    return total / (2 * x.numel())


def test_loss_is_that_of_the_equations() -> None:
    head = new_head(3, 4, learnt=True)
    student, teacher = (noise(2, c, 5, 6, seed=c).float() for c in (3, 4))
    with torch.no_grad():
        loss, expected = loss_of(head, student, teacher), cankd_in_loops(head, student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_new_head_reads_nothing_and_ignores_scale_and_shift_of_a_channel() -> None:
    head = new_head(4, 4)
    x = noise(2, 4, 6, 5).float() * 3
    factor = torch.tensor([0.5, 1.0, 4.0, 9.0]).view(4, 1, 1)
    # As variance is never 0 here, 1e-5 beside it is all that is left of the scale.
    assert loss_of(head, x, x * factor + 2).item() == pytest.approx(0, abs=1e-6)
    assert loss_of(head, x, -x).item() == pytest.approx(2, rel=1e-4)  # 1/2 mean (2 x)^2, x^2 is 1


def test_what_is_read_learns_from_the_second_step_on() -> None:
    # The norm after it starts at 0: at first nothing else of it has a gradient.
    student, teacher = (noise(2, 4, 6, 6, seed=s).float() for s in (1, 2))
    for learnt in (False, True):
        head = new_head(4, 4, learnt)
        loss_of(head, student.requires_grad_(), teacher).backward()
        block = head.read["p3"]
        assert block.norm.weight.grad.abs().sum() > 0
        weights = [f.weight.grad for f in (block.query, block.key, block.value, block.project)]
        assert all(bool(g.abs().sum() > 0) == learnt for g in weights)


@pytest.mark.parametrize("size", [(1, 1), (1, 4)])
def test_maps_of_a_cell_or_a_row_are_finite(size: tuple) -> None:
    head = new_head(4, 4, learnt=True)
    x = noise(1, 4, *size, seed=1).float().requires_grad_()
    loss = loss_of(head, x, noise(1, 4, *size, seed=2).float())
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert all(p.grad is not None for p in head.parameters()), "DDP would wait for it"


def test_no_map_of_all_pairs_of_cells_is_kept() -> None:
    head, largest = new_head(4, 4, learnt=True), 0

    def pack(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    x = noise(1, 4, 32, 32, seed=1).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss_of(head, x, noise(1, 4, 32, 32, seed=2).float())
    assert largest <= x.numel()  # all pairs of a cell and a pooled cell: 64 times as much

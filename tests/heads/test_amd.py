"""AMDHead beside its equations, and what its gate and its mask do to the gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2kd.heads import AMDHead
from d2kd.layers import MaskRule
from tests.helpers.references import MOST, cell_attention, conv, generate, guide_of, parts, visible
from tests.helpers.toys import feature_view, level_pairs, noise

SIZES = [(40, 48), (24, 30), (8, 8)]  # 5 x 6, 3 x 4 cells and one cell, in maps of 5 x 6


def random_head(channels: int = 3, **values: Any) -> AMDHead:
    """From `channels` to 4, on p3; a gate that opens as far as chance wants it."""
    torch.manual_seed(0)
    head = AMDHead(levels=level_pairs(p3=(channels, 4)), **{"mask": MOST, **values})
    for key, p in head.gate.named_parameters():
        torch.nn.init.constant_(p, 1.0) if "squeeze.bias" in key else torch.nn.init.normal_(p)
    return head.double()


def gate(head: AMDHead, x: Tensor) -> Tensor:
    """sigmoid(W_2 relu(W_1 z + b_1) + b_2), z the mean over cells: (C, H, W) -> (C, 1, 1)."""
    squeeze, excite = head.gate["p3"].squeeze, head.gate["p3"].excite
    hidden = squeeze.weight @ (x.sum(dim=(1, 2)) / x[0].numel()) + squeeze.bias
    logits = excite.weight @ hidden.clamp(min=0) + excite.bias
    return (1 / (1 + torch.exp(-logits))).detach()[:, None, None]


def amd_of_equations(head: AMDHead, x: Tensor, target: Tensor) -> float:
    """Of one image: sum (G(f(S) * M) * w - T)^2."""
    x = conv(x, head.adapter["p3"])
    attention = cell_attention(guide_of(head.guide, x, target), head.guide.temperature)
    rebuilt = generate(head.generator["p3"], x * visible(head.mask, attention))
    if head.gate:
        rebuilt = rebuilt * gate(head, x)
    return ((rebuilt - target) ** 2).sum().item()


@pytest.mark.parametrize("sizes", [(), SIZES], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mask": MaskRule(0.45, hide="least"), "temperature": 0.8, "attention_from": "student"},
        {"mask": MaskRule(rule="threshold", threshold=0.9, hide="most")},
        {"mask": MaskRule(rule="threshold", hide="least"), "adapt_channels": False},
    ],
    ids=["most", "least-of-student", "threshold", "threshold-least-no-gate"],
)
@pytest.mark.parametrize("channels", [3, 4])
def test_loss_is_that_of_the_equations(channels: int, values: Any, sizes: Any) -> None:
    head = random_head(channels, **values)
    assert len(list(head.adapter.parameters())) == (0 if channels == 4 else 2)
    student, teacher = noise(3, channels, 5, 6, seed=1), noise(3, 4, 5, 6, seed=2)
    loss = head(feature_view({"p3": student}, sizes), feature_view({"p3": teacher}, sizes))
    pairs = zip(parts(student, sizes), parts(teacher, sizes))
    expected = sum(amd_of_equations(head, x, target) for x, target in pairs) / 3
    assert loss["loss_amd"]["p3"].item() == pytest.approx(expected, rel=1e-5)


def test_gate_starts_alike_for_every_channel() -> None:
    # sigmoid(2) whatever goes in: the method starts as plain masked generation.
    head = AMDHead(levels=level_pairs(p3=(32, 32)), mask=MOST)
    weights = head.gate["p3"](torch.randn(2, 32, 3, 3))
    torch.testing.assert_close(weights, torch.full((2, 32, 1, 1), 2.0).sigmoid())
    assert head.gate["p3"].squeeze.out_features == 2, "a sixteenth"


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_hidden_cells_get_no_gradient(source: str) -> None:
    # The gate apart, which sees all cells. Nor is there a way through the attention.
    head = random_head(4, attention_from=source, adapt_channels=False)
    x = noise(2, 4, 5, 6).requires_grad_()
    loss = head(feature_view({"p3": x}), feature_view({"p3": noise(2, 4, 5, 6, seed=1)}))
    loss["loss_amd"]["p3"].backward()
    shown = head.maps["visible"]["p3"].expand_as(x)
    assert (x.grad[~shown] == 0).all() and (x.grad[shown] != 0).all()
    assert (~shown[:, 0]).flatten(1).sum(dim=1).tolist() == [20, 20]  # ceil(0.65 x 30)

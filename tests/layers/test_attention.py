"""Attention maps beside their equations, and whose attention guides."""

import pytest
import torch
from torch import Tensor

from d2kd.layers import AttentionGuide, channel_attention, mean_inside, spatial_attention
from tests.helpers.references import cell_attention as cells_of_equation
from tests.helpers.references import channel_attention as channels_of_equation
from tests.helpers.references import parts
from tests.helpers.toys import feature_view, noise

# At stride 8: 5 x 6 cells, 3 x 4 cells, one cell; in maps of 5 x 6.
SIZES = [(40, 48), (24, 30), (8, 8)]


def inside_of(x: Tensor) -> Tensor:
    return feature_view({"p3": x}, SIZES).inside_image("p3")


@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_attention_is_that_of_the_equations(temperature: float) -> None:
    x = noise(2, 3, 4, 5) * 2
    cells, channels = (f(x.abs(), temperature) for f in (spatial_attention, channel_attention))
    assert cells.shape == (2, 1, 4, 5) and channels.shape == (2, 3, 1, 1)
    for n, image in enumerate(x):
        torch.testing.assert_close(cells[n], cells_of_equation(image, temperature).float())
        torch.testing.assert_close(channels[n], channels_of_equation(image, temperature).float())


def test_attention_of_a_padded_image_is_that_of_its_part() -> None:
    x = noise(3, 4, 5, 6)
    inside = inside_of(x)
    x = torch.where(inside, x, 1e4 * x)  # what is in the padding does not count
    cells, channels = (f(x.abs(), 0.5, inside) for f in (spatial_attention, channel_attention))
    found = parts(cells, SIZES)
    for n, image in enumerate(parts(x, SIZES)):
        torch.testing.assert_close(found[n], cells_of_equation(image, 0.5).float())
        torch.testing.assert_close(channels[n], channels_of_equation(image, 0.5).float())
    assert (cells[~inside] == 0).all()
    assert cells[2].sum() == 1, "one cell has all the attention"


def test_mean_is_one_for_each_image() -> None:
    x = noise(3, 4, 5, 6) * 5
    for inside in (None, inside_of(x)):
        cells, channels = (f(x.abs(), 0.5, inside) for f in (spatial_attention, channel_attention))
        torch.testing.assert_close(mean_inside(cells, inside), torch.ones(3, 1, 1, 1))
        torch.testing.assert_close(channels.mean(dim=1, keepdim=True), torch.ones(3, 1, 1, 1))


def test_a_constant_added_to_the_magnitudes_does_not_matter() -> None:
    # Softmax is invariant to a shift; 5 added to |x| is 5 added to the mean of the magnitudes.
    x = noise(3, 4, 5, 6).abs()
    for inside in (None, inside_of(x)):
        for attention in (spatial_attention, channel_attention):
            torch.testing.assert_close(
                attention(x + 5, 0.5, inside), attention(x, 0.5, inside), rtol=1e-4, atol=1e-6
            )


def test_large_magnitudes_do_not_overflow() -> None:
    x = torch.full((1, 2, 2, 2), 6e4, dtype=torch.float16)
    guide = AttentionGuide(0.5)
    magnitudes = guide.magnitudes(x, x)
    for attention in (guide.cells(magnitudes), guide.channels(magnitudes)):
        assert attention.dtype == torch.float32 and (attention == 1).all()


@pytest.mark.parametrize("source", ["teacher", "student", "both"])
def test_guide_reads_its_source_and_leaves_no_gradient(source: str) -> None:
    x, target = noise(2, 3, 4, 5, seed=1), noise(2, 3, 4, 5, seed=2)
    guide = AttentionGuide(0.8, source)
    x.requires_grad_(), target.requires_grad_()
    magnitudes = guide.magnitudes(x, target)
    cells, channels = guide.cells(magnitudes), guide.channels(magnitudes)
    assert not cells.requires_grad and not channels.requires_grad
    features = {"teacher": [target], "student": [x], "both": [x, target]}[source]
    for found, attention in ((cells, spatial_attention), (channels, channel_attention)):
        expected = torch.stack([attention(y.detach().float().abs(), 0.8) for y in features]).mean(
            dim=0
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

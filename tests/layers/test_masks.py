"""What is hidden: how much exactly, which entries, and never what is outside the image."""

import pytest
import torch
from torch import Tensor

from d2kd.layers import MaskRule, hide_top
from tests.helpers.references import hidden_count
from tests.helpers.references import visible as visible_of_equation
from tests.helpers.toys import noise

RATIOS = [0.0, 0.07, 0.15, 0.3, 0.333, 0.45, 0.5, 0.6, 0.65, 0.9, 0.99]


def inside_first(counts: Tensor, width: int) -> Tensor:
    """(N, 1, 1, width): the first counts[n] cells of image n."""
    return (torch.arange(width) < counts[:, None])[:, None, None]


@pytest.mark.parametrize("ratio", RATIOS)
def test_share_is_hidden_exactly_of_each_image(ratio: float) -> None:
    # Images of 1 to 120 cells in a map of 130; the last are the P2 and P3 of 800 x 1344 and more,
    # where float32 has no exact products: 0.6 x 50,000 would hide 30,001.
    for counts, width in ((range(1, 121), 130), ((67200, 50000, 16800, 12345), 67200)):
        inside = inside_first(torch.tensor(counts), width)
        visible = hide_top(torch.randn(inside.shape), ratio, inside)
        hidden = (inside & ~visible).flatten(1).sum(dim=1).tolist()
        assert hidden == [hidden_count(ratio, n) for n in counts]
        assert not (visible & ~inside).any()


@pytest.mark.parametrize("ratio", RATIOS)
def test_share_is_hidden_exactly_without_padding_and_of_ties(ratio: float) -> None:
    for n in (1, 2, 3, 20, 77, 100, 4200, 50000):
        hidden = ~hide_top(torch.ones(2, 1, 1, n), ratio)
        assert hidden.flatten(1).sum(dim=1).tolist() == [hidden_count(ratio, n)] * 2


def test_largest_are_hidden_and_padding_never_counts() -> None:
    scores = torch.tensor([3.0, 1.0, 9.0, 2.0, 8.0]).view(1, 1, 1, 5)
    inside = inside_first(torch.tensor([4]), 5)  # without the 8
    hidden = (~hide_top(scores, 0.5)).flatten().tolist()
    assert hidden == [True, False, True, False, True]  # ceil(2.5) = 3
    assert hide_top(scores, 0.5, inside).flatten().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("hide", ["most", "least"])
@pytest.mark.parametrize("rule", ["ratio", "threshold"])
def test_rule_hides_what_the_equation_says(rule: str, hide: str) -> None:
    attention = noise(2, 1, 6, 7).exp()
    mask = MaskRule(ratio=0.3, rule=rule, threshold=1.2, hide=hide)
    inside = torch.zeros(2, 1, 6, 7, dtype=torch.bool)
    inside[0, :, :4, :5] = inside[1, :, :6, :2] = True
    whole, part = mask(attention), mask(attention, inside)
    for n, (h, w) in enumerate([(4, 5), (6, 2)]):
        assert torch.equal(whole[n].double(), visible_of_equation(mask, attention[n]))
        expected = visible_of_equation(mask, attention[n, :, :h, :w])
        assert torch.equal(part[n, :, :h, :w].double(), expected)
    assert not (part & ~inside).any()


@pytest.mark.parametrize("hide", ["most", "least", "random", "sampled"])
def test_nothing_is_hidden_at_ratio_zero_and_something_of_a_single_cell_above(hide: str) -> None:
    attention, inside = torch.rand(2, 1, 3, 3), torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    inside[0, 0, 0, 0] = True  # and the second image is empty
    assert MaskRule(ratio=0.0, hide=hide)(attention).all()
    assert torch.equal(MaskRule(ratio=0.0, hide=hide)(attention, inside), inside)
    assert not MaskRule(ratio=0.1, hide=hide)(attention, inside).any()


def test_random_hides_alike_and_sampled_in_proportion_to_attention() -> None:
    # Of one of three cells: the deviation of a share p in n draws is sqrt(p (1 - p) / n).
    n, attention = 20000, torch.tensor([1.5, 1.0, 0.5])
    torch.manual_seed(0)
    for hide, expected in (("random", torch.full((3,), 1 / 3)), ("sampled", attention / 3)):
        visible = MaskRule(ratio=0.3, hide=hide)(attention.expand(n, 1, 1, 3))
        share = (~visible).double().mean(dim=(0, 1, 2))
        sigma = (expected * (1 - expected) / n).sqrt()
        assert ((share - expected).abs() <= 4 * sigma).all(), (hide, share)

"""ReviewFusion and pyramid_error beside the equations cell by cell, and in closed form."""

from contextlib import nullcontext
from typing import Optional, Tuple

import pytest
import torch
from torch import Tensor, nn

from d2kd.conformance.cuda_autocast import cuda_autocast
from d2kd.conformance.half_precision import relative_error, runs_in_float16
from d2kd.heads.reviewkd import ReviewFusion, pyramid_error
from tests.helpers.baseline_references import fuse, hcl
from tests.helpers.toys import noise


def random_fusion(channels: Tuple[int, int, int] = (3, 4, 5), fuse: bool = True) -> ReviewFusion:
    """Also the affine part of BatchNorm."""
    torch.manual_seed(0)
    block = ReviewFusion(*channels, fuse)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return block


# Fusion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarser", [(2, 3), (3, 4), (1, 1), (5, 7), None])
def test_fusion_is_that_of_the_equations(coarser: Optional[Tuple[int, int]]) -> None:
    # Of 5 x 7 cells, which the coarser level need not divide.
    block, x = random_fusion(fuse=coarser is not None), noise(2, 3, 5, 7, seed=1).float()
    handed = None if coarser is None else noise(2, 4, *coarser, seed=2).float()
    out, gathered = block(x, handed)
    assert out.shape == (2, 5, 5, 7) and gathered.shape == (2, 4, 5, 7)
    expected = fuse(block, x, None if handed is None else handed.double())
    torch.testing.assert_close(out, expected[0].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gathered, expected[1].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (4, 6)])
def test_gradient_of_few_cells_is_close_to_the_exact_one_in_half_precision(
    size: Tuple[int, int],
) -> None:
    # Of two nearly equal images BatchNorm leaves +1 and -1 in every channel, whatever their
    # difference is: the gradient is a small rest of large terms.
    block = random_fusion((32, 32, 32), fuse=False)
    image = noise(1, 32, *size, seed=1)
    x = torch.cat([image, image + 0.1 * noise(1, 32, *size, seed=2)]).half()
    gradients = []
    for dtype in (torch.float32, torch.float16):
        leaf = x.detach().to(dtype).requires_grad_()
        with cuda_autocast() if dtype == torch.float16 else nullcontext():
            pyramid_error(block(leaf)[0], noise(2, 32, *size, seed=3).float()).backward()
        gradients.append(leaf.grad.float())
    assert relative_error(gradients[:1], gradients[1:]) < 0.01


def test_first_attention_map_is_of_the_level_and_the_second_of_the_coarser_ones() -> None:
    # sigmoid(+-100) is 1 and 0: one of the two alone is handed on.
    block = random_fusion()
    x, coarser = noise(2, 3, 4, 6, seed=1).float(), noise(2, 4, 2, 3, seed=2).float()
    nn.init.zeros_(block.attention.weight)
    block.attention.bias.data = torch.tensor([100.0, -100.0])
    torch.testing.assert_close(block(x, coarser)[1], block.reduce(x))
    block.attention.bias.data = torch.tensor([-100.0, 100.0])
    doubled = coarser.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(block(x, coarser)[1], doubled)
    # Both at 0: half of each. They are no softmax, and need not add up to 1.
    block.attention.bias.data = torch.tensor([0.0, 100.0])
    torch.testing.assert_close(block(x, coarser)[1], block.reduce(x) / 2 + doubled)


def test_gradient_reaches_the_level_and_the_coarser_ones_by_both_results() -> None:
    for i in range(2):
        x, coarser = (torch.randn(2, c, 4, 6, requires_grad=True) for c in (3, 4))
        (random_fusion()(x, coarser)[i] ** 3).sum().backward()
        assert (x.grad != 0).any() and (coarser.grad != 0).any()


def test_convolutions_have_no_bias_and_start_in_the_published_range() -> None:
    # Kaiming, uniform, a = 1: within sqrt(3 / fan_in), so a deviation of sqrt(1 / fan_in).
    block = ReviewFusion(64, 32, 48, True)
    for (conv, _), fan_in in ((block.reduce, 64), (block.expand, 32 * 9)):
        assert conv.bias is None
        assert conv.weight.abs().max().item() <= (3 / fan_in) ** 0.5
        assert conv.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    assert block.reduce[0].kernel_size == (1, 1) and block.expand[0].kernel_size == (3, 3)
    assert block.attention.weight.shape == (2, 64, 1, 1) and block.attention.bias is not None
    assert ReviewFusion(64, 32, 48, False).attention is None


def norms(block: nn.Module) -> Tuple[nn.BatchNorm2d, ...]:
    return tuple(m for m in block.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("size, images", [((1, 1), 2), ((1, 2), 1), ((2, 1), 1)])
def test_two_values_of_a_channel_are_normalised_to_opposite_ones(
    size: Tuple[int, int], images: int
) -> None:
    # (a - mean) / deviation of two different values is -1 and 1, whatever they are.
    block, x = ReviewFusion(3, 4, 5, False), noise(images, 3, *size).float()
    out, gathered = block(x)
    for y in (out, gathered):
        values = y.transpose(0, 1).flatten(1)
        torch.testing.assert_close(values[:, 0], -values[:, 1], rtol=1e-3, atol=1e-4)
        assert (values.abs() > 0.9).any() and (values.abs() <= 1).all()


def test_single_cell_of_a_single_image_is_normalised_by_the_running_statistics() -> None:
    block = random_fusion(fuse=False).train()
    for norm in norms(block):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    before = {k: v.clone() for k, v in block.state_dict().items()}
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    out, gathered = block(x)
    (out.sum() + gathered.sum()).backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and (x.grad != 0).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    for k, v in block.state_dict().items():
        assert torch.equal(v, before[k]), f"{k} has changed"
    for norm in norms(block):
        norm.__class__ = nn.BatchNorm2d  # PyTorch's own
    torch.testing.assert_close(block.eval()(x)[0], out)


def test_running_statistics_follow_the_batches_and_serve_in_eval_mode() -> None:
    block, plain = ReviewFusion(3, 4, 5, False), nn.BatchNorm2d(4)
    x = noise(2, 3, 4, 5).float() + 3
    block(x), plain(block.reduce[0](x))
    torch.testing.assert_close(block.reduce[1].running_mean, plain.running_mean)
    torch.testing.assert_close(block.reduce[1].running_var, plain.running_var)
    assert block.reduce[1].running_mean.abs().max() > 0
    both, one = block.eval()(x)[1], block(x[:1])[1]
    torch.testing.assert_close(both[:1], one)


# The loss over a pyramid --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(9, 7), (8, 8), (5, 2), (4, 9), (3, 4), (2, 5), (1, 6), (1, 1), (13, 3)]
)
def test_error_is_that_of_the_equations(size: Tuple[int, int]) -> None:
    x, target = noise(2, 3, *size, seed=1) * 2, noise(2, 3, *size, seed=2) + 1
    found = pyramid_error(x, target)
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(hcl(x, target), rel=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (2, 2), (1, 1)])
def test_constant_difference_has_its_square_at_every_scale(size: Tuple[int, int]) -> None:
    # An average of equal numbers is that number, and the weights are divided by their sum.
    x = noise(2, 3, *size)
    assert pyramid_error(x, x + 3).item() == pytest.approx(9.0, rel=1e-6)
    assert pyramid_error(x, x).item() == 0.0


@pytest.mark.parametrize(
    "rows, sum_of_weights",
    [
        (16, 1 + 1 / 2 + 1 / 4 + 1 / 8),
        (5, 1 + 1 / 2 + 1 / 4 + 1 / 8),
        (4, 1 + 1 / 2 + 1 / 4),  # 2 and 1: not as many rows as 4
        (3, 1 + 1 / 2 + 1 / 4),
        (2, 1 + 1 / 2),
        (1, 1),
    ],
)
def test_difference_that_averages_to_nothing_counts_in_the_full_map_alone(
    rows: int, sum_of_weights: float
) -> None:
    # +2 and -2 in turn along each row: every window of an even number of columns averages to 0.
    stripes = torch.tensor([2.0, -2.0]).repeat(8).expand(1, 3, rows, 16)
    found = pyramid_error(stripes, torch.zeros(1, 3, rows, 16))
    assert found.item() == pytest.approx(4 / sum_of_weights, rel=1e-6)


def test_scales_of_four_two_and_one_have_the_weights_a_half_a_quarter_and_an_eighth() -> None:
    # What a scale sees of 8 columns: halves of +1 and -1 are seen by all but 1x1; quarters by 8 and
    # 4; of 8 stripes each 4x4 window has two, +1 and -1.
    total, found = 1 + 1 / 2 + 1 / 4 + 1 / 8, []
    for stripes in (2, 4, 8):
        signs = [1.0 if i * stripes // 8 % 2 == 0 else -1.0 for i in range(8)]
        x = torch.tensor(signs).expand(1, 1, 8, 8)
        found.append(pyramid_error(x, torch.zeros(1, 1, 8, 8)).item() * total)
    assert found == pytest.approx([1 + 1 / 2 + 1 / 4, 1 + 1 / 2, 1], rel=1e-6)


def test_only_rows_decide_which_scales_are_compared() -> None:
    # As the released code: with two columns, the four windows of a row are 0, 0, 1, 1.
    x = torch.tensor([1.0, -1.0]).expand(1, 1, 8, 2)
    error = pyramid_error(x, torch.zeros(1, 1, 8, 2)).item()
    assert error == pytest.approx((1 + 1 / 2 + 1 / 4) / (1 + 1 / 2 + 1 / 4 + 1 / 8), rel=1e-6)


def test_error_leaves_the_teacher_without_gradient() -> None:
    x, target = (noise(2, 3, 6, 6, seed=i).requires_grad_() for i in (1, 2))
    pyramid_error(x, target).backward()
    assert target.grad is None and (x.grad != 0).all()


def test_squares_of_half_precision_features_do_not_overflow() -> None:
    # 300^2 = 90,000 is above the largest float16, 65,504.
    def half(value: float) -> Tensor:
        return torch.full((1, 2, 9, 9), value, dtype=torch.float16)

    assert pyramid_error(half(300.0), half(0.0)).item() == pytest.approx(90000.0)

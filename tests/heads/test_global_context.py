"""GlobalContext beside its equation, cell by cell, and how it begins."""

import math

import pytest
import torch
from torch import nn

from d2kd.conformance.cuda_autocast import cuda_autocast
from d2kd.conformance.half_precision import runs_in_float16
from d2kd.heads.fgd import GlobalContext
from tests.helpers.baseline_references import global_context
from tests.helpers.toys import noise


def random_block(channels: int) -> GlobalContext:
    """Also the affine part of LayerNorm, and the layer that starts as zero."""
    torch.manual_seed(0)
    block = GlobalContext(channels)
    for p in block.parameters():
        nn.init.normal_(p)
    return block


def test_context_is_that_of_the_equation() -> None:
    for channels in (1, 5, 8):
        block, x = random_block(channels), noise(3, channels, 4, 5).float()
        found = block(x)
        assert found.shape == (3, channels, 1, 1)
        for vector, image in zip(found, x):
            expected = global_context(block, image).float()
            torch.testing.assert_close(vector[:, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_context_does_not_depend_on_where_the_cells_are() -> None:
    block, x = random_block(6).double(), noise(2, 6, 4, 5)
    shuffled = x.flatten(2)[:, :, torch.randperm(20)].view(2, 6, 10, 2)
    torch.testing.assert_close(block(shuffled), block(x))


def test_attention_chooses_the_cell_and_not_their_mean() -> None:
    # Channel 0 is the score: 100 in one cell, so that its softmax is 1 there and e^-100 elsewhere.
    block, x = random_block(4).double(), noise(1, 4, 3, 3)
    nn.init.zeros_(block.attention.weight)
    block.attention.weight.data[0, 0] = 1.0
    x[0, 0] = 0.0
    x[0, 0, 1, 2] = 100.0
    chosen = x[:, :, 1:2, 2:3].expand(-1, -1, 3, 3)
    torch.testing.assert_close(block(x), block(chosen))


def test_new_block_adds_nothing_yet_learns() -> None:
    torch.manual_seed(0)
    block = GlobalContext(8)
    out = block(torch.randn(2, 8, 4, 5))
    assert (out == 0).all()
    (out - 1).square().sum().backward()
    assert block.transform[-1].weight.grad.abs().sum() > 0


def test_new_attention_has_the_published_deviation_and_no_bias() -> None:
    # Kaiming, fan_in, ReLU: sqrt(2 / C); of 4,096 draws the deviation is off by 1.1 %.
    torch.manual_seed(0)
    weight = GlobalContext(4096).attention.weight
    assert abs(weight.std().item() / math.sqrt(2 / 4096) - 1) < 0.05
    assert (GlobalContext(4).attention.bias == 0).all()


def test_hidden_layer_has_half_of_the_channels() -> None:
    for channels, hidden in ((8, 4), (5, 2), (1, 1)):
        shapes = {k: tuple(v.shape) for k, v in GlobalContext(channels).state_dict().items()}
        assert shapes["attention.weight"] == (1, channels, 1, 1)
        assert shapes["transform.0.weight"] == (hidden, channels, 1, 1)
        assert shapes["transform.1.weight"] == (hidden, 1, 1)
        assert shapes["transform.3.weight"] == (channels, hidden, 1, 1)


@pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")
def test_shares_of_thousands_of_cells_are_not_rounded_to_half_precision() -> None:
    # One cell has the score 14.5, the 16,799 others 0, so e^-14.5 = 5.0e-7 of its share each and
    # 0.8 % together. The numbers of float16 are 6e-8 apart there: 12 % of what they add up to.
    block = GlobalContext(2)
    nn.init.zeros_(block.attention.weight)
    block.attention.weight.data[0, 0] = 1.0
    pooled = []
    block.transform[0].register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    x = torch.zeros(1, 2, 100, 168)
    x[0, 0, 50, 50], x[0, 1] = 14.5, 1000.0
    x[0, 1, 50, 50] = 0.0
    block(x)
    with cuda_autocast():
        block(x)
    others = 16799 * math.exp(-14.5)
    assert pooled[0][0, 1].item() == pytest.approx(1000 * others / (1 + others), rel=1e-3)
    assert pooled[1][0, 1].item() == pytest.approx(pooled[0][0, 1].item(), rel=1e-3)

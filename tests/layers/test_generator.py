"""Generators beside their equations, and independent of how far an image was padded."""

import torch

from d2kd.layers import DualGenerator, Generator
from tests.helpers.references import generate, generate_from_both, parts
from tests.helpers.toys import feature_view, noise

SIZES = [(40, 48), (24, 30)]  # 5 x 6 and 3 x 4 cells, in maps of 5 x 6


def test_generator_is_two_convolutions_with_relu_between() -> None:
    torch.manual_seed(0)
    generator, x = Generator(3).double(), noise(2, 3, 4, 5)
    expected = torch.stack([generate(generator, image) for image in x])
    torch.testing.assert_close(generator(x), expected)
    # A scale of the result, bias included.
    scale = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(generator(x, output=generator.output(scale)), 0.3 * expected)


def test_padding_does_not_reach_into_the_image() -> None:
    # Without `inside` the bias of the first convolution would light up the padding around.
    torch.manual_seed(0)
    generator, x = Generator(3).double(), noise(2, 3, 5, 6)
    inside = feature_view({"p3": x}, SIZES).inside_image("p3")
    rebuilt = generator(x * inside, inside)
    for found, image in zip(parts(rebuilt, SIZES), parts(x, SIZES)):
        torch.testing.assert_close(found, generate(generator, image))


def test_dual_generator_fuses_by_learned_weights() -> None:
    torch.manual_seed(0)
    generator, x = DualGenerator(3).double(), noise(2, 3, 5, 6)
    assert generator.fusion.softmax(dim=0).tolist() == [0.5, 0.5], "equal at first"
    generator.fusion.data = torch.tensor([0.7, -0.4], dtype=torch.float64)
    inside = feature_view({"p3": x}, SIZES).inside_image("p3")
    cells, channels = (noise(2, 1, 5, 6) > 0) & inside, noise(2, 3, 1, 1, seed=1) > 0
    rebuilt = parts(generator(1e3 * x * ~inside + x * inside, cells, channels, inside), SIZES)
    for n, image in enumerate(parts(x, SIZES)):
        visible = parts(cells, SIZES)[n].double()
        expected = generate_from_both(generator, image, visible, channels[n].double())
        torch.testing.assert_close(rebuilt[n], expected)


def test_fusion_learns() -> None:
    generator, x = DualGenerator(2), torch.randn(1, 2, 4, 4)
    cells, channels = torch.ones(1, 1, 4, 4).bool(), torch.ones(1, 2, 1, 1).bool()
    generator(x, cells, channels).square().sum().backward()
    # Softmax: what the one weight gains the other loses.
    a, b = generator.fusion.grad.tolist()
    assert a != 0 and abs(a + b) < 1e-4 * abs(a)

"""CWDHead beside its equation in loops, its closed forms, and its limits."""

import math
from typing import Any, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from d2kd import load_config
from d2kd.heads import CWDHead, DetectorInfo, DistillPair, build_head
from d2kd.pairing.levels import pair_levels
from tests.helpers.baseline_references import cwd
from tests.helpers.references import conv
from tests.helpers.toys import feature_view, level_pairs, noise


def loss_of(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Of one level of equal channels."""
    levels = level_pairs(p3=(student.shape[1], teacher.shape[1]))
    head = CWDHead(levels=levels, temperature=temperature)
    losses = head(feature_view({"p3": student}), feature_view({"p3": teacher}))
    assert list(losses) == ["loss_cwd"] and list(losses["loss_cwd"]) == ["p3"]
    return losses["loss_cwd"]["p3"]


def pair_of_maps(images: int = 2, channels: int = 3) -> Tuple[Tensor, Tensor]:
    return tuple(noise(images, channels, 4, 5, seed=i) * 3 for i in (1, 2))


# The equation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_and_gradient_are_those_of_the_equation(temperature: float) -> None:
    # d/dx of tau^2 KL is tau (phi_s - phi_t), here divided by 2 images x 3 channels.
    student, teacher = pair_of_maps()
    loss = loss_of(student.requires_grad_(), teacher, temperature)
    expected = cwd(student.detach(), teacher, temperature)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 0.1
    loss.backward()
    ours, theirs = ((x.detach() / temperature).flatten(2).softmax(2) for x in (student, teacher))
    expected_gradient = (temperature * (ours - theirs) / 6).view_as(student)
    torch.testing.assert_close(student.grad, expected_gradient, rtol=1e-4, atol=1e-6)


def test_every_level_has_the_loss_of_its_adapted_features() -> None:
    torch.manual_seed(0)
    head = CWDHead(levels=level_pairs(p3=(3, 5), p4=(5, 5)), temperature=2.0)
    student = {"p3": noise(2, 3, 6, 4, seed=1).float(), "p4": noise(2, 5, 3, 2, seed=2).float()}
    teacher = {"p3": noise(2, 5, 6, 4, seed=3).float(), "p4": noise(2, 5, 3, 2, seed=4).float()}
    losses = head(feature_view(student), feature_view(teacher))["loss_cwd"]
    assert list(losses) == ["p3", "p4"]
    for level, loss in losses.items():
        x = torch.stack([conv(image.double(), head.adapter[level]) for image in student[level]])
        assert loss.item() == pytest.approx(cwd(x, teacher[level].double(), 2.0), rel=1e-5)


def test_divergence_is_the_teacher_s_from_the_student_s() -> None:
    # Two cells: phi_t = (1/2, 1/2), phi_s = (1/4, 3/4). log(4/3) / 2 this way, and the other
    # (3 log 3 - 4 log 2) / 4.
    student, teacher = torch.tensor([[[[0.0, math.log(3)]]]]), torch.zeros(1, 1, 1, 2)
    there, back = math.log(4 / 3) / 2, (3 * math.log(3) - 4 * math.log(2)) / 4
    assert loss_of(student, teacher).item() == pytest.approx(there, rel=1e-5)
    assert loss_of(teacher, student).item() == pytest.approx(back, rel=1e-5)


def test_square_of_the_temperature_makes_up_for_softer_distributions() -> None:
    # At temperature 2, 2 log 3 is log 3: the same distributions, four times the loss.
    student, teacher = torch.tensor([[[[0.0], [2 * math.log(3)]]]]), torch.zeros(1, 1, 2, 1)
    found = loss_of(student, teacher, temperature=2.0).item()
    assert found == pytest.approx(4 * math.log(4 / 3) / 2, rel=1e-5)


def test_loss_is_a_mean_over_channels_and_not_over_cells() -> None:
    # A teacher whose mass is in one of n cells, a student that spreads it: log n per channel.
    for rows, columns, channels in ((2, 3, 1), (2, 3, 4), (8, 10, 2)):
        teacher = torch.zeros(2, channels, rows, columns)
        teacher[:, :, 0, 1] = 1000.0
        found = loss_of(torch.zeros_like(teacher), teacher).item()
        assert found == pytest.approx(math.log(rows * columns), rel=1e-5)


# What does not matter -----------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_a_number_added_to_a_channel_does_not_matter_but_a_factor_does(changed: str) -> None:
    maps = dict(zip(("student", "teacher"), pair_of_maps()))
    expected = loss_of(**maps)
    x, offset = maps[changed], torch.tensor([-5.0, 0.0, 20.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        loss_of(**{**maps, changed: x + offset}), expected, rtol=1e-4, atol=0.0
    )
    assert abs(loss_of(**{**maps, changed: 2 * x}) / expected - 1) > 0.1


def test_place_of_the_cells_does_not_matter_but_that_it_is_the_same() -> None:
    student, teacher = pair_of_maps()
    expected = loss_of(student, teacher)
    flipped = loss_of(student.flip(2), teacher.flip(2))
    torch.testing.assert_close(flipped, expected, rtol=1e-5, atol=0.0)
    assert abs(loss_of(student.flip(2), teacher) / expected - 1) > 0.01


def test_duplicated_images_leave_the_loss_as_it_is() -> None:
    student, teacher = pair_of_maps()
    twice = loss_of(torch.cat([student, student]), torch.cat([teacher, teacher]))
    torch.testing.assert_close(twice, loss_of(student, teacher), rtol=1e-5, atol=0.0)


def test_new_head_gives_zero_for_equal_features() -> None:
    x = pair_of_maps()[0]
    assert loss_of(x, x).item() == 0.0
    # And for those that differ by a number per channel
    shifted = loss_of(x, x + torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)).item()
    assert shifted == pytest.approx(0.0, abs=1e-6)


# Limits, gradients, precision ---------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2])
def test_level_of_one_cell_gives_a_finite_zero(images: int) -> None:
    # All of a distribution over one cell is in it, whatever the feature.
    head = CWDHead(levels=level_pairs(p7=(3, 5)))
    x = torch.randn(images, 3, 1, 1, requires_grad=True)
    teacher = feature_view({"p7": torch.randn(images, 5, 1, 1)})
    loss = head(feature_view({"p7": x}), teacher)["loss_cwd"]["p7"]
    loss.backward()
    assert loss.item() == 0.0 and (x.grad == 0).all()
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_gradient_reaches_student_and_adapters_but_not_the_teacher() -> None:
    head = CWDHead(levels=level_pairs(p3=(3, 5), p4=(5, 5)))
    student = {"p3": torch.randn(2, 3, 6, 7), "p4": torch.randn(2, 5, 3, 4)}
    teacher = {"p3": torch.randn(2, 5, 6, 7), "p4": torch.randn(2, 5, 3, 4)}
    for x in (*student.values(), *teacher.values()):
        x.requires_grad_()
    losses = head(feature_view(student), feature_view(teacher))["loss_cwd"]
    sum(losses.values()).backward()
    assert all(x.grad is None for x in teacher.values())
    assert [k for k, _ in head.named_parameters()] == ["adapter.p3.weight", "adapter.p3.bias"]
    for name, x in [*student.items(), ("adapter", head.adapter["p3"].weight)]:
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0, name
    # A number added to a whole channel does not matter.
    assert head.adapter["p3"].bias.grad.abs().max() < 1e-6


def test_autocast_gives_a_float32_loss_close_to_the_exact_one() -> None:
    torch.manual_seed(0)
    head, losses = CWDHead(levels=level_pairs(p3=(6, 8))), []
    student, teacher = (feature_view({"p3": noise(2, c, 16, 16, seed=c).float()}) for c in (6, 8))
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(head(student, teacher)["loss_cwd"]["p3"])
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0.0)


def test_large_features_of_half_precision_are_summed_in_float32() -> None:
    # Uniform over 16,800 cells beside a teacher with all its mass in one: log 16,800. The share of
    # a cell, 6e-5, is below the normal numbers of float16.
    student = torch.full((1, 2, 100, 168), 100.0, dtype=torch.float16)
    teacher = student.clone()
    teacher[:, :, 50, 84] = 60000.0
    loss = loss_of(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(16800), rel=1e-5)


# Keys ---------------------------------------------------------------------------------------------


def config(**values: Any) -> CfgNode:
    return load_config(opts=[word for k, v in values.items() for word in (f"DISTILL.CWD.{k}", v)])


def build(**values: Any) -> nn.Module:
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in (3, 4)}
    detector = DetectorInfo("Toy", shapes, num_classes=3, provides=frozenset({"features"}))
    pair = DistillPair(detector, detector, pair_levels(shapes, shapes))
    return build_head("CWD", config(**values), pair)


def test_defaults_are_the_published_ones() -> None:
    assert build().temperature == 1.0 and config().DISTILL.CWD.LOSS_WEIGHT == 10.0
    assert [p.student for p in build().levels] == ["p3", "p4"]
    assert not list(build().parameters()), "none is needed for equal channels"


def test_temperature_reaches_the_head() -> None:
    assert build(TEMPERATURE=4.0).temperature == 4.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_temperature_that_is_not_above_zero_is_refused(value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"DISTILL\.CWD\.TEMPERATURE must be above 0, got {value}"
    ):
        build(TEMPERATURE=value)

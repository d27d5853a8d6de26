"""MGDHead beside its equations in loops, at its limits, and where its gradient goes."""

import math
from typing import Tuple

import pytest
import torch
from torch import Tensor, nn

from d2kd.heads import MGDHead
from tests.helpers.references import conv, generate
from tests.helpers.toys import feature_view, level_pairs, noise


def identity_head(mask_ratio: float, **levels: Tuple[int, int]) -> MGDHead:
    """A head whose generator hands its input on."""
    head = MGDHead(levels=level_pairs(**levels), mask_ratio=mask_ratio)
    for level in levels:
        head.generator[level] = nn.Identity()
    return head


def mgd_in_loops(head: MGDHead, level: str, x: Tensor, target: Tensor, draw: Tensor) -> float:
    """
    1/N sum_{n,c,i,j} (G(f(S) * M) - T)^2, where M is 0 with probability mask_ratio.

    Args:
        draw: uniform numbers, (N, 1, H, W); a position is hidden where they are below mask_ratio
    """
    masked = torch.stack([conv(image, head.adapter[level]) for image in x])
    images, channels, height, width = masked.shape
    for n in range(images):
        for i in range(height):
            for j in range(width):
                if draw[n, 0, i, j] < head.mask_ratio:
                    for c in range(channels):
                        masked[n, c, i, j] = 0.0
    rebuilt = torch.stack([generate(head.generator[level], image) for image in masked])
    total = 0.0
    for n in range(images):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    total += (rebuilt[n, c, i, j] - target[n, c, i, j]).item() ** 2
    return total / images


def test_loss_is_that_of_the_equations_for_the_same_draw() -> None:
    torch.manual_seed(0)
    head = MGDHead(levels=level_pairs(p3=(2, 3), p4=(4, 3)), mask_ratio=0.4).double()
    student = {"p3": noise(2, 2, 4, 5, seed=1), "p4": noise(2, 4, 2, 3, seed=2)}
    teacher = {"p3": noise(2, 3, 4, 5, seed=3), "p4": noise(2, 3, 2, 3, seed=4)}
    torch.manual_seed(7)
    losses = head(feature_view(student), feature_view(teacher))
    assert list(losses) == ["loss_mgd"] and list(losses["loss_mgd"]) == ["p3", "p4"]
    torch.manual_seed(7)  # the levels draw one after the other
    for level, loss in losses["loss_mgd"].items():
        x, target = student[level], teacher[level]
        draw = torch.rand(2, 1, *x.shape[-2:], dtype=torch.float64)
        expected = mgd_in_loops(head, level, x, target, draw)
        # The sum is taken in float32.
        assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)


def test_equal_features_without_mask_and_generator_give_zero() -> None:
    features = {"p3": noise(2, 4, 5, 6)}
    loss = identity_head(0.0, p3=(4, 4))(feature_view(features), feature_view(features))
    assert loss["loss_mgd"]["p3"].item() == 0.0


def test_loss_is_summed_over_channels_and_positions_and_averaged_over_images() -> None:
    # Every difference is 2: 4 x 3 channels x (5 x 6) positions, whatever the number of images.
    for images in (1, 3):
        student = {"p3": torch.zeros(images, 3, 5, 6)}
        teacher = {"p3": torch.full((images, 3, 5, 6), 2.0)}
        loss = identity_head(0.5, p3=(3, 3))(feature_view(student), feature_view(teacher))
        assert loss["loss_mgd"]["p3"].item() == 4 * 3 * 30


def test_duplicated_images_leave_the_loss_as_it_is() -> None:
    head = MGDHead(levels=level_pairs(p3=(4, 4)), mask_ratio=0.0).double()
    x, target = noise(2, 4, 5, 6, seed=1), noise(2, 4, 5, 6, seed=2)
    once = head(feature_view({"p3": x}), feature_view({"p3": target}))["loss_mgd"]["p3"]
    twice = head(
        feature_view({"p3": torch.cat([x, x])}), feature_view({"p3": torch.cat([target, target])})
    )["loss_mgd"]["p3"]
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.45, 0.65, 0.9])
def test_mask_hides_its_share_of_positions_in_all_channels_alike(mask_ratio: float) -> None:
    head = identity_head(mask_ratio, p3=(4, 4))
    seen = []
    head.generator["p3"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = {"p3": torch.ones(2, 4, 100, 100)}
    torch.manual_seed(0)
    head(feature_view(features), feature_view(features))
    visible = seen[0]
    assert set(visible.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(visible, visible[:, :1].expand_as(visible)), "a channel gives it away"
    # Of n positions a share is hidden whose deviation is sqrt(ratio (1 - ratio) / n).
    positions = 2 * 100 * 100
    sigma = math.sqrt(mask_ratio * (1 - mask_ratio) / positions)
    assert abs((visible[:, 0] == 0).double().mean().item() - mask_ratio) <= 3 * sigma


def test_every_image_level_and_iteration_has_a_draw_of_its_own() -> None:
    head = identity_head(0.5, p3=(1, 1), p4=(1, 1))
    seen = []
    for level in ("p3", "p4"):
        head.generator[level].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    features = feature_view({k: torch.ones(2, 1, 16, 16) for k in ("p3", "p4")})
    head(features, features)
    head(features, features)
    masks = {tuple(image.flatten().tolist()) for mask in seen for image in mask}
    assert len(masks) == 2 * 2 * 2


@pytest.mark.parametrize("student_channels", [4, 6])
def test_hidden_positions_get_no_gradient(student_channels: int) -> None:
    # Through the identity or the 1x1 adapter, so that a position of the student's map is a
    # position of the masked one. Its neighbours are reached through the generator all the same.
    torch.manual_seed(0)
    head = MGDHead(levels=level_pairs(p3=(student_channels, 4)), mask_ratio=0.5).double()
    x = noise(2, student_channels, 8, 8, seed=1).requires_grad_()
    target = noise(2, 4, 8, 8, seed=2)
    torch.manual_seed(5)
    head(feature_view({"p3": x}), feature_view({"p3": target}))["loss_mgd"]["p3"].backward()
    torch.manual_seed(5)
    hidden = (torch.rand(2, 1, 8, 8, dtype=torch.float64) < 0.5).expand_as(x)
    assert (x.grad[hidden] == 0).all()
    assert (x.grad[~hidden] != 0).all()


def test_gradient_reaches_student_adapter_and_generator_of_every_level() -> None:
    head = MGDHead(levels=level_pairs(p3=(3, 5), p4=(3, 5)), mask_ratio=0.65)
    student = {"p3": torch.randn(2, 3, 8, 8), "p4": torch.randn(2, 3, 4, 4)}
    teacher = {"p3": torch.randn(2, 5, 8, 8), "p4": torch.randn(2, 5, 4, 4)}
    for x in student.values():
        x.requires_grad_()
    sum(head(feature_view(student), feature_view(teacher))["loss_mgd"].values()).backward()
    for name, x in [*student.items(), *head.named_parameters()]:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0, name


def test_adapters_are_built_only_where_channels_differ() -> None:
    head = MGDHead(levels=level_pairs(p3=(3, 5), p4=(5, 5)), mask_ratio=0.65)
    assert {k: v.shape for k, v in head.adapter.named_parameters()} == {
        "p3.weight": (5, 3, 1, 1),
        "p3.bias": (5,),
    }


def test_autocast_gives_a_float32_loss_close_to_the_exact_one() -> None:
    torch.manual_seed(0)
    head = MGDHead(levels=level_pairs(p3=(8, 8)), mask_ratio=0.65)
    student, teacher = ({"p3": torch.randn(2, 8, 16, 16)} for _ in range(2))
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(head(feature_view(student), feature_view(teacher))["loss_mgd"]["p3"])
    assert losses[1].dtype == torch.float32 and losses[1].isfinite()
    # bfloat16 has 8 significant bits: an error of 2^-9 per rounding, most of which cancel here.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0.0)


def test_mask_does_not_depend_on_the_precision_of_the_features() -> None:
    head = identity_head(0.65, p3=(1, 1))
    masks = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        view = feature_view({"p3": torch.ones(2, 1, 128, 128, dtype=dtype)})
        head(view, view)
        masks.append(head.maps["visible"]["p3"])
    assert torch.equal(*masks)


def test_sum_does_not_overflow_half_precision() -> None:
    # 10^2 x 64 channels x 32 x 32 positions = 6,553,600; the largest float16 is 65,504.
    student, teacher = (
        {"p3": torch.full((1, 64, 32, 32), v, dtype=torch.float16)} for v in (0.0, 10.0)
    )
    loss = identity_head(0.0, p3=(64, 64))(feature_view(student), feature_view(teacher))
    assert loss["loss_mgd"]["p3"].item() == 6553600.0


@pytest.mark.parametrize("images", [1, 2])
def test_level_of_one_cell_is_finite_and_trains(images: int) -> None:
    head = MGDHead(levels=level_pairs(p7=(3, 5)), mask_ratio=0.65)
    x = torch.randn(images, 3, 1, 1, requires_grad=True)
    teacher = feature_view({"p7": torch.randn(images, 5, 1, 1)})
    loss = head(feature_view({"p7": x}), teacher)["loss_mgd"]["p7"]
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 65, math.nan])
def test_mask_ratio_outside_its_range_is_refused(mask_ratio: float) -> None:
    message = rf"^mask_ratio must be in \[0, 1\), got {mask_ratio}"
    with pytest.raises(ValueError, match=message):
        MGDHead(levels=level_pairs(p3=(4, 4)), mask_ratio=mask_ratio)

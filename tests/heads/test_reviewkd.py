"""ReviewKDHead beside its equations in loops, at its limits, and where its gradient goes."""

from typing import Any, Dict, List, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from d2kd import load_config
from d2kd.heads import DetectorInfo, DistillPair, ReviewKDHead, build_head
from d2kd.pairing.levels import LevelPair, pair_levels
from tests.helpers.baseline_references import fuse, hcl
from tests.helpers.toys import feature_view, level_pairs, noise

LEVELS = {"p3": (3, 5), "p4": (4, 6), "p5": (5, 5)}  # of student and teacher
SIZES = {"p3": (6, 9), "p4": (3, 5), "p5": (2, 3)}


def random_head(mid_channels: int = 4, **levels: Tuple[int, int]) -> ReviewKDHead:
    """Also the affine part of BatchNorm."""
    torch.manual_seed(0)
    head = ReviewKDHead(levels=level_pairs(**(levels or LEVELS)), mid_channels=mid_channels)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return head


def features(side: int, seed: int, images: int = 2) -> Dict[str, Tensor]:
    """Of the student (side 0) or the teacher (side 1)."""
    return {
        k: noise(images, channels[side], *SIZES[k], seed=seed + i).float()
        for i, (k, channels) in enumerate(LEVELS.items())
    }


def losses_of(head: ReviewKDHead, student: Any, teacher: Any) -> Dict[str, Tensor]:
    losses = head(feature_view(student), feature_view(teacher))
    assert list(losses) == ["loss_reviewkd"]
    return losses["loss_reviewkd"]


def review_in_loops(head: ReviewKDHead, student: Any, teacher: Any) -> Dict[str, float]:
    """From the coarsest level to the finest, each joined with what the one before handed on."""
    losses, gathered = {}, None
    for level in sorted(student, reverse=True):
        out, gathered = fuse(head.fusion[level], student[level], gathered)
        losses[level] = hcl(out, teacher[level])
    return losses


# The equations ------------------------------------------------------------------------------------


def test_losses_are_those_of_the_equations() -> None:
    head, student, teacher = random_head(), features(0, seed=1), features(1, seed=5)
    found, expected = losses_of(head, student, teacher), review_in_loops(head, student, teacher)
    assert list(found) == list(expected) == ["p5", "p4", "p3"]
    for level, loss in found.items():
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[level], rel=1e-5) and expected[level] > 0.1


@pytest.mark.parametrize("order", [["p3", "p4", "p5"], ["p5", "p4", "p3"], ["p4", "p5", "p3"]])
def test_order_of_the_levels_does_not_matter(order: Sequence[str]) -> None:
    by_name = {p.student: p for p in level_pairs(**LEVELS)}
    head = ReviewKDHead(levels=[by_name[k] for k in order], mid_channels=4)
    head.load_state_dict(random_head().state_dict())
    student, teacher = features(0, seed=1), features(1, seed=5)
    found = losses_of(head, {k: student[k] for k in order}, teacher)
    assert list(found) == ["p5", "p4", "p3"]
    for level, loss in losses_of(random_head(), student, teacher).items():
        assert torch.equal(found[level], loss)


def test_levels_are_ordered_by_stride_whatever_their_names() -> None:
    levels = (LevelPair("b", "x", 3, 3, 8, 8), LevelPair("a", "y", 3, 3, 32, 32))
    for given in (levels, levels[::-1]):
        head = ReviewKDHead(levels=given, mid_channels=4)
        assert list(head.fusion) == ["a", "b"]
        assert head.fusion["a"].attention is None and head.fusion["b"].attention is not None


def test_what_a_level_hands_on_reaches_all_finer_ones_and_no_coarser_one() -> None:
    student, teacher = features(0, seed=1), features(1, seed=5)
    before = losses_of(random_head(), student, teacher)
    for changed, reached in (("p5", "p5 p4 p3"), ("p4", "p4 p3"), ("p3", "p3")):
        other = {**student, changed: student[changed].flip(0, 1)}
        after = losses_of(random_head(), other, teacher)
        assert [k for k in after if after[k] != before[k]] == reached.split()


def test_teacher_level_matters_to_its_own_loss_alone() -> None:
    student, teacher = features(0, seed=1), features(1, seed=5)
    before = losses_of(random_head(), student, teacher)
    after = losses_of(random_head(), student, {**teacher, "p4": teacher["p4"] + 1})
    assert [k for k in after if after[k] != before[k]] == ["p4"]


def test_teacher_that_is_what_comes_out_gives_zero() -> None:
    head, student, gathered, teacher = random_head(), features(0, seed=1), None, {}
    for level in ("p5", "p4", "p3"):
        teacher[level], gathered = head.fusion[level](student[level], gathered)
    assert all(x.item() == 0 for x in losses_of(head, student, teacher).values())


def test_new_head_compares_standardised_maps_with_the_teacher() -> None:
    # What comes out of a new BatchNorm has the mean 0 and the variance 1 in each channel: a teacher
    # of 3 everywhere is 9 + 1 away from it cell by cell; the other scales lie between that and 9.
    torch.manual_seed(0)
    head = ReviewKDHead(levels=level_pairs(p3=(3, 5)), mid_channels=4)
    x, target = noise(2, 3, 8, 8).float(), torch.full((2, 5, 8, 8), 3.0)
    loss = losses_of(head, {"p3": x}, {"p3": target})["p3"].item()
    assert (10 * 1 + 9 * 0.875) / 1.875 - 1e-4 <= loss < 10


# Limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1)])
def test_small_levels_are_finite_and_train(size: Tuple[int, int], images: int) -> None:
    head = random_head(p6=(3, 5), p7=(3, 5))
    x = {k: torch.randn(images, 3, *size, requires_grad=True) for k in ("p6", "p7")}
    target = {k: torch.randn(images, 5, *size) for k in x}
    losses = losses_of(head, x, target)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert all(v.grad is not None and v.grad.isfinite().all() for v in x.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(v.isfinite().all() for v in head.state_dict().values()), "running statistics"


def test_duplicated_images_leave_the_losses_as_they_are() -> None:
    # BatchNorm divides by the deviation over the batch without Bessel's correction: that of twice
    # the same images is the same.
    student, teacher = features(0, seed=1), features(1, seed=5)
    twice = [{k: torch.cat([x, x]) for k, x in side.items()} for side in (student, teacher)]
    once, found = losses_of(random_head(), student, teacher), losses_of(random_head(), *twice)
    for level, loss in once.items():
        torch.testing.assert_close(found[level], loss, rtol=1e-5, atol=0.0)


def test_detectors_that_pad_differently_are_compared_on_what_they_share() -> None:
    student, teacher = features(0, seed=1), features(1, seed=5)
    expected = losses_of(random_head(), student, teacher)
    student, teacher = dict(student), dict(teacher)
    student["p4"] = torch.cat([student["p4"], torch.full((2, 4, 1, 5), 1e3)], dim=2)
    teacher["p3"] = torch.cat([teacher["p3"], torch.full((2, 5, 6, 2), 1e3)], dim=3)
    for level, loss in losses_of(random_head(), student, teacher).items():
        assert torch.equal(loss, expected[level])


# Gradients and precision --------------------------------------------------------------------------


def test_gradient_reaches_student_and_all_parameters_but_not_the_teacher() -> None:
    head, student, teacher = random_head(), features(0, seed=1), features(1, seed=5)
    for x in (*student.values(), *teacher.values()):
        x.requires_grad_()
    losses = losses_of(head, student, teacher)
    reached = torch.autograd.grad(losses["p3"], list(student.values()), retain_graph=True)
    assert all(x.abs().sum() > 0 for x in reached), "the finest loss teaches all levels"
    sum(losses.values()).backward()
    assert all(x.grad is None for x in teacher.values())
    for key, p in [*student.items(), *head.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, key


def test_autocast_gives_float32_losses_close_to_the_exact_ones() -> None:
    student, teacher, found = features(0, seed=1), features(1, seed=5), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(losses_of(random_head(), student, teacher))
    for level, loss in found[1].items():
        assert loss.dtype == torch.float32
        # Two convolutions per level round to bfloat16, 8 significant bits.
        torch.testing.assert_close(loss, found[0][level], rtol=3e-2, atol=0.0)


def test_large_features_of_half_precision_do_not_overflow() -> None:
    # The student's are standardised, to (-1, 1) of mean 0; of the teacher's 300, the square is
    # above the largest float16, 65,504.
    torch.manual_seed(0)
    head = ReviewKDHead(levels=level_pairs(p3=(2, 3)), mid_channels=4)
    x = (noise(1, 2, 100, 168) + 100).half()
    target = torch.full((1, 3, 100, 168), 300.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses_of(head, {"p3": x}, {"p3": target})["p3"]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(300.0**2, rel=1e-3)


# Keys ---------------------------------------------------------------------------------------------


def config(**values: Any) -> CfgNode:
    words = [word for k, v in values.items() for word in (f"DISTILL.ReviewKD.{k}", v)]
    return load_config(opts=words)


def build(**values: Any) -> nn.Module:
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in (3, 4, 5)}
    detector = DetectorInfo("Toy", shapes, num_classes=3, provides=frozenset({"features"}))
    pair = DistillPair(detector, detector, pair_levels(shapes, shapes))
    return build_head("ReviewKD", config(**values), pair)


def channels(head: nn.Module) -> List[Tuple[int, ...]]:
    return [(x.reduce[0].out_channels, x.expand[0].out_channels) for x in head.fusion.values()]


def test_defaults_are_the_published_ones() -> None:
    assert config().DISTILL.ReviewKD.LOSS_WEIGHT == 1.0
    assert channels(build()) == [(256, 4)] * 3
    assert [p.student for p in build().levels] == ["p5", "p4", "p3"]


def test_number_of_channels_reaches_the_head() -> None:
    assert channels(build(MID_CHANNELS=7)) == [(7, 4)] * 3


@pytest.mark.parametrize("value", [0, -1])
def test_number_of_channels_below_one_is_refused(value: int) -> None:
    message = rf"DISTILL\.ReviewKD\.MID_CHANNELS must be in \[1, 65536\], got {value}"
    with pytest.raises(ValueError, match=message):
        build(MID_CHANNELS=value)


def test_head_makes_no_promise_of_zero_between_equal_detectors() -> None:
    # Its convolutions and BatchNorms are random, and not the identity.
    assert not getattr(ReviewKDHead, "zero_at_equal", False)
    x = {"p3": noise(2, 4, 6, 9).float()}
    assert losses_of(random_head(p3=(4, 4)), x, x)["p3"] > 0.1

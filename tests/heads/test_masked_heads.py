"""What AMD, DMKD, DFMSD and SAMKD have in common: padding, limits, gradients, keys."""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec

from d2kd import load_config
from d2kd.heads import (
    AMDHead,
    DetectorInfo,
    DFMSDHead,
    DistillPair,
    DMKDHead,
    SAMKDHead,
    build_head,
)
from d2kd.heads.samkd_scales import Windows
from d2kd.layers import MaskRule
from d2kd.pairing.levels import pair_levels
from tests.helpers.references import BOTH_MOST, MOST
from tests.helpers.toys import feature_view, level_pairs, noise

HEADS = {
    "amd": (AMDHead, {"mask": MOST}),
    "dmkd": (DMKDHead, BOTH_MOST),
    "dfmsd": (DFMSDHead, BOTH_MOST),
    "samkd-pool": (SAMKDHead, {"min_cells": 2, **BOTH_MOST}),
    "samkd-window": (SAMKDHead, {"min_cells": 2, "hierarchy": "window", **BOTH_MOST}),
}
# Without scales, on which a batch decides, and without statistics over the batch.
SUMS = {k: v for k, v in HEADS.items() if k in ("amd", "dmkd")}
SUMS["samkd"] = (SAMKDHead, {"scales": [1], **BOTH_MOST})

every_head = pytest.mark.parametrize("name", HEADS)


def random_head(name: str, channels: Tuple[int, int] = (3, 4), **values: Any) -> nn.Module:
    """On p3, also where training starts from zeros: gates, weights of fusion."""
    torch.manual_seed(0)
    cls, own = {**HEADS, **SUMS}[name]
    head = cls(levels=level_pairs(p3=channels), **{**own, **values})
    for key, p in head.named_parameters():
        if "gate" in key or "fusion" in key:
            nn.init.uniform_(p)
        if "squeeze.bias" in key:
            nn.init.constant_(p, 2.0)  # a ReLU that is open
    return head


def loss_of(head: nn.Module, student: Tensor, teacher: Tensor, sizes: Sequence[Any] = ()) -> Tensor:
    terms = head(feature_view({"p3": student}, sizes), feature_view({"p3": teacher}, sizes))
    return sum(x for levels in terms.values() for x in levels.values())


class Hands(nn.Module):
    """A generator that hands what it sees on."""

    def forward(self, x: Tensor, inside: Any = None, output: Optional[Tensor] = None) -> Tensor:
        return x if output is None else x * output

    def output(self, scale: Tensor) -> Tensor:
        return scale


def identity_head(name: str, channels: int, **values: Any) -> nn.Module:
    """Hides nothing, rebuilds nothing."""
    masks = ("mask",) if name == "amd" else ("cell_mask", "channel_mask")
    own = {"adapt_channels": False} if name == "amd" else {}
    head = random_head(
        name, (channels, channels), **{k: MaskRule(ratio=0.0) for k in masks}, **own, **values
    )
    generator = head.generator["p3"]
    if name == "amd":
        head.generator["p3"] = Hands()
    else:
        generator.from_cells = generator.from_channels = Hands()
    return head


# Padding ------------------------------------------------------------------------------------------


@every_head
@pytest.mark.parametrize("garbage", [0.0, 1e4])
def test_neither_more_padding_nor_what_is_in_it_matters(name: str, garbage: float) -> None:
    sizes = [(72, 80), (50, 61)]  # 9 x 10 and 7 x 8 cells
    head, found = random_head(name).double(), []
    student, teacher = noise(2, 3, 9, 10, seed=1), noise(2, 4, 9, 10, seed=2)
    for height, width, seed in ((9, 10, 3), (13, 17, 4)):
        features = []
        for x in (student, teacher):
            padded = garbage * noise(2, x.shape[1], height, width, seed=seed)
            padded[0, :, :9, :10], padded[1, :, :7, :8] = x[0], x[1, :, :7, :8]
            features.append(padded)
        loss = loss_of(head, features[0].requires_grad_(), features[1], sizes)
        loss.backward()
        found.append((loss, features[0].grad))
    (loss, gradient), (more, more_gradient) = found
    torch.testing.assert_close(more, loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(more_gradient[..., :9, :10], gradient, rtol=1e-4, atol=1e-6)
    outside = torch.ones(2, 3, 13, 17, dtype=torch.bool)
    outside[0, :, :9, :10] = outside[1, :, :7, :8] = False
    assert (more_gradient[outside] == 0).all() and (more_gradient[~outside] != 0).any()


@every_head
def test_detectors_that_pad_differently_are_compared_where_both_have_cells(name: str) -> None:
    head, sizes = random_head(name), [(72, 80), (50, 61)]
    x, target = torch.randn(2, 3, 13, 10), torch.randn(2, 4, 9, 17)
    expected = loss_of(head, x[..., :9, :], target[..., :10], sizes)
    torch.testing.assert_close(loss_of(head, x, target, sizes), expected)


@pytest.mark.parametrize("name", SUMS)
def test_loss_of_a_batch_is_the_mean_of_its_images(name: str) -> None:
    head = random_head(name).double()
    sizes = [(72, 80), (50, 61), (8, 8), (72, 16)]
    cells = [(9, 10), (7, 8), (1, 1), (9, 2)]
    x, target = noise(4, 3, 9, 10, seed=1), noise(4, 4, 9, 10, seed=2)
    each = [
        loss_of(head, x[[n], :, :h, :w], target[[n], :, :h, :w]).item()
        for n, (h, w) in enumerate(cells)
    ]
    assert loss_of(head, x, target, sizes).item() == pytest.approx(sum(each) / 4, rel=1e-5)


@every_head
def test_image_of_a_single_cell_in_a_batch_is_finite(name: str) -> None:
    head, x = random_head(name), torch.randn(2, 3, 9, 10, requires_grad=True)
    loss = loss_of(head, x, torch.randn(2, 4, 9, 10), [(72, 80), (3, 5)])
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert (x.grad[1, :, 1:] == 0).all() and (x.grad[1, :, :, 1:] == 0).all()


# Limits -------------------------------------------------------------------------------------------


@every_head
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 3)])
@pytest.mark.parametrize("images", [1, 2])
def test_small_level_is_finite_and_trains(name: str, size: Tuple[int, int], images: int) -> None:
    head, x = random_head(name), torch.randn(images, 3, *size, requires_grad=True)
    loss = loss_of(head, x, torch.randn(images, 4, *size))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", [k for k in HEADS if k != "dfmsd"])
def test_equal_features_without_mask_and_generator_give_zero(name: str) -> None:
    x = noise(2, 4, 9, 10)
    assert loss_of(identity_head(name, 4), x, x).item() == pytest.approx(0.0, abs=1e-9)
    # And a difference of 2 everywhere gives 4 x 4 channels x 90 cells, also as the mean of three
    # scales with windows; pooled, these are 90, 25 that each stand for 4, and 9 for 16.
    cells = (90 + 4 * 25 + 16 * 9) / 3 if name == "samkd-pool" else 90
    loss = loss_of(identity_head(name, 4), x, x + 2)
    assert loss.item() == pytest.approx(4 * 4 * cells, rel=1e-5)


@pytest.mark.parametrize("name", [k for k in HEADS if k != "dfmsd"])
def test_duplicated_images_leave_the_loss_as_it_is(name: str) -> None:
    head = random_head(name)
    x, target = noise(2, 3, 9, 10, seed=1).float(), noise(2, 4, 9, 10, seed=2).float()
    twice = loss_of(head, torch.cat([x, x]), torch.cat([target, target]))
    torch.testing.assert_close(twice, loss_of(head, x, target), rtol=1e-5, atol=0.0)


# Gradients ----------------------------------------------------------------------------------------


@every_head
def test_gradient_reaches_student_and_all_parameters_but_not_the_teacher(name: str) -> None:
    head = random_head(name)
    x, target = torch.randn(2, 3, 9, 10), torch.randn(2, 4, 9, 10, requires_grad=True)
    loss_of(head, x.requires_grad_(), target, [(72, 80), (50, 61)]).backward()
    assert target.grad is None
    for key, p in [("student", x), *head.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, key


@every_head
def test_attention_of_both_is_that_of_neither_unless_features_are_equal(name: str) -> None:
    sources = ("teacher", "student", "both")
    x, target = noise(2, 4, 16, 16, seed=1).float(), noise(2, 4, 16, 16, seed=2).float()
    for teacher, alike in ((x, True), (target, False)):
        found = []
        for source in sources:
            head = random_head(name, (4, 4), attention_from=source)
            torch.manual_seed(0)
            loss_of(head, x, teacher)
            *_, cells = head.maps.values()  # of SAMKD the coarsest scale
            found.append(cells["p3"])
        assert torch.equal(found[0], found[1]) == alike
        assert (torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])) == alike


@every_head
def test_every_level_has_modules_and_a_loss_of_its_own(name: str) -> None:
    cls, values = HEADS[name]
    head = cls(levels=level_pairs(p3=(3, 4), p5=(4, 4)), **values)
    features = {"p3": torch.randn(2, 3, 12, 12), "p5": torch.randn(2, 4, 3, 3)}
    target = {"p3": torch.randn(2, 4, 12, 12), "p5": torch.randn(2, 4, 3, 3)}
    terms = head(feature_view(features), feature_view(target))
    for name, levels in terms.items():
        assert name.startswith("loss_") and list(levels) == ["p3", "p5"]
        for level, loss in levels.items():
            assert loss.shape == ()
            used = torch.autograd.grad(
                loss, list(head.parameters()), retain_graph=True, allow_unused=True
            )
            keys = [k for (k, _), g in zip(head.named_parameters(), used) if g is not None]
            assert keys and all(f".{level}." in k for k in keys)


# Precision ----------------------------------------------------------------------------------------


@every_head
def test_autocast_gives_a_float32_loss_close_to_the_exact_one(name: str) -> None:
    # The teacher's features guide, so that the masks are the same.
    head = random_head(name, (6, 8))
    x, target, losses = torch.randn(2, 6, 16, 16), torch.randn(2, 8, 16, 16), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(loss_of(head, x, target, [(128, 128), (100, 90)]))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("name", [k for k in HEADS if k != "dfmsd"])
def test_sum_does_not_overflow_half_precision(name: str) -> None:
    # 10^2 x 64 channels x 32 x 32 cells = 6,553,600; the largest float16 is 65,504. So has every
    # scale of SAMKD: k^2 makes up for the cells that pooling takes.
    x, target = (torch.full((1, 64, 32, 32), v, dtype=torch.float16) for v in (0.0, 10.0))
    loss = loss_of(identity_head(name, 64), x, target).item()
    assert loss == pytest.approx(6553600.0, rel=1e-6)


# Maps and keys ------------------------------------------------------------------------------------


@every_head
def test_maps_show_what_was_visible(name: str) -> None:
    head = random_head(name)
    loss_of(head, torch.randn(2, 3, 9, 10, requires_grad=True), torch.randn(2, 4, 9, 10))
    scales = [1, 2, 4] if name.startswith("samkd") else [0]
    assert list(head.maps) == [f"visible {k}" if k else "visible" for k in scales]
    for k, (key, levels) in zip(scales, head.maps.items()):
        size = k if name == "samkd-pool" else 1
        (shown,) = levels.values()
        assert list(levels) == ["p3"] and not shown.requires_grad
        assert shown.shape == (2, 1, math.ceil(9 / size), math.ceil(10 / size)), key
        assert shown.any() and not shown.all()


def build(name: str, **values: Any) -> nn.Module:
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in (3, 4, 5)}
    detector = DetectorInfo("Toy", shapes, num_classes=3, provides=frozenset({"features"}))
    pair = DistillPair(detector, detector, pair_levels(shapes, shapes))
    words = [w for k, v in values.items() for w in (f"DISTILL.{name}.{k.replace('__', '.')}", v)]
    return build_head(name, load_config(opts=words), pair)


MASK_ERRORS: List[Tuple[Dict[str, Any], str]] = [
    ({"RULE": "quantile"}, r"RULE must be one of ratio, threshold, got 'quantile'"),
    ({"HIDE": "best"}, r"HIDE must be one of sampled, .*random, got 'best'"),
    ({"RATIO": 1.0}, r"RATIO must be in \[0, 1\), got 1.0"),
    ({"RATIO": -0.1}, r"RATIO must be in \[0, 1\), got -0.1"),
    ({"RATIO": math.nan}, r"RATIO must be in \[0, 1\), got nan"),
    ({"THRESHOLD": 0.0}, r"THRESHOLD must be above 0, got 0.0"),
    (
        {"RULE": "threshold", "HIDE": "random"},
        r"RULE is 'threshold', which needs HIDE 'most' or 'least', got 'random'",
    ),
    (
        {"RULE": "threshold", "HIDE": "sampled"},
        r"RULE is 'threshold', which needs HIDE 'most' or 'least', got 'sampled'",
    ),
]
MASKS = [("AMD", "MASK")] + [
    (name, mask) for name in ("DMKD", "DFMSD", "SAMKD") for mask in ("CELL_MASK", "CHANNEL_MASK")
]


@pytest.mark.parametrize("name, mask", MASKS)
def test_value_of_a_mask_outside_its_range_is_refused_by_its_key(name: str, mask: str) -> None:
    for values, message in MASK_ERRORS:
        with pytest.raises(ValueError, match=rf"DISTILL\.{name}\.{mask}\.{message}"):
            build(name, **{f"{mask}__{k}": v for k, v in values.items()})


HEAD_ERRORS: List[Tuple[str, Dict[str, Any], str]] = [
    *((k, {"TEMPERATURE": 0.0}, r"TEMPERATURE must be above 0, got 0.0") for k in ("AMD", "DMKD")),
    ("DFMSD", {"TEMPERATURE": -1.0}, r"TEMPERATURE must be above 0, got -1.0"),
    ("SAMKD", {"TEMPERATURE": math.nan}, r"TEMPERATURE must be above 0, got nan"),
    *(
        (k, {"ATTENTION_FROM": "neck"}, r"ATTENTION_FROM must be one of .*, got 'neck'")
        for k in ("AMD", "DMKD", "DFMSD", "SAMKD")
    ),
    *(
        ("DFMSD", {k: v}, rf"{k} must be 0 or above, got {v}")
        for k, v in (
            ("SEMANTIC_RATIO", -0.5),
            ("SEMANTIC_RATIO", math.nan),
            ("ENHANCEMENT", -1.0),
            ("ENHANCEMENT", math.nan),
            ("ENHANCED_MAX_STRIDE", -8),
        )
    ),
    *(
        ("DFMSD", {"HIGH_PASS_CUTOFF": v}, rf"HIGH_PASS_CUTOFF must be in \(0, .* got {v}")
        for v in (0.0, 0.5, math.nan)
    ),
    ("SAMKD", {"HIERARCHY": "tree"}, r"HIERARCHY must be one of pool, window, got 'tree'"),
    *(
        ("SAMKD", {"SCALES": v}, r"SCALES must be different whole numbers .* got \[")
        for v in ([], [2, 4], [1, 0], [1, 2, 2], [1, 2.5], [1, -2])
    ),
    ("SAMKD", {"MIN_CELLS": 0}, r"MIN_CELLS must be 1 or more, got 0"),
]


@pytest.mark.parametrize("name, values, message", HEAD_ERRORS)
def test_value_of_a_head_outside_its_range_is_refused_by_its_key(
    name: str, values: Dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"DISTILL\.{name}\.{message}"):
        build(name, **values)


def test_head_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="RECONSTRUCT is False and SEMANTIC_RATIO is 0"):
        build("DFMSD", RECONSTRUCT=False, SEMANTIC_RATIO=0.0)


def test_keys_reach_the_heads() -> None:
    masks = {"CELL_MASK__RATIO": 0.45, "CHANNEL_MASK__HIDE": "least"}
    guide = {"TEMPERATURE": 0.8, "ATTENTION_FROM": "student"}
    amd = build("AMD", MASK__RULE="threshold", MASK__HIDE="least", ADAPT_CHANNELS=False, **guide)
    assert (amd.mask.rule, len(amd.gate)) == ("threshold", 0)
    dfmsd = build("DFMSD", ENHANCEMENT=0.5, HIGH_PASS_CUTOFF=0.12, **masks, **guide)
    assert dfmsd.enhancement == {"p3": 0.5, "p4": 0.5, "p5": 0.0} and dfmsd.high_pass_cutoff == 0.12
    samkd = build("SAMKD", HIERARCHY="window", SCALES=[2, 1], **masks, **guide)
    assert (samkd.hierarchy, samkd.scales, samkd.min_cells) == (Windows, [1, 2], 4)
    dmkd = build("DMKD", **masks, **guide)
    for head in (dmkd, dfmsd, samkd):
        assert (head.cell_mask.ratio, head.channel_mask.hide) == (0.45, "least")
    for head in (amd, dmkd, dfmsd, samkd):
        assert (head.guide.temperature, head.guide.source) == (0.8, "student")

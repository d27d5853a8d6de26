"""SGFIHead beside its equations in loops, at its limits, and between real detectors."""

from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import detectron2.modeling
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes

from d2kd import load_config
from d2kd.engine.optimizer import build_optimizer
from d2kd.heads import DetectorInfo, DistillPair, SGFIHead, build_head
from d2kd.heads.sgfi import MIN_TEMPERATURE
from d2kd.pairing.levels import pair_levels
from d2kd.views import Regions, RegionSampler
from d2kd.views.regions import Source
from tests.helpers.distillers import build_distiller, losses_of
from tests.helpers.region_references import pool_all_levels, sgfi
from tests.helpers.toys import FeatureView, batch, noise

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
# Of an image of 64 x 64: inside, all of it, of less than a cell, thin, at its edges. The second
# image has two.
BOXES = [
    [[9.0, 5.5, 40.0, 30.0], [0.0, 0.0, 64.0, 64.0], [20.0, 21.0, 23.0, 25.5]],
    [[30.0, 2.0, 36.0, 60.0], [0.0, 40.0, 30.0, 64.0]],
]


class StudentView(FeatureView):
    """Maps and regions, and no detector behind them."""

    def __init__(self, features: Mapping[str, Tensor], regions: Regions):
        super().__init__(features)
        self._regions = regions

    def regions(self, sampler: RegionSampler) -> Regions:
        return self._regions


class TeacherView(FeatureView):
    """RoI features of given boxes, which are those that a head must ask for."""

    def __init__(self, target: Tensor, boxes: List[Boxes]):
        super().__init__({})
        self.target, self.boxes = target, boxes

    def roi_features(self, boxes: List[Boxes]) -> Tensor:
        assert boxes is self.boxes
        return self.target


def boxes_of(boxes: Sequence[Sequence[Sequence[float]]]) -> List[Boxes]:
    return [Boxes(torch.tensor(x, dtype=torch.float64).reshape(-1, 4)) for x in boxes]


def make_head(channels: Tuple[int, int] = (4, 16), **values: Any) -> SGFIHead:
    """In float64, with an adapter that is not the identity."""
    torch.manual_seed(0)
    head = SGFIHead(
        student_levels=values.pop("levels", ["p3", "p4", "p5"]),
        student_channels=channels[0],
        teacher_channels=channels[1],
        sampler=RegionSampler(),
        **values,
    ).double()
    nn.init.normal_(head.adapter.weight, std=channels[0] ** -0.5)
    nn.init.normal_(head.adapter.bias)
    enliven(head)
    return head


def enliven(head: SGFIHead) -> None:
    """Few channels: none of them may begin with a dead ReLU, where similarities are 0."""
    for conv in (head.embedding[0], head.embedding[2]):
        nn.init.kaiming_normal_(conv.weight)
        nn.init.constant_(conv.bias, 0.3)


def maps_of(channels: int) -> Dict[str, Tensor]:
    """Levels of two images of 64 x 64."""
    return {f"p{i}": noise(2, channels, 64 >> i, 64 >> i, seed=i) for i in (3, 4, 5)}


def views(
    channels: Tuple[int, int] = (4, 16), size: int = 7, boxes: Sequence = BOXES
) -> Tuple[StudentView, TeacherView]:
    regions = Regions(boxes_of(boxes))
    target = noise(len(regions), channels[1], size, size, seed=9)
    student = StudentView(maps_of(channels[0]), regions)
    return student, TeacherView(target, regions.boxes)


def reference(
    head: SGFIHead, student: StudentView, teacher: TeacherView, **values: float
) -> Tuple[float, Tensor]:
    pooled = pool_all_levels(
        [student.features[k] for k in head.student_levels],
        [student.strides[k] for k in head.student_levels],
        student.regions(head.sampler).rois,
        size=teacher.target.shape[-1],
        sampling_ratio=head.sampling_ratio,
    )
    convs = head.embedding[0], head.embedding[2]
    return sgfi(pooled, teacher.target, head.adapter, convs, head.temperature.item(), **values)


# The equations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, size, sampling_ratio", [((4, 16), 7, 0), ((16, 16), 7, 2), ((9, 8), 14, 1)]
)
def test_loss_is_that_of_the_equations(
    channels: Tuple[int, int], size: int, sampling_ratio: int
) -> None:
    # The reference pools the student's maps and then adapts, as the paper does, the head the other
    # way round.
    head = make_head(channels, sampling_ratio=sampling_ratio)
    student, teacher = views(channels, size)
    losses = head(student, teacher)
    loss, weights = reference(head, student, teacher)
    assert list(losses) == ["loss_sgfi"] and losses["loss_sgfi"].shape == ()
    assert losses["loss_sgfi"].item() == pytest.approx(loss, rel=1e-5)
    found, boxes = head.latest_weights
    assert boxes is teacher.boxes and not found.requires_grad
    torch.testing.assert_close(found.double(), weights, rtol=1e-4, atol=1e-6)
    assert weights.max() > 0.5 and weights.min() < 0.2, "they choose"


def test_loss_is_that_of_the_levels_that_are_named_and_of_the_temperature() -> None:
    head = make_head(levels=["p5", "p3"])
    nn.init.constant_(head.temperature, 0.3)
    student, teacher = views()
    loss = head(student, teacher)["loss_sgfi"].item()
    assert loss == pytest.approx(reference(head, student, teacher)[0], rel=1e-5)
    assert head.latest_weights[0].shape == (5, 2)
    nn.init.constant_(head.temperature, 1.0)
    assert head(student, teacher)["loss_sgfi"].item() != pytest.approx(loss, rel=1e-3)


def test_leaky_embedding_that_has_died_can_still_learn() -> None:
    """With all outputs below 0 a ReLU gives equal weights, and no gradient to change them."""
    gradients = {}
    for slope in (0.0, 0.01):
        head, (student, teacher) = make_head(negative_slope=slope), views()
        loss = head(student, teacher)["loss_sgfi"].item()
        assert loss == pytest.approx(
            reference(head, student, teacher, negative_slope=slope)[0], rel=1e-5
        )
        nn.init.constant_(head.embedding[2].bias, -50.0)
        head(student, teacher)["loss_sgfi"].backward()
        assert head.latest_weights[0].sub(1 / 3).abs().max().item() < (1e-6 if slope == 0 else 0.3)
        gradients[slope] = head.embedding[2].weight.grad.norm().item()
    assert gradients[0.0] == 0 and gradients[0.01] > 0


def test_weights_of_a_region_sum_to_one_over_its_levels() -> None:
    # Softmax over the 5 regions instead, a mistake of a re-implementation, sums to 1 over these.
    head, (student, teacher) = make_head(), views()
    loss = head(student, teacher)["loss_sgfi"].item()
    weights = head.latest_weights[0].double()
    assert weights.shape == (5, 3) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert ((weights.sum(dim=0) - 1).abs() > 0.1).any()
    wrong, over_regions = reference(head, student, teacher, over_regions=True)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(over_regions.sum(dim=0), ones)
    assert ((over_regions.sum(dim=1) - 1).abs() > 0.1).any()
    assert loss != pytest.approx(wrong, rel=0.01)


def test_embedding_ends_with_a_relu() -> None:
    # A re-implementation has none after the second convolution; similarities may then be negative.
    head, (student, teacher) = make_head(), views()
    loss = head(student, teacher)["loss_sgfi"].item()
    wrong, _ = reference(head, student, teacher, last_relu=False)
    assert loss != pytest.approx(wrong, rel=0.01)


def test_one_embedding_serves_student_and_teacher() -> None:
    # 7 cells -> 3 -> 1, and channels 16 -> 8 -> 4: 3 x 3 x 16 x 8 + 8 and 3 x 3 x 8 x 4 + 4.
    head = make_head()
    assert {k: p.numel() for k, p in head.named_parameters()} == {
        "adapter.weight": 64,
        "adapter.bias": 16,
        "embedding.0.weight": 1152,
        "embedding.0.bias": 8,
        "embedding.2.weight": 288,
        "embedding.2.bias": 4,
        "temperature": 1,
    }
    assert head.embedding(torch.zeros(1, 16, 7, 7).double()).shape == (1, 4, 1, 1)
    assert head.temperature.item() == 1.0
    # With a bias alone, both sides embed to it: K^s . K^t = 3^2 + 4^2 on each level; ReLU
    # takes the rest.
    nn.init.zeros_(head.embedding[2].weight)
    head.embedding[2].bias.data = torch.tensor([3.0, -5.0, 4.0, -1.0]).double()
    dots = []
    softmax = F.softmax
    student, teacher = views()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", lambda x, dim: dots.append(x.detach()) or softmax(x, dim))
        head(student, teacher)
    torch.testing.assert_close(dots[0], torch.full((5, 3), 25.0).to(dots[0]))


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_levels_that_all_hold_the_teacher_s_feature_give_zero(chunk_size: int) -> None:
    # RoIAlign of a constant map is that constant, whatever the box, and the weights sum to 1. The
    # adapter of equal channels starts as the identity.
    head = SGFIHead(
        student_levels=["p3", "p4", "p5"],
        student_channels=8,
        teacher_channels=8,
        sampler=RegionSampler(),
        chunk_size=chunk_size,
    ).double()
    student, teacher = views((8, 8), boxes=[BOXES[0], BOXES[1][:1]])
    value = noise(1, 8, 1, 1)
    for x in student.features.values():
        x.copy_(value.expand_as(x))
    teacher.target.copy_(value.expand_as(teacher.target))
    loss = head(student, teacher)["loss_sgfi"]
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    # One channel is off by 2 everywhere: 2^2 / 8 in each region.
    teacher.target[:, 3] += 2
    assert head(student, teacher)["loss_sgfi"].item() == pytest.approx(0.5, rel=1e-5)


def test_loss_is_a_mean_over_regions() -> None:
    # Each alone, and all 5 together.
    head = make_head()
    student, teacher = views()
    together = head(student, teacher)["loss_sgfi"].item()
    alone, row = [], 0
    for image, boxes in enumerate(BOXES):
        for box in boxes:
            regions = Regions(boxes_of([[box] if i == image else [] for i in (0, 1)]))
            target = teacher.target[row : row + 1]
            views_of_one = StudentView(student.features, regions), TeacherView(
                target, regions.boxes
            )
            alone.append(head(*views_of_one)["loss_sgfi"].item())
            row += 1
    assert together == pytest.approx(sum(alone) / 5, rel=1e-6)


# What it learns ----------------------------------------------------------------------------------


def test_weights_turn_to_the_level_that_matches() -> None:
    # The teacher's features are those of the student's p4; p3 and p5 are noise. Nothing but the
    # embedding is trained.
    torch.manual_seed(0)
    head = SGFIHead(
        student_levels=["p3", "p4", "p5"],
        student_channels=16,
        teacher_channels=16,
        sampler=RegionSampler(),
    )
    enliven(head)
    corners = torch.rand(24, 2) * 32
    boxes = [Boxes(torch.cat([corners, corners + 8 + torch.rand(24, 2) * 24], dim=1))]
    maps = {k: x[:1].float() for k, x in maps_of(16).items()}
    student = StudentView(maps, Regions(boxes))
    rois = student.regions(head.sampler).rois
    target = pool_all_levels([maps["p4"]], [16], rois, sampling_ratio=1)[:, 0].float()
    head.sampling_ratio = 1
    teacher = TeacherView(target, boxes)
    before = head(student, teacher)["loss_sgfi"].item()
    assert 0.2 < head.latest_weights[0][:, 1].mean() < 0.5, "all levels alike at first"
    optimizer = torch.optim.Adam(head.embedding.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = head(student, teacher)["loss_sgfi"]
        loss.backward()
        optimizer.step()
    assert head.latest_weights[0][:, 1].mean() > 0.9
    assert loss.item() < before / 10


def test_gradient_reaches_student_and_head_and_never_the_teacher() -> None:
    head, (student, teacher) = make_head(), views()
    leaves = [*student.features.values(), teacher.target]
    for x in leaves:
        x.requires_grad_()
    head(student, teacher)["loss_sgfi"].backward()
    assert all(x.grad.abs().sum() > 0 for x in student.features.values())
    assert {k: bool(p.grad.abs().sum() > 0) for k, p in head.named_parameters()} == {
        k: True for k, _ in head.named_parameters()
    }
    assert teacher.target.grad is None


def test_gradient_of_maps_embedding_and_temperature_is_that_of_small_steps() -> None:
    # Through the sum and through alpha, without a detach: the slope along a random direction d is
    # (L(x + e d) - L(x - e d)) / 2e.
    head, (student, teacher) = make_head(), views()
    tensors = [student.features["p3"], head.adapter.weight, head.embedding[0].weight]
    tensors += [head.embedding[2].bias, head.temperature]
    for x in tensors:
        x.requires_grad_()
    gradients = torch.autograd.grad(head(student, teacher)["loss_sgfi"], tensors)
    step = 1e-4
    for i, (x, gradient) in enumerate(zip(tensors, gradients)):
        direction = noise(x.numel(), seed=20 + i).view_as(x)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                x.add_(sign * step * direction)
                ends.append(reference(head, student, teacher)[0])
                x.sub_(sign * step * direction)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-6), i


# The temperature ---------------------------------------------------------------------------------


def test_temperature_below_its_bound_is_lifted_and_can_still_learn() -> None:
    # clamp(t, min) in the graph has the gradient 0 below the bound: t could never come back.
    head, (student, teacher) = make_head(), views()
    teacher.target *= 0.05  # similarities so small that the softmax is not saturated
    clamped = nn.Parameter(torch.tensor(-0.3))
    clamped.clamp(min=MIN_TEMPERATURE).backward()
    assert clamped.grad == 0, "the mistake itself"
    nn.init.constant_(head.temperature, -0.3)
    loss = head(student, teacher)["loss_sgfi"]
    assert head.temperature.item() == pytest.approx(MIN_TEMPERATURE)
    assert loss.item() == pytest.approx(reference(head, student, teacher)[0], rel=1e-5)
    loss.backward()
    assert head.temperature.grad.abs() > 0
    assert head.temperature.requires_grad and head.temperature.is_leaf


def test_temperature_above_its_bound_is_left_alone() -> None:
    head, (student, teacher) = make_head(), views()
    nn.init.constant_(head.temperature, MIN_TEMPERATURE * 2)
    head(student, teacher)
    assert head.temperature.item() == pytest.approx(MIN_TEMPERATURE * 2)


@pytest.mark.parametrize("clip", [(False, "value"), (True, "full_model"), (True, "norm")])
def test_temperature_is_not_decayed_and_every_parameter_is_trained_once(
    clip: Tuple[bool, str],
) -> None:
    opts = ["SOLVER.CLIP_GRADIENTS.ENABLED", clip[0], "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip[1]]
    opts += ["SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_BIAS", 0.05, "SOLVER.BASE_LR", 0.1]
    model = nn.ModuleDict({"student": nn.Conv2d(3, 4, 1), "heads": make_head().float()})
    optimizer = build_optimizer(load_config(opts=opts), model)
    decay = [(id(p), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(decay) == len(dict(decay)) == len(list(model.parameters())), "each once"
    decay = dict(decay)
    assert {k: decay[id(p)] for k, p in model.named_parameters()} == {
        k: 0.0 if k == "heads.temperature" else 0.05 for k, _ in model.named_parameters()
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.1}
    assert all(g["params"] for g in optimizer.param_groups)
    # Gradients of 0: a step changes what decays by 1 - 0.1 x 0.05.
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for k, p in model.named_parameters():
        shrink = 1.0 if k == "heads.temperature" else 0.995
        torch.testing.assert_close(p.detach(), before[k] * shrink)


# In chunks ---------------------------------------------------------------------------------------


def gradients_of(chunk_size: int, boxes: Sequence = BOXES) -> Tuple[Tensor, List[Tensor], Tensor]:
    """The loss, its gradients, and the weights."""
    head, (student, teacher) = make_head(chunk_size=chunk_size), views(boxes=boxes)
    maps = list(student.features.values())
    for x in maps:
        x.requires_grad_()
    loss = head(student, teacher)["loss_sgfi"]
    loss.backward()
    grads = [x.grad for x in maps] + [p.grad for p in head.parameters()]
    return loss.detach(), grads, head.latest_weights[0]


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks_give_the_loss_and_gradients_of_all_at_once(chunk_size: int) -> None:
    # 2 does not divide the 5 regions.
    loss, grads, weights = gradients_of(0)
    in_chunks = gradients_of(chunk_size)
    torch.testing.assert_close(in_chunks[0], loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(in_chunks[2], weights)
    for found, expected in zip(in_chunks[1], grads):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def bytes_kept(chunk_size: int) -> int:
    """For the backward; a tensor that is kept twice counts once."""
    head, (student, teacher) = make_head(chunk_size=chunk_size), views()
    for x in student.features.values():
        x.requires_grad_()
    kept = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = head(student, teacher)["loss_sgfi"]
    assert loss.requires_grad
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(storages.values())


def test_chunks_keep_less_for_the_backward() -> None:
    # All at once, the pooled features are 5 regions x 3 levels x 16 x 7 x 7 numbers of 8 bytes. In
    # chunks only what was there before is kept: maps, adapted or not, and the teacher's features.
    pooled = 5 * 3 * 16 * 7 * 7 * 8
    given = 2 * (4 + 16) * (8 * 8 + 4 * 4 + 2 * 2) * 8 + 5 * 16 * 7 * 7 * 8
    assert bytes_kept(0) > pooled
    assert bytes_kept(2) < given * 1.1 < pooled


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("dense", [False, True])
def test_batch_without_regions_gives_a_connected_zero(dense: bool, chunk_size: int) -> None:
    head, (student, teacher) = make_head(chunk_size=chunk_size), views(boxes=[[], []])
    if dense:
        student._regions.source = Source(*torch.zeros(4, 0, dtype=torch.int64))
    maps = list(student.features.values())
    for x in maps:
        x.requires_grad_()
    loss = head(student, teacher)["loss_sgfi"]
    assert loss.shape == () and loss.item() == 0.0
    loss.backward()
    trained = maps + list(head.parameters())
    assert all(x.grad is not None and (x.grad == 0).all() for x in trained), "DDP would wait"
    assert head.latest_weights[0].shape == (0, 3)


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_autocast_is_close_to_float32(chunk_size: int) -> None:
    head, (student, teacher) = make_head(chunk_size=chunk_size).float(), views()
    maps = {k: x.float().requires_grad_() for k, x in student.features.items()}
    student, teacher.target = StudentView(maps, student._regions), teacher.target.float()
    results, kinds = [], []
    head.embedding.register_forward_pre_hook(lambda module, x: kinds.append(x[0].dtype))
    for enabled in (False, True):
        inputs = [*maps.values(), *head.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = head(student, teacher)["loss_sgfi"]
        assert loss.dtype == torch.float32
        results.append((loss, torch.autograd.grad(loss, inputs)))
    # The largest tensor, which the embedding reads first, takes half the memory.
    assert kinds[0] == torch.float32 and torch.bfloat16 in kinds
    (loss, grads), (half, half_grads) = results
    assert half.item() == pytest.approx(loss.item(), rel=0.02)
    for found, expected in zip(half_grads, grads):
        assert found.isfinite().all() and found.dtype == torch.float32
        assert (found - expected).norm() < 0.1 * expected.norm() + 1e-6


# Between real detectors --------------------------------------------------------------------------


def build(
    student: str, opts: Sequence[Any], heads: Sequence[str] = ("SGFI",), **values: Any
) -> nn.Module:
    if student not in ("faster_rcnn", "cascade_rcnn", "mask_rcnn"):
        values = {"DISTILL__REGIONS__PER_IMAGE": 16, **values}
    return build_distiller(student, opts, heads, **values)


PAIRS = [
    ("faster_rcnn", "faster_rcnn"),
    ("faster_rcnn", "cascade_rcnn"),
    ("cascade_rcnn", "faster_rcnn"),
    ("retinanet", "faster_rcnn"),
    pytest.param("fcos", "faster_rcnn", marks=needs_fcos),
    ("retinanet", "retinanet"),
    ("faster_rcnn", "retinanet"),
]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_step_trains_student_and_head_of_any_pair(
    student: str, teacher: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(student, teacher_of(teacher), DISTILL__SGFI__CHUNK_SIZE=24)
    loss = losses_of(distiller, batch(height=64, width=96))["loss_sgfi"]
    assert loss.shape == () and 0 < loss.item() < 1e4
    loss.backward()
    # What makes the pyramid is trained; the teacher never.
    trained = [p for k, p in distiller.student.backbone.named_parameters() if "lateral" in k]
    trained += [*distiller.student.backbone.bottom_up.parameters(), *distiller.heads.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(p.grad.abs().sum() > 0 for p in distiller.heads.parameters())
    assert all(p.grad is None for p in distiller.teacher.model.parameters())
    head, view = distiller.heads["SGFI"], distiller.last_step.student
    levels = list(distiller.student.backbone.output_shape())
    assert head.student_levels == levels and len(levels) == 5
    weights, boxes = head.latest_weights
    assert weights.shape == (len(view.regions(head.sampler)), 5) and len(weights) > 0
    assert boxes is view.regions(head.sampler).boxes


@pytest.mark.parametrize("student, chunk_size", [("retinanet", 0), ("faster_rcnn", 8)])
def test_detectors_without_any_region_train(
    student: str, chunk_size: int, teacher_of: Callable[[str], List[Any]]
) -> None:
    # A dense student that predicts boxes without extent; an RPN whose proposals are none.
    values = {"MODEL__RPN__POST_NMS_TOPK_TRAIN": 0, "DISTILL__SGFI__CHUNK_SIZE": chunk_size}
    distiller = build(student, teacher_of("faster_rcnn"), **values)
    if student == "retinanet":
        for p in (distiller.student.head.bbox_pred.weight, distiller.student.head.bbox_pred.bias):
            nn.init.constant_(p, 0.0)
        nn.init.constant_(distiller.student.head.bbox_pred.bias, -1e4)
    loss = losses_of(distiller, batch(boxes=0))["loss_sgfi"]
    assert len(distiller.last_step.student.regions(distiller.heads["SGFI"].sampler)) == 0
    assert loss.item() == 0.0
    loss.backward()
    trained = [*distiller.heads.parameters(), *distiller.student.backbone.bottom_up.parameters()]
    assert all((p.grad == 0).all() for p in trained)


def count_calls(distiller: nn.Module) -> Dict[Tuple[str, str], int]:
    """How often each part of both detectors runs, counted from now on."""
    calls: Dict[Tuple[str, str], int] = {}

    def count(side: str, key: str, module: nn.Module) -> None:
        calls[side, key] = 0

        def on_forward(*_: Any) -> None:
            calls[side, key] += 1

        module.register_forward_hook(on_forward)

    for side, detector in (("student", distiller.student), ("teacher", distiller.teacher.model)):
        count(side, "backbone", detector.backbone)
        if hasattr(detector, "roi_heads"):
            count(side, "rpn_head", detector.proposal_generator.rpn_head)
            for key in ("box_pooler", "box_head", "box_predictor"):
                count(side, key, getattr(detector.roi_heads, key))
        else:
            count(side, "head", detector.head)
    return calls


def calls_of(side: str, *runs: str, idle: Sequence[str] = ()) -> Dict[Tuple[str, str], int]:
    return {**{(side, k): 1 for k in runs}, **{(side, k): 0 for k in idle}}


BOX = ("box_pooler", "box_head", "box_predictor")


@pytest.mark.parametrize("student", ["faster_rcnn", "retinanet"])
def test_modules_run_once_in_the_student_and_as_needed_in_the_teacher(
    student: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    # Of the teacher SGFI wants RoI features alone; CKD beside it the box head's vector, of the
    # same RoI features.
    own = ("rpn_head", *BOX) if student == "faster_rcnn" else ("head",)
    expected = calls_of("student", "backbone", *own)
    alone = calls_of("teacher", "backbone", "box_pooler", idle=("rpn_head", *BOX[1:]))
    both = calls_of("teacher", "backbone", *BOX, idle=["rpn_head"])
    for heads, others in ((["SGFI"], alone), (["SGFI", "CKD"], both)):
        values = {"DISTILL__CKD__QUEUE_SIZE": 16}
        distiller = build(student, teacher_of("faster_rcnn"), heads, **values)
        calls = count_calls(distiller)
        losses = losses_of(distiller, batch())
        sum(losses.values()).backward()
        assert calls == {**expected, **others}, heads


@pytest.mark.parametrize("student", ["faster_rcnn", "retinanet"])
def test_loss_is_the_same_beside_another_head(
    student: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    opts = teacher_of("faster_rcnn")
    alone, beside = (
        losses_of(build(student, opts, heads), batch()) for heads in (["SGFI"], ["SGFI", "MGD"])
    )
    assert alone["loss_sgfi"] > 0 and beside["loss_mgd"] > 0
    assert torch.equal(beside["loss_sgfi"], alone["loss_sgfi"])


# Refusals ----------------------------------------------------------------------------------------


def detector(two_stage: bool = True, **values: Any) -> DetectorInfo:
    values.setdefault("shapes", {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in (3, 4, 5)})
    values.setdefault("roi_size", 7)
    provides = frozenset({"features", "dense", "roi_features", "regions"})
    values.setdefault("provides", provides)
    name = "GeneralizedRCNN" if two_stage else "RetinaNet"
    return DetectorInfo(name=name, num_classes=3, two_stage=two_stage, **values)


def build_for(student: DetectorInfo, teacher: DetectorInfo, **values: Any) -> nn.Module:
    pair = DistillPair(student, teacher, pair_levels(student.shapes, teacher.shapes))
    opts = [w for k, v in values.items() for w in (f"DISTILL.{k.replace('__', '.')}", v)]
    return build_head("SGFI", load_config(opts=opts), pair)


def test_keys_reach_the_head() -> None:
    head = build_for(
        detector(two_stage=False),
        detector(shapes={f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in (3, 4)}),
        SGFI__LEVELS=["p5", "p3"],
        SGFI__NEGATIVE_SLOPE=0.25,
        SGFI__SAMPLING_RATIO=2,
        SGFI__CHUNK_SIZE=128,
        REGIONS__PER_IMAGE=99,
    )
    assert head.student_levels == ["p5", "p3"]
    assert (head.sampling_ratio, head.chunk_size, head.sampler.per_image) == (2, 128, 99)
    assert [head.embedding[i].negative_slope for i in (1, 3)] == [0.25, 0.25]
    assert tuple(head.adapter.weight.shape) == (16, 8, 1, 1)
    head = build_for(detector(), detector())
    assert head.student_levels == ["p3", "p4", "p5"], "all"
    assert (head.sampling_ratio, head.chunk_size) == (0, 0)
    assert torch.equal(head.adapter.weight[:, :, 0, 0], torch.eye(8)), "starts as the identity"


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("LEVELS", ["p3", "p9"], r"is \['p3', 'p9'\]; it may name each of p3, p4, p5 once"),
        ("LEVELS", ["p3", "p3"], r"is \['p3', 'p3'\]; it may name each of p3, p4, p5 once"),
        ("LEVELS", [["p3"]], r"is \[\[.p3.\]\]; it may name each of p3, p4, p5 once"),
        ("NEGATIVE_SLOPE", -0.1, r"must be in \[0, 1\), got -0.1"),
        ("CHUNK_SIZE", -1, r"must be in \[0, 1000000\], got -1"),
        ("SAMPLING_RATIO", -2, r"must be in \[0, 8\], got -2"),
    ],
)
def test_value_outside_its_range_is_refused_by_its_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"DISTILL\.SGFI\.{key} {message}"):
        build_for(detector(), detector(), **{f"SGFI__{key}": value})


def test_roi_features_too_small_to_embed_are_refused_with_the_key() -> None:
    with pytest.raises(
        ValueError, match=r"teacher's have 6 \(MODEL\.ROI_BOX_HEAD\.POOLER_RESOLUTION\)"
    ):
        build_for(detector(), detector(roi_size=6))
    assert build_for(detector(roi_size=5), detector(roi_size=14)), "the student's do not matter"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_levels_of_unequal_channels_are_refused(side: str) -> None:
    shapes = {"res4": ShapeSpec(channels=8, stride=16), "res5": ShapeSpec(channels=16, stride=32)}
    unequal, other = detector(shapes=shapes, two_stage=False), detector(
        shapes={k: ShapeSpec(channels=4, stride=x.stride) for k, x in shapes.items()}
    )
    pair = (unequal, other) if side == "student" else (other, unequal)
    with pytest.raises(
        ValueError, match=r"DISTILL\.HEADS: .*RetinaNet has res4 \(8\), res5 \(16\)"
    ):
        build_for(*pair)


def test_detector_without_a_box_head_is_refused() -> None:
    c4 = detector(provides=frozenset({"features", "dense"}), roi_size=0)
    with pytest.raises(ValueError, match="SGFI needs regions, roi_features; the student General"):
        build_for(c4, detector())

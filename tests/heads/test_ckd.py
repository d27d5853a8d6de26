"""CKDHead beside its equation in loops, its queue, its pitfalls, and between real detectors."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

import detectron2.modeling
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.heads import CKDHead, DetectorInfo, DistillPair, build_head
from d2kd.pairing.levels import pair_levels
from d2kd.views import Regions, RegionSampler
from d2kd.views.regions import Source
from tests.helpers.logit_references import refusal_of
from tests.helpers.runs import assert_same_tensors, interrupt, run, run_config, scalars
from tests.helpers.toys import FeatureView, batch, distill_config, noise, write_teacher

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
# IoU of the first image: 0.8 (0, 1), 0.4 (0, 2), exactly 0.5 (1, 2). The second image has the very
# first box again, and one far from all.
BOXES = [
    [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [0.0, 0.0, 10.0, 4.0]],
    [[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]],
]
# As many as wanted, none of which overlap.
APART = [[40.0 * i, 0.0, 40.0 * i + 10, 10.0] for i in range(64)]


class VectorView(FeatureView):
    """A view with region vectors, and no detector behind it."""

    def __init__(self, vectors: Tensor, regions: Regions, two_stage: bool = True):
        super().__init__({})
        self.vectors, self._regions, self.two_stage = vectors, regions, two_stage

    def regions(self, sampler: Optional[RegionSampler] = None) -> Regions:
        return self._regions

    def region_vectors(self, regions: Regions) -> Tensor:
        assert regions is self._regions, "the student's"
        return self.vectors


def boxes_of(boxes: Sequence[Sequence[Sequence[float]]] = BOXES) -> List[Boxes]:
    return [Boxes(torch.tensor(x).reshape(-1, 4)) for x in boxes]


def views(
    channels: Tuple[int, int] = (4, 6),
    boxes: Sequence[Any] = BOXES,
    source: Optional[Source] = None,
    two_stage_teacher: bool = True,
    seed: int = 0,
) -> Tuple[VectorView, VectorView]:
    """Student and teacher with random vectors of these lengths."""
    regions = Regions(boxes_of(boxes), source)
    student, teacher = (noise(len(regions), c, seed=seed + c).float() for c in channels)
    return (
        VectorView(student, regions, two_stage=source is None),
        VectorView(teacher, regions, two_stage_teacher),
    )


def make_head(channels: Tuple[int, int] = (4, 6), queue_size: int = 0, **values: Any) -> CKDHead:
    torch.manual_seed(0)
    shared = values.pop("shared_channels", 0)
    if shared:
        values.update(projection="shared", shared_channels=shared)
    return CKDHead(
        student_channels=channels[0],
        teacher_channels=channels[1],
        num_anchors=values.pop("num_anchors", 1),
        sampler=RegionSampler(),
        queue_size=queue_size,
        **values,
    )


def plain_head(channels: int, **values: Any) -> CKDHead:
    """Whose projection is the identity."""
    head = make_head((channels, channels), **values)
    nn.init.eye_(head.projection.weight.data[0])
    return head


def loss_of(head: CKDHead, student: VectorView, teacher: VectorView) -> Tensor:
    losses = head(student, teacher)
    assert list(losses) == ["loss_ckd"] and losses["loss_ckd"].shape == ()
    return losses["loss_ckd"]


# The equation, in loops --------------------------------------------------------------------------


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return overlap / (area - overlap)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def keys_in_loops(head: CKDHead, teacher: VectorView) -> List[Tensor]:
    """The teacher's vectors, projected where there is a shared projection, of length 1."""
    keys = [x.detach().double() for x in teacher.vectors]
    if head.shared is not None:
        keys = [head.shared.weight.double() @ x for x in keys]
    return [unit(x) for x in keys]


def ckd_in_loops(
    head: CKDHead,
    student: VectorView,
    teacher: VectorView,
    queue: Sequence[Tensor] = (),
    with_positive: bool = True,
    across_images: bool = False,
    same_cell: bool = True,
) -> Tensor:
    """
    mean_i -log(g(s_i, t_i) / sum_j g(s_i, t_j)), g(s, t) = exp(cos(s, t) / gamma), in float64.

    j runs over i itself, the other regions, except those of the same image that overlap i by more
    than the threshold or are of its cell (dense teacher), and the queue.

    Args:
        queue: keys of past batches
        with_positive: False: a known mistake, j never is i
        across_images: True: a known mistake, boxes of different images are filtered too
        same_cell: False: a known mistake, regions of a dense teacher's cell are negatives
    """
    regions = student.regions()
    boxes, image = [b.tolist() for x in regions.boxes for b in x.tensor], regions.image.tolist()
    cells = [None] * len(boxes)
    if not teacher.two_stage and same_cell:
        cells = list(zip(*(getattr(regions.source, k).tolist() for k in ("stride", "y", "x"))))
    keys, total = keys_in_loops(head, teacher), torch.zeros((), dtype=torch.float64)
    for i, vector in enumerate(student.vectors.double()):
        anchor = int(regions.source.anchor[i]) if regions.source else 0
        query = head.projection.weight[anchor].double() @ vector
        if head.shared is not None:
            query = head.shared.weight.double() @ query
        query, denominator = unit(query), 0.0
        for j, key in enumerate(keys):
            alike = iou(boxes[i], boxes[j]) > head.iou_threshold
            alike = alike or (cells[i] is not None and cells[i] == cells[j])
            alike = alike and (across_images or image[i] == image[j])
            if (i == j and with_positive) or (i != j and not alike):
                denominator = denominator + torch.exp(query @ key / head.temperature)
        for key in queue:
            denominator = denominator + torch.exp(query @ key / head.temperature)
        total = total + torch.log(denominator) - query @ keys[i] / head.temperature
    return total / len(boxes)


def source_of(cells: Sequence[Tuple[int, int, int, int]]) -> Source:
    """(stride, y, x, anchor) of each region."""
    return Source(*torch.tensor(cells, dtype=torch.int64).reshape(-1, 4).unbind(1))


# Two regions of the cell (8, 1, 2), then the same numbers on another level; in the second image,
# the first's cell again.
CELLS = [(8, 1, 2, 0), (8, 1, 2, 2), (16, 1, 2, 1), (8, 1, 2, 1), (8, 2, 1, 0)]


@pytest.mark.parametrize("shared_channels", [0, 3], ids=["student", "shared"])
@pytest.mark.parametrize("dense", ["neither", "student", "both"])
@pytest.mark.parametrize("threshold, temperature", [(0.5, 0.07), (0.3, 0.5), (0.9, 1.0)])
def test_loss_and_gradients_are_those_of_the_equation(
    threshold: float, temperature: float, dense: str, shared_channels: int
) -> None:
    head = make_head(
        num_anchors=1 if dense == "neither" else 3,
        iou_threshold=threshold,
        temperature=temperature,
        shared_channels=shared_channels,
        queue_size=7,
    )
    queue = [unit(x) for x in noise(4, shared_channels or 6, seed=3)]
    head.queue = torch.stack(queue).float()
    source = None if dense == "neither" else source_of(CELLS)
    student, teacher = views(source=source, two_stage_teacher=dense != "both")
    student.vectors.requires_grad_()
    inputs = [student.vectors, *head.parameters()]
    expected = ckd_in_loops(head, student, teacher, queue)
    gradients = torch.autograd.grad(expected, inputs)
    loss = loss_of(head, student, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, gradient in zip(torch.autograd.grad(loss, inputs), gradients):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


def test_every_anchor_has_a_projection_of_its_own() -> None:
    # The cell's feature is the same; only their projections tell its anchors apart.
    head = make_head(num_anchors=3, temperature=0.5)
    student, teacher = views(source=source_of(CELLS), boxes=[APART[:5]])
    student.vectors[:] = student.vectors[0].clone()
    loss = loss_of(head, student, teacher)
    assert loss.item() == pytest.approx(ckd_in_loops(head, student, teacher).item(), rel=1e-5)
    loss.backward()
    assert (head.projection.weight.grad.abs().sum(dim=(1, 2)) > 0).all()
    student._regions.source.anchor = torch.tensor([1, 1, 1, 1, 1])
    assert loss_of(head, student, teacher).item() != pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_lengths_of_the_vectors_do_not_matter(length: float) -> None:
    head, (student, teacher) = make_head(), views()
    expected = loss_of(head, student, teacher)
    teacher.vectors *= length
    student.vectors /= length
    torch.testing.assert_close(loss_of(head, student, teacher), expected, rtol=1e-4, atol=1e-6)


# Closed forms ------------------------------------------------------------------------------------


def test_one_region_alone_has_nothing_to_learn() -> None:
    # The positive is the whole denominator.
    head, (student, teacher) = make_head(), views(boxes=[APART[:1]])
    student.vectors.requires_grad_()
    loss = loss_of(head, student, teacher)
    assert loss.item() == 0.0
    loss.backward()
    assert (student.vectors.grad == 0).all()


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("queued", [0, 5])
def test_aligned_vectors_among_orthogonal_keys(queued: int, temperature: float) -> None:
    # cos is 1 with its own key and 0 with the others, of which there are M - 1 + Q:
    # log((e^(1/gamma) + M - 1 + Q) / e^(1/gamma))
    head = plain_head(16, queue_size=8, temperature=temperature)
    head.queue = torch.eye(16)[8 : 8 + queued]
    student, teacher = views((16, 16), boxes=[APART[:8]])
    teacher.vectors = torch.eye(16)[:8] * torch.arange(1.0, 9.0)[:, None]
    student.vectors = torch.eye(16)[:8] * 3
    expected = math.log1p((7 + queued) * math.exp(-1 / temperature))
    assert loss_of(head, student, teacher).item() == pytest.approx(expected, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("queued", [0, 192])
def test_random_vectors_give_the_log_of_the_number_of_keys(queued: int) -> None:
    # cos of random vectors in D dimensions is normal with variance 1 / D, so the mean of
    # exp(cos / gamma) is exp(1 / (2 D gamma^2)), e^0.0996 for D = 1024; the positive adds 0.
    head = make_head((512, 1024), queue_size=256)
    head.queue = torch.nn.functional.normalize(noise(queued, 1024, seed=1).float(), dim=1)
    loss = loss_of(head, *views((512, 1024), boxes=[APART])).item()
    assert loss == pytest.approx(math.log(64 + queued) + 0.0996, abs=0.15)


# What is a negative of what ----------------------------------------------------------------------


def test_positive_is_in_the_denominator() -> None:
    # Without: log(M - 1) - 1 / gamma for aligned vectors, which is unbounded below.
    head = plain_head(8)
    student, teacher = views((8, 8), boxes=[APART[:8]])
    student.vectors = teacher.vectors = torch.eye(8)
    wrong = ckd_in_loops(head, student, teacher, with_positive=False).item()
    assert wrong == pytest.approx(math.log(7) - 1 / 0.07, rel=1e-6)
    assert loss_of(head, student, teacher).item() >= 0.0 > wrong


@pytest.mark.parametrize("seed", range(5))
def test_loss_is_never_negative(seed: int) -> None:
    head = plain_head(2, temperature=0.01)
    assert loss_of(head, *views((2, 2), seed=seed)).item() >= 0.0


def test_boxes_that_overlap_are_no_negatives_of_each_other_but_each_is_its_own_positive() -> None:
    # The same box three times: IoU is 1 everywhere, on the diagonal too. Each is left alone with
    # its positive, so the loss is 0; were that filtered as well, the loss would be infinite.
    head, (student, teacher) = make_head(), views(boxes=[APART[:1] * 3])
    assert loss_of(head, student, teacher).item() == 0.0
    # With a queue they have negatives: log(1 + e^(-1/gamma)) where they are aligned.
    head = plain_head(4, temperature=0.5, queue_size=1)
    head.queue = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    student, teacher = views((4, 4), boxes=[APART[:1] * 3])
    student.vectors = teacher.vectors = torch.eye(4)[:3]
    expected = math.log1p(math.exp(-2))
    assert loss_of(head, student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("threshold, filtered", [(0.5, 1), (0.45, 2), (0.3, 3), (0.85, 0), (1, 0)])
def test_filter_is_symmetric_strict_and_spares_the_diagonal(
    threshold: float, filtered: int
) -> None:
    # Pairs of the first image by IoU: 0.8 (0, 1), 0.5 (1, 2), 0.4 (0, 2).
    head = make_head(iou_threshold=threshold)
    alike = head._no_negatives(Regions(boxes_of()), same_cell=False)
    assert torch.equal(alike, alike.T) and not alike.diagonal().any()
    pairs = [(0, 1), (1, 2), (0, 2)][:filtered]
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for i, j in pairs:
        expected[i, j] = expected[j, i] = True
    assert torch.equal(alike, expected)


def test_boxes_of_different_images_are_negatives_though_they_overlap() -> None:
    head, (student, teacher) = make_head(temperature=1.0), views(boxes=[APART[:1], APART[:1]])
    loss = loss_of(head, student, teacher).item()
    assert loss == pytest.approx(ckd_in_loops(head, student, teacher).item(), rel=1e-5)
    wrong = ckd_in_loops(head, student, teacher, across_images=True).item()
    assert wrong == pytest.approx(0.0, abs=1e-12) and loss > 0.1


def test_threshold_of_one_filters_nothing() -> None:
    head = plain_head(4, temperature=1.0, iou_threshold=1.0)
    student, teacher = views((4, 4), boxes=[APART[:1] * 4])
    student.vectors = teacher.vectors = torch.eye(4)
    expected = math.log1p(3 * math.exp(-1))
    assert loss_of(head, student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_regions_of_a_cell_have_one_key_for_a_dense_teacher_and_are_no_negatives() -> None:
    # Three anchors of a cell whose boxes do not overlap. Their key is the same, so that as
    # negatives they would hold the loss at log 3, whatever the student does.
    cell = source_of([(8, 1, 2, a) for a in range(3)])
    head = make_head(num_anchors=3)
    student, teacher = views(boxes=[APART[:3]], source=cell, two_stage_teacher=False)
    teacher.vectors[:] = teacher.vectors[0].clone()
    wrong = ckd_in_loops(head, student, teacher, same_cell=False).item()
    assert wrong == pytest.approx(math.log(3), rel=1e-6)
    assert loss_of(head, student, teacher).item() == 0.0


@pytest.mark.parametrize(
    "boxes, other, alike",
    [
        ([APART[:2]], (8, 1, 2, 1), True),
        ([APART[:2]], (16, 1, 2, 0), False),
        ([APART[:2]], (8, 2, 2, 0), False),
        ([APART[:2]], (8, 1, 1, 0), False),
        ([APART[:1], APART[1:2]], (8, 1, 2, 0), False),
    ],
    ids=["cell", "level", "row", "column", "image"],
)
def test_a_cell_is_level_row_column_and_image(
    boxes: List[Any], other: Tuple[int, int, int, int], alike: bool
) -> None:
    regions = Regions(boxes_of(boxes), source_of([(8, 1, 2, 0), other]))
    head = make_head()
    found = head._no_negatives(regions, same_cell=True)
    assert found.tolist() == [[False, alike], [alike, False]]
    assert not head._no_negatives(regions, same_cell=False).any(), "a two-stage teacher's keys"


# Numbers -----------------------------------------------------------------------------------------


def has_half_on_cpu() -> bool:
    try:
        torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2, dtype=torch.float16)
        with torch.autocast("cpu", dtype=torch.float16):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
    except RuntimeError:
        return False


needs_half = pytest.mark.skipif(not has_half_on_cpu(), reason="this PyTorch has no float16 on CPUs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=needs_half)])
def test_under_autocast_only_the_vectors_are_rounded(dtype: torch.dtype) -> None:
    # exp(1 / 0.07) is 1.6e6, half precision ends at 65504. The projection is the identity, so that
    # all that half precision may do here is to round the vectors.
    assert torch.tensor(1 / 0.07).half().exp().isinf()
    head = plain_head(8, queue_size=4)
    head.queue = torch.eye(8)[:4]
    student, teacher = views((8, 8))
    teacher.vectors = (student.vectors * 1.01).to(dtype)  # aligned; a teacher's run is half too
    x = student.vectors.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(head, student, teacher)
    assert loss.dtype == torch.float32 and loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all() and head.queue.dtype == torch.float32
    head.queue = torch.eye(8)[:4]
    student.vectors = x.detach().to(dtype).float()
    teacher.vectors = teacher.vectors.float()
    torch.testing.assert_close(loss_of(head, student, teacher), loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shared_channels", [0, 3])
@pytest.mark.parametrize("dead", ["student", "teacher", "both"])
def test_zero_vectors_give_finite_gradients(dead: str, shared_channels: int) -> None:
    # A ReLU may leave nothing of a region.
    head = make_head(shared_channels=shared_channels)
    student, teacher = views()
    student.vectors.requires_grad_()
    x = student.vectors
    if dead in ("student", "both"):
        student.vectors = torch.cat([x[:2] * 0, x[2:]])
    if dead in ("teacher", "both"):
        teacher.vectors[:2] = 0
    loss = loss_of(head, student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in (x, *head.parameters()))
    # All cosines of a zero are 0. Two regions without vectors: log of the number of their keys.
    student, teacher = views(boxes=[APART[:2]])
    student.vectors[:] = 0
    assert loss_of(head, student, teacher).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("queued", [0, 3])
@pytest.mark.parametrize("shared_channels", [0, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_batch_without_regions_gives_a_connected_zero(
    dense: bool, shared_channels: int, queued: int
) -> None:
    head = make_head(num_anchors=3 if dense else 1, shared_channels=shared_channels, queue_size=4)
    head.queue = torch.eye(shared_channels or 6)[:queued]
    source = source_of([]) if dense else None
    student, teacher = views(boxes=[[], []], source=source, two_stage_teacher=not dense)
    student.vectors.requires_grad_()
    loss = loss_of(head, student, teacher)
    assert loss.item() == 0.0 and len(head.queue) == queued
    loss.backward()
    assert all((x.grad == 0).all() for x in (student.vectors, *head.parameters()))


@needs_half
def test_dead_vector_does_not_overflow_scaled_half_precision() -> None:
    """1 / 1e-6 times GradScaler's 2^16 is more than float16 holds; inf x 0 would be NaN."""
    head, (student, teacher) = make_head((256, 256)), views((256, 256))
    x = student.vectors.requires_grad_()
    student.vectors = torch.cat([x[:1] * 0, x[1:]]).relu()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(head, student, teacher)
    (loss * 2.0**16).backward()
    assert all(p.grad.isfinite().all() for p in (x, *head.parameters()))
    assert head.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shared_channels", [0, 3])
def test_gradient_reaches_student_and_projections_and_not_the_teacher(shared_channels: int) -> None:
    head, (student, teacher) = make_head(shared_channels=shared_channels), views()
    for view in student, teacher:
        view.vectors.requires_grad_()
    loss_of(head, student, teacher).backward()
    assert teacher.vectors.grad is None
    trained = [student.vectors, *head.parameters()]
    assert len(trained) == (3 if shared_channels else 2)
    assert all(x.grad.abs().sum() > 0 for x in trained)
    assert (student.vectors.grad.abs().sum(dim=1) > 0).all(), "of every region"


def test_descent_on_the_loss_aligns_each_vector_with_its_own_key() -> None:
    head, (student, teacher) = plain_head(6), views((6, 6))
    x = student.vectors.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(head, student, teacher).backward()
        optimizer.step()
    cosines = torch.cosine_similarity(x[:, None], teacher.vectors[None], dim=2)
    apart = ~head._no_negatives(student.regions(), same_cell=False)
    assert torch.equal(cosines.where(apart, torch.tensor(-1.0)).argmax(dim=1), torch.arange(5))


# The queue ---------------------------------------------------------------------------------------


def rows_of(queue: Tensor) -> List[Tuple[float, ...]]:
    return sorted(tuple(row) for row in queue.tolist())


@pytest.mark.parametrize("shared_channels", [0, 3])
@pytest.mark.parametrize("queue_size", [0, 1, 4, 7, 12, 100])
def test_queue_holds_the_latest_keys_and_those_of_a_batch_enter_after_its_loss(
    queue_size: int, shared_channels: int
) -> None:
    # 5, 2, 0 and 1 keys in turn: some batches bring more than a short queue holds. Were those of
    # the batch in it before its loss, each key would count twice.
    head = make_head(queue_size=queue_size, temperature=0.5, shared_channels=shared_channels)
    shapes = [BOXES, [APART[:2]], [[]], [APART[:1]], BOXES, [APART[:2]], BOXES]
    past: List[Tensor] = []
    for seed, boxes in enumerate(shapes):
        student, teacher = views(boxes=boxes, seed=seed * 100)
        queue = past[-queue_size:] if queue_size else []
        loss = loss_of(head, student, teacher).item()
        if any(boxes):
            expected = ckd_in_loops(head, student, teacher, queue).item()
            assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7), f"batch {seed}"
        # The latest last; of a batch that does not fit, its first keys.
        past = [*past, *keys_in_loops(head, teacher)[:queue_size]]
        latest = past[-queue_size:] if queue_size else []
        assert len(head.queue) == len(latest)
        if latest:
            found, rows = rows_of(head.queue), rows_of(torch.stack(latest))
            torch.testing.assert_close(torch.tensor(found), torch.tensor(rows))


def test_queue_that_is_not_full_yet_changes_nothing() -> None:
    student, teacher = views()
    empty = loss_of(make_head(queue_size=1000), student, teacher)
    assert torch.equal(empty, loss_of(make_head(queue_size=0), student, teacher))


@pytest.mark.parametrize("shared_channels", [0, 3])
def test_order_of_the_queue_does_not_matter(shared_channels: int) -> None:
    head = make_head(queue_size=9, shared_channels=shared_channels)
    head(*views(seed=50)), head(*views(seed=60))
    student, teacher = views()
    other = make_head(queue_size=9, shared_channels=shared_channels)
    other.load_state_dict(head.state_dict())
    other.queue = head.queue[torch.tensor([3, 8, 1, 0, 7, 2, 6, 5, 4])]
    assert not torch.equal(other.queue, head.queue)
    loss, permuted = (loss_of(x, student, teacher) for x in (head, other))
    torch.testing.assert_close(permuted, loss, rtol=1e-6, atol=1e-7)
    assert loss > loss_of(make_head(shared_channels=shared_channels), student, teacher)


@pytest.mark.parametrize("shared_channels", [0, 3])
def test_queue_has_no_gradient_and_backward_works_after_keys_were_written(
    shared_channels: int,
) -> None:
    head = make_head(queue_size=6, shared_channels=shared_channels)
    assert {k for k, _ in head.named_parameters()} == (
        {"projection.weight", "shared.weight"} if shared_channels else {"projection.weight"}
    )
    losses = []
    for seed in range(3):  # full in the second
        student, teacher = views(seed=seed * 100)
        losses.append(loss_of(head, student, teacher))
        assert not head.queue.requires_grad and head.queue.grad_fn is None
    # Each loss has its keys as they were, although they have been overwritten since.
    for loss in losses:
        loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_queue_is_saved_and_resumed(batches: int, tmp_path: Path) -> None:
    head = make_head(queue_size=8)
    for seed in range(batches):  # after three: 15 keys for 8 rows
        head(*views(seed=seed * 100))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    assert (
        head.state_dict()["_extra_state"]["queue"].untyped_storage().nbytes()
        == len(head.queue) * 6 * 4
    )
    resumed = make_head(queue_size=8)
    resumed.load_state_dict(torch.load(tmp_path / "head.pth", weights_only=True))
    assert torch.equal(resumed.queue, head.queue)
    assert len(head.queue) == min(batches * 5, 8)
    for seed in (500, 600):
        losses = [loss_of(x, *views(seed=seed)) for x in (head, resumed)]
        assert torch.equal(*losses) and torch.equal(head.queue, resumed.queue)
    shorter = make_head(queue_size=3)
    shorter.load_state_dict(head.state_dict())
    in_order = head.queue.roll(-head.oldest, 0)
    assert torch.equal(shorter.queue, in_order[-3:]), "the newest"
    longer = make_head(queue_size=20)
    longer.load_state_dict(head.state_dict())
    longer(*views(seed=700))
    assert torch.equal(longer.queue[: len(in_order)], in_order)
    earlier = make_head(queue_size=8)
    earlier.load_state_dict({**head.state_dict(), "_extra_state": in_order.flip(0)})
    assert torch.equal(earlier.queue, in_order)


# Which pairs, and which values -------------------------------------------------------------------

PROVIDES = frozenset({"features", "regions", "region_vectors"})
TWO_STAGE = {"name": "GeneralizedRCNN", "two_stage": True, "vector_channels": 8}
DENSE = {"name": "RetinaNet", "num_anchors": 9, "vector_channels": 4}


def info(detector: Dict[str, Any], levels: Sequence[str] = ("p3", "p4")) -> DetectorInfo:
    shapes = {k: ShapeSpec(channels=4, stride=2 ** int(k[1:])) for k in levels}
    dense = () if detector.get("two_stage") else tuple(levels)
    return DetectorInfo(
        shapes=shapes, num_classes=3, provides=PROVIDES, dense_levels=dense, **detector
    )


def head_for(student: DetectorInfo, teacher: DetectorInfo, *opts: Any) -> CKDHead:
    levels = pair_levels({"p3": student.shapes["p3"]}, {"p3": teacher.shapes["p3"]})
    pair = DistillPair(student, teacher, levels)
    return build_head("CKD", load_config(opts=list(opts)), pair)


@pytest.mark.parametrize(
    "key, value, hint",
    [
        ("TEMPERATURE", 0.0, "above 0, got 0.0"),
        ("TEMPERATURE", -0.07, "above 0, got -0.07"),
        ("IOU_THRESHOLD", 0.0, "got 0.0"),
        ("IOU_THRESHOLD", 1.5, "got 1.5"),
        ("QUEUE_SIZE", -1, "got -1"),
        ("SHARED_CHANNELS", 0, "got 0"),
        ("PROJECTION", "teacher", "student, shared, got 'teacher'"),
    ],
)
def test_value_outside_its_range_is_refused_by_its_key(key: str, value: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=r"DISTILL\.CKD") as error:
        head_for(info(TWO_STAGE), info(TWO_STAGE), f"DISTILL.CKD.{key}", value)
    assert key in str(error.value) and hint in str(error.value)


def test_region_sampler_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"DISTILL\.REGIONS\.PER_IMAGE .* got 0"):
        head_for(info(DENSE), info(TWO_STAGE), "DISTILL.REGIONS.PER_IMAGE", 0)


def test_two_stage_student_of_a_dense_teacher_is_refused_with_the_heads_that_fit() -> None:
    sides = info(TWO_STAGE), info(DENSE)
    levels = pair_levels(sides[0].shapes, sides[1].shapes)
    text = refusal_of("CKD", load_config(), DistillPair(*sides, levels))
    assert "CKD takes dense -> dense, two-stage -> dense, two-stage -> two-stage; " in text
    assert "this is dense -> two-stage (teacher RetinaNet, student GeneralizedRCNN)." in text


def test_dense_pair_without_common_strides_is_refused_by_its_levels() -> None:
    student, teacher = info(DENSE, ["p3", "p4", "p8"]), info(DENSE, ["p3", "p4", "p5"])
    with pytest.raises(ValueError, match="CKD .*RetinaNet predicts on no level .* student's p8"):
        head_for(student, teacher)
    assert head_for(info(DENSE, ["p3", "p4"]), teacher), "fewer levels than the teacher"
    assert head_for(student, info(TWO_STAGE, ["p3"])), "a two-stage teacher takes any box"


@pytest.mark.parametrize(
    "student, teacher, shape",
    [
        (TWO_STAGE, {**TWO_STAGE, "vector_channels": 16}, (1, 16, 8)),
        (DENSE, TWO_STAGE, (9, 8, 4)),
        ({**DENSE, "num_anchors": 1}, TWO_STAGE, (1, 8, 4)),
        (DENSE, DENSE, (9, 4, 4)),
    ],
)
def test_projection_has_the_shape_of_the_pair(
    student: Dict[str, Any], teacher: Dict[str, Any], shape: Tuple[int, int, int]
) -> None:
    head = head_for(info(student), info(teacher), "DISTILL.CKD.QUEUE_SIZE", 10)
    assert tuple(head.projection.weight.shape) == shape and head.shared is None
    assert tuple(head.queue.shape) == (0, shape[1]) and head.queue_size == 10
    opts = ["DISTILL.CKD.PROJECTION", "shared", "DISTILL.CKD.SHARED_CHANNELS", 5]
    head = head_for(info(student), info(teacher), *opts)
    assert tuple(head.projection.weight.shape) == shape
    assert tuple(head.shared.weight.shape) == (5, shape[1])
    assert tuple(head.queue.shape) == (0, 5) and head.queue_size == 81920


# Between real detectors --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_of(folder: Path) -> Callable[[str], List[Any]]:
    """DISTILL.TEACHER.* of a toy detector by name, with longer region vectors than students'."""
    wider = {"MODEL__FPN__OUT_CHANNELS": 64, "MODEL__ROI_BOX_HEAD__FC_DIM": 48}
    return lru_cache(maxsize=None)(lambda name: write_teacher(folder, name, **wider))


def build(student: str, opts: Sequence[Any], **values: Any) -> nn.Module:
    torch.manual_seed(0)
    values = {"DISTILL__CKD__QUEUE_SIZE": 100, **values}
    if student in ("retinanet", "fcos"):
        values["DISTILL__REGIONS__PER_IMAGE"] = 16
    return build_model(distill_config(student, opts, ["CKD"], **values)).train()


def masked_batch(boxes: int = 2) -> List[Dict[str, Any]]:
    """A batch whose boxes have masks as well: Mask R-CNN wants them, the others do not mind."""
    inputs = batch(boxes=boxes, height=64, width=96)
    for x in inputs:
        x["instances"].gt_masks = BitMasks(torch.ones(len(x["instances"]), 64, 96))
    return inputs


def count_calls(module: nn.Module, calls: List[nn.Module]) -> None:
    module.register_forward_hook(lambda *_: calls.append(module))


PAIRS = [  # student, teacher
    ("faster_rcnn", "faster_rcnn"),
    ("faster_rcnn", "cascade_rcnn"),
    ("cascade_rcnn", "faster_rcnn"),
    ("faster_rcnn", "mask_rcnn"),
    ("mask_rcnn", "faster_rcnn"),
    ("retinanet", "faster_rcnn"),
    pytest.param("fcos", "faster_rcnn", marks=needs_fcos),
    ("retinanet", "retinanet"),
]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_step_trains_any_pair_with_the_loss_of_the_equation(
    student: str, teacher: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(student, teacher_of(teacher))
    detector, calls = distiller.student, []
    head = distiller.heads["CKD"]
    two_stage = hasattr(detector, "roi_heads")
    if two_stage:
        predictor = detector.roi_heads.box_predictor
        stages = list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]
        for stage in stages:
            count_calls(stage, calls)
    torch.manual_seed(1)  # which proposals are sampled
    with EventStorage():
        losses = distiller(masked_batch())
    if two_stage:
        assert calls == stages, "each stage once"
    ours, theirs = distiller.last_step.student, distiller.last_step.teacher
    regions = ours.regions(head.sampler)
    assert len(regions) == len(head.queue) > 10
    ours = VectorView(ours.region_vectors(regions), regions, two_stage)
    theirs = VectorView(theirs.region_vectors(regions), regions, theirs.two_stage)
    expected = 0.5 * ckd_in_loops(head, ours, theirs)
    assert losses["loss_ckd"].item() == pytest.approx(expected.item(), rel=1e-4)
    losses["loss_ckd"].backward()
    # The box head, or the classification tower, and everything below; its own predictors do not
    # take part.
    last = detector.roi_heads.box_head if two_stage else detector.head.cls_subnet
    last = last[0] if isinstance(last, nn.ModuleList) else last
    trained = [*detector.backbone.bottom_up.parameters(), *last.parameters(), *head.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert head.projection.weight.grad.abs().sum() > 0
    assert any(p.grad.abs().sum() > 0 for p in last.parameters())
    scores = stages[0].cls_score if two_stage else detector.head.cls_score
    assert scores.weight.grad is None
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


@pytest.mark.parametrize("student", ["faster_rcnn", "retinanet"])
def test_images_without_objects_train_too(
    student: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(student, teacher_of("faster_rcnn"))
    with EventStorage():
        for boxes in (0, 2):
            losses = distiller(masked_batch(boxes))
            sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.heads.parameters())


def test_shared_projection_trains_between_detectors(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    values = {"DISTILL__CKD__PROJECTION": "shared", "DISTILL__CKD__SHARED_CHANNELS": 12}
    distiller = build("retinanet", teacher_of("faster_rcnn"), **values)
    with EventStorage():
        distiller(batch())["loss_ckd"].backward()
    grads = {k: p.grad for k, p in distiller.heads["CKD"].named_parameters()}
    assert {k: tuple(x.shape) for k, x in grads.items()} == {
        "projection.weight": (3, 48, 32),
        "shared.weight": (12, 48),
    }
    assert all(x.abs().sum() > 0 for x in grads.values())


# Resuming ----------------------------------------------------------------------------------------


def at(cfg: CfgNode, folder: Path) -> CfgNode:
    """The same run with another OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def test_interrupted_and_resumed_run_has_the_queue_and_losses_of_an_uninterrupted_one(
    folder: Path, tmp_path: Path
) -> None:
    # 2 images x 16 proposals in each of 6 iterations, for 50 rows: saved after 4 iterations when
    # the queue had gone round twice, stopped in the next, resumed there.
    opts = write_teacher(tmp_path, "faster_rcnn", MODEL__ROI_HEADS__NUM_CLASSES=5)
    cfg = run_config(folder, opts, ["CKD"], "faster_rcnn", SOLVER__MAX_ITER=6)
    cfg.DISTILL.CKD.QUEUE_SIZE = 50
    whole, parts = at(cfg, tmp_path / "whole"), at(cfg, tmp_path / "parts")
    trainer = run(whole)
    expected = scalars(trainer)
    dead = interrupt(parts, 4)
    resumed_trainer = run(parts, resume=True)
    resumed = scalars(resumed_trainer)
    assert expected["loss_ckd"][5] > 0
    for name, values in expected.items():
        assert resumed[name] == {i: v for i, v in values.items() if i >= 4}, name
    heads = [x._module.heads["CKD"] for x in (resumed_trainer, trainer, dead)]
    assert torch.equal(heads[0].queue, heads[1].queue) and len(heads[1].queue) == 50
    assert not torch.equal(heads[1].queue, heads[2].queue)
    found, final = (
        torch.load(Path(x.OUTPUT_DIR) / "model_final.pth", weights_only=True)
        for x in (parts, whole)
    )
    assert_same_tensors(found["model"], final["model"])
    assert_same_tensors(found["distill_heads"], final["distill_heads"])
    assert torch.equal(found["distill_heads"]["CKD._extra_state"]["queue"], heads[0].queue)

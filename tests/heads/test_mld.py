"""MLDHead beside its equations in loops, at its limits, and between real detectors."""

import math
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import detectron2.modeling
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.heads import DetectorInfo, DistillPair, MLDHead, build_head
from d2kd.heads.mld_guides import LogitGuide
from d2kd.pairing.levels import LevelPair, pair_levels
from d2kd.views import Regions
from d2kd.views.predictions import DensePredictions, RoIPredictions
from tests.helpers.logit_references import refusal_of
from tests.helpers.toys import FeatureView, batch, distill_config, level_pairs, noise, write_teacher

Maps = Dict[str, Tensor]
Sizes = Sequence[Tuple[int, int]]
GUIDES = ["features", "logits"]
ANCHORS, CLASSES = 2, 3


class CellView(FeatureView):
    """A view with class logits of every cell, (N, A*K, Hi, Wi), and no detector behind it."""

    def __init__(self, features: Maps, logits: Maps, sizes: Sizes = (), anchors: int = ANCHORS):
        super().__init__(features, sizes)
        self.logits, self._anchors = logits, anchors

    @property
    def num_anchors(self) -> int:
        return self._anchors

    def dense(self) -> DensePredictions:
        return DensePredictions(list(self.logits), list(self.logits.values()), [], [])


class RegionView(FeatureView):
    """A view with class logits of every region, (R, K+1), and no detector behind it."""

    def __init__(self, features: Maps, logits: Tensor, boxes: List[Boxes], sizes: Sizes = ()):
        super().__init__(features, sizes)
        self.logits, self.boxes = logits, boxes

    def regions(self, sampler: Any = None) -> Regions:
        return Regions(self.boxes)

    def roi_predictions(self, boxes: Any = None) -> RoIPredictions:
        assert boxes in (None, self.boxes)
        return RoIPredictions(self.logits, self.logits, self.logits)

    @property
    def pooled_levels(self) -> List[str]:
        return list(self.features)


def cell_head(levels: Sequence[str] = ("p3", "p4"), guide: str = "features") -> MLDHead:
    return MLDHead(levels=level_pairs(**{k: (4, 4) for k in levels}), two_stage=False, guide=guide)


# The equations, in loops -------------------------------------------------------------------------


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def softmax(values: List[float]) -> List[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def cells_of(height: int, width: int, stride: int, size: Tuple[int, int]) -> List[Tuple[int, int]]:
    """Those that begin before the image ends."""
    return [
        (i, j)
        for i in range(height)
        for j in range(width)
        if i * stride < size[0] and j * stride < size[1]
    ]


def weight_in_loops(differences: List[float], temperature: float = 0.5) -> List[float]:
    """W = n softmax(D / tau_D) over n entries, Q = W where that is at least 1, else 0."""
    weights = [len(differences) * p for p in softmax([d / temperature for d in differences])]
    return [w if w >= 1 else 0.0 for w in weights]


def difference_in_loops(s: Tensor, t: Tensor, act: Callable[[float], float]) -> float:
    """Mean absolute difference of two vectors."""
    return sum(abs(act(a) - act(b)) for a, b in zip(s.tolist(), t.tolist())) / len(s)


def cell_weights_in_loops(view: CellView, other: CellView, level: str, guide: str) -> Tensor:
    """Q, (N, H, W)."""
    s, t = ((x.features if guide == "features" else x.logits)[level] for x in (view, other))
    act = sigmoid if guide == "logits" else float
    weight = torch.zeros(len(s), *s.shape[-2:], dtype=torch.float64)
    for n, size in enumerate(view.image_sizes):
        cells = cells_of(*s.shape[-2:], view.strides[level], size)
        d = [difference_in_loops(s[n, :, i, j], t[n, :, i, j], act) for i, j in cells]
        for (i, j), q in zip(cells, weight_in_loops(d)):
            weight[n, i, j] = q
    return weight


def positives_in_loops(student: CellView, teacher: CellView, levels: Sequence[str]) -> float:
    """Sum over the anchors inside their image of max_c sigmoid(z_T), at least 1."""
    total = 0.0
    for level in levels:
        x = teacher.logits[level]
        for n, size in enumerate(student.image_sizes):
            for i, j in cells_of(*x.shape[-2:], student.strides[level], size):
                for a in range(ANCHORS):
                    answers = x[n, a * CLASSES : (a + 1) * CLASSES, i, j].tolist()
                    total += max(sigmoid(z) for z in answers)
    return max(total, 1.0)


def mld_in_loops(student: CellView, teacher: CellView, level: str, guide: str) -> float:
    """sum_{n,i,j,a,c} Q KL(Bernoulli(sigmoid(z_T)) || Bernoulli(sigmoid(z_S)))"""
    weight, total = cell_weights_in_loops(student, teacher, level, guide), 0.0
    for n, i, j in weight.nonzero().tolist():
        pairs = zip(student.logits[level][n, :, i, j], teacher.logits[level][n, :, i, j])
        for s, t in ((sigmoid(a.item()), sigmoid(b.item())) for a, b in pairs):
            divergence = t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))
            total += weight[n, i, j].item() * divergence
    return total


def cell_views(sizes: Sizes = ((24, 32), (24, 32))) -> Tuple[CellView, CellView]:
    """Student and teacher on two levels of two images, which fill p3 unless `sizes` differ."""
    shapes = {"p3": (3, 4), "p4": (2, 2)}
    views = []
    for seed in (1, 10):
        features = {k: noise(2, 4, *s, seed=seed + i) for i, (k, s) in enumerate(shapes.items())}
        logits = {
            k: noise(2, ANCHORS * CLASSES, *s, seed=seed + 5 + i) * 3
            for i, (k, s) in enumerate(shapes.items())
        }
        views.append(CellView(features, logits, sizes))
    return views[0], views[1]


SIZES = [((24, 32), (24, 32)), ((24, 32), (9, 20))]  # the second image ends in cell (1, 2) of p3


# Dense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=["full", "padded"])
@pytest.mark.parametrize("guide", GUIDES)
def test_dense_loss_is_that_of_the_equations(guide: str, sizes: Sizes) -> None:
    student, teacher = cell_views(sizes)
    losses = cell_head(guide=guide)(student, teacher)["loss_mld"]
    positives = positives_in_loops(student, teacher, ("p3", "p4"))
    assert positives > 1 and list(losses) == ["p3", "p4"]
    for level, loss in losses.items():
        assert loss.shape == ()
        expected = mld_in_loops(student, teacher, level, guide) / positives
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=["full", "padded"])
@pytest.mark.parametrize("guide", GUIDES)
def test_dense_gradient_is_that_of_the_weighted_cross_entropy(guide: str, sizes: Sizes) -> None:
    # That of BCE with soft targets: Q (sigmoid(z_S) - sigmoid(z_T)) / N_pos. Nothing through Q.
    student, teacher = cell_views(sizes)
    leaves = [*student.logits.values(), *teacher.logits.values()]
    leaves += [*student.features.values(), *teacher.features.values()]
    for x in leaves:
        x.requires_grad_()
    sum(cell_head(guide=guide)(student, teacher)["loss_mld"].values()).backward()
    positives = positives_in_loops(student, teacher, ("p3", "p4"))
    for level, x in student.logits.items():
        weight = cell_weights_in_loops(student, teacher, level, guide)[:, None]
        z, target = x.detach().clone().requires_grad_(), teacher.logits[level].detach().sigmoid()
        entropy = F.binary_cross_entropy_with_logits(z, target, reduction="none")
        (expected,) = torch.autograd.grad((weight * entropy).sum() / positives, z)
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-7)
    assert all(x.grad is None for x in leaves[2:]), "features or the teacher"


@pytest.mark.parametrize("guide", GUIDES)
def test_equal_logits_give_exactly_zero(guide: str) -> None:
    student, teacher = cell_views()
    teacher.logits = {k: x.clone() for k, x in student.logits.items()}
    for x in student.logits.values():
        x.requires_grad_()
    losses = cell_head(guide=guide)(student, teacher)["loss_mld"]
    assert [x.item() for x in losses.values()] == [0.0, 0.0]
    sum(losses.values()).backward()
    assert all((x.grad == 0).all() for x in student.logits.values())


def test_nearly_equal_logits_have_the_loss_that_they_have_in_float64() -> None:
    # Cross entropy and entropy, each summed over all cells, are 10^7 times what they differ by.
    features = {"p3": noise(2, 4, 64, 64).float()}  # equal ones: every cell weighs 1
    target = 2 * noise(2, 6, 64, 64, seed=1).float() - 4
    logits = target + 1e-3 * noise(2, 6, 64, 64, seed=2).float()
    student, teacher = (CellView(features, {"p3": x}) for x in (logits, target))
    loss = cell_head(["p3"])(student, teacher)["loss_mld"]["p3"]
    x, target = logits.double(), target.double()
    p, positives = target.sigmoid(), target.unflatten(1, (ANCHORS, -1)).amax(dim=2).sigmoid().sum()
    divergence = p * (F.logsigmoid(target) - F.logsigmoid(x))
    divergence += (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-x))
    assert loss.item() == pytest.approx((divergence.sum() / positives).item(), rel=0.05)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("z, target", [(120, -120), (-120, 120), (120, 120), (-120, -120)])
def test_extreme_logits_are_finite_on_a_level_of_one_cell(
    z: float, target: float, guide: str
) -> None:
    # The one cell weighs 1. KL is 120 where the answers are opposite, and N_pos 1 either way: the
    # sum is 1 for the target 120, and below its floor of 1 for -120.
    x = torch.full((1, 1, 1, 1), float(z), requires_grad=True)
    features = {"p7": torch.randn(1, 4, 1, 1)}
    student = CellView(features, {"p7": x}, anchors=1)
    teacher = CellView(features, {"p7": torch.full((1, 1, 1, 1), float(target))}, anchors=1)
    loss = cell_head(["p7"], guide)(student, teacher)["loss_mld"]["p7"]
    loss.backward()
    assert loss.item() == (120.0 if z != target else 0.0)
    assert x.grad.item() == (math.copysign(1, z) if z != target else 0.0)


def test_sure_positives_divide_the_loss() -> None:
    # 2 images x 3 anchors of one cell, sure of one class each: N_pos 6. One class at 0 against
    # a teacher at -inf: KL = log 2, once for each image.
    target = torch.tensor([50.0, -50.0]).repeat(3).view(1, 6, 1, 1).repeat(2, 1, 1, 1)
    logits = target.clone()
    logits[:, 1] = 0.0
    features = {"p7": torch.randn(2, 4, 1, 1)}
    student, teacher = (CellView(features, {"p7": x}, anchors=3) for x in (logits, target))
    loss = cell_head(["p7"])(student, teacher)["loss_mld"]["p7"]
    assert loss.item() == pytest.approx(2 * math.log(2) / 6, rel=1e-6)


def test_equal_differences_weigh_all_cells_alike() -> None:
    # 1 in exact numbers; 41 x (1 / 41) is below 1 in float32.
    student, teacher = (
        CellView({"p3": torch.zeros(1, 4, 1, 41)}, {"p3": torch.full((1, 1, 1, 41), z)}, anchors=1)
        for z in (0.0, 50.0)
    )
    loss = cell_head(["p3"])(student, teacher)["loss_mld"]["p3"]
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5), "41 log 2 / 41 positives"


@pytest.mark.parametrize("more", ["both", "student", "teacher"])
@pytest.mark.parametrize("guide", GUIDES)
def test_more_padding_and_what_is_in_it_do_not_matter(guide: str, more: str) -> None:
    views = cell_views(SIZES[1])
    head = cell_head(guide=guide)
    expected = head(*views)["loss_mld"]
    # Cells outside: all of the margin, and what the second image leaves.
    for side, view in zip(("student", "teacher"), views):
        margin = (0, 3, 0, 2) if more in (side, "both") else (0, 0, 0, 0)
        for maps in view.features, view.logits:
            for seed, (level, x) in enumerate(maps.items()):
                grown = F.pad(x, margin, value=100.0)
                for n, size in enumerate(view.image_sizes):
                    inside = cells_of(*grown.shape[-2:], view.strides[level], size)
                    garbage = noise(*grown.shape[1:], seed=seed) * 50
                    for i, j in inside:
                        garbage[:, i, j] = grown[n, :, i, j]
                    grown[n] = garbage
                maps[level] = grown
    for level, loss in head(*views)["loss_mld"].items():
        torch.testing.assert_close(loss, expected[level], rtol=1e-5, atol=0.0)
    for level, weight in head.maps["weight"].items():
        assert weight.shape[1] == 1 and not weight.requires_grad
        for n, size in enumerate(SIZES[1]):
            cells = cells_of(*weight.shape[-2:], views[0].strides[level], size)
            assert set(map(tuple, weight[n, 0].nonzero().tolist())) <= set(cells)


def test_levels_that_are_not_paired_do_not_count() -> None:
    # p4 learns from the teacher's "q4"; of p3 nobody is asked, not even how many positives it has.
    student, teacher = cell_views()
    head = MLDHead(levels=[LevelPair("p4", "q4", 4, 4, 16, 16)], two_stage=False)
    teacher._features = {"q4": teacher.features["p4"], "q3": teacher.features["p3"]}
    teacher.logits = {"q3": teacher.logits["p3"], "q4": teacher.logits["p4"]}
    losses = head(student, teacher)["loss_mld"]
    student, teacher = cell_views()
    expected = mld_in_loops(student, teacher, "p4", "features")
    expected /= positives_in_loops(student, teacher, ["p4"])
    assert list(losses) == ["p4"] and losses["p4"].item() == pytest.approx(expected, rel=1e-5)


# Regions -----------------------------------------------------------------------------------------

# On whole cells of p3: (image, top, left, bottom, right), of which the mean of Q is taken.
CELLS = [(0, 0, 0, 2, 3), (0, 2, 1, 8, 8), (0, 5, 5, 6, 6), (1, 0, 0, 8, 8), (1, 3, 0, 4, 5)]


def region_views(sizes: Sizes = ()) -> Tuple[RegionView, RegionView]:
    boxes = [
        Boxes(torch.tensor([[x0, y0, x1, y1] for m, y0, x0, y1, x1 in CELLS if m == n]) * 8.0)
        for n in (0, 1)
    ]
    return tuple(
        RegionView({"p3": noise(2, 4, 8, 8, seed=s)}, noise(5, 4, seed=s + 1) * 3, boxes, sizes)
        for s in (1, 3)
    )


def region_head(guide: str, temperature: float = 1.0, **channels: Tuple[int, int]) -> MLDHead:
    levels = level_pairs(**(channels or {"p3": (4, 4)}))
    return MLDHead(levels=levels, two_stage=True, guide=guide, temperature=temperature)


def region_mld_in_loops(
    student: RegionView, teacher: RegionView, guide: str, temperature: float
) -> float:
    """tau^2 mean_r q_r KL(softmax(z_T / tau) || softmax(z_S / tau)); no softmax over padding."""
    answers = [
        [softmax([z / temperature for z in row]) for row in view.logits.tolist()]
        for view in (student, teacher)
    ]
    if guide == "logits":
        d = [sum(abs(a - b) for a, b in zip(s, t)) / len(s) for s, t in zip(*answers)]
        weights = weight_in_loops(d)
    else:
        maps = CellView(student.features, {}, student.image_sizes)
        q = cell_weights_in_loops(maps, teacher, "p3", "features")
        weights = [q[n, top:bottom, a:b].mean().item() for n, top, a, bottom, b in CELLS]
    divergences = [
        sum(t * math.log(t / s) for s, t in zip(ours, theirs)) for ours, theirs in zip(*answers)
    ]
    total = sum(w * d for w, d in zip(weights, divergences))
    return temperature**2 * total / len(divergences)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("guide", GUIDES)
def test_region_loss_is_that_of_the_equations(guide: str, temperature: float) -> None:
    student, teacher = region_views()
    loss = region_head(guide, temperature)(student, teacher)["loss_mld"]
    assert loss.shape == ()
    expected = region_mld_in_loops(student, teacher, guide, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_region_weights_leave_padding_out() -> None:
    # The second image ends after 4 x 5 cells, the last box with it; a box beyond is cut off.
    sizes = ((64, 64), (32, 40))
    student, teacher = region_views(sizes)
    loss = region_head("features")(student, teacher)["loss_mld"]
    expected = region_mld_in_loops(student, teacher, "features", 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    student.features["p3"][1, :, 4:], teacher.features["p3"][1, :, :, 5:] = 1e3, -1e3
    again = region_head("features")(student, teacher)["loss_mld"]
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("guide", GUIDES)
def test_region_gradient_is_the_difference_of_the_probabilities(guide: str) -> None:
    # d/dz of tau^2 KL(softmax(z_T / tau) || softmax(z / tau)) = tau (softmax(z / tau) - target).
    student, teacher = region_views()
    logits, features = student.logits, student.features["p3"]
    for x in (logits, features, teacher.logits, teacher.features["p3"]):
        x.requires_grad_()
    head = region_head(guide, 2.0)
    head(student, teacher)["loss_mld"].backward()
    step = ((logits / 2).softmax(1) - (teacher.logits / 2).softmax(1)).detach()
    # The weight of a region is one number, and no negative one.
    weight = (logits.grad * 5 / 2 / step).mean(dim=1, keepdim=True)
    torch.testing.assert_close(logits.grad, weight * step * 2 / 5, rtol=1e-4, atol=1e-7)
    assert (weight > -1e-6).all() and (weight > 0.1).any()
    assert features.grad is None and teacher.logits.grad is None
    assert teacher.features["p3"].grad is None
    assert not any(x.requires_grad for x in head.maps["weight"].values())


@pytest.mark.parametrize("guide", GUIDES)
def test_batch_without_regions_gives_a_connected_zero(guide: str) -> None:
    student, teacher = region_views()
    predictor = nn.Linear(3, 4)
    student.logits, teacher.logits = predictor(torch.zeros(0, 3)), torch.zeros(0, 4)
    student.boxes = teacher.boxes = [Boxes(torch.zeros(0, 4)) for _ in range(2)]
    loss = region_head(guide)(student, teacher)["loss_mld"]
    loss.backward()
    assert loss.shape == () and loss.item() == 0.0
    assert all((p.grad == 0).all() for p in predictor.parameters()), "DDP would wait for it"


@pytest.mark.parametrize("guide", GUIDES)
def test_regions_of_equal_logits_give_exactly_zero(guide: str) -> None:
    student, teacher = region_views()
    teacher.logits = student.logits.clone()
    assert region_head(guide)(student, teacher)["loss_mld"].item() == 0.0


@pytest.mark.parametrize("guide", GUIDES)
def test_regions_of_extreme_logits_are_finite(guide: str) -> None:
    # Opposite answers, each sure: KL = 240 for every region. Equal features weigh 1, and so do
    # equal differences.
    student, teacher = region_views()
    teacher.features["p3"] = student.features["p3"].clone()
    student.logits = torch.tensor([[120.0, -120.0]] * 5, requires_grad=True)
    teacher.logits = torch.tensor([[-120.0, 120.0]] * 5)
    loss = region_head(guide)(student, teacher)["loss_mld"]
    loss.backward()
    assert loss.item() == pytest.approx(240.0, rel=1e-5)
    expected = torch.tensor([[1.0, -1.0]] * 5) / 5
    torch.testing.assert_close(student.logits.grad, expected, rtol=1e-5, atol=0.0)


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("guide", GUIDES)
def test_autocast_gives_the_float32_loss_of_half_precision_views(
    guide: str, two_stage: bool
) -> None:
    head = region_head(guide) if two_stage else cell_head(guide=guide)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        views = region_views() if two_stage else cell_views()
        for view in views:
            # Rounded either way, so that only what the head itself does differs.
            view._features = {k: x.bfloat16().to(dtype) for k, x in view.features.items()}
            if two_stage:
                view.logits = view.logits.bfloat16().to(dtype)
            else:
                view.logits = {k: x.bfloat16().to(dtype) for k, x in view.logits.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = head(*views)["loss_mld"]
        losses.append(loss if two_stage else sum(loss.values()))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0.0)


# Real detectors ----------------------------------------------------------------------------------

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
DENSE = [("retinanet", "retinanet"), pytest.param("fcos", "fcos", marks=needs_fcos)]
TWO_STAGE = [
    ("faster_rcnn", "faster_rcnn"),
    ("mask_rcnn", "cascade_rcnn"),
    ("cascade_rcnn", "mask_rcnn"),
]


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], List[Any]]:
    """DISTILL.TEACHER.* of a toy teacher, written once."""
    written: Dict[str, List[Any]] = {}

    def write(name: str) -> List[Any]:
        if name not in written:
            written[name] = write_teacher(tmp_path_factory.mktemp(name), name)
        return written[name]

    return write


def build(student: str, teacher: List[Any], heads: Sequence[str] = ("MLD",), **keys: Any):
    keys.setdefault("INPUT__MASK_FORMAT", "bitmask")
    torch.manual_seed(3)
    return build_model(distill_config(student, teacher, heads, **keys)).train()


def losses_of(model: nn.Module, inputs: List[Dict[str, Any]]) -> Dict[str, Tensor]:
    for x in inputs:  # Mask R-CNN wants masks, the others do not mind
        masks = torch.ones(len(x["instances"]), x["height"], x["width"])
        x["instances"].gt_masks = BitMasks(masks)
    torch.manual_seed(5)  # the sampling of proposals
    with EventStorage():
        return model(inputs)


def classifier(student: nn.Module) -> nn.Module:
    if hasattr(student, "head"):
        return student.head.cls_score
    return first(student.roi_heads.box_predictor).cls_score


def first(module: nn.Module) -> nn.Module:
    return module[0] if isinstance(module, nn.ModuleList) else module


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("student, teacher", [*DENSE, *TWO_STAGE])
def test_loss_trains_the_student_s_classifier_and_not_the_teacher(
    student: str, teacher: str, guide: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(student, teacher_of(teacher), DISTILL__MLD__GUIDE=guide)
    loss = losses_of(distiller, batch(height=64, width=96))["loss_mld"]
    assert loss.shape == () and loss.isfinite() and loss > 0
    loss.backward()
    grads = {k: p.grad for k, p in distiller.student.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values())
    assert classifier(distiller.student).weight.grad.abs().sum() > 0
    assert not [k for k in grads if "bbox_pred" in k or "mask_head" in k or "ctrness" in k]
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


@pytest.mark.parametrize("student, teacher", TWO_STAGE)
def test_region_head_of_either_detector_runs_once(
    student: str, teacher: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    # The student's in its own detection loss: never a second pass. A cascade's later stages run
    # once in a student, on boxes of their own, and in a teacher not at all.
    distiller, calls = build(student, teacher_of(teacher)), []
    for side, detector in (("student", distiller.student), ("teacher", distiller.teacher.model)):
        parts = {"backbone": [detector.backbone], "rpn": [detector.proposal_generator]}
        for key in ("box_head", "box_predictor"):
            part = getattr(detector.roi_heads, key)
            parts[key] = list(part) if isinstance(part, nn.ModuleList) else [part]
        for key, stages in parts.items():
            for i, module in enumerate(stages):
                call = (side, key, i)
                module.register_forward_hook(lambda *_, call=call: calls.append(call))
    losses = losses_of(distiller, batch())
    assert losses["loss_mld"] > 0
    stages = 3 if student == "cascade_rcnn" else 1
    expected = [("student", key, 0) for key in ("backbone", "rpn")]
    expected += [("student", k, i) for k in ("box_head", "box_predictor") for i in range(stages)]
    expected += [("teacher", key, 0) for key in ("backbone", "box_head", "box_predictor")]
    assert sorted(calls) == sorted(expected)


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_loss_is_the_same_beside_other_heads(
    student: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    alone = losses_of(build(student, teacher_of(student)), batch())
    for heads in (["MLD", "MGD"], ["SAMKD", "MLD"]):
        losses = losses_of(build(student, teacher_of(student), heads), batch())
        assert {f"loss_{name.lower()}" for name in heads} <= set(losses)
        for key, value in alone.items():
            assert torch.equal(losses[key], value), key
        sum(losses.values()).backward()


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("student, teacher", [*DENSE, *TWO_STAGE])
def test_images_without_boxes_and_of_different_sizes_train(
    student: str, teacher: str, guide: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(student, teacher_of(teacher), DISTILL__MLD__GUIDE=guide)
    inputs = batch(1, boxes=0, height=64, width=96) + batch(1, boxes=0, height=80, width=50)
    losses = losses_of(distiller, inputs)
    assert all(x.isfinite() for x in losses.values()), losses
    assert losses["loss_mld"].shape == ()
    losses["loss_mld"].backward()
    assert classifier(distiller.student).weight.grad.isfinite().all()


@pytest.mark.parametrize("levels", [["p3", "p5"], ["p6"]])
def test_regions_without_neighbouring_levels_are_refused_with_the_key(
    levels: List[str], teacher_of: Callable[[str], List[Any]]
) -> None:
    named = [[k, k] for k in levels]
    distiller = build("faster_rcnn", teacher_of("faster_rcnn"), DISTILL__LEVELS=named)
    with pytest.raises(ValueError, match=rf"got {', '.join(levels)}\. .*DISTILL\.LEVELS"):
        losses_of(distiller, batch())


# Refusals ----------------------------------------------------------------------------------------


def detector(two_stage: bool = False, **values: Any) -> DetectorInfo:
    provides = {"features", "dense", "roi_features"}
    provides |= {"regions", "roi_predictions"} if two_stage else set()
    values.setdefault("shapes", {"p3": ShapeSpec(channels=4, stride=8)})
    values.setdefault("num_classes", 3)
    values.setdefault("num_anchors", 3 if two_stage else 9)
    values.setdefault("dense_levels", tuple(values["shapes"]))
    name = "GeneralizedRCNN" if two_stage else "RetinaNet"
    return DetectorInfo(name=name, provides=frozenset(provides), two_stage=two_stage, **values)


def build_for(student: DetectorInfo, teacher: DetectorInfo, **values: Any) -> nn.Module:
    pair = DistillPair(student, teacher, pair_levels(student.shapes, teacher.shapes))
    return build_head("MLD", config(values), pair)


def config(values: Mapping[str, Any]) -> CfgNode:
    return load_config(opts=[w for k, v in values.items() for w in (f"DISTILL.MLD.{k}", v)])


def test_keys_reach_the_head() -> None:
    keys = {"GUIDE": "logits", "MASK_TEMPERATURE": 0.8, "TEMPERATURE": 4.0}
    for two_stage in (False, True):
        head = build_for(detector(two_stage), detector(two_stage), **keys)
        assert isinstance(head.guide, LogitGuide) and head.temperature == 4.0
        assert (head.guide.temperature, head.guide.class_temperature) == (0.8, 4.0)
        assert head.two_stage is two_stage and not list(head.parameters())


@pytest.mark.parametrize("two_stage", [False, True])
def test_unlike_detectors_are_refused_with_heads_that_fit(two_stage: bool) -> None:
    student, teacher = detector(two_stage), detector(not two_stage)
    pair = DistillPair(student, teacher, pair_levels(student.shapes, teacher.shapes))
    text = refusal_of("MLD", load_config(), pair)
    kind = "dense -> two-stage" if two_stage else "two-stage -> dense"
    names = f"teacher {teacher.name}, student {student.name}"
    assert text.startswith("DISTILL.HEADS: MLD takes dense -> dense, two-stage -> two-stage; ")
    assert f"; this is {kind} ({names})." in text
    assert {"DFMSD", "PKD"} <= set(text.split("Heads that fit: ")[1][:-1].split(", "))


def test_detector_without_a_box_head_is_refused() -> None:
    c4 = DetectorInfo(
        "GeneralizedRCNN",
        detector().shapes,
        num_classes=3,
        provides=frozenset({"features", "dense"}),
        two_stage=True,
    )
    with pytest.raises(ValueError, match="MLD needs regions, roi_predictions; the teacher Gen"):
        build_for(detector(two_stage=True), c4)


@pytest.mark.parametrize("two_stage", [False, True])
def test_unequal_classes_are_refused(two_stage: bool) -> None:
    with pytest.raises(ValueError, match="MLD .* student has 3 classes and the teacher 80"):
        build_for(detector(two_stage), detector(two_stage, num_classes=80))


def test_unequal_anchors_per_cell_are_refused_where_cells_are_compared() -> None:
    with pytest.raises(
        ValueError, match=r"student has 9 anchors .* the teacher 1 \(MODEL\.ANCHOR_GENERATOR\)"
    ):
        build_for(detector(), detector(num_anchors=1))
    # Those of an RPN are not.
    assert build_for(detector(two_stage=True), detector(two_stage=True, num_anchors=15))


def test_levels_without_predictions_are_left_out_and_none_at_all_is_refused() -> None:
    # A pyramid may have levels that the head on it does not read, as p2 here.
    shapes = {k: ShapeSpec(channels=4, stride=2 ** int(k[1])) for k in ("p2", "p3", "p4")}
    student, teacher, finest = (
        detector(shapes=shapes, dense_levels=levels)
        for levels in (("p3", "p4"), ("p2", "p3"), ("p2",))
    )
    assert [x.student for x in build_for(student, student).levels] == ["p3", "p4"]
    assert [x.student for x in build_for(student, teacher).levels] == ["p3"]
    with pytest.raises(ValueError, match=r"DISTILL\.LEVELS: .* predicts on p3, p4, .* on p2\."):
        build_for(student, finest)


@pytest.mark.parametrize("two_stage", [False, True])
def test_unequal_channels_need_the_logits_for_a_guide(two_stage: bool) -> None:
    shapes = {"p3": ShapeSpec(channels=8, stride=8)}
    student, teacher = detector(two_stage), detector(two_stage, shapes=shapes)
    with pytest.raises(ValueError, match=r"DISTILL\.MLD\.GUIDE is 'features', .* at p3\. .*logits"):
        build_for(student, teacher)
    assert build_for(student, teacher, GUIDE="logits")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("GUIDE", "boxes", "must be one of features, logits, got 'boxes'"),
        ("MASK_TEMPERATURE", 0.0, "must be above 0, got 0.0"),
        ("MASK_TEMPERATURE", -1.0, "must be above 0, got -1.0"),
        ("TEMPERATURE", 0.0, "must be above 0, got 0.0"),
        ("TEMPERATURE", -0.5, "must be above 0, got -0.5"),
        ("TEMPERATURE", math.nan, "must be above 0, got nan"),
    ],
)
def test_value_outside_its_range_is_refused_by_its_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"DISTILL\.MLD\.{key} {message}"):
        build_for(detector(), detector(), **{key: value})

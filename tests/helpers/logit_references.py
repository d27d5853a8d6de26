"""
What the heads on predictions compute, slowly and in float64: one region or anchor at a time, as the
papers' equations read. Also views of predictions without a detector, and which heads a refusal of
build_head has to name.
"""

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from d2kd.heads import DistillPair, build_head
from d2kd.heads.build import fitting
from d2kd.views import Regions, RegionSampler
from d2kd.views.anchor_labels import AnchorLabels
from d2kd.views.predictions import DensePredictions, RoIPredictions
from d2kd.views.towers import Towers

from .toys import FeatureView, noise

Maps = Dict[str, Tensor]

# Probabilities -----------------------------------------------------------------------------------


def log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def binary_cross_entropy(z: float, p: float) -> float:
    """-p log(sigmoid(z)) - (1 - p) log(1 - sigmoid(z)), with log(sigmoid(z)) = -log(1 + e^-z)."""
    return p * log_sum_exp([0.0, -z]) + (1 - p) * log_sum_exp([0.0, z])


def divergence(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """sum_i p_i (log p_i - log q_i) of logarithms: log q of `ours`, log p of `theirs`."""
    return sum(math.exp(p) * (p - q) for q, p in zip(ours, theirs))


def dkd(
    student: Tensor, teacher: Tensor, labels: Sequence[int], temperature: float = 1.0
) -> Tuple[float, float]:
    """
    TCKD = T^2 KL of (p_y, 1 - p_y), NCKD = T^2 KL of the softmax without class y; means over
    regions. Logits (R, K+1).
    """
    target, others = 0.0, 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels):
        binary, rest = [], []
        for z in ([v / temperature for v in s], [v / temperature for v in t]):
            without = z[:y] + z[y + 1 :]
            total, remaining = log_sum_exp(z), log_sum_exp(without)
            binary.append([z[y] - total, remaining - total])
            rest.append([v - remaining for v in without])
        target += divergence(*binary)
        others += divergence(*rest)
    scale = temperature**2 / len(student)
    return scale * target, scale * others


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """sum (x - mean x)(y - mean y) / (|x - mean x| |y - mean y| + 1e-8), the authors' epsilon."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    x, y = [v - mean_x for v in x], [v - mean_y for v in y]
    norms = math.sqrt(sum(v * v for v in x)) * math.sqrt(sum(v * v for v in y))
    return sum(a * b for a, b in zip(x, y)) / (norms + 1e-8)


def dist(
    student: Sequence[Sequence[float]],
    teacher: Sequence[Sequence[float]],
    temperature: float = 1.0,
) -> Any:
    """
    T^2 (1 - mean of Pearson's correlation) over the rows, and over the columns, of probabilities.
    """
    return tuple(
        temperature**2 * (1 - sum(pearson(x, y) for x, y in zip(ours, theirs)) / len(ours))
        for ours, theirs in (
            (list(student), list(teacher)),
            (list(zip(*student)), list(zip(*teacher))),
        )
    )


def softmax_rows(logits: Tensor, temperature: float = 1.0) -> List[List[float]]:
    """(R, C)"""
    rows = [[z / temperature for z in row] for row in logits.tolist()]
    return [[math.exp(z - log_sum_exp(row)) for z in row] for row in rows]


def sigmoid_rows(logits: Tensor, temperature: float = 1.0) -> List[List[float]]:
    """(N, A*K, H, W) -> N*H*W rows of A*K"""
    return [
        [sigmoid(z / temperature) for z in image[:, i, j].tolist()]
        for image in logits
        for i in range(image.shape[1])
        for j in range(image.shape[2])
    ]


# Boxes -------------------------------------------------------------------------------------------


def area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    common = intersection(a, b)
    return common / (area(a) + area(b) - common)


def giou_loss(a: Sequence[float], b: Sequence[float]) -> float:
    """1 - (IoU - (|C| - |union|) / |C|), C the smallest box around both; 0: the target is empty."""
    if area(b) == 0:
        return 0.0
    around = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
    union = area(a) + area(b) - intersection(a, b)
    return 1 - (iou(a, b) - (area(around) - union) / area(around))


def log_iou_loss(a: Sequence[float], b: Sequence[float]) -> float:
    """-log IoU, which counts as at least 1e-6; 0: the target is empty."""
    return -math.log(max(iou(a, b), 1e-6)) if area(b) else 0.0


BOX_LOSSES = {"giou": giou_loss, "log_iou": log_iou_loss}


def decode(deltas: Sequence[float], anchor: Sequence[float], of_fcos: bool) -> List[float]:
    """
    RetinaNet: the shift of the centre in anchor sizes, and the logarithm of the growth. FCOS: the
    distances from the centre to the sides, in sizes of the anchor, at least 0.
    """
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2, anchor[1] + height / 2
    if of_fcos:
        left, top, right, bottom = (max(d, 0.0) for d in deltas)
        return [x - left * width, y - top * height, x + right * width, y + bottom * height]
    x, y = x + deltas[0] * width, y + deltas[1] * height
    limit = math.log(1000 / 16)  # Detectron2's
    width, height = (size * math.exp(min(d, limit)) for size, d in zip((width, height), deltas[2:]))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def decode_map(deltas: Tensor, stride: int, sizes: Sequence[Any], of_fcos: bool) -> Tensor:
    """
    (N, A*4, H, W) -> the same shape. The anchors of cell (i, j) have the centre (j, i) * stride, of
    FCOS half a cell further.

    Args:
        sizes: (width, height) of each anchor
    """
    out = torch.zeros(deltas.shape, dtype=torch.float64)
    for n, image in enumerate(deltas):
        for a, (width, height) in enumerate(sizes):
            for i in range(image.shape[1]):
                for j in range(image.shape[2]):
                    x, y = (stride * (v + (0.5 if of_fcos else 0.0)) for v in (j, i))
                    anchor = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                    box = decode(image[4 * a : 4 * a + 4, i, j].tolist(), anchor, of_fcos)
                    out[n, 4 * a : 4 * a + 4, i, j] = torch.tensor(box, dtype=torch.float64)
    return out


# Heads on every cell -----------------------------------------------------------------------------


def anchors_of(x: Tensor, num_anchors: int, sizes: Sequence[Any] = (), stride: int = 8) -> Any:
    """
    (n, a, i, j) of every anchor in a cell that begins inside its image.

    Args:
        sizes: (height, width) of each image in pixels; empty: no padding
    """
    for n in range(len(x)):
        height, width = sizes[n] if sizes else (math.inf, math.inf)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                if i * stride < height and j * stride < width:
                    yield from ((n, a, i, j) for a in range(num_anchors))


def entries(x: Tensor, num_anchors: int, index: Tuple[int, int, int, int]) -> List[float]:
    """Those of one anchor of (N, A*E, H, W), E numbers."""
    n, a, i, j = index
    length = x.shape[1] // num_anchors
    return x[n, a * length : (a + 1) * length, i, j].tolist()


def class_term(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """sum_c |p_t - p_s| BCE(z_s, p_t) of one anchor's logits."""
    return sum(
        abs(sigmoid(t) - sigmoid(s)) * binary_cross_entropy(s, sigmoid(t))
        for s, t in zip(ours, theirs)
    )


def bckd_sums(
    logits: Tuple[Tensor, Tensor], boxes: Tuple[Tensor, Tensor], num_anchors: int, *where: Any
) -> Tuple[float, float]:
    """
    sum |p_t - p_s| BCE, and sum max_c |p_t - p_s| (1 - GIoU), of one level; each pair is of student
    and teacher, `where` as in anchors_of.
    """
    cls, box = 0.0, 0.0
    for index in anchors_of(logits[0], num_anchors, *where):
        s, t = (entries(x, num_anchors, index) for x in logits)
        cls += class_term(s, t)
        differ = max(abs(sigmoid(b) - sigmoid(a)) for a, b in zip(s, t))
        box += differ * giou_loss(*(entries(x, num_anchors, index) for x in boxes))
    return cls, box


def crosskd_sums(
    logits: Tuple[Tensor, Tensor],
    boxes: Tuple[Tensor, Tensor],
    labels: Tensor,
    box_loss: str,
    *where: Any,
) -> Tuple[float, float]:
    """
    sum |sigmoid(x) - p_t| BCE(x, p_t) and sum w D(box), w = max_c p_t, over the anchors of one
    level whose label (N, A, H, W) is not -1; each pair is of the crossed and the teacher's own.
    """
    cls, box = 0.0, 0.0
    num_anchors = labels.shape[1]
    for index in anchors_of(logits[0], num_anchors, *where):
        if labels[index] == -1:
            continue
        x, t = (entries(z, num_anchors, index) for z in logits)
        cls += class_term(x, t)
        weight = max(sigmoid(z) for z in t)
        box += weight * BOX_LOSSES[box_loss](*(entries(b, num_anchors, index) for b in boxes))
    return cls, box


def align(x: Tensor, like: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-6) * std_t + mean_t per channel, over (N, H, W), with n - 1."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for c in range(x.shape[1]):
        moments = []
        for values in (x[:, c].double().flatten(), like[:, c].double().flatten()):
            mean = values.sum() / len(values)
            variance = ((values - mean) ** 2).sum() / (len(values) - 1) if len(values) > 1 else 0.0
            moments += [mean, variance**0.5]
        mean, std, target_mean, target_std = moments
        out[:, c] = (x[:, c].double() - mean) / (std + 1e-6) * target_std + target_mean
    return out


def tower_by_hand(subnet: nn.Sequential, x: Tensor, first: int, last: int) -> Tensor:
    """Convolutions first to last, counted from 1, a ReLU before all but number 1; no norms."""
    convs = [m for m in subnet if isinstance(m, nn.Conv2d)]
    for number in range(first, last + 1):
        x = x if number == 1 else x.clamp(min=0)
        x = conv3x3(x, convs[number - 1])
    return x


def conv3x3(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


# Views without a detector ------------------------------------------------------------------------


class RegionView(FeatureView):
    """
    A view of regions with logits and true classes.

    A student is asked for those of its own pass, a teacher for those of the student's boxes.
    """

    def __init__(self, logits: Tensor, regions: Regions, labels: Optional[Tensor] = None):
        super().__init__({})
        self.logits, self._regions, self.labels = logits, regions, labels

    def regions(self, sampler: Optional[RegionSampler] = None) -> Regions:
        assert self.labels is not None, "a teacher has none"
        return self._regions

    @property
    def sampled_proposals(self) -> List[Instances]:
        sizes = [len(x) for x in self._regions.boxes]
        return [Instances((64, 64), gt_classes=x) for x in self.labels.split(sizes)]

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        assert boxes is (self._regions.boxes if self.labels is None else None)
        return RoIPredictions(self.logits, self.logits, self.logits)


def region_views(
    student: Tensor, teacher: Tensor, labels: Sequence[int] = ()
) -> Tuple[RegionView, RegionView]:
    """Of logits (R, K+1); half of the regions are in each of two images."""
    boxes, half = torch.zeros(len(student), 4), len(student) // 2
    regions = Regions([Boxes(boxes[:half]), Boxes(boxes[half:])])
    classes = torch.tensor(list(labels) or [0] * len(student), dtype=torch.int64)
    return RegionView(student, regions, classes), RegionView(teacher, regions)


class CellView(FeatureView):
    """
    A view of predictions (N, A*K, Hi, Wi), boxes (N, A*4, Hi, Wi) in place of deltas, and labels
    (N, A, Hi, Wi). Its towers are what it predicts: the rest of its head leaves all as it is.
    """

    def __init__(self, logits: Maps, boxes: Maps, labels: Optional[Maps] = None, sizes: Any = ()):
        super().__init__(logits, sizes)
        self.logits, self.decoded, self.labels = logits, boxes, labels

    @property
    def num_anchors(self) -> int:
        return next(iter(self.decoded.values())).shape[1] // 4

    def _predictions(self, logits: List[Tensor], boxes: List[Tensor]) -> DensePredictions:
        return DensePredictions(list(self.logits), logits, boxes, [])

    def dense(self) -> DensePredictions:
        return self._predictions(list(self.logits.values()), list(self.decoded.values()))

    def boxes(self, deltas: Sequence[Tensor]) -> List[Tensor]:
        return list(deltas)

    def anchor_labels(self) -> AnchorLabels:
        return AnchorLabels(list(self.labels.values()), num_classes=3)

    def towers(self, depth: int) -> Towers:
        return Towers(list(self.logits.values()), list(self.decoded.values()))

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        return self._predictions(towers.classes, towers.boxes)


# Of cell_view: images of 24 x 32 pixels, the second one smaller, so that it has padding on p3.
SIZES = [(24, 32), (9, 17)]
ANCHORS, CLASSES = 2, 3


def cell_view(seed: int, sizes: Any = ()) -> CellView:
    """Two images, two levels; labels are -1 (ignored), a class, or 3, background."""
    logits, boxes, labels = {}, {}, {}
    for level, (height, width) in {"p3": (3, 4), "p4": (2, 2)}.items():
        seed += 10
        logits[level] = (noise(2, ANCHORS * CLASSES, height, width, seed=seed) * 2).float()
        corner = noise(2, ANCHORS, 2, height, width, seed=seed + 1) * 6
        size = noise(2, ANCHORS, 2, height, width, seed=seed + 2).abs() * 20 + 4
        boxes[level] = torch.cat([corner, corner + size], dim=2).flatten(1, 2).float()
        labels[level] = (
            (noise(2, ANCHORS, height, width, seed=seed + 3) * 2 + 1).long().clamp(-1, 3)
        )
    return CellView(logits, boxes, labels, sizes)


def positives(view: Any) -> int:
    """Anchors labelled with a class, padding or not."""
    labels = [x for maps in view.anchor_labels().maps for x in maps.flatten().tolist()]
    return sum(0 <= x < view.anchor_labels().num_classes for x in labels)


def total(losses: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    return sum(x for levels in losses.values() for x in levels.values())


# Which heads fit ---------------------------------------------------------------------------------


def refusal_of(name: str, cfg: CfgNode, pair: DistillPair) -> str:
    """The message with which the head is refused; it ends with all heads that fit, and no other."""
    with pytest.raises(ValueError) as error:
        build_head(name, cfg, pair)
    text = str(error.value)
    assert text.endswith(f"Heads that fit: {', '.join(fitting(cfg, pair))}."), text
    return text

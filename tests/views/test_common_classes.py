"""From the classes of one detector to those it shares with another, beside loops in float64."""

import copy
import itertools
import math
from typing import Any, List, Sequence

import pytest
import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from d2kd.views import CommonClassesView, MergeClasses
from d2kd.views.anchor_labels import AnchorLabels
from d2kd.views.predictions import DensePredictions, RoIPredictions
from tests.helpers.logit_references import log_sum_exp, sigmoid
from tests.helpers.toys import noise

K = 5
# One class each; another order; several in a group; all in one; a group of one beside one of three.
GROUPS = [
    [[0], [1], [2], [3], [4]],
    [[4], [2]],
    [[1, 3], [0]],
    [[0, 1, 2, 3, 4]],
    [[2], [4, 0, 1]],
    [[3]],
]
groups_of = pytest.mark.parametrize("groups", GROUPS, ids=str)


def merge_of(groups: Sequence[Sequence[int]], num_classes: int = K) -> MergeClasses:
    return MergeClasses(groups, num_classes)


# What the definitions say ------------------------------------------------------------------------


def merged_sigmoids(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """(N, A*K, H, W) -> (N, A*C, H, W): of each group the largest, anchor by anchor."""
    images, channels, height, width = logits.shape
    anchors, count = channels // K, len(groups)
    out = torch.zeros(images, anchors * count, height, width, dtype=torch.float64)
    for n, a, c, i, j in itertools.product(
        range(images), range(anchors), range(count), range(height), range(width)
    ):
        out[n, a * count + c, i, j] = max(logits[n, a * K + k, i, j].item() for k in groups[c])
    return out


def merged_softmax(logits: Tensor, groups: Sequence[Sequence[int]]) -> List[List[float]]:
    """(R, K+1) -> R rows of C + 1 log-probabilities: of each group, then of everything else."""
    rest = [k for k in range(K + 1) if not any(k in group for group in groups)]
    rows = []
    for z in logits.double().tolist():
        total = log_sum_exp(z)
        rows.append([log_sum_exp([z[k] - total for k in group]) for group in [*groups, rest]])
    return rows


def merged_deltas(deltas: Tensor, logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """(R, K*4) -> (R, C*4): sum_k p_k deltas_k / sum_k p_k over the classes k of each group."""
    out = torch.zeros(len(deltas), 4 * len(groups), dtype=torch.float64)
    for r, (d, z) in enumerate(zip(deltas.double().tolist(), logits.double().tolist())):
        for c, group in enumerate(groups):
            total = log_sum_exp([z[k] for k in group])
            for side in range(4):
                out[r, 4 * c + side] = sum(math.exp(z[k] - total) * d[4 * k + side] for k in group)
    return out


def slopes(function: Any, x: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient of a scalar function of float64 numbers, one number at a time."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        ends = []
        for sign in (1, -1):
            moved = x.clone()
            moved.view(-1)[i] += sign * step
            ends.append(float(function(moved)))
        out.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return out


# Sigmoids ----------------------------------------------------------------------------------------


@groups_of
@pytest.mark.parametrize("anchors", [1, 3])
def test_group_of_sigmoids_is_its_likeliest_class(groups: List[List[int]], anchors: int) -> None:
    logits = noise(2, anchors * K, 2, 3)
    merged = merge_of(groups).sigmoids(logits)
    assert torch.equal(merged, merged_sigmoids(logits, groups)) and merged.dtype == logits.dtype


def test_group_of_sigmoids_by_hand() -> None:
    # One cell, one anchor: of (1, 5, -2, 3, 0) the groups {1, 3} and {2} have 5 and -2; 0 and 4 are
    # in none.
    logits = torch.tensor([1.0, 5.0, -2.0, 3.0, 0.0]).view(1, K, 1, 1)
    assert merge_of([[1, 3], [2]]).sigmoids(logits).flatten().tolist() == [5.0, -2.0]


@groups_of
def test_gradient_of_sigmoids_is_that_of_float64(groups: List[List[int]]) -> None:
    logits, weight = noise(1, 2 * K, 1, 2), noise(1, 2 * len(groups), 1, 2, seed=1)
    x = logits.float().requires_grad_()
    (merge_of(groups).sigmoids(x).sigmoid() * weight.float()).sum().backward()

    def loss(z: Tensor) -> float:
        merged = merged_sigmoids(z, groups).flatten().tolist()
        return sum(w * sigmoid(v) for w, v in zip(weight.flatten().tolist(), merged))

    torch.testing.assert_close(x.grad.double(), slopes(loss, logits), rtol=1e-4, atol=1e-6)


def test_filler_of_short_groups_takes_no_part_of_the_gradient() -> None:
    # The largest of {4, 0, 1} gets all of it; {2} is filled up to three and gets 1, not 3.
    x = torch.zeros(1, K, 1, 1)
    x[0, 0] = 1
    x.requires_grad_()
    merge_of([[2], [4, 0, 1]]).sigmoids(x).sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]


# Softmax -----------------------------------------------------------------------------------------


@groups_of
def test_group_of_a_softmax_has_the_sum_of_its_probabilities(groups: List[List[int]]) -> None:
    logits = noise(4, K + 1) * 3
    found = merge_of(groups).softmax(logits)
    assert found.shape == (4, len(groups) + 1) and found.dtype == torch.float32
    expected = torch.tensor(merged_softmax(logits, groups))
    torch.testing.assert_close(found.log_softmax(1), expected.float(), rtol=1e-5, atol=1e-5)
    # The definition once more: probabilities of the groups, and what is left.
    p = logits.softmax(1)
    sums = torch.stack([p[:, group].sum(1) for group in groups], dim=1)
    sums = torch.cat([sums, 1 - sums.sum(1, keepdim=True)], dim=1)
    torch.testing.assert_close(found.softmax(1).double(), sums, rtol=1e-5, atol=1e-6)


def test_group_of_a_softmax_by_hand() -> None:
    # Of p = (1, 2, 3, 4, 5, 5) / 20, the group {1, 3} has 6/20 and {0} 1/20; background has its own
    # 5/20 with the 8/20 of the classes 2 and 4.
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 5.0]]).log()
    found = merge_of([[1, 3], [0]]).softmax(logits).softmax(1)
    torch.testing.assert_close(found, torch.tensor([[6.0, 1.0, 13.0]]) / 20)


def test_all_classes_one_by_one_leave_a_softmax_as_it_is() -> None:
    logits = noise(4, K + 1).float() * 20
    torch.testing.assert_close(merge_of(GROUPS[0]).softmax(logits), logits)


@groups_of
def test_gradient_of_a_softmax_is_that_of_float64(groups: List[List[int]]) -> None:
    logits, weight = noise(2, K + 1) * 2, noise(2, len(groups) + 1, seed=1)
    x = logits.float().requires_grad_()
    (merge_of(groups).softmax(x).log_softmax(1) * weight.float()).sum().backward()

    def loss(z: Tensor) -> float:
        rows = zip(weight.tolist(), merged_softmax(z, groups))
        return sum(w * v for ws, vs in rows for w, v in zip(ws, vs))

    torch.testing.assert_close(x.grad.double(), slopes(loss, logits), rtol=1e-4, atol=1e-5)


@groups_of
@pytest.mark.parametrize("sure", [120.0, -120.0])
@pytest.mark.parametrize("where", [[0], [3], [K], [1, 2], list(range(K + 1)), list(range(K))])
def test_sure_logits_have_finite_probabilities_and_gradients(
    groups: List[List[int]], sure: float, where: List[int]
) -> None:
    x = noise(1, K + 1).float()
    x[0, where] = sure
    x.requires_grad_()
    found = merge_of(groups).softmax(x)
    expected = torch.tensor(merged_softmax(x.detach(), groups))
    torch.testing.assert_close(found.log_softmax(1), expected, rtol=1e-4, atol=1e-4)
    found.log_softmax(1).sum().backward()
    assert x.grad.isfinite().all()


# Boxes -------------------------------------------------------------------------------------------


@groups_of
def test_box_of_a_group_is_the_mean_over_its_classes(groups: List[List[int]]) -> None:
    deltas, logits = noise(3, 4 * K), noise(3, K + 1, seed=1) * 2
    found = merge_of(groups).deltas(deltas.float(), logits.float())
    expected = merged_deltas(deltas, logits, groups)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_box_of_a_group_by_hand() -> None:
    # Classes 1 and 3 of probabilities 2 : 6 have the boxes 4 and 8: 4 / 4 + 3 * 8 / 4 = 7.
    logits = torch.tensor([[9.0, 2.0, 9.0, 6.0, 9.0, 9.0]]).log()
    deltas = torch.tensor([0.0, 4.0, 0.0, 8.0, 0.0]).repeat_interleave(4)[None]
    found = merge_of([[1, 3]]).deltas(deltas, logits)
    torch.testing.assert_close(found, torch.full((1, 4), 7.0))


def test_box_of_a_single_class_is_its_own() -> None:
    deltas, logits = noise(3, 4 * K).float(), noise(3, K + 1).float()
    found = merge_of([[4], [2]]).deltas(deltas, logits)
    assert torch.equal(found, torch.cat([deltas[:, 16:20], deltas[:, 8:12]], dim=1))


@groups_of
def test_class_agnostic_boxes_are_left_as_they_are(groups: List[List[int]]) -> None:
    deltas = noise(3, 4)
    assert merge_of(groups).deltas(deltas, noise(3, K + 1)) is deltas


def test_box_of_a_detector_of_one_class_is_left_as_it_is() -> None:
    deltas = noise(3, 4).float()
    assert torch.equal(merge_of([[0]], num_classes=1).deltas(deltas, noise(3, 2).float()), deltas)


def test_boxes_give_no_gradient_to_logits() -> None:
    deltas, logits = (x.requires_grad_() for x in (noise(3, 4 * K), noise(3, K + 1)))
    merge_of([[1, 3], [0]]).deltas(deltas, logits).sum().backward()
    assert logits.grad is None
    # The shares of a group sum to 1; a class in none has no part.
    by_class = deltas.grad.view(3, K, 4)
    torch.testing.assert_close(by_class[:, [1, 3]].sum(1), torch.ones(3, 4).double())
    assert (by_class[:, 0] == 1).all() and (by_class[:, [2, 4]] == 0).all()


# Labels ------------------------------------------------------------------------------------------


@groups_of
def test_label_is_that_of_the_group_or_background(groups: List[List[int]]) -> None:
    labels = torch.arange(-2, K + 1).repeat(2, 1)
    expected = [
        x if x < 0 else next((c for c, group in enumerate(groups) if x in group), len(groups))
        for x in labels[0].tolist()
    ]
    found = merge_of(groups).labels(labels)
    assert found.tolist() == [expected, expected] and found.dtype == torch.int64


def test_label_by_hand() -> None:
    # Classes 1 and 3 are the common class 0, 0 is 1; 2 and 4 are the student's alone, 5 is
    # background; -1 is left out of the loss.
    found = merge_of([[1, 3], [0]]).labels(torch.tensor([0, 1, 2, 3, 4, 5, -1]))
    assert found.tolist() == [1, 0, 2, 0, 2, 2, -1]


# Nothing to merge, less precision, nothing to save -----------------------------------------------


@groups_of
def test_no_region_gives_none(groups: List[List[int]]) -> None:
    logits = torch.zeros(0, K + 1, requires_grad=True)
    merge = merge_of(groups)
    deltas = merge.deltas(torch.zeros(0, 4 * K), logits)
    assert deltas.shape == (0, 4 * len(groups))
    merged = merge.softmax(logits)
    merged.sum().backward()
    assert merged.shape == (0, len(groups) + 1) and logits.grad.shape == (0, K + 1)
    assert merge.labels(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@groups_of
def test_autocast_rounds_what_it_is_given_and_no_more(groups: List[List[int]]) -> None:
    merge = merge_of(groups)
    cells, regions = noise(1, K, 2, 2).bfloat16(), (noise(4, K + 1) * 3).bfloat16()
    deltas = noise(4, 4 * K).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merge.sigmoids(cells), merge.softmax(regions), merge.deltas(deltas, regions)
    assert torch.equal(found[0].double(), merged_sigmoids(cells, groups))
    assert found[1].dtype == torch.float32
    expected = torch.tensor(merged_softmax(regions, groups)).float()
    torch.testing.assert_close(found[1].log_softmax(1), expected, rtol=1e-4, atol=1e-4)
    expected = merged_deltas(deltas, regions, groups)
    torch.testing.assert_close(found[2].double(), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_does_not_overflow() -> None:
    # 60000 is near the largest number of float16, and the sum of two is none.
    x = torch.tensor([[60000.0, 60000.0, 60000.0, -60000.0, 0.0, 0.0]], dtype=torch.float16)
    found = merge_of([[0, 1], [2]]).softmax(x).softmax(1)
    # float32 has steps of 1/256 there.
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3, 0.0]]), rtol=0, atol=1e-3)


def test_nothing_of_the_map_is_saved_or_trained() -> None:
    merge = merge_of([[1, 3], [0]])
    assert not merge.state_dict() and not list(merge.parameters())
    assert merge.num_classes == 2


# The view ----------------------------------------------------------------------------------------


class View:
    """Answers like a detector's, counted."""

    def __init__(self, two_stage: bool):
        self.two_stage, self.asked, self.answers = two_stage, [], {}
        self.num_classes, self.num_anchors = K, 2
        self.features = {"p3": noise(1, 2, 2, 2)}
        self.logits, self.deltas = noise(3, K + 1).float(), noise(3, 4 * K).float()
        fields = {"gt_classes": torch.tensor([0, 2, 3]), "gt_boxes": Boxes(torch.zeros(3, 4))}
        self.gt_instances = [Instances((8, 8), **fields)]
        self.sampled_proposals = self.mask_proposals = self.gt_instances

    def _once(self, question: Any, compute: Any) -> Any:
        if question not in self.answers:
            self.answers[question] = compute()
        return self.answers[question]

    def _of_boxes(self, name: str, boxes: Any, compute: Any) -> Any:
        return self._once((name, id(boxes)), compute)

    def dense(self) -> DensePredictions:
        self.asked.append("dense")
        entries = 1 if self.two_stage else K
        return DensePredictions(["p3"], [noise(1, 2 * entries, 2, 2)], [noise(1, 8, 2, 2)], [])

    def predict_from(self, depth: int, towers: Any) -> DensePredictions:
        assert (depth, towers) == (3, "towers")
        return self.dense()

    def roi_predictions(self, boxes: Any = None) -> RoIPredictions:
        sign = 1 if boxes is None else -1
        return RoIPredictions(noise(3, 2), sign * self.logits, self.deltas)

    def anchor_labels(self) -> AnchorLabels:
        centerness = torch.tensor([[[[0.1, 1.5], [3.0, 0.2]]]])
        return AnchorLabels([torch.tensor([[[[-1, 0], [2, K]]]])], K, [centerness])


def view_of(two_stage: bool, groups: Any = ((1, 3), (0,))) -> Any:
    view = View(two_stage)
    merge = merge_of(groups)
    return view, CommonClassesView(view, merge, merge)


def test_dense_view_has_common_logits_and_its_own_boxes() -> None:
    view, common = view_of(two_stage=False)
    dense, raw = common.dense(), view.dense()
    assert torch.equal(dense.logits[0], merged_sigmoids(raw.logits[0], [[1, 3], [0]]))
    assert torch.equal(dense.deltas[0], raw.deltas[0]) and dense.levels == ["p3"]
    assert torch.equal(common.predict_from(3, "towers").logits[0], dense.logits[0])


def test_two_stage_view_leaves_its_rpn_alone() -> None:
    view, common = view_of(two_stage=True)
    assert torch.equal(common.dense().logits[0], view.dense().logits[0])


def test_view_of_regions_has_common_logits_and_boxes() -> None:
    view, common = view_of(two_stage=True)
    merge = merge_of([[1, 3], [0]])
    for boxes, logits in ((None, view.logits), (["boxes"], -view.logits)):
        found = common.roi_predictions(boxes)
        assert torch.equal(found.logits, merge.softmax(logits))
        assert torch.equal(found.deltas, merge.deltas(view.deltas, logits))
        assert common.roi_predictions(boxes) is found, "merged once for all heads"


def test_labels_of_a_view_are_in_the_common_classes() -> None:
    view, common = view_of(two_stage=False)
    labels = common.anchor_labels()
    assert labels.maps[0].tolist() == [[[[-1, 1], [2, 2]]]] and labels.num_classes == 2
    assert labels.mean_positives == 1, "the object of class 2 is background"
    assert labels.mean_centerness == 1.5, "and so it is for FCOS"
    for name in ("gt_instances", "sampled_proposals", "mask_proposals"):
        (found,) = getattr(common, name)
        assert found.gt_classes.tolist() == [1, 2, 0] and len(found.gt_boxes) == 3
        (raw,) = getattr(view, name)
        assert raw.gt_classes.tolist() == [0, 2, 3], "the student's own loss reads these"


def test_view_of_a_student_answers_each_of_several_teachers_in_their_common_classes() -> None:
    view, groups = View(two_stage=True), ([[1, 3], [0]], [[2], [4]])
    ours = [CommonClassesView(view, merge, merge) for merge in map(merge_of, groups)]
    for boxes, logits in ((None, view.logits), (["boxes"], -view.logits)):
        for common, chosen in zip(ours, groups):
            expected = merge_of(chosen).softmax(logits)
            assert torch.equal(common.roi_predictions(boxes).logits, expected)
    assert [x.gt_instances[0].gt_classes.tolist() for x in ours] == [[1, 2, 0], [2, 0, 2]]


def test_labels_of_a_teacher_s_view_are_told_in_the_student_s_classes() -> None:
    # The data is the student's: its class 3 is a common class, whatever the teacher's 3 is.
    teacher, student = merge_of([[0], [1]], num_classes=2), merge_of([[1, 3], [0]])
    found = CommonClassesView(View(two_stage=True), teacher, student).gt_instances
    assert found[0].gt_classes.tolist() == [1, 2, 0]


def test_everything_else_is_the_view_s_own() -> None:
    view, common = view_of(two_stage=False)
    assert common.features is view.features and common.num_anchors == 2
    assert common.num_classes == 2
    assert common.dense() is common.dense() and view.asked == ["dense"]
    with pytest.raises(AttributeError, match="nonsense"):
        common.nonsense


def test_view_can_be_copied() -> None:
    _, common = view_of(two_stage=False)
    for copied in (copy.copy(common), copy.deepcopy(common)):
        assert torch.equal(copied.dense().logits[0], common.dense().logits[0])
        assert copied.num_classes == 2 and copied.num_anchors == 2

"""A view whose class logits are those of the classes that student and teacher share."""

from dataclasses import replace
from typing import Any, Callable, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.structures import Boxes, Instances

from .anchor_labels import AnchorLabels
from .base import DetectorView
from .predictions import DensePredictions, RoIPredictions
from .towers import Towers
from .wrapped import WrappedView


class MergeClasses(nn.Module):
    """
    Maps the K classes of one detector to the C groups of them that it shares with another.

    Sigmoids score each class by itself: a group is as likely as its likeliest class, and the
    classes in no group are left out. A softmax is one distribution over all classes: a group has
    the sum of its probabilities, and background that of everything in no group. (So "background"
    is "none of the common classes" for both detectors, as in https://arxiv.org/abs/2002.00718.)
    """

    def __init__(self, groups: Sequence[Sequence[int]], num_classes: int):
        """
        Args:
            groups: C groups of class indices, no index twice
            num_classes: K
        """
        super().__init__()
        size = max(map(len, groups))
        filled = [[*group, *group[:1] * (size - len(group))] for group in groups]
        filler = [[i >= len(group) for i in range(size)] for group in groups]
        rest = set(range(num_classes + 1)).difference(*groups)
        labels = torch.full((num_classes + 1,), len(groups))
        for i, group in enumerate(groups):
            labels[list(group)] = i
        self._keep("groups", torch.tensor(filled))  # (C, size), the first again where fewer
        self._keep("filler", torch.tensor(filler))  # (C, size)
        self._keep("rest", torch.tensor(sorted(rest)))  # classes in no group, and background
        self._keep("new_labels", labels)  # (K+1,)

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def num_classes(self) -> int:
        """C"""
        return len(self.groups)

    def sigmoids(self, logits: Tensor) -> Tensor:
        """(N, A*K, H, W) -> (N, A*C, H, W), or (R, K) -> (R, C)"""
        by_class = logits.unflatten(1, (-1, len(self.new_labels) - 1))
        of_groups = by_class.index_select(2, self.groups.flatten())
        of_groups = of_groups.unflatten(2, self.groups.shape)  # (N, A, C, size, H, W)
        # Most often each has one class: nothing to compare, nor to remember for the backward.
        merged = of_groups.squeeze(3) if of_groups.shape[3] == 1 else of_groups.amax(dim=3)
        return merged.flatten(1, 2)

    def softmax(self, logits: Tensor) -> Tensor:
        """(R, K+1) -> (R, C+1), background last, float32; log-probabilities up to a constant."""
        logits = logits.float()
        merged = self._of_groups(logits).logsumexp(dim=2)
        background = logits[:, self.rest].logsumexp(dim=1, keepdim=True)
        return torch.cat([merged, background], dim=1)

    def deltas(self, deltas: Tensor, logits: Tensor) -> Tensor:
        """
        (R, K*4) -> (R, C*4): the mean over the classes of a group, weighted by how likely they are.

        Args:
            logits: (R, K+1), or (R, K) log-probabilities of a sigmoid each; they get no gradient
        """
        if deltas.shape[1] == 4 < 4 * (len(self.new_labels) - 1):  # class-agnostic
            return deltas
        share = self._of_groups(logits.detach().float()).softmax(dim=2)[..., None]
        by_class = deltas.unflatten(1, (-1, 4))
        return (by_class[:, self.groups] * share).sum(dim=2).flatten(1)

    def labels(self, classes: Tensor) -> Tensor:
        """0 to K, where K is background, to 0 to C; negative ones are left as they are."""
        return torch.where(classes < 0, classes, self.new_labels[classes.clamp(min=0)])

    def _of_groups(self, logits: Tensor) -> Tensor:
        """(R, K+1) -> (R, C, size), -inf where a group has fewer."""
        return logits[:, self.groups].masked_fill(self.filler, -torch.inf)


class CommonClassesView(WrappedView):
    """
    A DetectorView with C common classes in place of its K: class logits, boxes and masks that
    depend on the class, and labels, in which C is background or a class that only the student has.
    Everything else is the view's own.
    """

    def __init__(self, view: DetectorView, merge: MergeClasses, merge_labels: MergeClasses):
        """
        Args:
            merge: from the detector's classes
            merge_labels: from the student's, which are those of the data, also for a teacher
        """
        super().__init__(view)
        self._merge = merge
        self._merge_labels = merge_labels

    @property
    def num_classes(self) -> int:
        return self._merge.num_classes

    def dense(self) -> DensePredictions:
        return self._once("dense", lambda: self._merged(self._view.dense()))

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        return self._merged(self._view.predict_from(depth, towers))

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        answer = self._view.roi_predictions(boxes)
        if boxes is None:
            return self._once("roi_predictions", lambda: self._merged_rois(answer))
        question = "common roi_predictions", self._merge
        return self._view._of_boxes(question, boxes, lambda: self._merged_rois(answer))

    def mask_logits(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        logits = self._view.mask_logits(boxes)
        if logits.shape[1] == 1 < len(self._merge.new_labels) - 1:  # class-agnostic
            return logits
        return self._merge.sigmoids(logits)

    @property
    def mask_proposals(self) -> List[Instances]:
        return self._relabelled("mask_proposals")

    def anchor_labels(self) -> AnchorLabels:
        return self._once("anchor_labels", self._anchor_labels)

    @property
    def sampled_proposals(self) -> List[Instances]:
        return self._relabelled("sampled_proposals")

    @property
    def gt_instances(self) -> List[Instances]:
        return self._relabelled("gt_instances")

    def _once(self, question: str, compute: Callable[[], Any]) -> Any:
        """A student's view may be in common classes with several teachers."""
        return self._view._once((f"common {question}", self._merge), compute)

    def _merged(self, dense: DensePredictions) -> DensePredictions:
        if self._view.two_stage:  # an RPN has no classes
            return dense
        merge = self._merge  # not this view, which the maps that nobody reads would keep
        return dense.map(lambda _, x: merge.sigmoids(x), ("logits",))

    def _merged_rois(self, answer: RoIPredictions) -> RoIPredictions:
        if answer.activation == "sigmoid":
            logits = self._merge.sigmoids(answer.logits)
            deltas = self._merge.deltas(answer.deltas, F.logsigmoid(answer.logits.float()))
        else:
            logits = self._merge.softmax(answer.logits)
            deltas = self._merge.deltas(answer.deltas, answer.logits)
        return replace(answer, logits=logits, deltas=deltas)

    def _anchor_labels(self) -> AnchorLabels:
        labels = self._view.anchor_labels()
        maps = [self._merge_labels.labels(x) for x in labels.maps]
        return replace(labels, maps=maps, num_classes=self._merge.num_classes)

    def _relabelled(self, name: str) -> List[Instances]:
        return self._once(name, lambda: self._relabel(getattr(self._view, name)))

    def _relabel(self, instances: List[Instances]) -> List[Instances]:
        labels = [self._merge_labels.labels(x.gt_classes) for x in instances]
        return [
            Instances(x.image_size, **{**x.get_fields(), "gt_classes": y})
            for x, y in zip(instances, labels)
        ]

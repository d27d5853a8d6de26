"""Faster, Mask and Cascade R-CNN: an RPN, then a head on each region."""

from dataclasses import replace
from typing import Any, FrozenSet, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances

from .anchors import cell_anchors
from .base import DETECTOR_VIEW_REGISTRY, DetectorView
from .info import DetectorInfo
from .parts import DensePredictions, RoIPredictions, unaliased
from .region_sampler import RegionSampler
from .regions import Regions


class RCNNView(DetectorView):
    """A view of GeneralizedRCNN: Faster, Mask, Keypoint and Cascade R-CNN with an FPN."""

    members = frozenset(
        {"features", "dense", "roi_features", "regions", "region_vectors", "roi_predictions"}
    )

    @classmethod
    def members_of(cls, detector: nn.Module) -> FrozenSet[str]:
        # A C4 model pools from one level and has no separate box head to ask.
        has_box_head = hasattr(detector.roi_heads, "box_pooler")
        members = cls.members if has_box_head else frozenset({"features", "dense"})
        if has_box_head and not hasattr(_predictor(detector), "cls_score"):
            members = members - {"region_vectors"}
        # MODEL.PROPOSAL_GENERATOR.NAME "PrecomputedProposals" has no RPN to ask.
        return members - {"dense"} if detector.proposal_generator is None else members

    two_stage = True

    @classmethod
    def info(cls, detector: nn.Module) -> DetectorInfo:
        info = super().info(detector)
        if "dense" in info.provides:
            rpn = detector.proposal_generator
            anchors = cell_anchors(rpn.anchor_generator, rpn.in_features)
            info = replace(info, dense_levels=tuple(rpn.in_features), anchors=anchors)
        if "roi_predictions" not in info.provides:
            return info
        predictor, has_vectors = _predictor(detector), "region_vectors" in info.provides
        return replace(
            info,
            vector_channels=predictor.cls_score.in_features if has_vectors else 0,
            roi_size=detector.roi_heads.box_pooler.output_size[0],
            box_weights=tuple(predictor.box2box_transform.weights),
            class_activation=class_activation(predictor),
        )

    @staticmethod
    def num_classes(detector: nn.Module) -> int:
        return detector.roi_heads.num_classes

    @staticmethod
    def num_anchors(detector: nn.Module) -> int:
        rpn = detector.proposal_generator
        return 0 if rpn is None else rpn.rpn_head.objectness_logits.out_channels

    @property
    def sampled_boxes(self) -> List[Boxes]:
        """The boxes that the student's box head was trained on in this batch, one per image."""
        return self.regions().boxes

    @property
    def sampled_proposals(self) -> List[Instances]:
        """
        The student's sampled proposals with their `gt_classes` (K is background).

        Their boxes may have been refined since (TRAIN_ON_PRED_BOXES): take `sampled_boxes`.
        """
        return self._part("sampled_proposals")

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        if boxes is None:
            return self._part("roi_predictions")
        return self._of_boxes("roi_predictions", boxes, lambda: self._roi_predictions(boxes))

    def regions(self, sampler: Optional[RegionSampler] = None) -> Regions:
        """
        The sampled proposals, ground truth among them where Detectron2 appends it.

        Args:
            sampler: not read, they are sampled already
        """
        return self._part("regions")

    def region_vectors(self, regions: Regions) -> Tensor:
        predictions = self.roi_predictions(None if self._is_student else regions.boxes)
        return predictions.feature.flatten(1)  # without FC layers it is a map

    def _roi_features(self, boxes: List[Boxes], levels: str) -> Tensor:
        regions = self._recorded.get("regions")
        if levels == "assigned" and regions is not None and boxes is regions.boxes:
            return self._part("own_roi_features")  # the student's box head has pooled them
        return super()._roi_features(boxes, levels)

    def _roi_predictions(self, boxes: List[Boxes]) -> RoIPredictions:
        feature = self._box_head(self.roi_features(boxes))
        return self._read(feature, *self._predictor(feature))

    def _read(self, feature: Tensor, logits: Tensor, deltas: Tensor) -> RoIPredictions:
        activation = class_activation(self._predictor)
        # The column of background is what its initialisation made it: no head shall see it.
        logits = logits[:, :-1] if activation == "sigmoid" else logits
        return RoIPredictions(feature, logits, deltas, activation)

    def _add_hooks(self, members: FrozenSet[str]) -> List[Any]:
        handles = super()._add_hooks(members)
        if members & {"regions", "region_vectors", "roi_predictions"}:
            roi_heads = self.detector.roi_heads
            handles += [
                roi_heads.box_pooler.register_forward_hook(self._on_pooler),
                self._predictor.register_forward_hook(self._on_predictor),
                roi_heads.register_forward_hook(self._on_roi_heads),
            ]
        return handles

    def _on_pooler(self, module: nn.Module, inputs: Tuple[Any, ...], output: Tensor) -> None:
        boxes = [Boxes(x.tensor.detach().clone()) for x in inputs[1]]
        self._keep("regions", Regions(boxes), [])
        self._keep("own_roi_features", output, [output])

    def _on_predictor(self, module: nn.Module, inputs: Tuple[Tensor], output: Any) -> None:
        predictions = self._read(inputs[0], *output)
        self._keep("roi_predictions", predictions, [inputs[0], *output])

    def _on_roi_heads(self, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        self._keep("sampled_proposals", output[0], [])

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        rpn = self.detector.proposal_generator
        return rpn.rpn_head.conv, rpn.rpn_head, list(rpn.in_features)

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        return DensePredictions(
            levels=self._dense_head()[-1],
            logits=unaliased(output[0], num_classes=1),
            deltas=list(output[1]),
            # Detectron2 0.5 applies the ReLU outside the hooked layer; twice is the same as once.
            tower=[x.relu() for x in tower],
        )

    @property
    def _box_head(self) -> nn.Module:
        return _first_stage(self.detector.roi_heads.box_head)

    @property
    def _predictor(self) -> nn.Module:
        return _predictor(self.detector)

    def pooled_levels(self) -> Sequence[str]:
        return list(self.detector.roi_heads.box_in_features)

    def pooler(self) -> ROIPooler:
        return self.detector.roi_heads.box_pooler


def _predictor(detector: nn.Module) -> nn.Module:
    return _first_stage(detector.roi_heads.box_predictor)


def class_activation(predictor: nn.Module) -> str:
    """How a box predictor's class logits become probabilities: "softmax" or "sigmoid"."""
    return "sigmoid" if getattr(predictor, "use_sigmoid_ce", False) else "softmax"


def _first_stage(module: nn.Module) -> nn.Module:
    return module[0] if isinstance(module, nn.ModuleList) else module


DETECTOR_VIEW_REGISTRY._do_register("GeneralizedRCNN", RCNNView)

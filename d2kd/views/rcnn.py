"""Faster, Mask and Cascade R-CNN: an RPN, then a head on each region."""

from dataclasses import replace
from typing import Any, Callable, FrozenSet, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances

from .anchors import cell_anchors
from .base import DetectorView
from .build import DETECTOR_VIEW_REGISTRY
from .detector_info import DetectorInfo
from .layout import unaliased
from .predictions import DensePredictions, RoIPredictions
from .recording import Listener
from .region_sampler import RegionSampler
from .regions import Regions
from .roi_align import pool_assigned


class RCNNView(DetectorView):
    """A view of GeneralizedRCNN: Faster, Mask, Keypoint and Cascade R-CNN with an FPN."""

    two_stage = True

    @property
    def provides(self) -> FrozenSet[str]:
        words = {"features", "dense"}
        # A C4 model pools from one level and has no separate box head to ask.
        if hasattr(self.detector.roi_heads, "box_pooler"):
            words |= {"roi_features", "regions", "roi_predictions"}
            words |= {"region_vectors"} if hasattr(self._predictor, "cls_score") else set()
            words |= {"mask_features"} if self._mask_head is not None else set()
            words |= {"mask_logits"} if hasattr(self._mask_head, "layers") else set()
        # MODEL.PROPOSAL_GENERATOR.NAME "PrecomputedProposals" has no RPN to ask.
        return frozenset(words - {"dense"} if self._rpn is None else words)

    @property
    def num_classes(self) -> int:
        return self.detector.roi_heads.num_classes

    @property
    def num_anchors(self) -> int:
        return 0 if self._rpn is None else self._rpn.rpn_head.objectness_logits.out_channels

    @property
    def info(self) -> DetectorInfo:
        info = super().info
        if "dense" in info.provides:
            anchors = cell_anchors(self._rpn.anchor_generator, self._rpn.in_features)
            info = replace(info, dense_levels=tuple(self._rpn.in_features), anchors=anchors)
        if "mask_features" in info.provides:
            info = replace(info, mask_size=self.detector.roi_heads.mask_pooler.output_size[0])
        if "roi_predictions" not in info.provides:
            return info
        predictor, has_vectors = self._predictor, "region_vectors" in info.provides
        return replace(
            info,
            vector_channels=predictor.cls_score.in_features if has_vectors else 0,
            roi_size=self.pooler.output_size[0],
            box_weights=tuple(predictor.box2box_transform.weights),
            class_activation=class_activation(predictor),
        )

    @property
    def pooled_levels(self) -> Sequence[str]:
        self._check("roi_features")
        return list(self.detector.roi_heads.box_in_features)

    @property
    def pooler(self) -> ROIPooler:
        self._check("roi_features")
        return self.detector.roi_heads.box_pooler

    @property
    def sampled_proposals(self) -> List[Instances]:
        self._check("roi_predictions")
        return self._part("sampled_proposals")

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        return self._own_or_of("roi_predictions", boxes, self._roi_predictions)

    @property
    def mask_proposals(self) -> List[Instances]:
        self._check("mask_features")
        return self._part("mask_proposals")

    def mask_features(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        return self._own_or_of("mask_features", boxes, self._mask_features)

    def mask_logits(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        return self._own_or_of("mask_logits", boxes, self._mask_logits)

    def regions(self, sampler: RegionSampler = RegionSampler()) -> Regions:
        self._check("regions")
        return self._part("regions")

    def region_vectors(self, regions: Regions) -> Tensor:
        self._check("region_vectors")
        predictions = self.roi_predictions(None if self._is_student else regions.boxes)
        return predictions.feature.flatten(1)  # without FC layers it is a map

    def _own_or_of(
        self, word: str, boxes: Optional[List[Boxes]], compute: Callable[[List[Boxes]], Any]
    ) -> Any:
        """Of given boxes; None: from a student's own training pass."""
        self._check(word)
        if boxes is None:
            return self._part(word)
        return self._of_boxes(word, boxes, lambda: compute(boxes))

    def _roi_features(self, boxes: List[Boxes]) -> Tensor:
        regions = self._recorded.get("regions")
        if regions is not None and boxes is regions.boxes:
            return self._part("own_roi_features")  # the student's box head has pooled them
        return super()._roi_features(boxes)

    def _roi_predictions(self, boxes: List[Boxes]) -> RoIPredictions:
        feature = self._box_head(self.roi_features(boxes))
        return self._read(feature, *self._predictor(feature))

    def _mask_logits(self, boxes: List[Boxes]) -> Tensor:
        return self._mask_head.layers(self.mask_features(boxes))

    def _mask_features(self, boxes: List[Boxes]) -> Tensor:
        if "mask_features" in self._recorded and boxes is self.mask_regions.boxes:
            return self._part("mask_features")  # the student's mask head has pooled them
        roi_heads = self.detector.roi_heads
        features = [self.features[k] for k in roi_heads.mask_in_features]
        return pool_assigned(roi_heads.mask_pooler, features, boxes)

    def _read(self, feature: Tensor, logits: Tensor, deltas: Tensor) -> RoIPredictions:
        activation = class_activation(self._predictor)
        # The column of background is still as initialised: no head shall see it.
        logits = logits[:, :-1] if activation == "sigmoid" else logits
        return RoIPredictions(feature, logits, deltas, activation)

    def _add_hooks(self, requires: FrozenSet[str]) -> List[Any]:
        handles = super()._add_hooks(requires)
        if requires & {"regions", "region_vectors", "roi_predictions"}:
            roi_heads = self.detector.roi_heads
            handles += [
                roi_heads.box_pooler.register_forward_hook(self._on_pooler),
                self._predictor.register_forward_hook(self._on_predictor),
                roi_heads.register_forward_hook(self._on_roi_heads),
            ]
        if requires & {"mask_features", "mask_logits"}:
            handles.append(self._mask_head.register_forward_pre_hook(self._on_mask_head))
        if "mask_logits" in requires:
            handles.append(Listener(self._mask_head, "layers", self._on_mask_logits))
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

    def _on_mask_head(self, module: nn.Module, inputs: Tuple[Any, ...]) -> None:
        proposals = [
            Instances(
                x.image_size,
                proposal_boxes=Boxes(x.proposal_boxes.tensor.detach().clone()),
                gt_classes=x.gt_classes,
            )
            for x in inputs[1]
        ]
        self._keep("mask_proposals", proposals, [])
        self._keep("mask_features", inputs[0], [inputs[0]])

    def _on_mask_logits(self, logits: Tensor) -> None:
        self._keep("mask_logits", logits, [logits])

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        rpn_head = self._rpn.rpn_head
        return rpn_head.conv, rpn_head, list(self._rpn.in_features)

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        return DensePredictions(
            levels=self._dense_head()[-1],
            logits=unaliased(output[0], num_classes=1),
            deltas=list(output[1]),
            # Detectron2 0.5 applies the ReLU outside the hooked layer; twice is the same as once.
            tower=[x.relu() for x in tower],
        )

    def _box_coding(self) -> Tuple[nn.Module, Any]:
        return self._rpn.anchor_generator, self._rpn.box2box_transform

    @property
    def _rpn(self) -> Optional[nn.Module]:
        return self.detector.proposal_generator

    @property
    def _mask_head(self) -> Optional[nn.Module]:
        """None without masks, or where masks are pooled with the boxes' features."""
        roi_heads = self.detector.roi_heads
        has_own = getattr(roi_heads, "mask_on", False) and roi_heads.mask_pooler is not None
        return roi_heads.mask_head if has_own else None

    @property
    def _box_head(self) -> nn.Module:
        return _first_stage(self.detector.roi_heads.box_head)

    @property
    def _predictor(self) -> nn.Module:
        return _first_stage(self.detector.roi_heads.box_predictor)


def class_activation(predictor: nn.Module) -> str:
    """How a box predictor's class logits become probabilities: "softmax" or "sigmoid"."""
    return "sigmoid" if getattr(predictor, "use_sigmoid_ce", False) else "softmax"


def _first_stage(module: nn.Module) -> nn.Module:
    return module[0] if isinstance(module, nn.ModuleList) else module


DETECTOR_VIEW_REGISTRY._do_register("GeneralizedRCNN", RCNNView)

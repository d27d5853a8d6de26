"""What a distillation head may see of a detector, one batch at a time."""

from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from fvcore.common.registry import Registry
from torch import Tensor, nn

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances

from .info import DetectorInfo
from .parts import (
    DensePredictions,
    RoIPredictions,
    cells_inside,
    multi_level_pooler,
    roi_align_levels,
)
from .recording import Recording
from .region_sampler import RegionSampler
from .regions import Regions

DETECTOR_VIEW_REGISTRY = Registry("DETECTOR_VIEW")
DETECTOR_VIEW_REGISTRY.__doc__ = """
Registry of views: how d2kd reads a detector of one family.

A view is registered under the class name of a meta-architecture and serves its subclasses too. It
is called as `View(detector, batched_inputs, reads)` and subclasses :class:`DetectorView`.
"""


def find_view(detector: nn.Module, role: str) -> Callable[..., "DetectorView"]:
    """
    Args:
        detector: a student or a teacher
        role: "student" or "teacher", for the error

    Raises:
        ValueError: no view is registered for the detector's class or a parent of it
    """
    for cls in type(detector).__mro__:
        if cls.__name__ in DETECTOR_VIEW_REGISTRY:
            return DETECTOR_VIEW_REGISTRY.get(cls.__name__)
    known = ", ".join(sorted(name for name, _ in DETECTOR_VIEW_REGISTRY))
    raise ValueError(
        f"The {role}'s meta-architecture {type(detector).__name__} has no DetectorView. Known: "
        f"{known}. Register one with @DETECTOR_VIEW_REGISTRY (d2kd/views shows how)."
    )


class DetectorView(Recording):
    """
    One detector and one batch. Each part is computed at most once, and only when asked for.

    A student's view is filled by its own training forward, inside :meth:`record`. A teacher's view
    computes what it is asked for, without gradients.

    Attributes:
        detector: the detector itself
        batched_inputs: the batch as this detector wants it: images in its own channel order
        members: everything a view of this family can give; a head declares what it `requires`
    """

    members: FrozenSet[str] = frozenset({"features"})

    def __init__(
        self,
        detector: nn.Module,
        batched_inputs: List[Dict[str, Any]],
        reads: FrozenSet[str] = frozenset(),
    ):
        """
        Args:
            reads: members that a teacher will be asked for, so that one pass gives all of them
        """
        super().__init__()
        self.detector = detector
        self.batched_inputs = batched_inputs
        self.reads = reads

    # What is known of the detector, whatever the batch -------------------------------------------

    @classmethod
    def members_of(cls, detector: nn.Module) -> FrozenSet[str]:
        """What views of this very detector can give, out of `members` or depending on its depth."""
        return cls.members

    # Whether class logits come from a head on regions, `roi_predictions`, and not from `dense`.
    two_stage = False

    @staticmethod
    def num_classes(detector: nn.Module) -> int:
        """Number of foreground classes."""
        raise NotImplementedError

    @staticmethod
    def num_anchors(detector: nn.Module) -> int:
        """Predictions per cell of `dense`; 0 where a family has none."""
        return 0

    @classmethod
    def info(cls, detector: nn.Module) -> DetectorInfo:
        """All that is known of a detector when a head is built; a family adds its own."""
        return DetectorInfo(
            name=type(detector).__name__,
            shapes=detector.backbone.output_shape(),
            num_classes=cls.num_classes(detector),
            provides=cls.members_of(detector),
            num_anchors=cls.num_anchors(detector),
            two_stage=cls.two_stage,
        )

    # The parts -----------------------------------------------------------------------------------

    @property
    def strides(self) -> Dict[str, int]:
        """Level name to input pixels per cell."""
        return {k: v.stride for k, v in self.detector.backbone.output_shape().items()}

    @property
    def image_sizes(self) -> List[Tuple[int, int]]:
        """(height, width) of each image in pixels, without padding."""
        return [tuple(x["image"].shape[-2:]) for x in self.batched_inputs]

    @property
    def image_size(self) -> Tuple[int, int]:
        """(height, width) of the padded batch in pixels."""
        return self._part("backbone")[0]

    @property
    def features(self) -> Dict[str, Tensor]:
        """Level name to (N, C, Hi, Wi): the output of the backbone with its pyramid."""
        return self._part("backbone")[1]

    def inside_image(self, level: str, like: Optional[Tensor] = None) -> Optional[Tensor]:
        """
        The cells of a level that hold a part of their image, the rest being padding.

        Args:
            like: a map of the level that may have been cropped, (N, C, H, W); None: its features

        Returns:
            boolean (N, 1, H, W); None: all of them do
        """
        like = self.features[level] if like is None else like
        return cells_inside(self.image_sizes, self.strides[level], like)

    @property
    def gt_instances(self) -> List[Instances]:
        """Ground truth of each image, boxes XYXY in input pixels; may be empty."""
        device = next(self.detector.parameters()).device
        return self._once(
            "gt_instances", lambda: [x["instances"].to(device) for x in self.batched_inputs]
        )

    def dense(self) -> DensePredictions:
        """Per-cell predictions; a two-stage detector answers with its RPN."""
        return self._part("dense")

    def roi_features(self, boxes: List[Boxes], levels: str = "assigned") -> Tensor:
        """
        RoIAlign of given boxes.

        Args:
            boxes: one Boxes per image, XYXY in input pixels, R in all
            levels: "assigned": each box on the level that the usual size rule gives it (a box of
                224 pixels belongs to stride 16); "all": each box on every pooled level

        Returns:
            (R, C, S, S), or (R, L, C, S, S) for "all"
        """
        assert levels in ("assigned", "all"), f"levels must be 'assigned' or 'all', got {levels!r}"
        return self._of_boxes(
            f"roi_features, {levels}", boxes, lambda: self._roi_features(boxes, levels)
        )

    def mean_in_boxes(self, maps: Mapping[str, Tensor], boxes: List[Boxes]) -> Tensor:
        """
        Mean of a map over each box, on the level that the usual size rule gives the box.

        Args:
            maps: level name to (N, C, Hi, Wi), for some or all of the levels that RoIAlign uses
            boxes: one Boxes per image, XYXY in input pixels, R in all

        Returns:
            (R, C)

        Raises:
            ValueError: none of those levels, or one is missing between two others
        """
        names = [k for k in self.pooled_levels() if k in maps]
        strides = tuple(self.strides[k] for k in names)
        if not names or strides[-1] != strides[0] * 2 ** (len(names) - 1):
            raise ValueError(
                f"Boxes need maps of neighbouring levels out of {', '.join(self.pooled_levels())},"
                f" got {', '.join(maps)}. Choose others in DISTILL.LEVELS."
            )
        pooler = multi_level_pooler(strides, size=1)
        return pooler([maps[k] for k in names], boxes).flatten(1)

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        """
        The box head's answer for given boxes, one Boxes per image.

        A student answers for the proposals it sampled for its own loss when `boxes` is None, from
        that very pass: nothing is computed twice.
        """
        raise NotImplementedError(f"{type(self).__name__} has no RoI head")

    def regions(self, sampler: RegionSampler) -> Regions:
        """
        The boxes on which a student is compared with its teacher.

        A two-stage student's are the proposals that it sampled for its own loss, a dense one's a
        sample of the boxes that it predicts, drawn once per batch for all heads.
        """
        raise NotImplementedError(f"{type(self).__name__} has no regions")

    def region_vectors(self, regions: Regions) -> Tensor:
        """
        What a detector's classifier reads of each of the student's regions.

        Two-stage: the box head's last vector (a student's from its own training pass); dense: the
        last feature of the classification tower in the cell that predicted the region.

        Returns:
            (R, D)
        """
        raise NotImplementedError(f"{type(self).__name__} has no region vectors")

    # Hooks on a student, and what a teacher computes ---------------------------------------------

    def _add_hooks(self, members: FrozenSet[str]) -> List[Any]:
        handles = [self.detector.backbone.register_forward_hook(self._on_backbone)]
        return handles + (self._hook_dense() if "dense" in members else [])

    def _roi_features(self, boxes: List[Boxes], levels: str) -> Tensor:
        names, pooler = self.pooled_levels(), self.pooler()
        features = [self.features[k] for k in names]
        if levels == "assigned":
            return pooler(features, boxes)
        rois, strides = Regions(boxes).rois, [self.strides[k] for k in names]
        return roi_align_levels(features, strides, rois, pooler.output_size)

    def _hook_dense(self) -> List[Any]:
        """Collect the tower's output, once per level, then the head's predictions."""
        collected: List[Tensor] = []
        tower, head, _ = self._dense_head()

        def on_tower(module: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:
            collected.append(output)

        def on_head(module: nn.Module, inputs: Any, output: Sequence[Any]) -> None:
            predictions = self._dense_predictions(output, list(collected))
            self._keep("dense", predictions, predictions.logits + predictions.deltas)
            collected.clear()

        return [tower.register_forward_hook(on_tower), head.register_forward_hook(on_head)]

    def _on_backbone(self, module: nn.Module, inputs: Tuple[Tensor], output: Dict[str, Tensor]):
        self._keep("backbone", (tuple(inputs[0].shape[-2:]), dict(output)), list(output.values()))

    def _compute_backbone(self) -> Tuple[Tuple[int, int], Dict[str, Tensor]]:
        images = self.detector.preprocess_image(self.batched_inputs)
        return tuple(images.tensor.shape[-2:]), self.detector.backbone(images.tensor)

    def _compute_dense(self) -> DensePredictions:
        handles, (_, head, levels) = self._hook_dense(), self._dense_head()
        try:
            head([self.features[k] for k in levels])
        finally:
            for handle in handles:
                handle.remove()
        return self._recorded["dense"]

    # What a family has to say --------------------------------------------------------------------

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        """The classification tower, the head around it, and the levels that the head reads."""
        raise NotImplementedError

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        """From the output of the head and that of the tower, level by level."""
        raise NotImplementedError

    def pooled_levels(self) -> Sequence[str]:
        """Names of the levels that RoIAlign uses, finest first."""
        raise NotImplementedError

    def pooler(self) -> ROIPooler:
        return multi_level_pooler(tuple(self.strides[k] for k in self.pooled_levels()))

"""The contract of a view: all that a distillation head may ask of a detector."""

from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances

from .anchor_labels import AnchorLabels
from .detector_info import DetectorInfo
from .ground_truth import ground_truth
from .layout import cells_inside, decode_deltas
from .predictions import DensePredictions, RoIPredictions
from .recording import Recording
from .region_sampler import RegionSampler
from .regions import Regions
from .roi_align import mean_in_boxes, multi_level_pooler, pool_assigned
from .towers import Towers


class DetectorView(Recording):
    """
    One detector and one batch. Each part is computed at most once, on demand.

    A student's view is filled by its own training forward, inside :meth:`record`. A teacher's view
    computes what it is asked for, without gradients.

    These are all members, by the word under which a head `requires` and a view `provides` them. To
    ask for one that the detector does not provide is an error; all provide the first two. (N
    images, K classes, A predictions per cell, R boxes; "per level": a list in the order of
    `DensePredictions.levels`.)

    always               detector, batched_inputs, provides, info, two_stage, num_classes (K),
                         num_anchors (A), strides, image_sizes
                         image_size: (height, width) of the padded batch
                         inside_image(level): (N, 1, Hi, Wi), or None
                         detections(): Instances of each image, of a teacher that is a detector
    "features"           features: {level: (N, C, Hi, Wi)}
    "gt_instances"       gt_instances, also of images without labels
    "dense"              dense(): per level logits (N, A*K, Hi, Wi), deltas (N, A*4, Hi, Wi) and the
                         output of the classification tower (N, C, Hi, Wi)
                         boxes(deltas): per level (N, A*4, Hi, Wi)
    "tower_<depth>"      towers(depth): per level (N, C, Hi, Wi), for classes and for boxes
                         predict_from(depth, towers): as dense()
    "anchor_labels"      anchor_labels(): per level (N, A, Hi, Wi), of a student
    "roi_features"       roi_features(boxes): (R, C, S, S)
    "roi_predictions"    roi_predictions(boxes): feature (R, D), logits (R, K+1), deltas (R, K*4)
                         sampled_proposals: Instances of each image, of a student
    either of these two  pooled_levels, pooler, mean_in_boxes(maps, boxes): (R, C)
    "mask_logits"        mask_logits(boxes): (R, K, M, M), or (R, 1, M, M) of all classes alike
    "mask_features"      mask_features(boxes): (R, C, S, S), what the mask head reads
    either of these two  mask_proposals: Instances of each image, of a student
                         mask_regions: R boxes of a student, those of mask_proposals
    "regions"            regions(sampler): R boxes of a student
    "region_vectors"     region_vectors(regions): (R, D)

    Attributes:
        detector: the detector itself
        batched_inputs: the batch as this detector wants it: images in its own channel order
        provides: words of the list above, a class attribute or a property
        two_stage: whether classes come from a head on regions, `roi_predictions`, not from `dense`
    """

    provides: FrozenSet[str] = frozenset({"features"})
    two_stage = False

    # Facts of the detector, whatever the batch ---------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        raise NotImplementedError(f"{type(self).__name__} does not define num_classes")

    @property
    def num_anchors(self) -> int:
        """Predictions per cell of `dense`; 0 where a family has none."""
        return 0

    @property
    def info(self) -> DetectorInfo:
        """All that is known of the detector when a head is built; a family adds its own."""
        return DetectorInfo(
            name=type(self.detector).__name__,
            shapes=self.detector.backbone.output_shape(),
            num_classes=self.num_classes,
            provides=self.provides,
            num_anchors=self.num_anchors,
            two_stage=self.two_stage,
        )

    @property
    def strides(self) -> Dict[str, int]:
        """Level name to input pixels per cell."""
        return {k: v.stride for k, v in self.detector.backbone.output_shape().items()}

    @property
    def pooled_levels(self) -> Sequence[str]:
        """Names of the levels that RoIAlign uses, finest first."""
        raise self._missing("roi_features")

    @property
    def pooler(self) -> ROIPooler:
        """The detector's RoIAlign of `pooled_levels`, with the rule that assigns boxes to them."""
        return multi_level_pooler(tuple(self.strides[k] for k in self.pooled_levels))

    # The batch -----------------------------------------------------------------------------------

    @property
    def image_sizes(self) -> List[Tuple[int, int]]:
        """(height, width) of each image in pixels, without padding."""
        return [tuple(x["image"].shape[-2:]) for x in self.batched_inputs]

    @property
    def image_size(self) -> Tuple[int, int]:
        """(height, width) of the padded batch in pixels."""
        return self._part("backbone")[0]

    @property
    def gt_instances(self) -> List[Instances]:
        """
        Ground truth of each image, boxes XYXY in input pixels; may be empty. Of an image without
        labels, what the teacher detects (DISTILL.UNLABELLED.BOX_SCORE).
        """
        device = next(self.detector.parameters()).device
        return self._once("gt_instances", lambda: ground_truth(self.batched_inputs, device))

    @property
    def features(self) -> Mapping[str, Tensor]:
        """
        Level name to (N, C, Hi, Wi): the output of the backbone with its pyramid. A teacher's level
        is computed when it is first read.
        """
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
        return self._once(
            ("inside_image", level, like.shape[-2:]),
            lambda: cells_inside(self.image_sizes, self.strides[level], like),
        )

    # Cells ---------------------------------------------------------------------------------------

    def dense(self) -> DensePredictions:
        """Predictions of every cell; those of a two-stage detector are its RPN's."""
        self._check("dense")
        return self._part("dense")

    def boxes(self, deltas: Sequence[Tensor]) -> List[Tensor]:
        """
        Decode box deltas of all levels of `dense`.

        Args:
            deltas: per level (N, A*4, Hi, Wi)

        Returns:
            XYXY in input pixels, of the same shape, float32 also under AMP
        """
        self._check("dense")
        generator, transform = self._box_coding()
        sizes = tuple(x.shape[-2:] for x in deltas)
        anchors = self._once(("anchors", sizes), lambda: generator(list(deltas)))
        return decode_deltas(deltas, [x.tensor for x in anchors], transform)

    def towers(self, depth: int) -> Towers:
        """
        The towers of a dense detector's head after `depth` convolutions, before the activation.

        A teacher's head is run once more if its `requires` does not name the depth.
        """
        raise self._missing(f"tower_{depth}")

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        """
        Predictions by the rest of this detector's head, given another's towers after `depth`
        convolutions, with gradient. `tower` of the answer is empty.
        """
        raise self._missing(f"tower_{depth}")

    def anchor_labels(self) -> AnchorLabels:
        """Labels that a dense student's own loss assigned to its anchors; a teacher has none."""
        raise self._missing("anchor_labels")

    # Boxes ---------------------------------------------------------------------------------------

    def roi_features(self, boxes: List[Boxes]) -> Tensor:
        """
        RoIAlign of given boxes, each on the level that the usual size rule gives it: a box of 224
        pixels belongs to stride 16.

        Args:
            boxes: one Boxes per image, XYXY in input pixels, R in all

        Returns:
            (R, C, S, S)
        """
        self._check("roi_features")
        return self._of_boxes("roi_features", boxes, lambda: self._roi_features(boxes))

    def mean_in_boxes(self, maps: Mapping[str, Tensor], boxes: List[Boxes]) -> Tensor:
        """
        Mean of a map over each box, on the level that the usual size rule gives the box.

        Args:
            maps: level name to (N, C, Hi, Wi), for some or all of `pooled_levels`
            boxes: one Boxes per image, XYXY in input pixels, R in all

        Returns:
            (R, C)

        Raises:
            ValueError: none of those levels, or one is missing between two others
        """
        return mean_in_boxes(maps, boxes, self.pooled_levels, self.strides)

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        """
        Predictions of the box head for given boxes, one Boxes per image.

        A student answers for the proposals it sampled for its own loss when `boxes` is None, from
        that very pass: nothing is computed twice.
        """
        raise self._missing("roi_predictions")

    @property
    def sampled_proposals(self) -> List[Instances]:
        """
        A two-stage student's sampled proposals with their `gt_classes` (K is background).

        Their boxes may have been refined since (TRAIN_ON_PRED_BOXES): take those of `regions`.
        """
        raise self._missing("roi_predictions")

    def mask_logits(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        """
        Logits of the mask head, over the M x M cells of each box.

        Args:
            boxes: one Boxes per image, XYXY in input pixels, R in all; None: the student's
                `mask_proposals`, from its own training pass

        Returns:
            (R, K, M, M), or (R, 1, M, M) of a class-agnostic mask head
        """
        raise self._missing("mask_logits")

    def mask_features(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        """
        RoI features as the mask head reads them, of its own size and levels.

        Args:
            boxes: one Boxes per image, XYXY in input pixels, R in all; None: the student's
                `mask_proposals`, from its own training pass

        Returns:
            (R, C, S, S)
        """
        raise self._missing("mask_features")

    @property
    def mask_proposals(self) -> List[Instances]:
        """The proposals of objects on which a student trains its masks: boxes and `gt_classes`."""
        raise self._missing("mask_features")

    @property
    def mask_regions(self) -> Regions:
        """The boxes of `mask_proposals`."""
        return self._once(
            "mask_regions", lambda: Regions([x.proposal_boxes for x in self.mask_proposals])
        )

    def regions(self, sampler: RegionSampler = RegionSampler()) -> Regions:
        """
        The boxes on which a student is compared with its teacher.

        A two-stage student's are the proposals that it sampled for its own loss, ground truth among
        them where Detectron2 appends it; the sampler is not read. A dense student's are a sample of
        the boxes that it predicts, drawn once per batch for all heads with an equal sampler.
        """
        raise self._missing("regions")

    def region_vectors(self, regions: Regions) -> Tensor:
        """
        What a detector's classifier reads of each of the student's regions.

        Two-stage: the box head's last vector (a student's from its own training pass); dense: the
        last feature of the classification tower in the cell that predicted the region.

        Returns:
            (R, D)
        """
        raise self._missing("region_vectors")

    # For families --------------------------------------------------------------------------------

    def _check(self, word: str) -> None:
        if word not in self.provides:
            raise self._missing(word)

    def _missing(self, word: str) -> NotImplementedError:
        kind, provided = type(self).__name__, ", ".join(sorted(self.provides))
        return NotImplementedError(
            f"{kind} of {type(self.detector).__name__} does not provide {word!r}, only {provided}. "
            "A head that declares what it reads in `requires` is refused when the model is built."
        )

    def _box_coding(self) -> Tuple[nn.Module, Any]:
        """The anchor generator and the box2box_transform of `dense`."""
        raise self._missing("dense")

    def _roi_features(self, boxes: List[Boxes]) -> Tensor:
        return pool_assigned(self.pooler, [self.features[k] for k in self.pooled_levels], boxes)

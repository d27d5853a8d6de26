from typing import Dict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm

from ..layers import PerAnchorLinear, gather_rows, unit_vectors
from ..pairing.pair import ANY_PAIR, DistillPair
from ..utils.checks import MAX_CHANNELS, check_choice, check_range, check_temperature
from ..views import DetectorView, Regions, RegionSampler
from .build import DISTILL_HEAD_REGISTRY

PROJECTIONS = ("student", "shared")


@DISTILL_HEAD_REGISTRY.register()
class CKDHead(nn.Module):
    """
    Contrastive Knowledge Distillation of G-DetKD, https://arxiv.org/abs/2108.07482 (RECONSTRUCTED,
    see SGFIHead): of all regions' teacher vectors, a student's vector is to be most like that of
    its own region (InfoNCE). The other regions are those of the batch, of the other processes and
    of a queue of past batches.

    Shapes: R regions; M regions of all processes; Q keys in the queue; Cs, Ct length of the
    vectors; D of what is compared: Ct, or that of the shared projection.
    """

    # The proposals of a two-stage student come from no cell of a dense teacher.
    pairs = ANY_PAIR - {"dense -> two-stage"}
    requires = frozenset({"regions", "region_vectors"})

    @configurable
    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        num_anchors: int,
        sampler: RegionSampler,
        temperature: float = 0.07,
        iou_threshold: float = 0.5,
        queue_size: int = 81920,
        shared_channels: int = 0,
    ):
        """
        Args:
            student_channels, teacher_channels: length of the region vectors
            num_anchors: of a dense student; each has a projection of its own
            sampler: which of a dense student's boxes are its regions
            temperature: divides cosines, > 0
            iou_threshold: boxes of one image that overlap by more are no negatives of each other
            queue_size: keys of past batches, 0 or more
            shared_channels: of a projection of student and teacher after the student's own; 0: none
        """
        super().__init__()
        self.sampler = sampler
        self.temperature = temperature
        self.iou_threshold = iou_threshold
        self.projection = PerAnchorLinear(student_channels, teacher_channels, num_anchors)
        self.shared = (
            nn.Linear(teacher_channels, shared_channels, bias=False) if shared_channels else None
        )
        self.queue_size = queue_size
        # (Q, D), newest first. Saved as extra state, since Q grows until the queue is full.
        queue = torch.zeros(0, shared_channels or teacher_channels)
        self.register_buffer("queue", queue, persistent=False)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # lambda_ckd
        node.LOSS_WEIGHT = 0.5
        # gamma
        node.TEMPERATURE = 0.07
        # Keys of the same image whose boxes overlap by more than this IoU are no negatives
        node.IOU_THRESHOLD = 0.5
        # Keys of past batches, of all processes together. Per key, 2 x Ct multiply-adds for each
        # region in forward and backward, and 4 x Ct bytes in memory and in every checkpoint: 335 MB
        # for these and the 1024 numbers of a Faster R-CNN. The logits of 1024 regions take as much
        # again, and their gradient
        node.QUEUE_SIZE = 81920
        # f_theta. "student": the student's vectors are projected to the teacher's length, the
        # teacher's are taken as they are. "shared": and then both by one projection
        node.PROJECTION = "student"
        # Length of the vectors after the shared projection
        node.SHARED_CHANNELS = 128

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node, student, teacher = cfg.DISTILL.CKD, pair.student, pair.teacher
        check_choice("DISTILL.CKD.PROJECTION", node.PROJECTION, PROJECTIONS)
        check_temperature("DISTILL.CKD.TEMPERATURE", node.TEMPERATURE)
        if not 0 < node.IOU_THRESHOLD <= 1:
            raise ValueError(
                f"DISTILL.CKD.IOU_THRESHOLD must be in (0, 1], got {node.IOU_THRESHOLD}."
            )
        why = f"a key is 4 x {teacher.vector_channels} bytes"
        check_range("DISTILL.CKD.QUEUE_SIZE", node.QUEUE_SIZE, 0, 10**7, why)
        check_range("DISTILL.CKD.SHARED_CHANNELS", node.SHARED_CHANNELS, 1, MAX_CHANNELS)
        if not teacher.two_stage:
            _check_cells(pair)
        return {
            "student_channels": student.vector_channels,
            "teacher_channels": teacher.vector_channels,
            "num_anchors": 1 if student.two_stage else student.num_anchors,
            "sampler": RegionSampler.from_config(cfg, pair.student),
            "temperature": node.TEMPERATURE,
            "iou_threshold": node.IOU_THRESHOLD,
            "queue_size": node.QUEUE_SIZE,
            "shared_channels": node.SHARED_CHANNELS if node.PROJECTION == "shared" else 0,
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        Args:
            student, teacher: views with region vectors, (R, Cs) and (R, Ct)

        Returns:
            {"loss_ckd": scalar}, -log of the share of a region's own key, averaged over regions;
            near log(M + Q) for vectors that know nothing of each other. A share of all keys, its
            own among them, as InfoNCE has it; third-party code of this method divides by the others
            alone, and so gives smaller values, below 0 too.
        """
        regions = student.regions(self.sampler)
        anchor = regions.source.anchor if regions.source else None
        queries = self.projection(student.region_vectors(regions), anchor)
        # All processes project all keys, so that the shared projection's gradient is complete.
        keys = gather_rows(teacher.region_vectors(regions), regions.counts)
        if self.shared is not None:
            queries, keys = self.shared(queries), self.shared(keys)
        # exp(1 / 0.07) is 25 times what half precision holds.
        with torch.autocast(queries.device.type, enabled=False):
            keys = torch.cat([unit_vectors(keys), self.queue])
            loss = self._info_nce(
                unit_vectors(queries), keys, regions, same_cell=not teacher.two_stage
            )
        # Not written in place: the loss's backward needs them, so they cost no memory of their own.
        self.queue = keys[: self.queue_size].detach()
        return {"loss_ckd": loss}

    def _info_nce(self, queries: Tensor, keys: Tensor, regions: Regions, same_cell: bool) -> Tensor:
        """
        Args:
            queries, keys: (R, D) and (M + Q, D), of length 1
            same_cell: whether regions from one cell have the same key
        """
        first = int(regions.counts[: comm.get_rank()].sum())  # the key of this process's region 0
        logits = (queries / self.temperature) @ keys.T
        own = slice(first, first + len(regions))
        logits[:, own].masked_fill_(self._no_negatives(regions, same_cell), -torch.inf)
        target = torch.arange(first, first + len(regions), device=logits.device)
        return F.cross_entropy(logits, target, reduction="sum") / regions.mean_count

    def _no_negatives(self, regions: Regions, same_cell: bool) -> Tensor:
        """
        (R, R), True for pairs of regions that show the same thing; never on the diagonal, which
        holds the positives.
        """
        image, boxes = regions.image, Boxes(torch.cat([x.tensor for x in regions.boxes]))
        alike = pairwise_iou(boxes, boxes) > self.iou_threshold
        if same_cell:
            source = regions.source
            cells = torch.stack([source.stride, source.y, source.x])
            alike |= (cells[:, :, None] == cells[:, None, :]).all(dim=0)
        alike &= image[:, None] == image
        return alike.fill_diagonal_(False)

    def get_extra_state(self) -> Tensor:
        return self.queue.clone()  # a file would hold all of the storage that this is a view of

    def set_extra_state(self, state: Tensor) -> None:
        self.queue = state[: self.queue_size].to(self.queue.device)


def _check_cells(pair: DistillPair) -> None:
    """A dense teacher's vector of a region is that of the cell which the student predicted from."""
    student, teacher = pair.student, pair.teacher
    strides = {teacher.shapes[k].stride for k in teacher.dense_levels}
    missing = [k for k in student.dense_levels if student.shapes[k].stride not in strides]
    if missing:
        raise ValueError(
            f"DISTILL.HEADS: CKD compares cells of equal stride, but the teacher {teacher.name} "
            f"predicts on no level of the strides of the student's {', '.join(missing)}. Use a "
            "two-stage teacher, or the same levels."
        )

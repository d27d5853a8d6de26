from typing import Any, Dict, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils import comm

from ..layers import log_sum_exp_of_products, unit_vectors
from ..pairing.pair import ANY_PAIR, DistillPair
from ..utils.checks import MAX_CHANNELS, check_choice, check_range, check_temperature
from ..utils.processes import gather_rows
from ..views import DetectorView, Regions, RegionSampler
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY

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

    Attributes:
        loss_weight: lambda_ckd
    """

    loss_weight = 0.5
    # The proposals of a two-stage student come from no cell of a dense teacher.
    pairs = ANY_PAIR - {"dense -> two-stage"}
    requires = frozenset({"regions", "region_vectors"})

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
        projection: str = "student",
        shared_channels: int = 128,
    ):
        """
        Args:
            student_channels, teacher_channels: length of the region vectors
            num_anchors: of a dense student; each has a projection of its own
            sampler: which of a dense student's boxes are its regions
            temperature: gamma: divides cosines, > 0
            iou_threshold: keys of the same image whose boxes overlap by more than this IoU, in
                (0, 1], are no negatives
            queue_size: keys of past batches, of all processes together. Per key, 2 x Ct
                multiply-adds for each region, and 4 x Ct bytes in memory and in every checkpoint:
                335 MB for these and the 1024 numbers of a Faster R-CNN
            projection: f_theta. "student": the student's vectors are projected to the teacher's
                length, the teacher's are taken as they are. "shared": and then both by one
                projection
            shared_channels: length of the vectors after the shared projection
        """
        super().__init__()
        check_temperature("temperature", temperature)
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold}.")
        why = f"a key is 4 x {teacher_channels} bytes"
        check_range("queue_size", queue_size, 0, 10**7, why)
        check_choice("projection", projection, PROJECTIONS)
        check_range("shared_channels", shared_channels, 1, MAX_CHANNELS)
        shared = projection == "shared"
        self.sampler = sampler
        self.temperature = temperature
        self.iou_threshold = iou_threshold
        self.projection = PerAnchorLinear(student_channels, teacher_channels, num_anchors)
        self.shared = nn.Linear(teacher_channels, shared_channels, bias=False) if shared else None
        self.queue_size = queue_size
        # (Q, D). Saved as extra state, since Q grows until the queue is full; from then on new keys
        # overwrite the oldest.
        queue = torch.zeros(0, shared_channels if shared else teacher_channels)
        self.register_buffer("queue", queue, persistent=False)
        self.oldest = 0  # its row

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        student, teacher = pair.student, pair.teacher
        if not teacher.two_stage:
            _check_cells(pair)
        return head_arguments(
            cls,
            cfg,
            pair,
            student_channels=student.vector_channels,
            teacher_channels=teacher.vector_channels,
            num_anchors=1 if student.two_stage else student.num_anchors,
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        ::

            q = unit(f(s)),  k = unit(t)
            e_rj = exp(<q_r, k_j> / gamma)
            loss = -1/R sum over r of log(e_rr / sum over j of e_rj)

        over the keys j of all regions and of the queue, without those that show what r shows.

        Args:
            student, teacher: views with region vectors s (R, Cs) and t (R, Ct)

        Returns:
            {"loss_ckd": scalar}, averaged over regions (of all processes); near log(M + Q) for
            vectors that have nothing to do with each other. A share of all keys, its own among
            them, as InfoNCE has it; third-party code of this method divides by the others alone,
            and so gives smaller values, below 0 too.
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
            queries, keys = unit_vectors(queries), unit_vectors(keys)
            loss = self._info_nce(queries, keys, regions, same_cell=not teacher.two_stage)
        self._enqueue(keys.detach()[: self.queue_size])
        return {"loss_ckd": loss}

    def _enqueue(self, keys: Tensor) -> None:
        room = self.queue_size - len(self.queue)
        if room:
            self.queue = torch.cat([self.queue, keys[:room]])
        late = keys[room:]
        if len(late):
            # In place: the backward pass does not read the queue.
            rows = torch.arange(self.oldest, self.oldest + len(late), device=late.device)
            self.queue[rows % self.queue_size] = late
            self.oldest = (self.oldest + len(late)) % self.queue_size

    def _info_nce(self, queries: Tensor, keys: Tensor, regions: Regions, same_cell: bool) -> Tensor:
        """
        Args:
            queries, keys: (R, D) and (M, D), of length 1; the queue's keys join them
            same_cell: whether regions from one cell have the same key
        """
        first = int(regions.counts[: comm.get_rank()].sum())  # the key of this process's region 0
        queries = queries / self.temperature
        logits = queries @ keys.T
        own = slice(first, first + len(regions))
        logits[:, own].masked_fill_(self._no_negatives(regions, same_cell), -torch.inf)
        if len(self.queue):  # as one more key, whose exponential is the sum of theirs
            past = log_sum_exp_of_products(queries, self.queue)
            logits = torch.cat([logits, past[:, None]], dim=1)
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
            cells = cells.to(alike.device, non_blocking=True)
            alike |= (cells[:, :, None] == cells[:, None, :]).all(dim=0)
        alike &= image[:, None] == image
        return alike.fill_diagonal_(False)

    def get_extra_state(self) -> Dict[str, Any]:
        return {"queue": self.queue.clone(), "oldest": self.oldest}

    def set_extra_state(self, state: Union[Tensor, Dict[str, Any]]) -> None:
        if isinstance(state, Tensor):  # of an earlier version: the keys, newest first
            state = {"queue": state.flip(0), "oldest": 0}
        queue, self.oldest = state["queue"], state["oldest"]
        if len(queue) != self.queue_size:  # not full, or of another size: the newest, in order
            queue = queue.roll(-self.oldest, 0)[max(len(queue) - self.queue_size, 0) :]
            self.oldest = 0
        self.queue = queue.to(self.queue.device, copy=True)


class PerAnchorLinear(nn.Module):
    """
    A linear map without bias for each anchor of a cell: the anchors share the cell's feature, and
    only their maps tell them apart.
    """

    def __init__(self, in_channels: int, out_channels: int, num_anchors: int = 1):
        super().__init__()
        linear = [nn.Linear(in_channels, out_channels, bias=False) for _ in range(num_anchors)]
        self.weight = nn.Parameter(torch.stack([x.weight.detach() for x in linear]))  # (A, D, C)

    def forward(self, x: Tensor, anchor: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x: (R, C)
            anchor: (R,) integers below A, on the CPU; None where A is 1

        Returns:
            (R, D)
        """
        if len(self.weight) == 1:
            return F.linear(x, self.weight[0])
        # Anchor by anchor: all maps on all rows would be A times the arithmetic.
        order, counts = anchor.argsort(), anchor.bincount(minlength=len(self.weight)).tolist()
        back = order.argsort().to(x.device, non_blocking=True)
        rows = x[order.to(x.device, non_blocking=True)].split(counts)
        return torch.cat([F.linear(r, w) for r, w in zip(rows, self.weight)])[back]


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

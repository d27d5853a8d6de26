from typing import Any, Dict, FrozenSet, Sequence, Tuple, Union

from torch import Tensor, nn
from torch.linalg import vector_norm

from detectron2.config import CfgNode

from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import SAME_KIND, DistillPair
from ..utils.checks import check_temperature, check_weight
from ..views import DetectorView
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class DISTHead(nn.Module):
    """
    DIST, https://arxiv.org/abs/2205.10536 (exact, after the authors' released code): class
    probabilities are to correlate with the teacher's, over the classes of each prediction (inter)
    and over the predictions of each class (intra); their values are free.

    Two-stage pairs compare the softmax of the student's own sampled proposals, or the sigmoids of
    two detectors that ask of each class by itself; dense ones the sigmoids of every cell, of all
    its anchors in one row.

    Shapes: R proposals; K classes; N images; A anchors; Hi, Wi height and width of level i.
    """

    loss_weight = 1.0
    pairs = SAME_KIND
    requires_logits = True
    class_activations = frozenset({"softmax", "sigmoid"})

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        two_stage: bool,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
    ):
        """
        Args:
            levels: the pairs of levels on which both predict; not read of two-stage pairs
            two_stage: compare the heads on regions, not the dense ones
            inter_weight: beta, of the correlation over classes
            intra_weight: gamma, of the correlation over predictions
            temperature: tau: divides the logits of both, > 0
        """
        super().__init__()
        check_temperature("temperature", temperature)
        check_weight("inter_weight", inter_weight)
        check_weight("intra_weight", intra_weight)
        self.levels = levels
        self.two_stage = two_stage
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.temperature = temperature

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        return frozenset({"regions", "roi_predictions"} if pair.student.two_stage else {"dense"})

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        two_stage = pair.student.two_stage
        levels = () if two_stage else pair.dense_levels
        return head_arguments(cls, cfg, pair, levels=levels, two_stage=two_stage)

    def forward(
        self, student: DetectorView, teacher: DetectorView
    ) -> Dict[str, Union[Tensor, Dict[str, Tensor]]]:
        """
        ::

            p = softmax or sigmoid of logits / tau,  d = 1 - Pearson's correlation
            inter = beta tau^2 mean over predictions of d(p_student, p_teacher)
            intra = gamma tau^2 mean over classes of d(p_student, p_teacher)

        Args:
            student, teacher: views with logits: (R, K+1), or (R, K) of a sigmoid each, or dense
                ones (N, A*K, Hi, Wi)

        Returns:
            {"loss_dist_inter", "loss_dist_intra": scalar, or of dense pairs {level: scalar}}; inter
            is 0 where a prediction is a single number, of one class: it has no correlation
        """
        if self.two_stage:
            inter, intra = self._on_regions(student, teacher)
        else:
            inter, intra = self._on_cells(student, teacher)
        return {"loss_dist_inter": inter, "loss_dist_intra": intra}

    def _on_regions(self, student: DetectorView, teacher: DetectorView) -> Tuple[Tensor, Tensor]:
        regions = student.regions()
        x = student.roi_predictions().probabilities(self.temperature)
        target = teacher.roi_predictions(regions.boxes).probabilities(self.temperature).detach()
        inter = _of_several(x, distance(x, target, dims=(1,)).sum() / regions.mean_count)
        # Without proposals no class has anything to correlate; the zero keeps its gradient.
        intra = distance(x, target, dims=(0,)).mean() * min(len(x), 1)
        scale = self.temperature**2
        return scale * self.inter_weight * inter, scale * self.intra_weight * intra

    def _on_cells(
        self, student: DetectorView, teacher: DetectorView
    ) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
        ours, theirs = student.dense(), teacher.dense()
        logits, targets = ours.by_level(ours.logits), theirs.by_level(theirs.logits)
        inter, intra, scale = {}, {}, self.temperature**2
        for level, x, target in match_levels(self.levels, logits, targets):
            x, target = ((v.float() / self.temperature).sigmoid() for v in (x, target.detach()))
            of_cells, of_classes = (distance(x, target, dims) for dims in ((1,), (0, 2, 3)))
            inter[level] = scale * self.inter_weight * _of_several(x, of_cells.mean())
            intra[level] = scale * self.intra_weight * of_classes.mean()
        return inter, intra


def _of_several(x: Tensor, inter: Tensor) -> Tensor:
    """
    The distance over the classes of x, (rows, classes) or (N, classes, Hi, Wi); 0 where there is
    one class, whose distance is 1, whatever it is: a constant, like a loss that does not work.
    """
    return inter if x.shape[1] > 1 else inter * 0


def distance(x: Tensor, target: Tensor, dims: Tuple[int, ...]) -> Tensor:
    """
    1 - Pearson's correlation over `dims`, which are gone; 1 where one side does not vary.

    The authors' epsilon is as large as the norms of a new detector's probabilities, which are all
    0.01: their gradient would be huge without it, and equal ones are not at 0 with it.
    """
    x, target = (v - v.mean(dim=dims, keepdim=True) for v in (x, target))
    norms = vector_norm(x, dim=dims) * vector_norm(target, dim=dims)
    return 1 - (x * target).sum(dim=dims) / (norms + 1e-8)

from typing import Dict, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import build_adapters
from ..pairing.levels import LevelPair, match_levels
from ..utils.checks import check_range
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class CanKDHead(nn.Module):
    """
    Cross-attention non-local distillation, https://arxiv.org/abs/2511.21503 (exact, after the
    authors' released code): each student cell reads from all cells of the teacher and adds what it
    read to itself. Then every channel of every image is standardised, and compared.

    What is compared on the student's side holds values of the teacher's, so a loss of 0 does not
    say that the features are equal.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: published, per level, for all pairs
    """

    loss_weight = 10.0
    zero_at_equal = True

    def __init__(self, *, levels: Sequence[LevelPair], num_levels: int = 4):
        """
        Args:
            levels: the pairs of levels to distil, finest first
            num_levels: how many of the pairs to use; 0: all. The published configs use 4
        """
        super().__init__()
        check_range("num_levels", num_levels, 0, float("inf"), "0 is all")
        self.levels = levels[: num_levels or None]
        # Not in the published method, which needs equal channels; identity where they are equal.
        self.adapter = build_adapters(self.levels)
        self.read = nn.ModuleDict(
            {p.student: NonLocalRead(p.teacher_channels) for p in self.levels}
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            X = adapter(S),  X' = X + read(X, T)
            loss = 1/2 mean over n, c, cells of (standardise(T) - standardise(X'))^2

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_cankd": {level: scalar}}: a mean over all elements, summed over levels
        """
        losses = {}
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x = self.adapter[level](x)
            x = x.float() + self.read[level](x, target)
            losses[level] = F.mse_loss(_standardise(x), _standardise(target.float())) / 2
        return {"loss_cankd": losses}


class NonLocalRead(nn.Module):
    """
    A non-local block (https://arxiv.org/abs/1711.07971) from one map into another: dot products of
    queries and keys weigh the values, without a softmax. It starts at 0.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.query, self.key, self.value = (nn.Conv2d(channels, hidden, 1) for _ in range(3))
        self.project = nn.Conv2d(hidden, channels, 1)
        # Statistics of the batch only: it is never run in eval mode.
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """
        Args:
            x: where it is read into, (N, C, H, W)
            memory: what is read, (N, C, H', W')

        Returns:
            (N, C, H, W), float32 also under AMP
        """
        pooled = [min(2, size) for size in memory.shape[-2:]]
        query = self.query(x).flatten(2)
        key, value = (F.max_pool2d(f(memory), pooled).flatten(2) for f in (self.key, self.value))
        with torch.autocast(x.device.type, enabled=False):
            # (query^T key) value^T, multiplied from the right: without the map of all pairs of
            # cells, which has the size of P3 to the square.
            values = value.float() @ key.float().transpose(1, 2) / key.shape[2]
            read = (values @ query.float()).view(len(x), -1, *x.shape[-2:])
            read = F.conv2d(read, self.project.weight, self.project.bias)
            if read[:, 0].numel() == 1:  # PyTorch refuses a single value, which is its own mean
                weight, bias = (p.view(-1, 1, 1) for p in (self.norm.weight, self.norm.bias))
                return (read - read) * weight + bias
            return self.norm(read)


def _standardise(x: Tensor) -> Tensor:
    """(N, C, H, W) -> each channel of each image with mean 0 and variance 1 over its cells."""
    return F.instance_norm(x) if x[0, 0].numel() > 1 else x * 0

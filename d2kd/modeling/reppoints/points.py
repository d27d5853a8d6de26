"""
Nine points per cell: where a deformable convolution reads, and the box that they stand for.

Points are channels (y1, x1, y2, x2, ...) of a map, in strides from the corner of their cell at
(column, row) * stride. Boxes are offsets (x1, y1, x2, y2) from there, in strides, too.
"""

import torch
from torch import Tensor, nn

from ..deform_conv2d import deform_conv2d

KERNEL = 3
NUM_POINTS = KERNEL**2
# Of the gradients that reach the first points through the convolutions which read at them, and the
# two scales of a box. Published; a gradient of 1 trains worse.
POINTS_GRADIENT = 0.1
SCALES_GRADIENT = 0.01


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values, of which the gradient is multiplied by `factor`."""
    return factor * x + (1 - factor) * x.detach()


class PointConv(nn.Module):
    """A 3x3 convolution that reads at nine points in place of the cell's neighbours, then ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, KERNEL, KERNEL))
        nn.init.normal_(self.weight, std=0.01)
        steps = torch.arange(KERNEL) - KERNEL // 2
        grid = torch.cartesian_prod(steps, steps).flatten().float()  # y, x of each neighbour
        self.register_buffer("neighbours", grid[:, None, None], persistent=False)

    def forward(self, x: Tensor, points: Tensor) -> Tensor:
        """
        Args:
            x: (N, C, H, W)
            points: (N, 18, H, W)

        Returns:
            (N, C, H, W), float32 also under AMP: float16 would round where it reads
        """
        with torch.autocast(x.device.type, enabled=False):
            offsets = points.float() - self.neighbours
            return deform_conv2d(x.float(), offsets, self.weight, padding=(1, 1)).relu()


class MomentBox(nn.Module):
    """
    The box of nine points: around their mean, half as wide as their standard deviation times a
    learnt scale; the same for the height.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(2))  # of the width, of the height

    def forward(self, points: Tensor) -> Tensor:
        """(N, 18, H, W) -> (N, 4, H, W), float32 also under AMP"""
        with torch.autocast(points.device.type, enabled=False):
            yx = points.float().unflatten(1, (NUM_POINTS, 2))
            centre = yx.mean(dim=1).flip(1)
            scale = scale_gradient(self.log_scale, SCALES_GRADIENT).exp()
            half = yx.std(dim=1).flip(1) * scale[:, None, None]
            return torch.cat([centre - half, centre + half], dim=1)


class PointBoxTransform:
    """
    Detectron2's box2box_transform for boxes that are offsets, in strides, from the corner of their
    cell. The "anchor" of a cell is a square of one stride around that corner.
    """

    def apply_deltas(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """(R, 4), (R, 4) -> boxes XYXY in input pixels, (R, 4)"""
        corner = (anchors[:, :2] + anchors[:, 2:]) / 2
        stride = anchors[:, 2:] - anchors[:, :2]
        return deltas * stride.repeat(1, 2) + corner.repeat(1, 2)

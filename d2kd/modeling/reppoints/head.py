"""The head of RepPoints: points at first guess, and classes and better points read at them."""

import math
from typing import List, Tuple

from torch import Tensor, nn

from detectron2.layers import get_norm

from .points import NUM_POINTS, POINTS_GRADIENT, MomentBox, PointConv, scale_gradient


class RepPointsHead(nn.Module):
    """
    Two towers of 3x3 convolutions, one for classes and one for points, shared by all levels. The
    second predicts nine points per cell. There a convolution reads the first tower for the classes,
    and another the second tower for a shift of the points.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_convs: int = 3,
        norm: str = "GN",
        prior_prob: float = 0.01,
    ):
        """
        Args:
            channels: of the pyramid, and of all layers here
            num_convs: of each tower
            norm: of the towers, a name that Detectron2 knows; "": none
            prior_prob: class score of every cell at the start
        """
        super().__init__()
        self.cls_subnet = _tower(channels, num_convs, norm)
        self.bbox_subnet = _tower(channels, num_convs, norm)
        self.init_points = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * NUM_POINTS, 1),
        )
        self.cls_conv = PointConv(channels)
        self.cls_score = nn.Conv2d(channels, num_classes, 1)
        self.refine_conv = PointConv(channels)
        self.refine_points = nn.Conv2d(channels, 2 * NUM_POINTS, 1)
        self.to_box = MomentBox()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls_score.bias, -math.log(1 / prior_prob - 1))

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """
        Args:
            features: per level (N, C, Hi, Wi)

        Returns:
            per level logits (N, K, Hi, Wi), boxes of the refined points and boxes of the initial
            ones (N, 4, Hi, Wi), in strides from the corner of the cell
        """
        levels = [self.predict(self.cls_subnet(x), self.bbox_subnet(x)) for x in features]
        logits, boxes, init_boxes = (list(maps) for maps in zip(*levels))
        return logits, boxes, init_boxes

    def predict(self, classes: Tensor, points: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            classes, points: the last features of the towers of one level, (N, C, H, W)

        Returns:
            of this level, as `forward`
        """
        init = self.init_points(points).float()
        read_at = scale_gradient(init, POINTS_GRADIENT)
        logits = self.cls_score(self.cls_conv(classes, read_at))
        shift = self.refine_points(self.refine_conv(points, read_at)).float()
        return logits, self.to_box(init.detach() + shift), self.to_box(init)


def _tower(channels: int, num_convs: int, norm: str) -> nn.Sequential:
    layers: List[nn.Module] = []
    for _ in range(num_convs):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=not norm))
        if norm:
            layers.append(get_norm(norm, channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)

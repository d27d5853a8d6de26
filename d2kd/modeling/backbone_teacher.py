"""A model of timm that was never a detector, such as DINOv2's ViT, as a teacher of features."""

import math
from typing import Any, Dict, List, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.modeling import Backbone
from detectron2.structures import ImageList

from ..utils.to_device import to_device
from .timm_fpn import create_timm


class BackboneTeacher(nn.Module):
    """Takes a detector's place as a teacher. It has features and no predictions."""

    def __init__(self, net: nn.Module, strides: Sequence[int]):
        """
        Args:
            net: of timm, with forward_intermediates
            strides: of the levels that it teaches, powers of 2
        """
        super().__init__()
        self.backbone = ResampledBackbone(net, strides)
        for name in ("mean", "std"):
            value = 255 * torch.tensor(net.pretrained_cfg[name]).view(-1, 1, 1)
            self.register_buffer(f"pixel_{name}", value, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: Sequence[Mapping[str, Any]]) -> ImageList:
        """
        Args:
            batched_inputs: "image" (3, H, W), RGB, 0 to 255
        """
        images = [to_device(x["image"], self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, max(self.backbone.levels.values()))


class ResampledBackbone(Backbone):
    """
    Feature maps of a timm model at given strides. Where it has none of a stride, as a ViT with
    patches of 14 pixels has none of 16, its last one is interpolated at the cells' centres.
    """

    def __init__(self, net: nn.Module, strides: Sequence[int]):
        super().__init__()
        self.net = net
        self.levels = {f"p{int(math.log2(x))}": x for x in strides}
        info = net.feature_info
        reductions = [x["reduction"] for x in info]
        self.indices = {level: _last(reductions, stride) for level, stride in self.levels.items()}
        self.reductions = {level: reductions[i] for level, i in self.indices.items()}
        self.multiple = max(reductions)
        self._out_features = list(self.levels)
        self._out_feature_strides = self.levels
        self._out_feature_channels = {k: info[i]["num_chs"] for k, i in self.indices.items()}

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        """
        Args:
            images: (N, 3, H, W), normalised, H and W multiples of all strides

        Returns:
            level to (N, C, H / stride, W / stride)
        """
        height, width = images.shape[-2:]
        right, bottom = -width % self.multiple, -height % self.multiple
        wanted = sorted(set(self.indices.values()))
        maps: List[Tensor] = self.net.forward_intermediates(
            F.pad(images, (0, right, 0, bottom)),
            indices=wanted,
            norm=True,  # as its own head would read the last one
            intermediates_only=True,
        )
        found = dict(zip(wanted, maps))
        return {
            level: resample(found[i], self.reductions[level], self.levels[level], (height, width))
            for level, i in self.indices.items()
        }


def _last(reductions: Sequence[int], stride: int) -> int:
    """Index of the last map of this stride; without any, of the last map."""
    return max((i for i, x in enumerate(reductions) if x == stride), default=len(reductions) - 1)


def resample(x: Tensor, old: int, new: int, size: Sequence[int]) -> Tensor:
    """
    Interpolate a feature map at the centres of the cells of another stride.

    Args:
        x: (N, C, Hi, Wi), of which a cell covers `old` x `old` pixels
        new: pixels along a side of a wanted cell; from twice `old` on, means of old cells are
            interpolated
        size: (height, width) of the image in pixels, multiples of `new`

    Returns:
        (N, C, height / new, width / new)
    """
    if old == new:
        return x[..., : size[0] // new, : size[1] // new]
    if new >= 2 * old:
        factor = new // old
        x, old = F.avg_pool2d(x, factor, ceil_mode=True), factor * old
    axes = []
    for pixels, cells in zip(size, x.shape[-2:]):
        centers = (torch.arange(pixels // new, device=x.device) + 0.5) * new / old
        axes.append(centers / cells * 2 - 1)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1)
    # In float32 or better: bfloat16 would move the cells of a map of 100 by a tenth of one.
    exact = x.to(torch.promote_types(x.dtype, grid.dtype))
    grid = grid.to(exact.dtype).expand(len(x), -1, -1, -1)
    return F.grid_sample(exact, grid, padding_mode="border", align_corners=False).to(x.dtype)


def check_strides(strides: Sequence[int]) -> None:
    """
    Raises:
        ValueError: DISTILL.TEACHER.BACKBONE_STRIDES are not what levels can have
    """
    is_power = all(isinstance(x, int) and x > 0 and not x & (x - 1) for x in strides)
    if not strides or not is_power or len(set(strides)) < len(strides) or max(strides) > 1024:
        raise ValueError(
            "DISTILL.TEACHER.BACKBONE_STRIDES must be different powers of 2 up to 1024, got "
            f"{list(strides)}."
        )


def build_backbone_teacher(name: str, strides: Sequence[int]) -> BackboneTeacher:
    """
    Args:
        name: of timm, DISTILL.TEACHER.BACKBONE
        strides: DISTILL.TEACHER.BACKBONE_STRIDES

    Raises:
        ValueError: timm is missing, has no such model, or cannot build it for images of any size
    """
    key = "DISTILL.TEACHER.BACKBONE"
    check_strides(strides)
    try:
        net = create_timm(key, name, num_classes=0, dynamic_img_size=True)
    except ValueError as error:
        if "dynamic_img_size" not in str(error):
            raise
        net = create_timm(key, name, num_classes=0)  # no ViT, and most others take any size
        if net.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"{key}: {name} takes images of one size only.") from None
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{key}: timm gives no intermediate features of {name}.")
    return BackboneTeacher(net, strides)

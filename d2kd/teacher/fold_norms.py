"""Fold norms whose statistics are fixed into the convolutions before them."""

from collections import Counter
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detectron2.layers import FrozenBatchNorm2d


def fold_norms(model: nn.Module) -> int:
    """
    Fold, in place, every norm that is affine with fixed numbers: FrozenBatchNorm2d and BatchNorm in
    eval mode, as `norm` of Detectron2's Conv2d, behind a convolution in a Sequential, or in a net
    of timm.

    Returns:
        how many were folded
    """
    folded = sum(_fold_timm(x) for x in list(model.modules()) if hasattr(x, "feature_info"))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_fixed(getattr(module, "norm", None)):
            _fold(module, module.norm)
            module.norm = None
            folded += 1
        elif isinstance(module, nn.Sequential):
            folded += _fold_neighbours(module)
    return folded


def _fold_neighbours(sequence: nn.Sequential) -> int:
    folded, layers = 0, list(sequence)
    for i, (layer, norm) in enumerate(zip(layers, layers[1:]), start=1):
        alone = getattr(layer, "norm", None) is None and getattr(layer, "activation", None) is None
        if isinstance(layer, nn.Conv2d) and alone and _is_fixed(norm):
            _fold(layer, norm)
            sequence[i] = _without_norm(norm)  # what follows keeps its place
            folded += 1
    return folded


def _fold_timm(net: nn.Module) -> int:
    """Blocks of timm call their layers in code of their own: a pass tells which norm reads what."""
    # Without a fixed norm no pass: such nets, as ViTs, may not take an image of one cell.
    pairs = _observed_pairs(net) if any(_is_fixed(x) for x in net.modules()) else []
    place = {child: (x, name) for x in net.modules() for name, child in x.named_children()}
    for convolution, norm in pairs:
        _fold(convolution, norm)
        parent, name = place[norm]
        setattr(parent, name, _without_norm(norm))
    return len(pairs)


@torch.no_grad()
def _observed_pairs(net: nn.Module) -> List[Tuple[nn.Conv2d, nn.Module]]:
    """Convolutions with the fixed norms that alone read what these make."""
    made: Dict[int, Tuple[nn.Module, Tensor]] = {}  # with the tensors, so that no id is used anew
    calls: Counter = Counter()  # of a layer
    pairs: List[Tuple[nn.Conv2d, nn.Module]] = []

    def keep(module: nn.Module, inputs: Tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        made[id(output)] = (module, output)

    def pair(norm: nn.Module, inputs: Tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], norm))

    hooks: List[Any] = []
    for module in net.modules():
        # By name: a Conv2d that standardises its weight in each pass is none to fold into.
        if type(module).__name__ in ("Conv2d", "Conv2dSame"):
            hooks.append(module.register_forward_hook(keep))
        elif _is_fixed(module):
            hooks.append(module.register_forward_pre_hook(pair))
    features = _features(net)
    for hook in hooks:
        hook.remove()
    asked_for = [made[id(x)][0] for x in features if id(x) in made]
    return [x for x in pairs if calls[x[0]] == calls[x[1]] == 1 and x[0] not in asked_for]


def _features(net: nn.Module) -> List[Tensor]:
    """Of an image of one cell, as a backbone reads them or, of a whole model, BackboneTeacher."""
    first, info = next(x for x in net.parameters() if x.dim() == 4), net.feature_info
    is_whole = isinstance(info, list)
    side = max(x["reduction"] for x in info) if is_whole else max(info.reduction())
    image = first.new_zeros(1, first.shape[1], side, side)
    if is_whole:
        return net.forward_intermediates(image, norm=True, intermediates_only=True)
    return net(image)


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left of a norm that was folded: timm's have an activation in them."""
    return nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()


def _is_fixed(norm: object) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    is_batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return is_batch_norm and not norm.training and norm.running_mean is not None


def _fold(convolution: nn.Conv2d, norm: nn.Module) -> None:
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.requires_grad_(False)

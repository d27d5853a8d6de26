"""Fold norms whose statistics are fixed into the convolutions before them."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detectron2.layers import FrozenBatchNorm2d


def fold_norms(model: nn.Module) -> int:
    """
    Fold, in place, every norm that is affine with fixed numbers: FrozenBatchNorm2d and BatchNorm in
    eval mode, as `norm` of Detectron2's Conv2d or behind a convolution in a Sequential.

    Returns:
        how many were folded
    """
    folded = 0
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
            # What follows keeps its place. timm's norms have an activation in them.
            rest = [norm.drop, norm.act] if hasattr(norm, "act") else []
            sequence[i] = nn.Sequential(*rest) if rest else nn.Identity()
            folded += 1
    return folded


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

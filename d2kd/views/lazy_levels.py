"""Maps of the levels of a pyramid, of which only those that are read are computed."""

import copy
from functools import partial
from typing import (
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from torch import Tensor, nn

from detectron2.modeling.backbone import FPN

from ..utils.autocast import autocast_now


def refuse_changed(what: str, tensors: Iterable[Tuple[Tensor, int]]) -> None:
    """
    Raises:
        RuntimeError: a tensor has another version than the one beside it, when heads began to share
            them; `what` it is
    """
    if any(x._version != version for x, version in tensors):
        raise RuntimeError(
            f"{what} was changed in place, and all heads share it: a loss on it would be wrong. "
            "Look for operators that end in _ and for -=, *= on what a view gives, also behind "
            ".float(), which copies nothing of float32."
        )


class Later:
    """
    A map that is computed when it is first asked for, and kept: with gradient and in mixed
    precision where it was put off so, whoever asks first.
    """

    def __init__(self, compute: Callable[[], Tensor], device_type: str):
        """
        Args:
            device_type: on which it is computed
        """
        self.device_type = device_type
        self._compute = compute
        self._with_gradient = torch.is_grad_enabled()
        self._autocast = autocast_now(device_type)
        self._map: Optional[Tensor] = None
        self._version = 0

    def __call__(self) -> Tensor:
        """
        Raises:
            RuntimeError: somebody who read it has changed it since
        """
        if self._map is None:
            with torch.set_grad_enabled(self._with_gradient), self._autocast():
                self._map = self._compute()
            self._version = self._map._version
            self._compute = None  # what it was computed from is freed
        refuse_changed("A map of the teacher", [(self._map, self._version)])
        return self._map

    @property
    def is_there(self) -> bool:
        return self._map is not None

    def then(self, function: Callable[[Tensor], Tensor]) -> "Later":
        """The map after a function, which is called when that is asked for."""
        return Later(lambda: function(self()), self.device_type)


class LazyLevels(Mapping[str, Tensor]):
    """Level name to (N, C, Hi, Wi), computed when it is first read."""

    def __init__(self, levels: Mapping[str, Later]):
        self._levels = levels

    def __getitem__(self, level: str) -> Tensor:
        return self._levels[level]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LazyLevels":
        """The same levels after a function, which is called when they are read."""
        return LazyLevels({k: x.then(function) for k, x in self._levels.items()})


def lazy_levels(backbone: nn.Module, images: Tensor) -> LazyLevels:
    """
    Run a backbone, and of an FPN what all levels need: the last convolution of each level, and the
    levels of its top block, are put off until they are read.

    Args:
        images: (N, 3, H, W), as the backbone wants them
    """
    if getattr(backbone.forward, "__func__", None) is not FPN.forward:
        levels = backbone(images).items()
        return LazyLevels({k: Later(lambda x=x: x, x.device.type) for k, x in levels})
    # A copy, as those of nn.DataParallel: the detector itself is left as it is.
    pyramid = copy.copy(backbone)
    pyramid._modules = dict(backbone._modules)
    pyramid.output_convs = [partial(_put_off, x) for x in backbone.output_convs]
    if backbone.top_block is not None:
        pyramid.top_block = _TopBlock(backbone.top_block, images.device.type)
    return LazyLevels(pyramid(images))


def _put_off(module: nn.Module, x: Tensor) -> Later:
    return Later(lambda: module(x), x.device.type)


class _TopBlock(nn.Module):
    """An FPN's top block, which is called when the first of its levels is read."""

    def __init__(self, block: nn.Module, device_type: str):
        super().__init__()
        self.block = block
        self.device_type = device_type
        self.in_feature = block.in_feature
        self.num_levels = block.num_levels

    def forward(self, x: Union[Tensor, Later]) -> List[Later]:
        levels: List[Tensor] = []

        def level(index: int) -> Tensor:
            if not levels:
                # Its input may be a level of the pyramid, which has been put off too.
                levels.extend(self.block(x() if isinstance(x, Later) else x))
            return levels[index]

        return [Later(partial(level, i), self.device_type) for i in range(self.num_levels)]


# Where forwards do nothing with maps but hand them from one module of the head to the next
_HEADS = {f"detectron2.modeling.meta_arch.{x}" for x in ("retinanet", "fcos")}


def can_be_put_off(head: nn.Module) -> bool:
    """Whether :func:`lazy_head` can run a head: RetinaNet's or FCOS's own."""
    forward = getattr(head.forward, "__func__", None)
    return getattr(forward, "__module__", "") in _HEADS


def lazy_head(head: nn.Module, features: Sequence[Tensor]) -> Dict[str, List[Later]]:
    """
    Run a dense head whose modules are all put off until a map that depends on them is read.

    Args:
        features: per level (N, C, Hi, Wi)

    Returns:
        name of each module to its maps, level by level
    """
    maps: Dict[str, List[Later]] = {}

    def put_off(name: str, module: nn.Module, x: Union[Tensor, Later]) -> Later:
        later = x.then(module) if isinstance(x, Later) else _put_off(module, x)
        maps.setdefault(name, []).append(later)
        return later

    lazy = copy.copy(head)  # as in lazy_levels
    lazy._modules = {}
    for name, module in head._modules.items():
        lazy.__dict__[name] = partial(put_off, name, module)
    lazy(features)
    return maps

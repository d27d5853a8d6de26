from dataclasses import fields, replace
from typing import Any, Callable

from torch import Tensor

from .lazy_levels import LazyLevels
from .predictions import DensePredictions, RoIPredictions
from .towers import Towers


def map_tensors(function: Callable[[Tensor], Any], x: Any) -> Any:
    """An answer of a view after a function of each tensor in it; boxes and regions stay."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, LazyLevels):
        return x.map(function)
    if isinstance(x, dict):
        return {k: map_tensors(function, v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map_tensors(function, v) for v in x)
    if isinstance(x, DensePredictions):
        return x.map(lambda _, y: function(y))
    if isinstance(x, (RoIPredictions, Towers)):
        parts = {f.name: map_tensors(function, getattr(x, f.name)) for f in fields(x)}
        return replace(x, **parts)
    return x

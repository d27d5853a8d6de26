"""Check that a head reads only what it declares in `requires`, and leaves it as it is."""

from typing import Any, Dict, FrozenSet, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from ..heads.fit import requires_of
from ..heads.registry import head_class
from ..views import DetectorView
from ..views.wrapped import WrappedView
from .case import Case

# Member of a DetectorView -> words that require it; all other members are always available.
WORDS: Dict[str, Tuple[str, ...]] = {
    "features": ("features",),
    "gt_instances": ("gt_instances",),
    "dense": ("dense",),
    "boxes": ("dense",),
    "towers": ("tower_",),
    "predict_from": ("tower_",),
    "anchor_labels": ("anchor_labels",),
    "roi_features": ("roi_features",),
    "roi_predictions": ("roi_predictions",),
    "sampled_proposals": ("roi_predictions",),
    "pooled_levels": ("roi_features", "roi_predictions"),
    "pooler": ("roi_features", "roi_predictions"),
    "mean_in_boxes": ("roi_features", "roi_predictions"),
    "mask_logits": ("mask_logits",),
    "mask_features": ("mask_features",),
    "mask_proposals": ("mask_logits", "mask_features"),
    "mask_regions": ("mask_logits", "mask_features"),
    "regions": ("regions",),
    "region_vectors": ("region_vectors",),
}


class RequiredView(WrappedView):
    """A view that gives access only to what a head requires."""

    def __init__(self, view: DetectorView, required: FrozenSet[str], case: Case):
        super().__init__(view)
        self._required, self._case = required, case

    def __getattr__(self, name: str) -> Any:
        words = WORDS.get(name, ())
        assert not words or any(x.startswith(words) for x in self._required), (
            f"{self._case}: forward reads `{name}`, but `requires` is {sorted(self._required)}: "
            f"add {words[0]!r}. It determines what the teacher computes in its forward pass, and "
            "pairs that do not provide it are refused when the model is built."
        )
        return super().__getattr__(name)


def watch_views(case: Case, distiller: Any) -> None:
    """
    Restrict the head's views to what it requires, from now on, and see to it that it changes
    nothing there: all heads of a run share the views of a step.
    """
    required = requires_of(head_class(case.name), case.cfg, distiller.pair)
    before: List[Tuple[str, Tensor, Tensor]] = []

    def restrict(module: nn.Module, views: Tuple[DetectorView, ...]) -> Tuple[RequiredView, ...]:
        for side, view in zip(("student", "teacher"), views):
            before.extend((f"{side}.{k}", x, x.clone()) for k, x in _shared(view, required))
        return tuple(RequiredView(view, required, case) for view in views)

    def compare(*_: Any) -> None:
        changed = [name for name, x, copy in before if not torch.equal(x, copy)]
        before.clear()
        assert not changed, (
            f"{case}: forward changes {changed[0]} in place, which the next head reads too. Look "
            "for operators that end in _, for -= and *=, for Boxes.scale() and clip(), also behind "
            ".float() and .to(), which copy nothing of the right type; .clone() does."
        )

    distiller.heads[case.name].register_forward_pre_hook(restrict)
    distiller.heads[case.name].register_forward_hook(compare)


def _shared(view: DetectorView, required: FrozenSet[str]) -> Iterator[Tuple[str, Tensor]]:
    """Name and tensor of what several heads may read of a view."""
    yield from ((f"features[{level!r}]", x) for level, x in view.features.items())
    for i, instances in enumerate(view.gt_instances):
        yield f"gt_instances[{i}].gt_boxes", instances.gt_boxes.tensor
        yield f"gt_instances[{i}].gt_classes", instances.gt_classes
    if "dense" in required:
        dense = view.dense()
        for level, logits, deltas in zip(dense.levels, dense.logits, dense.deltas):
            yield f"dense().logits of {level}", logits
            yield f"dense().deltas of {level}", deltas

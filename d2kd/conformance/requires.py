"""Check that a head reads only what it declares in `requires`, and leaves it as it is."""

from typing import Any, Callable, Dict, FrozenSet, Hashable, Iterator, List, Set, Tuple

import torch
from torch import Tensor, nn

from detectron2.structures import Boxes, Instances

from ..heads.fit import OF_BOXES, requires_of
from ..heads.registry import head_class
from ..views import DetectorView, Regions, RoIPredictions, Towers
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
        # What the view keeps for all heads -> its tensors, with their versions when it was new.
        self._kept: Dict[str, List[Tuple[Tensor, int]]] = {}
        self._known: Set[Hashable] = set()
        self._note()

    def __getattr__(self, name: str) -> Any:
        words = WORDS.get(name, ())
        assert not words or any(x.startswith(words) for x in self._required), (
            f"{self._case}: forward reads `{name}`, but `requires` is {sorted(self._required)}: "
            f"add {words[0]!r}. It determines what the teacher computes in its forward pass, and "
            "pairs that do not provide it are refused when the model is built."
        )
        value = super().__getattr__(name)
        if name == "batched_inputs" and not self._required & OF_BOXES:
            return [WithoutLabels(self._case, x) for x in value]
        if name not in WORDS:
            return value
        if callable(value):
            return self._noting(name, value)
        self._note(name)
        return value

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = method(*args, **kwargs)
            self._note(name)
            return answer

        return call

    def _note(self, name: str = "") -> None:
        for kept in (self._view._recorded, self._view._answers):
            for key, x in kept.items():
                if key not in self._known:
                    self._known.add(key)
                    versions = [(x, x._version) for x in _tensors(x)]
                    self._kept.setdefault(name or str(key), []).extend(versions)

    def changed(self) -> List[str]:
        """Members of which the head has changed a tensor in place since it was computed."""
        return [k for k, kept in self._kept.items() if any(x._version != n for x, n in kept)]


class WithoutLabels(dict):
    """An image of a batch, for a head that does not say that it needs boxes."""

    def __init__(self, case: Case, inputs: Dict[str, Any]):
        super().__init__({k: x for k, x in inputs.items() if k != "instances"})
        self._case = case

    def __missing__(self, key: str) -> Any:
        assert key != "instances", (
            f"{self._case}: forward reads the labels in batched_inputs, which images without "
            "labels do not have. Read `gt_instances` and add 'gt_instances' to `requires`."
        )
        raise KeyError(key)


def watch_views(case: Case, distiller: Any) -> None:
    """
    Restrict the head's views to what it requires, from now on, and see to it that it changes
    nothing there: all heads of a run share the views of a step.
    """
    required = requires_of(head_class(case.name), case.cfg, distiller.pair)
    before: List[Tuple[str, Tensor, Tensor]] = []
    restricted: Dict[str, RequiredView] = {}

    def restrict(module: nn.Module, views: Tuple[DetectorView, ...]) -> Tuple[RequiredView, ...]:
        for side, view in zip(("student", "teacher"), views):
            before.extend((f"{side}.{k}", x, x.clone()) for k, x in _shared(view, required))
            restricted[side] = RequiredView(view, required, case)
        return tuple(restricted.values())

    def compare(*_: Any) -> None:
        changed = [name for name, x, copy in before if not torch.equal(x, copy)]
        changed += [f"{side}.{k}" for side, view in restricted.items() for k in view.changed()]
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
        yield from ((f"dense().tower of {k}", x) for k, x in dense.by_level(dense.tower).items())


def _tensors(x: Any) -> List[Tensor]:
    """Of an answer of a view; levels that are computed later are not looked into."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, (dict, Instances)):
        x = list(x.values() if isinstance(x, dict) else x.get_fields().values())
    if isinstance(x, (Boxes, RoIPredictions, Towers, Regions)):
        x = list(vars(x).values())
    return [y for part in x for y in _tensors(part)] if isinstance(x, (list, tuple)) else []

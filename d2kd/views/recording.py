"""Keep what passes through a detector's own forward, so that nothing is computed twice."""

from contextlib import contextmanager
from typing import Any, Callable, Dict, FrozenSet, Hashable, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectron2.structures import Boxes, Instances

from ..utils.autocast import autocast_now
from .lazy_levels import LazyLevels, lazy_levels, refuse_changed
from .predictions import DensePredictions


class Recording:
    """
    Parts of one batch by name: recorded in a student's forward, computed for a teacher.

    The parts of all detectors, "backbone" and "dense", are here. A subclass adds others: hooks in
    `_add_hooks` that call `_keep`, and a method `_compute_<name>` for each that a teacher has.
    """

    def __init__(
        self,
        detector: nn.Module,
        batched_inputs: Sequence[Dict[str, Any]] = (),
        requires: FrozenSet[str] = frozenset(),
    ):
        """
        Args:
            batched_inputs: Detectron2's standard input; empty: for facts of the detector alone
            requires: what heads will ask a teacher for, so that one pass gives all of it
        """
        self.detector = detector
        self.batched_inputs = batched_inputs
        self.requires = requires
        self._recorded: Dict[str, Any] = {}
        self._versions: Dict[str, List[Tuple[Tensor, int]]] = {}
        self._answers: Dict[Hashable, Any] = {}
        self._is_student = False
        self._with_gradient = False
        self._autocast = autocast_now(next((x.device.type for x in detector.parameters()), "cpu"))

    @contextmanager
    def record(self, requires: FrozenSet[str]) -> Iterator[None]:
        """
        Hook the student while its own forward runs, and keep what the heads require.

        Hooks are removed on leaving, so a student outside this block is a stock detector.
        """
        self._is_student = True
        self.requires = requires
        handles = self._add_hooks(requires)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def of_unlabelled(
        cls,
        detector: nn.Module,
        batched_inputs: Sequence[Dict[str, Any]],
        requires: FrozenSet[str],
    ) -> "Recording":
        """
        A student's view of images that its own losses do not see: parts are computed as a
        teacher's are, but with gradient. What only a training pass has, such as labels of anchors,
        is missing.
        """
        view = cls(detector, batched_inputs, requires)
        view._with_gradient = True
        return view

    def detections(self) -> List[Instances]:
        """
        What a teacher detects, by a pass of its own, from which come its features too where nobody
        has read them before.

        Returns:
            of each image `pred_boxes`, XYXY in input pixels, `scores`, and `pred_classes`, as the
            teacher counts them
        """
        return self._once("detections", self._detections)

    @torch.no_grad()
    def _detections(self) -> List[Instances]:
        handle = self.detector.backbone.register_forward_hook(self._on_backbone)
        try:
            # Without the original sizes, to which Detectron2 would scale the boxes.
            outputs = self.detector([{"image": x["image"]} for x in self.batched_inputs])
        finally:
            handle.remove()
        return [x["instances"] for x in outputs]

    # What a subclass adds ------------------------------------------------------------------------

    def _add_hooks(self, requires: FrozenSet[str]) -> List[Any]:
        """
        Returns:
            handles to remove the hooks with
        """
        handles = [self.detector.backbone.register_forward_hook(self._on_backbone)]
        return handles + (self._hook_dense() if "dense" in requires else [])

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        """The classification tower, the head around it, and the levels that the head reads."""
        raise NotImplementedError

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        """From the output of the head and that of the tower, level by level."""
        raise NotImplementedError

    # Parts and answers ---------------------------------------------------------------------------

    def _keep(self, name: str, value: Any, tensors: Sequence[Tensor]) -> None:
        # The first call counts: a detector that runs a module again (a cascade's later stages)
        # does so on other inputs.
        if name not in self._recorded:
            self._recorded[name] = value
            self._versions[name] = [(x, x._version) for x in tensors]

    def _part(self, name: str) -> Any:
        if name not in self._recorded:
            self._recorded[name] = self._computed(name)
        side = "student" if self._is_student or self._with_gradient else "teacher"
        refuse_changed(f"The {side}'s {name!r}", self._versions.get(name, ()))
        return self._recorded[name]

    def _computed(self, name: str) -> Any:
        if self._is_student:
            raise RuntimeError(
                f"The student's {name!r} was not recorded in its forward. A head must declare what "
                "it reads in `requires`."
            )
        if not hasattr(self, f"_compute_{name}"):
            raise RuntimeError(
                f"A teacher has no {name!r}, which is recorded in a student's training forward."
            )
        with torch.set_grad_enabled(self._with_gradient), self._autocast():
            return getattr(self, f"_compute_{name}")()

    def _once(self, question: Hashable, compute: Callable[[], Any]) -> Any:
        """
        Compute the answer to a question for the first head that asks; all others share it, so a
        student's has its gradient also where the first asks under torch.no_grad, and all are
        computed in the mixed precision of the step, also where that is off while the first asks.
        """
        if question not in self._answers:
            wanted = self._is_student or self._with_gradient or torch.is_grad_enabled()
            with torch.set_grad_enabled(wanted), self._autocast():
                self._answers[question] = compute()
        return self._answers[question]

    def _of_boxes(self, name: Hashable, boxes: List[Boxes], compute: Callable[[], Any]) -> Any:
        """_once for these very boxes, which are kept so that no other list can get their id."""
        return self._once((name, id(boxes)), lambda: (boxes, compute()))[1]

    # The parts of all detectors ------------------------------------------------------------------

    def _on_backbone(self, module: nn.Module, inputs: Tuple[Tensor], output: Dict[str, Tensor]):
        self._keep("backbone", (tuple(inputs[0].shape[-2:]), dict(output)), list(output.values()))

    def _compute_backbone(self) -> Tuple[Tuple[int, int], LazyLevels]:
        images = self.detector.preprocess_image(self.batched_inputs)
        return tuple(images.tensor.shape[-2:]), lazy_levels(self.detector.backbone, images.tensor)

    def _hook_dense(self) -> List[Any]:
        """Collect the tower's output, once per level, then the head's predictions."""
        collected: List[Tensor] = []
        tower, head, _ = self._dense_head()

        def on_tower(module: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> None:
            collected.append(output)

        def on_head(module: nn.Module, inputs: Any, output: Sequence[Any]) -> None:
            predictions = self._dense_predictions(output, list(collected))
            self._keep("dense", predictions, predictions.logits + predictions.deltas)
            collected.clear()

        return [tower.register_forward_hook(on_tower), head.register_forward_hook(on_head)]

    def _compute_dense(self) -> DensePredictions:
        handles, (_, head, levels) = self._hook_dense(), self._dense_head()
        features = self._part("backbone")[1]
        try:
            head([features[k] for k in levels])
        finally:
            for handle in handles:
                handle.remove()
        return self._recorded["dense"]


class Listener:
    """Wraps a method of a module until removed, and passes its return value to a callback."""

    def __init__(self, owner: nn.Module, method: str, callback: Callable[[Any], None]):
        self.owner, self.method = owner, method
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            answer = original(*args, **kwargs)
            callback(answer)
            return answer

        setattr(owner, method, wrapped)

    def remove(self) -> None:
        """Give the module its own method back."""
        delattr(self.owner, self.method)

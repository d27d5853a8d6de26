"""Keep what passes through a detector's own forward, so that nothing is computed twice."""

from contextlib import contextmanager
from typing import Any, Callable, Dict, FrozenSet, Hashable, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes


class Recording:
    """
    Parts of one batch by name: recorded in a forward of the student's, computed for a teacher.

    A subclass has `_add_hooks(members)`, whose hooks call `_keep`, and a method `_compute_<name>`
    for each part that a teacher can be asked for.
    """

    def __init__(self) -> None:
        self._recorded: Dict[str, Any] = {}
        self._versions: Dict[str, List[Tuple[Tensor, int]]] = {}
        self._answers: Dict[Hashable, Any] = {}
        self._is_student = False
        self.reads: FrozenSet[str] = frozenset()

    @contextmanager
    def record(self, members: FrozenSet[str]) -> Iterator[None]:
        """
        Hook the detector while its own forward runs, and keep the named members.

        Hooks are removed on leaving, so a student outside this block is a stock detector.
        """
        self._is_student = True
        self.reads = members
        handles = self._add_hooks(members)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_hooks(self, members: FrozenSet[str]) -> List[Any]:
        """Returns: handles to remove the hooks with."""
        raise NotImplementedError

    def _keep(self, name: str, value: Any, tensors: Sequence[Tensor]) -> None:
        # The first call counts: a detector that runs a module again (a cascade's later stages)
        # does so on other inputs.
        if name not in self._recorded:
            self._recorded[name] = value
            self._versions[name] = [(x, x._version) for x in tensors]

    def _part(self, name: str) -> Any:
        if name not in self._recorded:
            if self._is_student:
                raise RuntimeError(
                    f"The student's {name!r} was not recorded in its forward. A head must declare "
                    "what it reads in `requires`."
                )
            with torch.no_grad():
                self._recorded[name] = getattr(self, f"_compute_{name}")()
        for tensor, version in self._versions.get(name, ()):
            if tensor._version != version:
                raise RuntimeError(
                    f"The student's {name!r} was changed in place after it was recorded; a loss on "
                    "it would be wrong."
                )
        return self._recorded[name]

    def _once(self, question: Hashable, compute: Callable[[], Any]) -> Any:
        """What was computed for a question before; all heads share the answer."""
        if question not in self._answers:
            self._answers[question] = compute()
        return self._answers[question]

    def _of_boxes(self, name: str, boxes: List[Boxes], compute: Callable[[], Any]) -> Any:
        """_once for these very boxes, which are kept so that no other list can get their id."""
        return self._once((name, id(boxes)), lambda: (boxes, compute()))[1]

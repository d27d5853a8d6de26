"""Whether the parameters of the heads train."""

from typing import Dict, List, Set

import torch
from torch import nn

from ...utils.checks import shown


class HeadParameters:
    """
    Over several steps, for each parameter of the heads: whether a loss depends on it, gives it a
    gradient, and whether the optimizer then moves it.
    """

    def __init__(self, heads: nn.ModuleDict, optimizer: torch.optim.Optimizer):
        """
        Raises:
            ValueError: the optimizer lacks one of them, or moves none of a head
        """
        self.heads, self.optimizer = heads, optimizer
        self.before: Dict[str, torch.Tensor] = {}
        self.in_graph: Set[str] = set()  # in some step a loss depended on it,
        self.has_gradient: Set[str] = set()  # and in some its gradient was not 0,
        self.should_move: Set[str] = set()  # and in some SGD's step was not too small to change it
        self._check_optimizer()

    def snapshot(self) -> None:
        """Keep all values; movement is measured from them."""
        self.before = {k: p.detach().clone() for k, p in self.heads.named_parameters()}

    def record_gradients(self, name: str) -> None:
        """Record which parameters of a head have a gradient, before it is cleared."""
        rates = {
            id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]
        }
        for key, p in self._of(name).items():
            if p.grad is None:
                continue
            self.in_graph.add(key)
            if p.grad.any():
                self.has_gradient.add(key)
            if not torch.equal(p.detach() - rates.get(id(p), 0.0) * p.grad, p.detach()):
                self.should_move.add(key)

    def problems(self, name: str) -> List[str]:
        """What is certainly wrong with a head, as clauses of a sentence."""
        mine = [k for k, p in self._of(name).items() if p.requires_grad]
        late = [k for k in self._missing() if k in mine]
        if late:
            return [f"the optimizer, built before, lacks {shown(late)}"]
        if mine and not any(k in self.has_gradient for k in mine):
            return [f"none of the {len(mine)} parameters of {name} has a gradient"]
        unused = [k for k in mine if k not in self.in_graph]
        stuck = self.stuck(name)
        found = [f"no loss depends on {shown(unused)}"] if unused else []
        return found + ([f"{shown(stuck)} has a gradient but is not moved"] if stuck else [])

    def stuck(self, name: str) -> List[str]:
        """Parameters that a step would have changed, but that did not move."""
        return [k for k in self.unmoved(name) if k in self.should_move]

    def untrained(self, name: str) -> List[str]:
        """What did not train, perhaps for a good reason, as clauses of a sentence."""
        mine, unmoved = self._of(name), self.unmoved(name)
        reasons = {
            "requires_grad is False": [k for k, p in mine.items() if not p.requires_grad],
            "gradient 0": [
                k for k, p in mine.items() if p.requires_grad and k not in self.has_gradient
            ],
            "too small a step to change it": [k for k in unmoved if k in self.has_gradient],
        }
        return [f"{', '.join(keys)} ({reason})" for reason, keys in reasons.items() if keys]

    def unmoved(self, name: str) -> List[str]:
        """Parameters that have not moved since :meth:`snapshot`."""
        mine = self._of(name)
        return [k for k, p in mine.items() if k in self.before and p.equal(self.before[k])]

    def _of(self, name: str) -> Dict[str, nn.Parameter]:
        return {f"{name}.{k}": p for k, p in self.heads[name].named_parameters()}

    def _missing(self) -> List[str]:
        """Trainable parameters of the heads that the optimizer does not have."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        named = self.heads.named_parameters()
        return [k for k, p in named if p.requires_grad and id(p) not in held]

    def _check_optimizer(self) -> None:
        groups = self.optimizer.param_groups
        missing = self._missing()
        if missing:
            raise ValueError(
                f"The optimizer does not have {shown(missing)} of the heads: they would never "
                "train."
            )
        trained = {k: p for k, p in self.heads.named_parameters() if p.requires_grad}
        moving = {id(p) for x in groups if x.get("initial_lr", x["lr"]) for p in x["params"]}
        heads: Dict[str, List[str]] = {}
        for key in trained:
            heads.setdefault(key.split(".")[0], []).append(key)
        for name, keys in heads.items():
            # Where some move, or the student's do not either, SOLVER says so.
            if moving and not any(id(trained[k]) in moving for k in keys):
                raise ValueError(
                    f"The optimizer has {shown(keys)} of {name} with a learning rate of 0: they "
                    "would never train."
                )

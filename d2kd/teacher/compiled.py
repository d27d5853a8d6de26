"""torch.compile on a teacher's bottom-up network, counting and telling what it compiles."""

import logging
from typing import Any, Callable, List

import torch
from torch import nn

logger = logging.getLogger(__name__)

BACKEND = "inductor"
# For a single image, for a batch, and for batches and images of any size
EXPECTED_GRAPHS = 3


class CompiledBackbone:
    """
    A detector whose bottom-up network is compiled; without an FPN, its whole backbone.

    The pyramid is left as it is, for its convolutions run when their level is read.

    Attributes:
        graphs: how many were compiled so far
    """

    def __init__(self, detector: nn.Module):
        self.graphs = 0
        network = getattr(detector.backbone, "bottom_up", detector.backbone)
        # Not a module around it: names in the state_dict stay as they are.
        network.forward = torch.compile(network.forward, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, inputs: List[Any]) -> Callable[..., Any]:
        from torch._dynamo import lookup_backend

        self.graphs += 1
        # Parameters are inputs, too, and so are buffers, such as those of a norm. Behind a break of
        # the graph there may be no map of four dimensions.
        own = (x for x in inputs if torch.is_tensor(x) and not isinstance(x, nn.Parameter))
        shape = max((tuple(x.shape) for x in own), key=len, default=())
        text = f"DISTILL.TEACHER.COMPILE: compiling graph {self.graphs}, for {shape}."
        if self.graphs > EXPECTED_GRAPHS:
            logger.warning(
                f"{text} If this goes on, it is compiled anew for each image size: let INPUT give "
                "images of one size, or set it to False."
            )
        else:
            logger.info(text)
        return lookup_backend(BACKEND)(graph, inputs)

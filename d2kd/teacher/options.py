"""Keys of DISTILL.TEACHER that change how the teacher runs, not what it is."""

import re
from typing import NamedTuple, Tuple

import torch

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..utils.checks import check_choice

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class TeacherOptions(NamedTuple):
    """How the teacher runs; the fields are keys of DISTILL.TEACHER."""

    fold_norms: bool = False
    channels_last: bool = False
    precision: str = ""
    compile: bool = False
    device: str = ""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TeacherOptions":
        """
        Raises:
            ValueError: a precision that does not exist, or a device that is not there
        """
        node = cfg.DISTILL.TEACHER
        options = cls(**{name: node[name.upper()] for name in cls._fields})
        check_choice("DISTILL.TEACHER.PRECISION", options.precision, ("", *PRECISIONS))
        if options.device:
            _check_device(options.device)
        return options

    @property
    def steps(self) -> Tuple[str, ...]:
        """Names of the fields that are set and change the model in place, in order."""
        return tuple(x for x in self._fields if x != "device" and getattr(self, x))

    def key(self, name: str) -> str:
        """The key of a field with its value, for a message."""
        return f"DISTILL.TEACHER.{name.upper()} {getattr(self, name)!r}"


def _check_device(device: str) -> None:
    key = f"DISTILL.TEACHER.DEVICE is {device!r}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(
            f"{key}; it must be 'cpu', 'cuda' or one GPU such as 'cuda:1', or '' for the student's."
        )
    gpus, index = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if device != "cpu" and index >= gpus:
        raise ValueError(f"{key}, but PyTorch sees {gpus} GPUs. Leave it empty for the student's.")
    if ":" in device and comm.get_world_size() > 1:
        raise ValueError(
            f"{key}, on which all {comm.get_world_size()} processes would put their teacher. "
            "Leave it empty: each process has its teacher on its own GPU."
        )

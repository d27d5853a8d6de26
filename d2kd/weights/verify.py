"""Check that a file of torch.save is whole, and read what it holds beside the bytes of tensors."""

import codecs
import io
import os
import pickle
import zipfile
from collections import Counter, OrderedDict
from typing import Any, Dict, Tuple

from .file_kinds import why_no_checkpoint
from .safe_load import why_not_tensors


def read_verified(path: str) -> Any:
    """
    Read the values in a checkpoint after verifying the checksum of every tensor, which PyTorch does
    not do. The file is read once; its tensors are not built.

    Returns:
        what was saved, with a placeholder for each tensor

    Raises:
        ValueError: what is wrong with the file, without its path
    """
    if not os.path.isfile(path):
        raise ValueError("there is no such file")
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
            if not broken:
                name = next(x for x in file.namelist() if x.endswith("/data.pkl"))
                return _ValuesOnly(io.BytesIO(file.read(name))).load()
    except pickle.UnpicklingError as error:
        reason = why_not_tensors(path, str(error))
    except Exception as error:  # whatever the bytes look like to the two readers
        reason = why_no_checkpoint(path) or str(error) or type(error).__name__
    else:
        reason = f"{broken} is corrupt"
    raise ValueError(reason)


_OF_TENSORS = (
    "torch",
    "torch._tensor",
    "torch._utils",
    "torch.nn.parameter",
    "torch.serialization",
    "torch.storage",
)


class _Placeholder:
    """Stands in for tensors and other objects of PyTorch."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Beside PyTorch's own, what its weights-only loader lets a file name.
_PLAIN: Dict[Tuple[str, str], Any] = {
    ("_codecs", "encode"): codecs.encode,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("builtins", "set"): set,
    ("collections", "Counter"): Counter,
    ("collections", "OrderedDict"): OrderedDict,
}


class _ValuesOnly(pickle.Unpickler):
    """Leaves out tensors, and calls nothing that could run code."""

    def persistent_load(self, pid: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        plain = _PLAIN.get((module.replace("__builtin__", "builtins"), name))
        if plain is None and module not in _OF_TENSORS:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return plain or _Placeholder

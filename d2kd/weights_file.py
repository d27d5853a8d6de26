"""Read weights from a file without running code that somebody may have put into it."""

import pickle
from typing import IO, Any, Dict, Tuple

import numpy as np
import torch

from detectron2.utils.file_io import PathManager


class _Dtype:
    """
    Stands in for numpy.dtype, whose state in a pickle NumPy believes: with another one, bytes of
    the file become addresses of Python objects.
    """

    def __init__(self, name: str, *_: Any):
        self.dtype = np.dtype(name)
        if self.dtype.hasobject or self.dtype.names or self.dtype.subdtype:
            raise pickle.UnpicklingError(f"it has an array of {self.dtype}; d2kd reads numbers")

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands in for numpy.ndarray: made by its own `_reconstruct` and state, and not otherwise."""

    def __new__(cls, *_: Any) -> "_Array":
        raise pickle.UnpicklingError("it has an array that is not made as NumPy's pickles make it")

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, data))


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0]


def _from_buffer(buffer: Any, dtype: _Dtype, shape: Tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype.dtype).reshape(shape, order=order)


# All that Detectron2's and Detectron1's pickled files are made of, beside Python's own containers,
# and what takes its place here; None: the thing itself.
_KNOWN: Dict[Tuple[str, str], Any] = {
    ("_codecs", "encode"): None,
    ("collections", "OrderedDict"): None,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): None,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.multiarray", "_reconstruct"): None,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


class _ArraysOnly(pickle.Unpickler):
    """A pickle may name any function to be called; here, only what makes an array."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it wants to run {module}.{name}; d2kd reads nothing but arrays from a .pkl"
            )
        return _KNOWN[module, name] or super().find_class(module, name)


def read_arrays(file: IO[bytes]) -> Any:
    """
    Raises:
        pickle.UnpicklingError: there is more in the pickle than arrays and Python's own containers
    """
    return _ArraysOnly(file, encoding="latin1").load()


def read_weights_file(path: str) -> Dict[str, Any]:
    """
    What Detectron2's checkpointer makes of a file, but safely: a .pkl of arrays (model zoo,
    Detectron1), a .pyth of pycls, and any other by PyTorch's weights-only loader.

    Args:
        path: a local file

    Returns:
        "model", name to tensor or array, and what else is in the file; "matching_heuristics" where
        names are those of other projects
    """
    with PathManager.open(path, "rb") as file:
        if not path.endswith(".pkl"):
            data = torch.load(file, map_location="cpu", weights_only=True)
        else:
            data = read_arrays(file)
    if path.endswith(".pyth"):
        state = {k: v for k, v in data["model_state"].items() if "num_batches_tracked" not in k}
        return {"model": state, "__author__": "pycls", "matching_heuristics": True}
    if path.endswith(".pkl") and not {"model", "__author__"} <= set(data):
        state = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    return data if "model" in data else {"model": data}

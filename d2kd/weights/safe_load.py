"""Read weights from a file without running any code in it."""

import importlib
import pickle
import zipfile
from typing import IO, Any, Dict, Tuple

import numpy as np
import torch

from detectron2.utils.file_io import PathManager

from ..utils.checks import shown
from .file_kinds import is_pickle_of_arrays, is_safetensors, objects_in, why_no_checkpoint
from .names import WANTED, with_model

# Errors seen when reading a file that is no checkpoint, or half of one.
UNREADABLE = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
)


class _Dtype:
    """
    Stands in for numpy.dtype. NumPy trusts a pickled dtype's state, with which bytes of the file
    could become addresses of Python objects.
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
    Read a file as Detectron2's checkpointer does, but safely: a .pkl of arrays (model zoo,
    Detectron1), a .pyth of pycls, safetensors, and any other by PyTorch's weights-only loader.

    Args:
        path: a local file

    Returns:
        "model", name to tensor or array, and what else is in the file; "matching_heuristics" where
        names are those of other projects

    Raises:
        ValueError: naming the path; the file is no checkpoint, has more in it than is read safely,
            no weights or several sets of them
    """
    try:
        return _read(path)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error


def _read(path: str) -> Dict[str, Any]:
    reason = why_no_checkpoint(path)
    if reason:
        raise pickle.UnpicklingError(reason)
    if is_safetensors(path):
        data = _read_safetensors(path)
    elif not path.endswith(".pkl"):
        data = load_tensors(path)
    elif zipfile.is_zipfile(path):
        raise pickle.UnpicklingError("it is a file of torch.save: name it .pth")
    else:
        with PathManager.open(path, "rb") as file:
            data = read_arrays(file)
    if not isinstance(data, dict):
        raise TypeError(f"it holds a {type(data).__name__}; {WANTED}")
    if path.endswith(".pyth") and "model_state" in data:
        state = {k: v for k, v in data["model_state"].items() if "num_batches_tracked" not in k}
        return {"model": state, "__author__": "pycls", "matching_heuristics": True}
    if path.endswith(".pkl") and not {"model", "__author__"} <= set(data):
        state = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    return with_model(data, path)


def _read_safetensors(path: str) -> Dict[str, Any]:
    try:
        library = importlib.import_module("safetensors")
    except ModuleNotFoundError:
        raise pickle.UnpicklingError(
            "it is a safetensors file, and that package is not installed: `pip install safetensors`"
        ) from None
    try:
        with library.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except library.SafetensorError as error:
        raise pickle.UnpicklingError(f"it begins as a safetensors file, but {error}") from error


def load_tensors(path: str) -> Any:
    """
    PyTorch's weights-only loader, without its errors' advice to turn that off.

    Raises:
        pickle.UnpicklingError: it is no file of torch.save, or holds other objects than tensors
    """
    try:
        with PathManager.open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = why_not_tensors(path, str(error))
    raise pickle.UnpicklingError(reason)


def why_not_tensors(path: str, said: str) -> str:
    """
    Why PyTorch's weights-only loader refuses a file.

    Args:
        said: its own words, which count where nothing better is known
    """
    if is_pickle_of_arrays(path):
        return "it is a pickle of arrays, not a file of torch.save: name it .pkl"
    objects = objects_in(path)
    if objects:
        whole = any(x.startswith("torch.nn.modules") for x in objects)
        kind = "a whole model, not its" if whole else "more than"
        return (
            f"it holds {kind} named weights: {shown(objects, 4)}. To read such "
            "objects is to run code, so d2kd does not. Where the file was made, save its weights "
            'alone: torch.save({"model": model.state_dict()}, "weights.pth").'
        )
    if "weights_only" in said or "safe_globals" in said:
        return "it is not what torch.save writes of named weights"
    return said.splitlines()[0] if said else "it is not what torch.save writes"

"""Read weights from a file without running code that somebody may have put into it."""

import pickle
from typing import Any, Dict

import torch

from detectron2.utils.file_io import PathManager

# All that Detectron2's and Detectron1's pickled files are made of, beside Python's own containers.
_KNOWN = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


class _ArraysOnly(pickle.Unpickler):
    """A pickle may name any function to be called; here, only what makes an array."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it wants to run {module}.{name}; d2kd reads nothing but arrays from a .pkl"
            )
        return super().find_class(module, name)


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
            data = _ArraysOnly(file, encoding="latin1").load()
    if path.endswith(".pyth"):
        state = {k: v for k, v in data["model_state"].items() if "num_batches_tracked" not in k}
        return {"model": state, "__author__": "pycls", "matching_heuristics": True}
    if path.endswith(".pkl") and not {"model", "__author__"} <= set(data):
        state = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    return data if "model" in data else {"model": data}

"""Weights are read; what else somebody may have put into the file is not run."""

import os
import pickle
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch

from d2kd.checkpoint import PlainCheckpointer, load_whole_detector
from d2kd.weights.safe_load import read_weights_file


class Attack:
    """Unpickled by a trusting reader, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def write_pickle(path: Path, data: Dict[str, Any]) -> str:
    path.write_bytes(pickle.dumps(data, protocol=2))
    return str(path)


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth"])
def test_code_in_a_file_of_weights_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / name
    data = {"model": {"weight": np.zeros(2), "more": Attack(trap)}, "__author__": "someone"}
    if name.endswith("pkl"):
        write_pickle(path, data)
    else:
        torch.save(data, path)
    with pytest.raises(ValueError, match=f"KEY: .*{name} is not a checkpoint that can be read"):
        load_whole_detector(torch.nn.Linear(2, 1), str(path), "KEY")
    assert not trap.exists()


def test_the_attack_of_the_test_above_works_on_a_trusting_reader(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Attack(trap)))
    assert trap.exists()


def test_what_a_pickle_wanted_to_run_is_named(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "weights.pkl", {"model": Attack(tmp_path / "trap")})
    with pytest.raises(ValueError, match=r"weights\.pkl.*wants to run posix\.system"):
        read_weights_file(path)


class Made:
    """Pickled, it is a call of a function, and then perhaps a state."""

    def __init__(self, *reduced: Any):
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


ADDRESS = b"A" * 8  # where nothing is: a reader that believes it crashes, or worse
NO_FLAGS = (3, "|", None, None, None, -1, -1, 0)  # hides from NumPy that these are objects
OBJECTS = Made(np.dtype, ("O8", False, True), NO_FLAGS)
RECONSTRUCT = np.zeros(0).__reduce__()[0]


@pytest.mark.parametrize(
    "made",
    [
        Made(np.ndarray, ((1,), "O", ADDRESS)),
        Made(np.ndarray, ((1,), np.dtype("O"), ADDRESS)),
        Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), OBJECTS, False, ADDRESS)),
        Made(np.float32(0).__reduce__()[0], (OBJECTS, ADDRESS)),
        np.array([None]),
    ],
)
def test_bytes_of_a_pickle_do_not_become_objects(made: Any, tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "weights.pkl", {"model": {"x": made}, "__author__": "x"})
    with pytest.raises(ValueError, match=r"weights\.pkl.*it has an array"):
        read_weights_file(path)


def test_zoo_detector_is_read_with_its_arrays(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(2)}
    path = write_pickle(tmp_path / "zoo.pkl", {"model": arrays, "__author__": "Detectron2"})
    loaded = read_weights_file(path)
    assert loaded["__author__"] == "Detectron2" and "matching_heuristics" not in loaded
    np.testing.assert_array_equal(loaded["model"]["a"], arrays["a"])
    assert loaded["model"]["b"] == 2


@pytest.mark.parametrize("nested", [False, True])
def test_old_backbone_is_matched_by_name_without_its_momentum(nested: bool, tmp_path: Path) -> None:
    blobs = {"conv1_w": np.zeros(2), "conv1_w_momentum": np.zeros(2)}
    data = {"blobs": blobs, "cfg": "text"} if nested else blobs
    loaded = read_weights_file(write_pickle(tmp_path / "old.pkl", data))
    assert list(loaded["model"]) == ["conv1_w"]
    assert loaded["matching_heuristics"] and loaded["__author__"] == "Caffe2"


def test_pickles_of_python_2_and_of_new_numpy_are_read(tmp_path: Path) -> None:
    # The model zoo's files say numpy.core; arrays pickled by NumPy 2 say numpy._core.
    data = pickle.dumps({"model": {"x": np.arange(3)}, "__author__": "x"}, protocol=2)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        found = data.replace(b"numpy._core.multiarray", name)
        found = found.replace(b"numpy.core.multiarray", name)
        path = tmp_path / "arrays.pkl"
        path.write_bytes(found)
        try:
            loaded = read_weights_file(str(path))
        except ModuleNotFoundError:
            continue  # the other NumPy's name
        np.testing.assert_array_equal(loaded["model"]["x"], np.arange(3))


def test_pycls_and_bare_state_dicts_are_read(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "bn.num_batches_tracked": torch.ones(1)}
    torch.save({"model_state": state}, tmp_path / "x.pyth")
    loaded = read_weights_file(str(tmp_path / "x.pyth"))
    assert list(loaded["model"]) == ["w"] and loaded["matching_heuristics"]
    torch.save(state, tmp_path / "x.pth")
    assert list(read_weights_file(str(tmp_path / "x.pth"))) == ["model"]


@pytest.mark.parametrize("dtype", [">f4", "<i8", "f2", "?", "S3"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_and_scalars_of_any_number_are_read(
    dtype: str, protocol: int, tmp_path: Path
) -> None:
    array = np.asfortranarray(np.arange(6).reshape(2, 3)).astype(dtype)
    path = tmp_path / "arrays.pkl"
    data = {"model": {"x": array, "y": array[0, 1]}, "__author__": "x"}
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    model = read_weights_file(str(path))["model"]
    for key, value in data["model"].items():
        assert model[key].dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
        assert model[key].shape == value.shape
        np.testing.assert_array_equal(model[key], value)


def test_unknown_query_of_an_address_is_refused(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(2, 1), tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    PlainCheckpointer(model).load(f"{path}?matching_heuristics=True")
    with pytest.raises(ValueError, match="only supported query is .matching_heuristics=True"):
        PlainCheckpointer(model).load(f"{path}?mode=fast")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_every_pickle_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    data = {"model": {"x": np.arange(6.0).reshape(2, 3)}, "__author__": "x"}
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    np.testing.assert_array_equal(read_weights_file(str(path))["model"]["x"], data["model"]["x"])

"""Checkpoints: the plain student under "model", what distillation adds beside it."""

import logging
import pickle
from typing import Any, Dict, List, Mapping
from urllib.parse import parse_qs, urlparse

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from .weights_file import read_weights_file
from .whole_files import BEST, WholeFiles

logger = logging.getLogger(__name__)

# What reading a file that is no checkpoint, or half of one, has been seen to raise.
_UNREADABLE = (
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


class PlainCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer on the student alone, so that "model" is what stock Detectron2 loads.

    Beside it "distill_heads" (adapters, generators, queues) and "teacher" (a manifest, never
    weights). It also remembers what the last load left uncovered.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any):
        """
        Args:
            model: a Distiller or a plain detector, also inside DistributedDataParallel
        """
        model = unwrap(model)
        if hasattr(model, "student"):
            checkpointables["distill_heads"] = model.heads
            if model.teacher is not None:
                # First, so that another teacher is refused before optimizer and heads are loaded.
                guard = TeacherManifest(model.teacher.manifest)
                checkpointables = {"teacher": guard, **checkpointables}
            model = model.student
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = WholeFiles(self.path_manager)
        self.missing_keys: List[str] = []  # of the model, not in the file or of another shape
        self.unexpected_keys: List[str] = []  # in the file, not of the model
        self.loaded_keys = 0

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        address = urlparse(path or "")
        self._queries = parse_qs(address.query)  # 0.5 does not know them
        if address.query:
            path = address._replace(query="").geturl()
        try:
            return super().load(path, *args, **kwargs)
        except _UNREADABLE as error:
            raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
        finally:
            self._parsed_url_during_load = None  # upstream leaves it set after a failure

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Raises:
            FloatingPointError: a weight is not finite, as a gradient of a finite loss may have left
                it; the checkpoint before is the one to go on from
        """
        heads = self.checkpointables.get("distill_heads", nn.Module())
        # Not their buffers: a running minimum may rightly begin at infinity.
        weights = {**dict(self.model.named_parameters()), **dict(heads.named_parameters())}
        bad = _not_finite(weights) if self.save_to_disk else ""
        if bad:
            raise FloatingPointError(
                f"{name}.pth was not saved: {bad} is not finite. What was saved before is as it "
                "was. Usual cause: a learning rate or loss weight that is too high."
            )
        super().save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # The best one is no place to go on from, also for a run that is killed right after it.
        if last_filename_basename != f"{BEST}.pth":
            super().tag_last_checkpoint(last_filename_basename)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        loaded = read_weights_file(filename)
        if self._queries:
            if self._queries != {"matching_heuristics": ["True"]}:
                raise ValueError(
                    f"of an address, only ?matching_heuristics=True is known, not {self._queries}"
                )
            loaded["matching_heuristics"] = True
        return loaded

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        if not isinstance(checkpoint.get("model"), dict):
            raise TypeError('it has no "model" with named weights')
        given = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [key for key, *_ in incompatible.incorrect_shapes]
        self.missing_keys = sorted({*incompatible.missing_keys, *wrong_shape})
        self.unexpected_keys = list(incompatible.unexpected_keys)
        # Not what is left of the model's: PyTorch does not miss BatchNorm's counters.
        self.loaded_keys = given - len(self.unexpected_keys) - len(wrong_shape)
        return incompatible


class TeacherManifest:
    """Which teacher a run learns from; refuses to go on with another."""

    def __init__(self, manifest: Dict[str, str]):
        """
        Args:
            manifest: "config" and "weights_sha256" of :class:`Teacher`
        """
        self.manifest = manifest

    def state_dict(self) -> Dict[str, str]:
        return dict(self.manifest)

    def load_state_dict(self, state: Dict[str, str]) -> None:
        """
        Raises:
            ValueError: the checkpoint was made with another teacher
        """
        for key, value in self.manifest.items():
            if state.get(key) != value:
                raise ValueError(
                    f"The checkpoint was made with another teacher: {key} differs.\n"
                    f"  checkpoint: {_first_difference(str(state.get(key)), value)}\n"
                    f"  this run:   {_first_difference(value, str(state.get(key)))}\n"
                    "Resume with the teacher of that run (DISTILL.TEACHER), or start a new run in "
                    "another OUTPUT_DIR."
                )


def load_whole_detector(model: nn.Module, path: str, key: str) -> None:
    """
    Load a detector and insist that every parameter and buffer is covered.

    Args:
        path: local file, URL or model-zoo address
        key: config key that named the path, for the error

    Raises:
        ValueError: not a checkpoint, or keys of the detector are missing or of other shape in it
    """
    checkpointer = PlainCheckpointer(model)
    _load(checkpointer, path, key)
    if checkpointer.missing_keys:
        keys, total = checkpointer.missing_keys, len(model.state_dict())
        loaded = checkpointer.loaded_keys
        shown = "\n".join(f"  {k}" for k in keys[:20])
        more = f"\n  and {len(keys) - 20} more" if len(keys) > 20 else ""
        raise ValueError(
            f"{key}: {path!r} covers {loaded} of the detector's {total} entries. "
            "Missing or of another shape:\n"
            f"{shown}{more}\nThe config file and the weights must belong to the same detector."
        )
    bad = _not_finite(model.state_dict())
    if bad:
        raise ValueError(f"{key}: {path!r} has values in {bad} that are not finite.")
    logger.info(f"{key}: {path!r} covers all of the detector, {checkpointer.loaded_keys} entries.")


def load_initial_weights(checkpointer: PlainCheckpointer, path: str) -> None:
    """
    Load MODEL.WEIGHTS into a student: an ImageNet backbone, a zoo detector or a plain .pth.

    Raises:
        ValueError: not a checkpoint, or one that covers nothing of the student
    """
    _load(checkpointer, path, "MODEL.WEIGHTS", checkpointables=[])
    if path and not checkpointer.loaded_keys:
        raise ValueError(
            f"MODEL.WEIGHTS: nothing in {path!r} fits the model by name and shape. An empty value "
            "trains from scratch."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _not_finite(values: Mapping[str, Tensor]) -> str:
    """Name of the first that has NaN or infinite values; "" without."""
    floats = (k for k, v in values.items() if v.is_floating_point() and not v.isfinite().all())
    return next(floats, "")


def _load(checkpointer: PlainCheckpointer, path: str, key: str, **kwargs: Any) -> None:
    """`checkpointer.load`, with the config key that named the path in its errors."""
    try:
        if path and not urlparse(path).scheme and not PathManager.isfile(path):
            raise FileNotFoundError(f"{key}: there is no file {path!r}.")
        checkpointer.load(path, **kwargs)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    except FileNotFoundError:
        raise
    except OSError as error:  # such as a URL's, which does not say which
        raise OSError(f"{key}: {path!r} cannot be read: {error}") from error


def _first_difference(text: str, other: str) -> str:
    """The first line of `text` that `other` does not have in its place."""
    lines, others = text.splitlines(), other.splitlines()
    for i, line in enumerate(lines):
        if i >= len(others) or line != others[i]:
            return line.strip()
    return text[:80]

"""Checkpoints with the plain student under "model" and distillation state beside it."""

import logging
import os
from itertools import zip_longest
from typing import Any, Dict, List, Mapping, Optional
from urllib.parse import parse_qs, urlparse

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from .utils.atomic_file import AtomicFiles
from .utils.packaged import find_file
from .weights.coverage import report_coverage
from .weights.from_timm import named_for_detector
from .weights.names import advice, check_named, describe, without_prefix
from .weights.run_checkpoints import BEST, NOT_OF_A_RUN
from .weights.safe_load import UNREADABLE, read_weights_file
from .weights.trained_config import OF_YAML, changed_keys, check_same_detector

logger = logging.getLogger(__name__)


class PlainCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer for the student alone, so that stock Detectron2 can load "model".

    Files also have "distill_heads" (adapters, generators, queues) and "teacher" (a manifest, never
    weights). The attributes describe which keys the last load covered.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any):
        """
        Args:
            model: a Distiller or a plain detector, also inside DistributedDataParallel
        """
        model = unwrap(model)
        if hasattr(model, "student"):
            checkpointables["distill_heads"] = model.heads
            if model.lessons:
                # First, to refuse another teacher before loading optimizer and heads.
                guard = TeacherManifest(model.teacher_manifest)
                checkpointables = {"teacher": guard, **checkpointables}
            model = model.student
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = AtomicFiles(self.path_manager)
        self.missing_keys: List[str] = []  # in the model, but not in the file or of another shape
        self.unexpected_keys: List[str] = []  # in the file, but not in the model
        self.wrong_shapes: Dict[str, str] = {}  # name to a text with both shapes
        self.loaded_keys = 0
        self.found = ""  # description of the file
        self.advice = ""  # what to do if nothing in the file fits

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:
        """
        Raises:
            ValueError: not a checkpoint, or not one that a run can resume from
        """
        self._resumes = checkpointables is None and "trainer" in self.checkpointables
        self._path = path
        address = urlparse(path or "")
        self._queries = parse_qs(address.query)  # Detectron2 0.5 does not support them
        if address.query:
            path = address._replace(query="").geturl()
        try:
            return super().load(path, checkpointables)
        except UNREADABLE as error:
            raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
        finally:
            self._parsed_url_during_load = None  # upstream leaves it set after a failure

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Raises:
            FloatingPointError: a weight is not finite, which a gradient can cause even if the loss
                is finite; resume from the previous checkpoint
        """
        heads = self.checkpointables.get("distill_heads", nn.Module())
        # Parameters only: a buffer such as a running minimum may validly start at infinity.
        weights = {**dict(self.model.named_parameters()), **dict(heads.named_parameters())}
        bad = _not_finite(weights) if self.save_to_disk else ""
        if bad:
            raise FloatingPointError(
                f"{name}.pth was not saved: {bad} is not finite. Earlier checkpoints are "
                "unchanged. Usual cause: a learning rate or loss weight that is too high."
            )
        super().save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # Never resume from the best checkpoint, even if a run is killed right after saving it.
        if last_filename_basename != f"{BEST}.pth":
            super().tag_last_checkpoint(last_filename_basename)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        loaded = read_weights_file(filename)
        if self._queries:
            if self._queries != {"matching_heuristics": ["True"]}:
                raise ValueError(
                    f"the only supported query is ?matching_heuristics=True, not {self._queries}"
                )
            loaded["matching_heuristics"] = True
        return loaded

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        check_named(checkpoint["model"])
        if self._resumes and "trainer" not in checkpoint:
            raise ValueError(f"{self._path} {NOT_OF_A_RUN}")
        wanted = self.model.state_dict()
        of_timm = named_for_detector(checkpoint["model"], self.model, self._path)
        if of_timm:
            checkpoint["model"] = of_timm
        elif not checkpoint.get("matching_heuristics"):
            checkpoint["model"] = without_prefix(checkpoint["model"], wanted)
        given = dict(checkpoint["model"])
        self.found = describe(checkpoint, given)
        incompatible = super()._load_model(checkpoint)
        self.wrong_shapes = {
            key: f"{key}: {tuple(theirs)} in the file, {tuple(ours)} in the detector"
            for key, theirs, ours in incompatible.incorrect_shapes
        }
        self.missing_keys = sorted({*incompatible.missing_keys, *self.wrong_shapes})
        self.unexpected_keys = list(incompatible.unexpected_keys)
        # Counted from the file: PyTorch does not report missing BatchNorm counters.
        self.loaded_keys = len(given) - len(self.unexpected_keys) - len(self.wrong_shapes)
        self.advice = "" if self.loaded_keys else advice(given, wanted)
        return incompatible


class TeacherManifest:
    """Identifies the teacher of a run, a Distiller's; refuses to resume with another."""

    def __init__(self, manifest: Dict[str, str]):
        self.manifest = manifest

    def state_dict(self) -> Dict[str, str]:
        return dict(self.manifest)

    def load_state_dict(self, state: Dict[str, str]) -> None:
        """
        Raises:
            ValueError: the checkpoint was made with another teacher
        """
        for key, value in self.manifest.items():
            if key not in state and key.endswith("classes"):  # of a checkpoint from before it
                continue
            differences = _differences(str(state.get(key)), value)
            if differences:
                raise ValueError(
                    f"The checkpoint was made with another teacher: {key} differs.\n"
                    + "".join(f"  {x}\n" for x in differences)
                    + "Resume with the teacher of that run (DISTILL.TEACHER), or start a new run "
                    "in another OUTPUT_DIR."
                )


def load_whole_detector(
    model: nn.Module, path: str, key: str, cfg: Optional[CfgNode] = None
) -> None:
    """
    Load a detector and require that every parameter and buffer is covered.

    Args:
        path: local file, URL or model-zoo address
        key: config key of the path, for the error
        cfg: of the detector, to be compared with what it was trained with

    Raises:
        ValueError: not a checkpoint, keys of the detector are missing or have another shape, or it
            was trained with a config with which its weights mean something else
    """
    checkpointer = PlainCheckpointer(model)
    found = _load(checkpointer, path, key)
    if checkpointer.missing_keys:
        keys, shapes = checkpointer.missing_keys, checkpointer.wrong_shapes
        shown = "\n".join(f"  {shapes.get(k, k)}" for k in keys[:20])
        more = f"\n  and {len(keys) - 20} more" if len(keys) > 20 else ""
        raise ValueError(
            f"{key}: {path!r} covers {checkpointer.loaded_keys} of the detector's "
            f"{len(model.state_dict())} entries. Found: {checkpointer.found}. "
            f"Missing or of another shape:\n{shown}{more}\n"
            + (checkpointer.advice or "The config file and the weights must belong together.")
        )
    bad = _not_finite(model.state_dict())
    if bad:
        raise ValueError(f"{key}: {path!r} has values in {bad} that are not finite.")
    if cfg is not None:
        check_same_detector(found, cfg, f"{key}: {path!r}")
    logger.info(f"{key}: {path!r} covers all of the detector, {checkpointer.loaded_keys} entries.")


def load_initial_weights(checkpointer: PlainCheckpointer, path: str) -> None:
    """
    Load MODEL.WEIGHTS into a student: an ImageNet backbone, a zoo detector or a plain .pth.

    Raises:
        ValueError: not a checkpoint, or one that covers less than half of every part of the student
    """
    _load(checkpointer, path, "MODEL.WEIGHTS", checkpointables=[])
    if path:
        missing = checkpointer.missing_keys
        report_coverage(checkpointer.model, missing, path, checkpointer.found, checkpointer.advice)


def check_is_file(path: str, key: str) -> None:
    """
    Raises:
        FileNotFoundError: not a file; names the key and, for a folder, the checkpoints in it
    """
    if os.path.isdir(path):
        inside = sorted(x for x in os.listdir(path) if x.endswith((".pth", ".pkl")))
        hint = f"one of those in it: {', '.join(inside[:5])}" if inside else "a file"
        raise FileNotFoundError(f"{key}: {path!r} is a folder; name {hint}.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{key}: there is no file {path!r}.")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _not_finite(values: Mapping[str, Tensor]) -> str:
    """Name of the first tensor with NaN or infinite values; "" if all are finite."""
    floats = {k: v.isfinite().all() for k, v in values.items() if v.is_floating_point()}
    # A GPU is waited for once, not for each of them.
    finite = torch.stack(list(floats.values())).tolist() if floats else []
    return next((k for k, is_finite in zip(floats, finite) if not is_finite), "")


def _load(checkpointer: PlainCheckpointer, path: str, key: str, **kwargs: Any) -> Dict[str, Any]:
    """`checkpointer.load` with errors that name the config key of the path."""
    path = find_file(path)
    try:
        if path and not urlparse(path).scheme:
            check_is_file(urlparse(path)._replace(query="").geturl(), key)
        return checkpointer.load(path, **kwargs)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    except FileNotFoundError:
        raise
    except OSError as error:  # such as of a URL, whose error does not name it
        raise OSError(f"{key}: {path!r} cannot be read: {error}") from error


def _differences(saved: str, value: str) -> List[str]:
    """First lines of two texts of a manifest that differ; of two YAMLs all keys that both have."""
    if saved == value:
        return []
    if all(x.startswith(OF_YAML) for x in (saved, value)):
        return [f"{key}: {old!r}, now {new!r}" for key, old, new in changed_keys(saved, value)]
    lines = zip_longest(saved.splitlines(), value.splitlines(), fillvalue="")
    old, new = next((x for x in lines if x[0] != x[1]), (saved[:80], value[:80]))
    return [f"checkpoint: {old.strip()}", f"this run:   {new.strip()}"]

"""What identifies a run: saved in its checkpoints, and compared when it is resumed."""

import hashlib
import logging
import os
from typing import Any, Dict, Iterable, List, Mapping, Sequence

import torch
from tabulate import tabulate

import detectron2
from detectron2.config import CfgNode
from detectron2.utils import comm

from .. import __version__
from ..config import student_config
from ..config.unread import why_unread
from ..utils.distils import distils
from ..utils.plugin import imported_files
from ..weights.trained_config import Change, changed_keys
from .resume_rules import PASSED_OVER, REFUSED, TAKEN, UNUSED, rule_of

logger = logging.getLogger(__name__)

WAY_OUT = (
    "Resume with the checkpoint's values, or start a run in an OUTPUT_DIR of its own; its "
    "MODEL.WEIGHTS may name this checkpoint."
)


class RunRecord:
    """Identity of a run: saved with every checkpoint, compared when the run is resumed."""

    def __init__(self, cfg: CfgNode, seed: int, images: Iterable[Mapping[str, Any]]):
        """
        Args:
            cfg: of the whole run
            seed: the one used, also where SEED is left to chance
            images: of DATASETS.TRAIN, in Detectron2's format
        """
        self.cfg = cfg
        student = student_config(cfg)
        student.SEED, student.OUTPUT_DIR = seed, ""  # the same run in another folder
        # Without distillation the same run with and without these keys
        student.DISTILL = cfg.DISTILL.clone() if distils(cfg) else CfgNode()
        self.config = student.dump()
        self.data = fingerprint(images)
        self.environment = {
            "d2kd": __version__,
            "Detectron2": detectron2.__version__,
            "PyTorch": str(torch.__version__),
            "number of processes": comm.get_world_size(),
            **{f"--plugin {name}": sha256 for name, sha256 in imported_files().items()},
        }

    def state_dict(self) -> Dict[str, Any]:
        """Plain values, which PyTorch's weights-only loader reads."""
        return {"config": self.config, "data": self.data, "environment": self.environment}

    def compare(self, saved: Dict[str, Any]) -> None:
        """
        Compare with a checkpoint, and log what has changed.

        Args:
            saved: state of a trainer; one from before this record has "seed" alone

        Raises:
            ValueError: naming each key whose change would make another run of it
        """
        if "config" not in saved:
            logger.warning(
                "The checkpoint has no config in it to compare this run's with, which counts from "
                "here on."
            )
        theirs = saved.get("config") or f"SEED: {saved['seed']}"
        changed = changed_keys(theirs, self.config)
        changed = [x for x in changed if not (why_unread(x[0], self.cfg) or _of_files_alone(x))]
        refused = [x for x in changed if rule_of(x[0]).action == REFUSED]
        if refused:
            lines = [f"  {k}: {old!r}, now {new!r}: {rule_of(k).why}" for k, old, new in refused]
            raise ValueError(
                "The checkpoint was made with other values, with which this run cannot go on:\n"
                + "\n".join(lines)
                + f"\n{WAY_OUT}"
            )
        if saved.get("data", self.data) != self.data:
            unlabelled = distils(self.cfg) and self.cfg.DISTILL.UNLABELLED.SETS
            sets = "DATASETS.TRAIN" + (" or DISTILL.UNLABELLED.SETS" if unlabelled else "")
            raise ValueError(
                f"{sets}: the images or annotations are not those of the checkpoint "
                f"({saved['data']['images']} images then, {self.data['images']} now; sizes, boxes "
                f"and classes are compared, in order). {WAY_OUT}"
            )
        _log_changes(changed)
        self._log_environment(saved.get("environment", self.environment))

    def _log_environment(self, saved: Mapping[str, Any]) -> None:
        now = self.environment.items()
        # Without those that this run alone has: another plug-in, which takes no part in the run.
        other = [f"{k} {saved[k]} (now {v})" for k, v in now if saved.get(k, v) != v]
        if other:
            logger.warning(
                f"The checkpoint was made with {', '.join(other)}: the run goes on with the same "
                "images, but not to the bit as it would have."
            )


def fingerprint(images: Iterable[Mapping[str, Any]]) -> Dict[str, Any]:
    """
    Fingerprint of a training set: file names, sizes, classes and boxes, in order.

    Returns:
        "images", their number, and "sha256"
    """
    digest, count = hashlib.sha256(), 0
    for count, x in enumerate(images, start=1):
        found = x.get("annotations") or ()
        boxes = [(y.get("category_id"), *map(float, _box(y))) for y in found]
        name = os.path.basename(str(x.get("file_name", "")))
        digest.update(repr((name, x.get("height"), x.get("width"), boxes)).encode())
    return {"images": count, "sha256": digest.hexdigest()}


def _box(annotation: Mapping[str, Any]) -> Sequence[float]:
    box = annotation.get("bbox")
    return () if box is None else box


def _of_files_alone(change: Change) -> bool:
    """
    Whether the entries of DISTILL.TEACHERS or STAGES differ in no more than what is passed over of
    DISTILL.TEACHER, too: where files are. Those that teach now are compared by their manifests.
    """
    key, old, new = change
    has_entries = key in ("DISTILL.TEACHERS", "DISTILL.STAGES")
    return has_entries and _without_files(old) == _without_files(new)


def _without_files(entries: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    found = []
    for entry in entries:
        rules = {k: rule_of(f"DISTILL.TEACHER.{k}") for k in entry.get("TEACHER") or {}}
        kept = {k: entry["TEACHER"][k] for k, x in rules.items() if x.action != PASSED_OVER}
        found.append({**entry, "TEACHER": kept})
    return found


def _log_changes(changed: Sequence[Change]) -> None:
    rows = []
    for key, old, new in changed:
        rule = rule_of(key)
        if rule.action in (TAKEN, UNUSED):
            rows.append((key, old, new, ": ".join(filter(None, [rule.action, rule.why]))))
    if rows:
        table = tabulate(rows, ["key", "checkpoint", "this run", ""], disable_numparse=True)
        logger.warning(f"This run's config is not that of the checkpoint:\n\n{table}\n")

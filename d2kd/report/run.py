"""The files of one OUTPUT_DIR."""

import os
from pathlib import Path
from typing import Any, Dict, List

import yaml

from ..config import leaves
from ..engine.facts import read_facts
from ..engine.metrics import Metrics


class Run:
    """
    A run, finished or not, from what it wrote.

    `config`: key to value; `metrics`: losses and AP; `facts`: see :mod:`d2kd.engine.facts`.
    """

    def __init__(self, folder: str):
        """
        Args:
            folder: OUTPUT_DIR

        Raises:
            FileNotFoundError: it is none
        """
        path = os.path.join(folder, "config.yaml")
        if not os.path.isfile(path):
            below = sorted(str(x.parent) for x in Path(folder).glob("*/config.yaml"))
            hint = f" Runs below it: {', '.join(below)}." if below else ""
            raise FileNotFoundError(
                f"There is no file {path!r}: {folder!r} is not the OUTPUT_DIR of a run.{hint}"
            )
        self.folder = folder
        self.config_text = Path(path).read_text()
        self.config: Dict[str, Any] = dict(leaves(yaml.safe_load(self.config_text)))
        self.metrics = Metrics(folder)
        self.facts = read_facts(folder)

    @property
    def distils(self) -> bool:
        is_distiller = self.config["MODEL.META_ARCHITECTURE"] == "Distiller"
        return is_distiller and self.config["DISTILL.ENABLED"]

    def facts_of(self, kind: str) -> List[Dict[str, Any]]:
        return [x for x in self.facts if x["kind"] == kind]

    def lessons(self) -> List[Dict[str, Any]]:
        """What was built, of each stage and each of its teachers the latest."""
        found = {(x["stage"], x.get("teacher", "")): x for x in self.facts_of("distillation")}
        return [found[i] for i in sorted(found)]

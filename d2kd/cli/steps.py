"""Commands of d2kd as steps of a longer work: shown, gone on with, never done twice."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import yaml

from detectron2.config import CfgNode

from ..config import load_config
from ..data.class_names import coco_json_files
from ..utils.atomic_file import write_json
from ..utils.packaged import find_file
from ..utils.sha256 import sha256_of
from ..weights.run_checkpoints import TAG, forget_last_checkpoint
from ..weights.start import starting_weights, teacher_digests

METRICS = ("AP", "AP50", "APs", "APm", "APl")
MASK_AP = "mask AP"  # of detectors that have masks
# Detectron2's progress line: keep time left, iteration and losses, drop timers and learning rate.
PROGRESS = re.compile(r"eta: .*?iter: (\d+).*?(?=\s+time:)")


class Steps:
    """Runs them, several at a time where its caller has several threads."""

    def __init__(self, fresh: bool = False):
        """
        Args:
            fresh: train anew what was trained before
        """
        self.fresh = fresh
        self._running: List[subprocess.Popen] = []

    def run(
        self,
        config_file: str,
        opts: Sequence[str],
        weights: str = "",
        name: str = "",
        plugins: Sequence[str] = (),
    ) -> Dict[str, float]:
        """
        Train, or only evaluate where trained weights are there already.

        Args:
            weights: trained weights of this detector, "" if it is to be trained
            name: stands before each line that is shown
            plugins: files for --plugin

        Returns:
            metric to value, in percent
        """
        cfg = load_config(config_file, opts)
        command = ["train", "--config-file", config_file]
        command += [word for path in plugins for word in ("--plugin", path)]
        if weights and os.path.isfile(find_file(weights)):
            print(f"Trained weights are there: {weights}. Evaluating them.")
            scratch = os.path.join(cfg.OUTPUT_DIR, "evaluation")
            words = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", scratch]
            return evaluation(self._command(["eval", *command[1:], *opts, *words], cfg, name))
        done = os.path.join(cfg.OUTPUT_DIR, "quickstart.json")
        files = (*plugins, *starting_weights(cfg), *_labels(cfg))
        # Those that are missing are for the command to tell.
        digests = [sha256_of(x) for x in files if os.path.isfile(x)] + teacher_digests(cfg)
        _forget_if_changed(cfg.OUTPUT_DIR, digests)
        if not self.fresh and os.path.isfile(done) and _is_of(_load(done)["config"], cfg):
            print(f"Done before: {done}. Add --fresh to repeat it.")
            return _load(done)["results"]
        # From here on the folder's weights and detections are of this run, finished or not.
        Path(done).unlink(missing_ok=True)
        resume = [] if self.fresh else _resumable(cfg)
        results = evaluation(self._command([*command, *resume, *opts], cfg, name))
        write_json(done, {"config": cfg.dump(), "results": results})
        return results

    def stop(self) -> None:
        """End what runs; each can be gone on with."""
        for process in self._running:
            process.terminate()

    def _command(self, words: List[str], cfg: CfgNode, name: str) -> List[str]:
        """Run a command of d2kd, show its progress, return all it printed; stop if it fails."""
        label = f"  {name}: " if name else "  "
        print(f"$ d2kd {shlex.join(words)}", flush=True)
        # One thread, unless the user's environment says more.
        one_thread = {"OMP_NUM_THREADS": "1", **os.environ}
        process = subprocess.Popen(
            [sys.executable, "-m", "d2kd", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=one_thread if cfg.MODEL.DEVICE == "cpu" else None,
        )
        self._running.append(process)
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                progress = PROGRESS.search(line)
                if progress and int(progress.group(1)) % 100 == 99:
                    print(label + progress.group(), flush=True)
                elif "Drawing" in line or "Start inference" in line:
                    print(label + line.split("]: ")[-1].rstrip(), flush=True)
        except BaseException:
            self.stop()
            raise
        if process.wait() == 2:  # the last line tells the mistake
            print(lines[-1], file=sys.stderr)
            sys.exit(2)
        if process.returncode:
            sys.exit("\n".join(lines[-30:]) + "\nThe step failed; the lines above say why.")
        return lines


def stop_on_sigterm() -> None:
    """
    Let SIGTERM raise, as Ctrl-C does, so that what was started ends as well. It would train on
    unseen, and hold its OUTPUT_DIR.
    """
    signal.signal(signal.SIGTERM, _stop)


def _stop(*_: Any) -> None:
    sys.exit("Stopped; the same command goes on.")


def evaluation(lines: Sequence[str]) -> Dict[str, float]:
    """
    Read Detectron2's last "copypaste" blocks: a line of names, a line of values; one for boxes, and
    one for masks where the detector has some.

    Detectron2 says NaN where a detector detects nothing at all; that is an AP of 0. What an
    evaluator does not measure, as Pascal VOC's no AP by size, is NaN.
    """
    rows = [x.split("copypaste: ")[1] for x in lines if "copypaste: " in x]
    found = _block(rows, "bbox")
    masks = _block(rows, "segm") if "Task: segm" in rows else {}
    boxes = {k: found.get(k, math.nan) for k in METRICS}
    return {**boxes, **({MASK_AP: masks["AP"]} if masks else {})}


def _block(rows: List[str], task: str) -> Dict[str, float]:
    start = len(rows) - rows[::-1].index(f"Task: {task}")
    values = dict(zip(rows[start].split(","), map(float, rows[start + 1].split(","))))
    return dict.fromkeys(values, 0.0) if math.isnan(values["AP"]) else values


def metrics_of(*results: Mapping[str, float]) -> List[str]:
    """METRICS, and the mask AP where all of the results have one."""
    return [*METRICS, *([MASK_AP] if all(MASK_AP in x for x in results) else [])]


def mask_warning(gains: Mapping[str, float]) -> str:
    """
    A line where boxes are better and masks worse; "" where not.

    Args:
        gains: metric to gain
    """
    box, mask = gains["AP"], gains.get(MASK_AP, 0.0)
    if not (box > 0 > mask):
        return ""
    return (
        f"Boxes gain {box:+.1f} AP and masks lose {mask:+.1f}: what is imitated helps one at the "
        "cost of the other."
    )


def _labels(cfg: CfgNode) -> List[str]:
    """Paths of the JSONs in DATASETS.COCO_FORMAT of what is trained and evaluated on."""
    used = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return [path for name, path in coco_json_files(cfg).items() if name in used]


def _resumable(cfg: CfgNode) -> List[str]:
    """["--resume"] if OUTPUT_DIR holds an interrupted run of this very config."""
    saved, last = (os.path.join(cfg.OUTPUT_DIR, x) for x in ("config.yaml", TAG))
    if not (os.path.isfile(saved) and os.path.isfile(last)):
        return []
    return ["--resume"] if _is_of(load_config(saved).dump(), cfg) else []


def _forget_if_changed(folder: str, now: Sequence[str]) -> None:
    """
    Forget the run in OUTPUT_DIR if its files were others then: with a head that was edited, a
    teacher that was trained anew or labels that were mended, it is another run under the same
    config.

    Args:
        now: what they are by now, see :func:`sha256_of`
    """
    record = os.path.join(folder, "files.json")
    before = _load(record) if os.path.isfile(record) else []
    if before != now[: len(before)]:  # earlier records end behind the weights
        Path(folder, "quickstart.json").unlink(missing_ok=True)
        forget_last_checkpoint(folder)
    os.makedirs(folder, exist_ok=True)
    write_json(record, now)


def _is_of(text: str, cfg: CfgNode) -> bool:
    """Whether a dumped config is this one; as text it may have other anchors for equal values."""
    return yaml.safe_load(text) == yaml.safe_load(cfg.dump())


def _load(path: str) -> Any:
    with open(path) as file:
        return json.load(file)

"""All commands of the project, by the words that start them."""

import argparse
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Dict, List

from .toys import ROOT

TOOLS = Path(ROOT) / "tools"
# Each by the module that reads its command line.
COMMANDS: Dict[str, str] = {
    "d2kd train": "d2kd.cli.train",
    "d2kd eval": "d2kd.cli.eval",
    "d2kd doctor": "d2kd.doctor",
    "d2kd export": "d2kd.export.__main__",
    "d2kd check": "d2kd.conformance.__main__",
    "d2kd label": "d2kd.cli.label",
    "d2kd draw": "d2kd.cli.draw",
    "d2kd draw-detections": "d2kd.cli.draw_detections",
    "d2kd quickstart": "d2kd.cli.quickstart",
    "d2kd heads": "d2kd.heads.__main__",
    "d2kd keys": "d2kd.cli.keys",
    "d2kd report": "d2kd.cli.report",
    "d2kd.data.preview": "d2kd.data.preview",
    "tools/bench.py": "bench",
    "tools/bench_curves.py": "bench_curves",
    "tools/bench_losses.py": "bench_losses",
    "tools/bench_tables.py": "bench_tables",
    "tools/bench_verdict.py": "bench_verdict",
    "tools/benchmark.py": "benchmark",
    "tools/choose_classes.py": "choose_classes",
    "tools/efficientnet_lite.py": "efficientnet_lite",
    "tools/gpu_check.py": "gpu_check",
    "tools/paired_baseline.py": "paired_baseline",
    "tools/shrink_checkpoint.py": "shrink_checkpoint",
}
# Other words that start the same.
ALIASES: Dict[str, str] = {
    "train_net.py": "d2kd train",
    "d2kd.doctor": "d2kd doctor",
    "d2kd.export": "d2kd export",
    "d2kd.conformance": "d2kd check",
    "d2kd.heads": "d2kd heads",
    "d2kd bench": "tools/bench.py",
    "d2kd compare": "tools/paired_baseline.py",
    "tools/draw_detections.py": "d2kd draw-detections",
    "tools/draw_distillation.py": "d2kd draw",
    "tools/quickstart.py": "d2kd quickstart",
}


def module_of(command: str) -> ModuleType:
    """Import a command; its folder stays on the path for the files beside it."""
    for folder in (ROOT, str(TOOLS)):
        if folder not in sys.path:
            sys.path.append(folder)
    return importlib.import_module(COMMANDS[command])


def parse(command: str, words: List[str]) -> argparse.Namespace:
    """
    Raises:
        SystemExit: as the command itself does, also for --help
    """
    return module_of(command).parse_args(words)


def files_with_parsers() -> List[str]:
    """Modules as COMMANDS names them, found by what their files contain."""
    found = []
    for path in [*Path(ROOT).glob("*.py"), *TOOLS.glob("*.py"), *Path(ROOT).glob("d2kd/**/*.py")]:
        if re.search(r"= (argparse\.ArgumentParser|command_parser)\(", path.read_text()):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append(name.replace("tools.", ""))
    return sorted(found)

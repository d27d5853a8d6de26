"""All commands of the project, by the words that start them."""

import argparse
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Dict, List

from toys import ROOT

TOOLS = Path(ROOT) / "tools"
# Each by the module that reads its command line.
COMMANDS: Dict[str, str] = {
    "train_net.py": "train_net",
    "d2kd.doctor": "d2kd.doctor",
    "d2kd.export": "d2kd.export.__main__",
    "d2kd.conformance": "d2kd.conformance.__main__",
    "d2kd.data.preview": "d2kd.data.preview",
    "tools/bench.py": "bench",
    "tools/bench_tables.py": "bench_tables",
    "tools/benchmark.py": "benchmark",
    "tools/draw_detections.py": "draw_detections",
    "tools/draw_distillation.py": "draw_distillation",
    "tools/paired_baseline.py": "paired_baseline",
    "tools/quickstart.py": "quickstart",
    "tools/shrink_checkpoint.py": "shrink_checkpoint",
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
    """Commands as COMMANDS names them, found by what their files contain."""
    found = []
    for path in [Path(ROOT, "train_net.py"), *TOOLS.glob("*.py"), *Path(ROOT).glob("d2kd/**/*.py")]:
        if re.search(r"(ArgumentParser|argument_parser)\(.*\n?", path.read_text()):
            name = str(path.relative_to(ROOT))
            if name.startswith("d2kd"):
                name = name[: -len(".py")].replace("/", ".").replace(".__main__", "")
            found.append(name)
    return sorted(found)

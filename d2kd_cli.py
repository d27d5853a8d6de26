"""
The command `d2kd`, outside the package: importing that imports PyTorch and Detectron2, which --help
and --version must not need.
"""

import difflib
import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence


class Command(NamedTuple):
    """`module`: has main(argv), which returns an exit code or None for 0; `summary`: one line."""

    module: str
    summary: str


COMMANDS: Dict[str, Command] = {
    "quickstart": Command("d2kd.cli.quickstart", "see what distillation does, in minutes"),
    "doctor": Command("d2kd.doctor", "check a distillation before it is run, and what it costs"),
    "train": Command("d2kd.cli.train", "train a student, alone or with a teacher"),
    "eval": Command("d2kd.cli.eval", "evaluate a student; the teacher is not needed"),
    "compare": Command("d2kd.cli.compare", "train with and without the teacher: is there a gain?"),
    "bench": Command("d2kd.cli.bench", "fill a table of runs, and keep the figures"),
    "report": Command("d2kd.cli.report", "write a run as one HTML file that can be sent"),
    "export": Command("d2kd.export.__main__", "write the student for machines without d2kd"),
    "label": Command("d2kd.cli.label", "label images with a teacher, where it can be trusted"),
    "draw": Command("d2kd.cli.draw", "draw what a student learns from its teacher"),
    "draw-detections": Command("d2kd.cli.draw_detections", "draw what detectors detect"),
    "heads": Command("d2kd.heads.__main__", "list the distillation heads and their keys"),
    "keys": Command("d2kd.cli.keys", "look up config keys: defaults and meaning"),
    "check": Command("d2kd.conformance.__main__", "test distillation heads of your own"),
}

DESCRIPTION = "Knowledge distillation for object detectors in Detectron2."
EXAMPLES = """
Examples:
  d2kd quickstart
  d2kd doctor --config-file quickstart/pkd.yaml
  d2kd train --config-file quickstart/pkd.yaml SOLVER.BASE_LR 0.01
  d2kd eval --config-file quickstart/pkd.yaml MODEL.WEIGHTS output/quickstart/pkd/model_final.pth
  d2kd export --config-file quickstart/pkd.yaml --output exported

A config that is not in the working folder is taken from those that d2kd comes with: quickstart/
and COCO/. `d2kd COMMAND --help` explains a command. A mistake in what a command is given ends in
one line and exit code 2; add --traceback to see where it was found.
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Args:
        argv: default: of this process

    Returns:
        the exit code: 0, or 2 after a mistake of the user's

    Raises:
        Exception: any other error
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        return _print_version()
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return _mistake(f"there is no command {words[0]!r}{hint}; see d2kd --help")
    return _run(words[0], words[1:])


def help_text() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    usage = "usage: d2kd COMMAND ... [--help] [--version]"
    completion = f"  complete -o default -W '{' '.join(COMMANDS)}' d2kd"
    ending = [EXAMPLES, "Completion of commands and files, for ~/.bashrc:", completion]
    return "\n".join([usage, "", DESCRIPTION, "", "Commands:", *rows, *ending])


def _run(name: str, words: List[str]) -> int:
    # Of Detectron2's code, on import: no user can mend it.
    warnings.filterwarnings("ignore", r".torch\.jit\.script. is deprecated", FutureWarning)
    try:
        from d2kd.utils.user_mistakes import run_command
    except ModuleNotFoundError as error:  # d2kd's own says how to install it
        if error.name != "detectron2":
            raise
        return _mistake(str(error))

    def command(argv: Optional[Sequence[str]]) -> Optional[int]:
        return importlib.import_module(COMMANDS[name].module).main(argv)

    return run_command(f"d2kd {name}", command, words)


def _print_version() -> int:
    source = Path(importlib.util.find_spec("d2kd").origin).read_text(encoding="utf-8")
    print("d2kd", re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)[1])
    return 0


def _mistake(text: str) -> int:
    print(f"d2kd: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

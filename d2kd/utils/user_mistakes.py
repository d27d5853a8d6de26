"""
Distinguish user mistakes, which one line explains, from bugs, which need their traceback.

There is no exception class for either. User input is checked before the first step, by code of d2kd
that raises a built-in exception with the key, the value and the remedy. So the origin decides: an
error is a user mistake if a `raise` statement in d2kd's own code raised it, outside training steps.
The same ValueError from PyTorch, from Detectron2, from a user's plug-in, from an operation inside
d2kd (int("x")), or from a training step keeps its traceback. New checks need no special handling.
"""

import dis
import sys
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Callable, List, Optional, Sequence

KINDS = (ValueError, OSError, ImportError)
OURS = ("d2kd", "d2kd_cli", "__main__")  # first parts of module names
TOOLS = Path(__file__).parents[2] / "tools"  # modules of a checkout, of any name
TRAINING_STEPS = "detectron2.engine.train_loop"
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_users_mistake(error: BaseException) -> bool:
    """Whether a caught exception is a user mistake, as defined above."""
    if not isinstance(error, KINDS) or error.__traceback__ is None:
        return False
    trace = _trace(error)
    if any(_module(x.tb_frame) == TRAINING_STEPS for x in trace):
        return False
    origin = trace[-1]
    raised = origin.tb_frame.f_code.co_code[origin.tb_lasti] == _RAISE
    of_tool = Path(origin.tb_frame.f_code.co_filename).absolute().parent == TOOLS
    return raised and (of_tool or _module(origin.tb_frame).split(".")[0] in OURS)


def run_command(
    name: str,
    command: Callable[[Optional[Sequence[str]]], Optional[int]],
    argv: Optional[Sequence[str]] = None,
) -> int:
    """
    Run a command; a user mistake prints one line to stderr, or a traceback with --traceback.

    Args:
        name: name of the command, which starts the line
        command: gets argv; returns an exit code, None for 0
        argv: default: sys.argv[1:]

    Returns:
        the command's exit code; 2 after a user mistake

    Raises:
        Exception: any other error
    """
    try:
        return command(argv) or 0
    except Exception as error:
        if not is_users_mistake(error):
            raise
        if "--traceback" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        else:
            print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: BaseException) -> str:
    """The message of an exception on one line; list items are joined with semicolons."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "".join(f"{x} " if x.endswith((":", ".")) else f"{x}; " for x in lines)
    return text.rstrip("; ")


def _trace(error: BaseException) -> List[TracebackType]:
    """From where the exception was caught to where it was raised."""
    trace, entry = [], error.__traceback__
    while entry is not None:
        trace.append(entry)
        entry = entry.tb_next
    return trace


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))

"""Let one run at a time write to an OUTPUT_DIR."""

import fcntl
import os
import socket
from contextlib import ExitStack, contextmanager
from typing import Iterator, TextIO

from detectron2.utils import comm

FILE = "run.lock"


@contextmanager
def hold_folder(folder: str) -> Iterator[None]:
    """
    Hold an OUTPUT_DIR, which is made, inside, or until the process ends, by `kill -9` too. Called
    in all processes.

    Raises:
        ValueError: in all of them: another run holds it
    """
    with ExitStack() as opened:
        holder = ""
        if comm.is_main_process():
            os.makedirs(folder, exist_ok=True)
            # Not in "w" mode, which would empty the file of the one who holds it.
            file = opened.enter_context(open(os.path.join(folder, FILE), "a+"))
            holder = _take(file)
        holder, *_ = comm.all_gather(holder)
        if holder:
            raise ValueError(
                f"OUTPUT_DIR: {folder!r} is in use by another run ({holder}), whose checkpoints "
                "this one would overwrite. Wait for its end, or give this run a folder of its own."
            )
        yield


def _take(file: TextIO) -> str:
    """Lock an open file, and say who has; "" if it is this process now."""
    try:
        # By process: unlike flock's it does not outlive a killed run in its data loader's workers.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return file.read() or "it does not say which"
    except OSError:  # a disk that knows no locks
        return ""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return ""

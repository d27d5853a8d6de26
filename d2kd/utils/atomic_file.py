"""Files that are there whole or not at all, whenever a run is killed."""

import errno
import os
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO, Any, Iterator

# What a disk says that takes no more.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def write_whole(path: str, mode: str = "wb") -> Iterator[IO]:
    """
    Open a file for writing that takes its name only when all of it is on the disk.

    Raises:
        OSError: it cannot be written; what had that name before is still there
    """
    unfinished = f"{path}.unfinished"  # what a killed process leaves, the next save overwrites
    try:
        with open(unfinished, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        # torch.save may hide what a full disk says; other RuntimeErrors are not about the disk.
        reasons = (error, error.__cause__, error.__context__)
        said = [x for x in reasons if isinstance(x, OSError)]
        if not said:
            raise
        raise OSError(
            f"{path} could not be written: {said[0]}. What had that name before is as it was. Make "
            "room, or name another folder; a run goes on with --resume."
        ) from error
    finally:
        with suppress(OSError):  # on a disk that is now read-only, it must not hide the error
            os.remove(unfinished)


def check_writable(folder: str) -> None:
    """
    Raises:
        OSError: OUTPUT_DIR cannot be made, or nothing can be written there
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"OUTPUT_DIR: nothing can be written to {folder!r}: {error}. Name another folder."
        ) from error


@contextmanager
def named_when_full(folder: str) -> Iterator[None]:
    """
    Raises:
        OSError: naming OUTPUT_DIR where the disk was full and what was written there did not say so
    """
    try:
        yield
    except OSError as error:
        if error.filename or error.errno not in _NO_ROOM:
            raise
        raise OSError(
            f"OUTPUT_DIR: no more can be written to {folder!r}: {error}. Its last checkpoint is as "
            "it was. Make room; the run goes on with --resume."
        ) from error


class WholeFiles:
    """A path manager as checkpointers use it, whose `open` writes files whole."""

    def __init__(self, path_manager: Any):
        self._path_manager = path_manager

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if "w" in mode:
            return write_whole(path, mode)
        return self._path_manager.open(path, mode, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

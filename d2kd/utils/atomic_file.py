"""Write files atomically: complete or not at all, even if the process is killed."""

import errno
import json
import os
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO, Any, Iterator

# Errors of a disk that is full or read-only.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
    """
    Open a temporary file for writing and rename it to `path` once it is complete on disk.

    Raises:
        OSError: it cannot be written; an existing file at `path` is unchanged
    """
    unfinished = f"{path}.unfinished"  # left by a killed process, overwritten by the next save
    try:
        with open(unfinished, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        # torch.save may wrap the error of a full disk; other RuntimeErrors are unrelated.
        chain = (error, error.__cause__, error.__context__)
        disk_errors = [x for x in chain if isinstance(x, OSError)]
        if not disk_errors:
            raise
        raise OSError(
            f"{path} could not be written: {disk_errors[0]}. An existing file of that name is "
            "unchanged. Free disk space, or use another folder; --resume continues a run."
        ) from error
    finally:
        with suppress(OSError):  # on a read-only disk; must not hide the first error
            os.remove(unfinished)


def write_json(path: str, content: Any) -> None:
    """Errors are those of :func:`atomic_write`."""
    with atomic_write(path, "w") as file:
        json.dump(content, file)


def check_writable(folder: str, key: str = "OUTPUT_DIR") -> None:
    """
    Args:
        key: what names the folder, for the error

    Raises:
        OSError: the folder cannot be created or is not writable
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{key}: {folder!r} is not writable: {error}. Choose another folder."
        ) from error


@contextmanager
def explain_full_disk(folder: str) -> Iterator[None]:
    """
    Add OUTPUT_DIR to the error of a full disk, unless it already names a file.

    Raises:
        OSError: the disk is full
    """
    try:
        yield
    except OSError as error:
        if error.filename or error.errno not in _NO_ROOM:
            raise
        raise OSError(
            f"OUTPUT_DIR: cannot write to {folder!r}: {error}. Its last checkpoint is unchanged. "
            "Free disk space and continue with --resume."
        ) from error


class AtomicFiles:
    """A path manager for checkpointers, whose `open` writes files atomically."""

    def __init__(self, path_manager: Any):
        self._path_manager = path_manager

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if "w" in mode:
            return atomic_write(path, mode)
        return self._path_manager.open(path, mode, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

"""The checkpoints of a run, as a killed process may have left them."""

import logging
from pathlib import Path
from typing import Any, List, Tuple

from .verify import read_verified

logger = logging.getLogger(__name__)

TAG = "last_checkpoint"  # the file in which fvcore names the one to go on from
BEST = "model_best"  # name of the checkpoint with the best evaluation
NOT_OF_A_RUN = (
    "is no checkpoint to resume from: it has weights, but not the optimizer and iteration of a run "
    "of d2kd. To start from its weights, name it in MODEL.WEIGHTS and leave out --resume."
)


def read_last_checkpoint(folder: str) -> Tuple[str, Any]:
    """
    Find the checkpoint to go on from: the last one, or, where that is damaged, the newest that is
    whole. Every file that is considered is read once.

    Returns:
        its path, and its content as :func:`read_verified` gives it; ("", None) if there never was
        one

    Raises:
        ValueError: there are checkpoints, but none of them is whole, or no last_checkpoint
    """
    tag = Path(folder, TAG)
    if not tag.is_file():
        _refuse_unnamed(folder)
        return "", None
    last, reasons = Path(folder, tag.read_text(errors="replace").strip() or "?"), []
    for path in dict.fromkeys([last, *_by_age(folder)]):
        try:
            content = read_verified(str(path))
        except ValueError as error:
            reasons.append(f"{path} is not a checkpoint that can be read: {error}.")
            continue
        if reasons:
            logger.error(f"{' '.join(reasons)} Going on from {path}.")
        return str(path), content
    raise ValueError(" ".join(reasons))


def forget_last_checkpoint(folder: str) -> bool:
    """
    For a run that begins in the folder of another one, and must not go on from that one's end.

    Returns:
        whether there was one
    """
    tag = Path(folder, TAG)
    there = tag.is_file()
    tag.unlink(missing_ok=True)
    return there


def last_whole_checkpoint(folder: str) -> str:
    """The path alone of :func:`read_last_checkpoint`."""
    return read_last_checkpoint(folder)[0]


def _refuse_unnamed(folder: str) -> None:
    found = _by_age(folder)
    if found:
        raise ValueError(
            f"OUTPUT_DIR: {folder!r} has {found[0].name}, but no file {TAG} that names it. It may "
            "be of an earlier run in this folder: begin anew without --resume. Or that file was "
            f"not copied with the checkpoints: write {found[0].name} into it."
        )


def _by_age(folder: str) -> List[Path]:
    """Checkpoints of a run, newest first; not the best one, which is no place to go on from."""
    found = [x for x in Path(folder).glob("model_*.pth") if x.stem != BEST]
    return sorted(found, key=lambda x: x.stat().st_mtime_ns, reverse=True)

"""The checkpoints of a run, as a killed process may have left them."""

import logging
import os
import zipfile
from pathlib import Path
from typing import List

from .file_kinds import why_no_checkpoint
from .safe_load import load_tensors

logger = logging.getLogger(__name__)

BEST = "model_best"  # name of the checkpoint with the best evaluation


def last_whole_checkpoint(folder: str) -> str:
    """
    The checkpoint to go on from: the last one, or, where that is damaged, the newest that is whole.

    Returns:
        its path; "" if there never was one

    Raises:
        ValueError: there are checkpoints, but none of them is whole
    """
    tag = Path(folder, "last_checkpoint")
    if not tag.is_file():
        return ""
    last, reasons = Path(folder, tag.read_text(errors="replace").strip() or "?"), []
    for path in dict.fromkeys([last, *_by_age(folder)]):
        damage = damage_of(str(path))
        if not damage:
            if reasons:
                logger.error(f"{' '.join(reasons)} Going on from {path}.")
            return str(path)
        reasons.append(f"{path} is not a checkpoint that can be read: {damage}.")
    raise ValueError(" ".join(reasons))


def damage_of(path: str) -> str:
    """What is wrong with a file of torch.save; "" if nothing is."""
    if not os.path.isfile(path):
        return "there is no such file"
    reason = why_no_checkpoint(path)
    if reason:
        return reason
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # a checksum for every tensor, which PyTorch does not look at
        if broken:
            return f"{broken} is corrupt"
        load_tensors(path)
    except Exception as error:  # whatever the bytes look like to the two readers
        return str(error) or type(error).__name__
    return ""


def _by_age(folder: str) -> List[Path]:
    """Checkpoints of a run, newest first; not the best one, which is no place to go on from."""
    found = [x for x in Path(folder).glob("model_*.pth") if x.stem != BEST]
    return sorted(found, key=lambda x: x.stat().st_mtime_ns, reverse=True)

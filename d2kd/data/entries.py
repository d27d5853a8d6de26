import os
from typing import Any, Dict, Tuple

from ..utils.checks import nearest

ENTRY_KEYS = ("NAME", "JSON", "IMAGES")


def parse_entry(entry: Dict[str, Any], key: str) -> Tuple[str, str, str]:
    """Returns: NAME, JSON and IMAGES of one entry of DATASETS.COCO_FORMAT."""
    if not isinstance(entry, dict):
        raise ValueError(f"{key}: must be a mapping with {', '.join(ENTRY_KEYS)}, got {entry!r}")
    for k in entry:
        if k not in ENTRY_KEYS:
            near = nearest(k, ENTRY_KEYS, cutoff=0)[0]
            raise ValueError(f"{key}: unknown key {k!r} in {dict(entry)}. Did you mean {near}?")
    for k in ENTRY_KEYS:
        if not isinstance(entry.get(k), str) or not entry[k]:
            raise ValueError(f"{key}: {k} must be a non-empty string, got {dict(entry)}")
    return entry["NAME"], os.path.expanduser(entry["JSON"]), os.path.expanduser(entry["IMAGES"])

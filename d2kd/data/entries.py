import os
from typing import Any, List, Tuple

from detectron2.config import CfgNode

from ..utils.checks import nearest

ENTRY_KEYS = ("NAME", "JSON", "IMAGES")


# NAME, JSON and IMAGES of an entry of DATASETS.COCO_FORMAT, and the config key to blame
Entry = Tuple[str, str, str, str]


def coco_format_entries(cfg: CfgNode) -> List[Entry]:
    entries = enumerate(cfg.DATASETS.COCO_FORMAT)
    return [_parsed(entry, f"DATASETS.COCO_FORMAT[{i}]") for i, entry in entries]


def _parsed(entry: Any, key: str) -> Entry:
    if not isinstance(entry, dict):
        raise ValueError(f"{key}: must be a mapping with {', '.join(ENTRY_KEYS)}, got {entry!r}")
    for k in entry:
        if k not in ENTRY_KEYS:
            near = nearest(k, ENTRY_KEYS, cutoff=0)[0]
            raise ValueError(f"{key}: unknown key {k!r} in {dict(entry)}. Did you mean {near}?")
    for k in ENTRY_KEYS:
        if not isinstance(entry.get(k), str) or not entry[k]:
            raise ValueError(f"{key}: {k} must be a non-empty string, got {dict(entry)}")
    json_file, image_root = map(os.path.expanduser, (entry["JSON"], entry["IMAGES"]))
    return entry["NAME"], json_file, image_root, key

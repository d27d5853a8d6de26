from typing import Any, Dict, List


def is_rle(mask: Dict[str, Any]) -> bool:
    """
    Whether a mask's runs add up to its size. pycocotools does not check this and loops forever on
    others.

    Args:
        mask: {"size": [height, width], "counts": runs, as numbers or in COCO's compressed text}
    """
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        return False
    if not all(type(x) is int and x > 0 for x in size):
        return False
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or not all(type(x) is int and x >= 0 for x in counts):
        return False
    return sum(counts) == size[0] * size[1]


def _uncompressed(text: str) -> List[int]:
    """
    Decode COCO's compressed runs: groups of 5 bits, lowest first, with a sixth bit for "more
    follow", as ASCII from 48 on; from the fourth run on, the difference to the last but one.

    Returns:
        the runs; [] if the text is incomplete
    """
    counts: List[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # negative
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return [] if shift else counts

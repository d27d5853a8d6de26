"""The configs that d2kd comes with, and the weights beside them, from any folder."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# A wheel has them inside the package, a checkout beside it.
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def find_file(path: str) -> str:
    """
    Find a file that a user, or a key of a YAML, names.

    Args:
        path: as it is named, relative to the working folder

    Returns:
        `path` itself where it exists; else :func:`packaged_file`; else `path`
    """
    return path if os.path.exists(path) else packaged_file(path) or path


def packaged_file(name: str) -> str:
    """
    Args:
        name: such as "configs/quickstart/cwd.yaml", or "quickstart/cwd.yaml"

    Returns:
        path of the file that d2kd comes with; "": none of this name
    """
    if not name or "://" in name or os.path.isabs(name):
        return ""
    parts = Path(name).parts
    parts = parts[1:] if parts[:1] == ("configs",) else parts
    if ".." in parts:
        return ""
    found = (place.joinpath(*parts) for place in _PLACES)
    return next((str(x) for x in found if x.is_file()), "")

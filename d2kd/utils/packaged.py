"""Find the configs and weights that come with d2kd, from any working folder."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# In a wheel they are inside the package, in a checkout beside it.
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def find_file(path: str) -> str:
    """
    Find a file named by a user or in a YAML.

    Args:
        path: absolute, or relative to the working folder

    Returns:
        `path` if it exists; else :func:`packaged_file`; else `path`
    """
    return path if os.path.exists(path) else packaged_file(path) or path


def packaged_file(name: str) -> str:
    """
    Args:
        name: such as "configs/quickstart/pkd.yaml", or "quickstart/pkd.yaml"

    Returns:
        path of d2kd's own file of this name; "" if there is none
    """
    if not name or "://" in name or os.path.isabs(name):
        return ""
    parts = Path(name).parts
    parts = parts[1:] if parts[:1] == ("configs",) else parts
    if ".." in parts:
        return ""
    found = (place.joinpath(*parts) for place in _PLACES)
    return next((str(x) for x in found if x.is_file()), "")

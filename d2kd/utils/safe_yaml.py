"""Read a YAML and its _BASE_ files without running code in them."""

import os
from typing import Any, Dict, Tuple

import yaml

import detectron2
from detectron2.utils.file_io import PathManager

from .packaged import packaged_file


def read_yaml(path: str, above: Tuple[str, ...] = ()) -> Dict[str, Any]:
    """
    Read a YAML and merge it over its _BASE_ files, as Detectron2 does, but safely.

    Only files of the installed Detectron2 may run code (its Base-RetinaNet.yaml computes anchor
    sizes): they are as trusted as its Python code.

    Args:
        path: path of the YAML; a _BASE_ may also be a URL
        above: chain of files whose _BASE_ led to this one

    Raises:
        ValueError, OSError: naming the file and what is wrong with it
    """
    if path in above:
        raise ValueError(f"{path}: its _BASE_ leads back to itself ({', '.join(above)}).")
    own = _parse(path)
    bases = own.pop("_BASE_", [])
    merged: Dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise ValueError(f"{path}: _BASE_ must name a YAML or a list of them, got {base!r}.")
        base = os.path.expanduser(base)
        if not _is_url(base):  # relative to the YAML, which may also be a URL
            beside = os.path.join(os.path.dirname(path), base)
            found = _is_url(beside) or os.path.isfile(beside)
            base = beside if found else packaged_file(base) or beside
        if not _is_url(base) and not os.path.isfile(base):
            raise FileNotFoundError(f"{path}: its _BASE_ {base!r} does not exist.")
        _update(merged, read_yaml(base, (*above, path)), base)
    _update(merged, own, path)
    return merged


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which PyYAML silently uses the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else None)
        return node


def _parse(path: str) -> Dict[str, Any]:
    own = os.path.abspath(os.path.dirname(detectron2.__file__)) + os.sep
    # A URL's "absolute path" would begin with the current folder, which may be Detectron2's.
    trusted = not _is_url(path) and os.path.abspath(path).startswith(own)
    try:
        with PathManager.open(path, "rb") as file:
            content = yaml.load(file, yaml.UnsafeLoader if trusted else _Loader)
    except yaml.constructor.ConstructorError as error:
        if "a constructor for the tag" not in error.problem:
            raise ValueError(f"{path} is not YAML: {error}") from None
        raise ValueError(
            f"{path} wants to run code ({error.problem.strip()}), which d2kd does not allow in a "
            "YAML. Write the values out; for a detector of Detectron2's model zoo, give its name "
            "instead of a path."
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # such as the date 2020-13-13
        raise ValueError(f"{path} is not YAML: {error}") from None
    except OSError as error:  # such as of a URL, whose error does not name it
        raise OSError(f"{path} cannot be read: {error}") from error
    if content is None:
        raise ValueError(f"{path} is empty.")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a mapping of config keys.")
    return content


def _is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _update(merged: Dict[str, Any], new: Dict[str, Any], path: str, prefix: str = "") -> None:
    """Override the values of `merged` with those of `new`, recursively."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            _update(merged[key], value, path, f"{prefix}{key}.")
        elif isinstance(value, dict) and key in merged:
            raise ValueError(
                f"{path}: {prefix}{key} is a mapping, but in its _BASE_ it is {merged[key]!r}."
            )
        else:
            merged[key] = value

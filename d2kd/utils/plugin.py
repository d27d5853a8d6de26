"""Import a user's file, so that the YAML can use what it registers."""

import hashlib
import importlib.util
import os
import sys
from typing import Dict

from .sha256 import sha256_of

_IMPORTED: Dict[str, str] = {}


def import_file(path: str) -> None:
    """
    Run a Python file, once per process; it registers its heads, views or detectors.

    Raises:
        FileNotFoundError: no such file
    """
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--plugin: there is no file {path!r}.")
    stem = os.path.splitext(os.path.basename(path))[0]
    name = f"d2kd_plugin_{stem}_{hashlib.sha1(path.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _IMPORTED[os.path.basename(path)] = sha256_of(path)[:12]


def imported_files() -> Dict[str, str]:
    """What :func:`import_file` has run in this process: file name to the start of its SHA-256."""
    return dict(_IMPORTED)

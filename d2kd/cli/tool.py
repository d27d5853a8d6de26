"""Commands that are files in tools/ of d2kd's repository: they run many trainings of a checkout."""

import importlib
import sys
from pathlib import Path
from typing import Optional, Sequence

_FOLDER = Path(__file__).parents[2] / "tools"


def run_tool(command: str, name: str, argv: Optional[Sequence[str]]) -> Optional[int]:
    """
    Args:
        command: of d2kd, for the error
        name: of the file, without .py

    Returns:
        what its main() returns

    Raises:
        FileNotFoundError: d2kd was installed from a wheel, which has no tools/
    """
    path = _FOLDER / f"{name}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"d2kd {command} is {path.name} in tools/ of d2kd's repository, and there is no file "
            f"{str(path)!r}. Run it from a checkout: pip install -e . there."
        )
    if str(_FOLDER) not in sys.path:
        sys.path.insert(0, str(_FOLDER))
    return importlib.import_module(name).main(argv)

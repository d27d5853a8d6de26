"""Commands that are files in tools/ of d2kd's repository: they run many trainings of a checkout."""

import importlib
import sys
from typing import Optional, Sequence

from ..utils.user_mistakes import TOOLS


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
    path = TOOLS / f"{name}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"d2kd {command} is {path.name} in tools/ of d2kd's repository, and there is no file "
            f"{str(path)!r}. Run it from a checkout: pip install -e . there."
        )
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name).main(argv)

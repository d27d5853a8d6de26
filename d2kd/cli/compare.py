"""Is the teacher worth it? Train the same student with and without it, over several seeds."""

import importlib
import sys
from pathlib import Path
from typing import Optional, Sequence

_TOOL = Path(__file__).parents[2] / "tools" / "paired_baseline.py"


def main(argv: Optional[Sequence[str]] = None) -> None:
    """
    Raises:
        FileNotFoundError: d2kd was installed from a wheel, which has no tools/
    """
    if not _TOOL.is_file():
        raise FileNotFoundError(
            f"d2kd compare is {_TOOL.name} in tools/ of d2kd's repository, and there is no file "
            f"{str(_TOOL)!r}. Run it from a checkout: pip install -e . there."
        )
    sys.path.insert(0, str(_TOOL.parent))
    words = sys.argv[1:] if argv is None else argv
    importlib.import_module(_TOOL.stem).main([x for x in words if x != "--traceback"])

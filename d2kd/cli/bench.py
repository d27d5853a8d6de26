"""Fill a table of runs, and keep the figures."""

from typing import Optional, Sequence

from .tool import run_tool


def main(argv: Optional[Sequence[str]] = None) -> Optional[int]:
    return run_tool("bench", "bench", argv)

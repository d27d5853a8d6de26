"""Is the teacher worth it? Train the same student with and without it, over several seeds."""

from typing import Optional, Sequence

from .tool import run_tool


def main(argv: Optional[Sequence[str]] = None) -> Optional[int]:
    return run_tool("compare", "paired_baseline", argv)

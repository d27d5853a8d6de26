"""What a page is made of; how it looks is for page.html to say."""

from dataclasses import dataclass
from typing import Any, List, Sequence, Union


@dataclass(frozen=True)
class Table:
    """`numbers`: indices of the columns that are aligned to the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Sequence[int]
    caption: str = ""
    kind = "table"


@dataclass(frozen=True)
class Facts:
    """Names and values, which may be long."""

    rows: Sequence[Sequence[Any]]
    kind = "facts"


@dataclass(frozen=True)
class Text:
    """Lines that stay as they are; with a title it is folded away."""

    text: str
    title: str = ""
    kind = "text"


@dataclass(frozen=True)
class Picture:
    """`source`: a data URI; `wide`: as wide as the page, else several stand side by side."""

    title: str
    source: str
    wide: bool = False
    kind = "picture"


@dataclass(frozen=True)
class Section:
    """`title`: "" of the one that opens the page."""

    title: str
    blocks: List[Any]


Part = Union[Section, str]  # a section, or in one line why there is none

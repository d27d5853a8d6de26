"""What a page is made of; how it looks is for page.html to say."""

from dataclasses import dataclass, field
from typing import Any, List, Sequence, Union


@dataclass(frozen=True)
class Table:
    """`numbers`: indices of the columns that are aligned to the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Sequence[int]
    caption: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Facts:
    """Names and values, which may be long."""

    rows: Sequence[Sequence[Any]]
    kind: str = field(default="facts", init=False)


@dataclass(frozen=True)
class Text:
    """Lines that stay as they are; with a title it is folded away."""

    text: str
    title: str = ""
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Picture:
    """`source`: a data URI; `wide`: as wide as the page, else several stand side by side."""

    title: str
    source: str
    wide: bool = False
    kind: str = field(default="picture", init=False)


@dataclass(frozen=True)
class Section:
    """`title`: "" of the one that opens the page."""

    title: str
    blocks: List[Any]


Part = Union[Section, str]  # a section, or in one line why there is none

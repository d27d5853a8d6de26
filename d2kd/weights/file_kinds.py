"""Identify, by its bytes alone, a file that was given as a checkpoint and is none."""

import io
import os
import pickletools
import tarfile
import zipfile
from contextlib import suppress
from typing import IO, Dict, List

# How other kinds of files begin.
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer: `git lfs pull` fetches the file itself"),
    (b"\x89HDF", "an HDF5 file, such as Keras writes"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"\x93NUMPY", "a single NumPy array"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")
# Modules that a file of plain weights refers to.
_OF_TENSORS = ("torch", "torch._utils", "torch.storage", "torch.serialization", "collections")
# How files of torch.save begin: since 1.6, and before.
_TORCH_SAVE = (b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


def why_no_checkpoint(path: str) -> str:
    """What kind of file it is, if it cannot be a checkpoint; "" where it may be one."""
    size = os.path.getsize(path)
    if not size:
        return "it is empty, as an interrupted download leaves it"
    with open(path, "rb") as file:
        head = file.read(512)
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return f"it is {kind}"
    if head.startswith(b"PK"):
        return _of_zip(path)
    if head.lstrip().lower().startswith(_PAGES):
        return "it is a web page: download the file itself, not the page about it"
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        return "it is an ONNX graph: name the checkpoint that it was exported from"
    if tarfile.is_tarfile(path):
        return "it is a tar archive: unpack it"
    if head.isascii() and head.decode().replace("\n", "").replace("\t", "").isprintable():
        return f"it is text that begins with {head[:40].decode()!r}"
    return ""


def is_safetensors(path: str) -> bool:
    """Whether it begins as one: the length of a header in JSON, and the header."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path)


def _of_zip(path: str) -> str:
    if not zipfile.is_zipfile(path):
        return "its end is missing, as after an interrupted download, copy or save"
    with zipfile.ZipFile(path) as file:
        names = [os.path.basename(x) for x in file.namelist()]
    if "constants.pkl" in names:
        return "it is a TorchScript archive: name the checkpoint that it was exported from"
    if "data.pkl" in names:
        return ""  # of torch.save
    return f"it is a zip archive of {', '.join(names[:3])}: unpack it"


def objects_in(path: str) -> List[str]:
    """
    Names of the classes and functions, beyond those of tensors, that a file of torch.save, or a
    pickle, would call.
    """
    found: List[str] = []
    with suppress(Exception):  # whatever the bytes look like
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                name = next(x for x in file.namelist() if x.endswith("/data.pkl"))
                _add_objects(io.BytesIO(file.read(name)), found)
        else:
            with open(path, "rb") as file:
                while True:  # the older format is several pickles, then bytes of the tensors
                    _add_objects(file, found)
    return found


def is_pickle_of_arrays(path: str) -> bool:
    """Whether it was written by pickle, not torch.save, and holds only arrays."""
    with open(path, "rb") as file:
        by_torch = file.read(16).startswith(_TORCH_SAVE)
    objects = objects_in(path)
    return bool(objects) and not by_torch and all(x.startswith("numpy.") for x in objects)


def _add_objects(file: IO[bytes], found: List[str]) -> None:
    texts: List[str] = []  # as they were pushed, also from the memo
    memo: Dict[int, str] = {}
    pushed = ""
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed
        elif opcode.name.endswith("PUT"):
            memo[int(value)] = pushed
        module, name = "", ""
        if opcode.name == "GLOBAL":
            module, name = value.split(" ", 1)
        elif opcode.name == "STACK_GLOBAL":
            module, name = texts[-2:]
        pushed = memo.get(int(value), "") if opcode.name.endswith("GET") else value
        if isinstance(pushed, str) and pushed:
            texts.append(pushed)
        plain = module in _OF_TENSORS or name in ("set", "encode")
        if name and not plain and f"{module}.{name}" not in found:
            found.append(f"{module}.{name}")

import hashlib

from detectron2.utils.file_io import PathManager


def sha256_of(path: str) -> str:
    """Of a file, or of what a URL is, in hexadecimal digits; read in blocks."""
    digest = hashlib.sha256()
    with PathManager.open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()

"""
PEP 517 backend that builds a pure-Python wheel of Detectron2 v0.5.

No Detectron2 source is kept here. The sdist is fetched from the user's own package indexes,
compared with a pinned sha256, edited by the table in d2_edits.py and handed to setuptools. Set
DETECTRON2_SDIST to a copy of the sdist to build without a network.
"""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Mapping, Optional

from d2_edits import EDITS, BuildError, apply_edits, describe

HERE = Path(__file__).resolve().parent
REQUIREMENT = "detectron2-cdo==0.5"  # upstream's v0.5 under a name that the index had free
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
REMEDY = "Set DETECTRON2_SDIST to a copy of the sdist to build without a network."

# Where the sdist keeps a package -> where Detectron2's own setup.py installs it.
PACKAGES = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}


def build_wheel(
    wheel_directory: str,
    config_settings: Optional[Mapping[str, str]] = None,
    metadata_directory: Optional[str] = None,
) -> str:
    """The PEP 517 hook: write the wheel into `wheel_directory` and return its file name."""
    from setuptools import build_meta

    wheel_directory = os.path.abspath(wheel_directory)
    with tempfile.TemporaryDirectory() as work:
        tree = lay_out(unpack(fetch(Path(work)), Path(work)), Path(work) / "tree")
        os.chdir(tree)
        try:
            return build_meta.build_wheel(wheel_directory)
        finally:
            os.chdir(HERE)  # some systems cannot delete the working directory


def fetch(directory: Path) -> Path:
    """Return the path of the sdist: the user's copy, or a download into `directory`."""
    if os.environ.get("DETECTRON2_SDIST"):
        return Path(os.environ["DETECTRON2_SDIST"])
    from unearth import PackageFinder

    options = index_options()
    if "cert" in options:
        os.environ["SSL_CERT_FILE"] = options["cert"]
    finder = PackageFinder(
        index_urls=options.get("index-url", "").split(),  # none: the finder takes the default index
        trusted_hosts=options.get("trusted-host", "").split(),
    )
    if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        finder.sources.clear()
    else:
        for url in options.get("extra-index-url", "").split():
            finder.add_index_url(url)
    for link in options.get("find-links", "").split():
        finder.add_find_links(os.path.expanduser(link))
    try:
        best = finder.find_best_match(REQUIREMENT).best
        if best is not None:
            return finder.download(best.link, directory)
    except Exception as e:  # what a network can raise differs between unearth's versions
        raise BuildError(f"Cannot download {REQUIREMENT}: {e}. {REMEDY}")
    raise BuildError(f"None of pip's package indexes answered with {REQUIREMENT}. {REMEDY}")


def index_options() -> Dict[str, str]:
    """Return pip's index options by name, such as "index-url", as `pip install` would see them."""
    # A build sandbox hides the environment's pip by means of PYTHONPATH, which -E leaves unread.
    command = [sys.executable, "-E", "-m", "pip", "config", "list"]
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return parse_pip_config(pip.stdout) if pip.returncode == 0 else read_variables(os.environ)


def parse_pip_config(listing: str) -> Dict[str, str]:
    """
    Args:
        listing: output of `pip config list`, lines such as global.index-url='https://...'

    Returns:
        option to value. As in pip, the environment wins over [install], which wins over [global].
    """
    options: Dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section):
                options[key.replace(section, "", 1)] = str(ast.literal_eval(value))
    return options


def read_variables(environ: Mapping[str, str]) -> Dict[str, str]:
    """Return the same options from pip's or uv's variables, for an environment without pip."""
    names = {
        "index-url": ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"),
        "extra-index-url": ("PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL"),
        "find-links": ("PIP_FIND_LINKS", "UV_FIND_LINKS"),
        "no-index": ("PIP_NO_INDEX", "UV_NO_INDEX"),
        "trusted-host": ("PIP_TRUSTED_HOST", "UV_INSECURE_HOST"),
        "cert": ("PIP_CERT",),
    }
    options = {}
    for option, variables in names.items():
        value = next((environ[v] for v in variables if environ.get(v)), None)
        if value is not None:
            # uv also takes commas between links, and "name=" in front of an index.
            values = value.replace(",", " ").split()
            options[option] = " ".join(re.sub(r"^[\w.-]+=", "", v) for v in values)
    return options


def unpack(sdist: Path, directory: Path) -> Path:
    """Unpack the sdist with the pinned sha256, refuse any other file. Return its top folder."""
    if not sdist.is_file():
        raise BuildError(f"{sdist} is not a file. It should be the sdist of {REQUIREMENT}.")
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise BuildError(f"{sdist} is refused: its sha256 is {found}, not {SDIST_SHA256}.")
    shutil.unpack_archive(str(sdist), str(directory / "source"), "gztar")
    (top,) = (directory / "source").iterdir()
    return top


def lay_out(source: Path, tree: Path) -> Path:
    """Copy the packages from `source` into `tree`, edit them and add what the wheel needs."""
    for old, new in PACKAGES.items():
        shutil.copytree(source / old, tree / new)
    apply_edits(tree, EDITS)
    shutil.copy(HERE / "no_ext.py", tree / "detectron2/_no_ext.py")
    shutil.copy(HERE / "pyproject.toml", tree)
    shutil.copy(source / "LICENSE", tree)
    changes = describe(EDITS, f"{REQUIREMENT} (sha256 {SDIST_SHA256})")
    (tree / "CHANGES.md").write_text(changes, encoding="utf-8")
    return tree

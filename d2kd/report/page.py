"""The page as HTML: one file, no script, nothing from the network."""

from datetime import datetime

from jinja2 import Environment, PackageLoader

from .. import __version__
from .contents import Contents


def render(contents: Contents) -> str:
    loader = PackageLoader("d2kd.report", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    values = {
        **contents._asdict(),
        "version": __version__,
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }
    return environment.get_template("page.html").render(**values)

"""Curves as SVG, and pictures, in data URIs: a page that needs no other file."""

import base64
import io
from typing import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..engine.metrics import Curve

SIZE = 4.2, 2.5  # width and height, inches
POINTS = 250  # of a curve: more are not seen, and a long run has thousands
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
INK, GRID = "#1f4e8c", "#d8d8d8"


def draw_curve(curve: Curve) -> str:
    """A data URI of an SVG."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    x, y = (_means(values) for values in curve)
    axes.plot(x, y, color=INK, linewidth=1.5, marker="o" if len(x) < 20 else "", markersize=4)
    axes.set_xlabel("iteration")
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _means(values: Sequence[float]) -> np.ndarray:
    """Of neighbours, as many as there are points."""
    parts = np.array_split(np.asarray(values, dtype=float), min(POINTS, len(values)))
    return np.array([part.mean() for part in parts])

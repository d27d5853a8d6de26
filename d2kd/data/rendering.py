"""
Render the built-in synthetic set.

Shape shorthand: S is the image size in pixels; an image is (S, S, 3) floats, BGR in [0, 255]; a
cover is (S, S) float32 in [0, 1], the share of each pixel that a figure covers.
"""

from typing import Optional

import cv2
import numpy as np

from .outlines import DISTRACTORS, Outline, place

SUPERSAMPLING = 3  # covers are drawn this many times larger and then averaged


def cover_of(outline: Outline, image_size: int) -> np.ndarray:
    """Returns: the (S, S) cover of an outline in pixels."""
    large = np.zeros((image_size * SUPERSAMPLING,) * 2, dtype=np.uint8)
    # OpenCV puts pixel centres at integers; `shift` adds 4 fractional bits to coordinates.
    points = [np.round((p * SUPERSAMPLING - 0.5) * 16).astype(np.int32) for p in outline]
    cv2.fillPoly(large, points, 255, shift=4)
    small = cv2.resize(large, (image_size, image_size), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def _colour_field(
    rng: np.random.Generator, image_size: int, colour: np.ndarray, cells: int, spread: float
) -> np.ndarray:
    """Returns: (S, S, 3), a smoothly varying colour with a spread of about `spread` grey levels."""
    grid = np.clip(colour + rng.normal(0, spread, size=(cells, cells, 3)), 0, 255)
    field = cv2.resize(grid.astype(np.float32), (image_size,) * 2, interpolation=cv2.INTER_CUBIC)
    return np.clip(field, 0, 255)


def _grating(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Returns: (S, S, 1) in [-1, 1], stripes of random width, angle and hardness."""
    y, x = np.mgrid[:image_size, :image_size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 24)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + rng.uniform(0, 6))
    return np.tanh(wave * rng.uniform(0.5, 4))[..., None]


def background(
    rng: np.random.Generator, image_size: int, clutter: int, texture: float
) -> np.ndarray:
    """
    Returns: an image with a texture of the given strength, in [0, 1], and up to `clutter` figures
        that belong to no class
    """
    colour, cells = rng.uniform(0, 255, size=3), int(rng.integers(2, 7))
    image = _colour_field(rng, image_size, colour, cells, spread=texture * rng.uniform(5, 60))
    if rng.random() < 0.5:
        image = image + texture * rng.uniform(4, 22) * _grating(rng, image_size)
    sigma = texture * rng.uniform(0, 25)
    grain = rng.normal(0, sigma, size=(image_size // 3, image_size // 3, 3))
    image = image + cv2.resize(grain.astype(np.float32), (image_size,) * 2)
    for _ in range(rng.integers(0, clutter + 1)):
        size = np.exp(rng.uniform(np.log(10), np.log(0.8 * image_size)))
        outline = DISTRACTORS[rng.integers(len(DISTRACTORS))](rng)
        placed = place(outline, rng, size, rng.uniform(0, image_size, size=2), stretch=1.1)
        cover = cover_of(placed, image_size)
        opacity = rng.uniform(0.3, 1)
        image = paint(rng, image, cover, opacity=opacity, contrast=15, texture=texture)
    return image


def _colour(rng: np.random.Generator, hue: Optional[float]) -> np.ndarray:
    """Returns: (3,) BGR, any colour, or a strong one within 20 degrees of a hue, 0 to 360."""
    if hue is None:
        return rng.uniform(0, 255, size=3)
    hsv = [(hue + rng.uniform(-20, 20)) % 360, rng.uniform(0.45, 1), rng.uniform(0.35, 1)]
    return cv2.cvtColor(np.float32([[hsv]]), cv2.COLOR_HSV2BGR)[0, 0] * 255.0


def paint(
    rng: np.random.Generator,
    image: np.ndarray,
    cover: np.ndarray,
    opacity: float,
    contrast: float,
    texture: float,
    hue: Optional[float] = None,
) -> np.ndarray:
    """
    Returns: the image with one textured figure on top, in roughly the given hue (None: any
        colour), at least `contrast` grey levels away from what it covers
    """
    size = len(image)
    behind = cover.reshape(-1) @ image.reshape(-1, 3) / max(cover.sum(), 1)
    colour = _colour(rng, hue)
    while np.abs(colour - behind).mean() < contrast:
        colour = _colour(rng, hue)
    fill = _colour_field(rng, size, colour, cells=2, spread=texture * rng.uniform(0, 35))
    if rng.random() < 0.35:
        fill = fill + texture * rng.uniform(8, 30) * _grating(rng, size)
    alpha = opacity * cover[..., None]
    if rng.random() < 0.3:  # a soft shadow
        shift = np.float32([[1, 0, rng.uniform(-3, 3)], [0, 1, rng.uniform(-3, 3)]])
        shadow = cv2.GaussianBlur(cv2.warpAffine(cover, shift, (size, size)), (0, 0), 1.5)
        image = image * (1 - 0.5 * shadow[..., None])
    return image * (1 - alpha) + np.clip(fill, 0, 255) * alpha


def camera(rng: np.random.Generator, image: np.ndarray, noise: float, blur: float) -> np.ndarray:
    """Returns: (S, S, 3) uint8, the image with uneven light, blur, changed contrast and noise."""
    light = cv2.resize(rng.uniform(0.7, 1.1, size=(2, 2)).astype(np.float32), image.shape[:2])
    image = image * light[..., None]
    sigma = rng.uniform(0, blur)
    if sigma > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = 128 + (image - 128) * rng.uniform(0.5, 1.1)
    image = image + rng.uniform(0, noise) * rng.standard_normal(image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)

from .draw import draw_panel
from .level_weights import LevelWeights, add_level_weights, draw_level_weights, level_tables

__all__ = [
    "LevelWeights",
    "add_level_weights",
    "draw_level_weights",
    "draw_panel",
    "level_tables",
]

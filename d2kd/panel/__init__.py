from .draw import class_names, draw_panel

__all__ = ["class_names", "draw_panel"]

"""The pictures that a run wrote for TensorBoard."""

from typing import Optional, Tuple

from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from ..engine.monitor.show_panel import TAG


def latest_panel(folder: str) -> Optional[Tuple[int, bytes]]:
    """
    Args:
        folder: OUTPUT_DIR

    Returns:
        its iteration and the PNG; None: there is none
    """
    events = EventAccumulator(folder, size_guidance={IMAGES: 1})  # keeps the last of each name
    events.Reload()
    if TAG not in events.Tags()[IMAGES]:
        return None
    image = events.Images(TAG)[-1]
    return image.step, image.encoded_image_string

from typing import Sequence

from torch import nn

from detectron2.engine import HookBase
from detectron2.utils import comm

from ...panel import draw_panel

TAG = "distillation"  # in TensorBoard


class ShowPanel(HookBase):
    """
    Write the panel of a batch's first image to TensorBoard, in the iterations in which Detectron2
    writes the student's detections.

    It only reads results of the step and draws no random number, so it does not affect training.
    """

    def __init__(self, model: nn.Module, period: int, class_names: Sequence[str] = ()):
        """
        Args:
            model: a Distiller; one without a teacher, or a plain detector, has no panel
            period: iterations between panels; 0: none
            class_names: of the ground truth
        """
        self.model = model
        self.period = period
        self.class_names = class_names

    def after_step(self) -> None:
        if self.period <= 0 or self.trainer.iter % self.period or not comm.is_main_process():
            return
        if getattr(self.model, "last_step", None):
            panel = draw_panel(self.model, class_names=self.class_names)
            self.trainer.storage.put_image(TAG, panel.transpose(2, 0, 1))

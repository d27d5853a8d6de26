"""What a teacher detects, in place of the labels that an image does not have."""

from typing import List, Optional, Sequence

import torch

from detectron2.structures import Instances

from ..pairing.classes import CommonClasses


def confident(
    detections: Sequence[Instances], score: float, classes: Optional[CommonClasses] = None
) -> List[Instances]:
    """
    Args:
        detections: of each image, of all classes of the teacher
        score: smallest one to be kept, in (0, 1]
        classes: common ones, of which objects are kept; None: the teacher's are the student's

    Returns:
        gt_boxes, XYXY in input pixels, and gt_classes, the student's, of each image
    """
    count = len(classes.teacher_names) if classes else 0
    to_student = torch.tensor([classes.student_class.get(i, -1) for i in range(count)])
    found = []
    for x in detections:
        new = x.pred_classes
        if classes is not None:
            new = to_student.to(new.device)[new]
        keep = (new >= 0) & (x.scores >= score)
        found.append(Instances(x.image_size, gt_boxes=x.pred_boxes[keep], gt_classes=new[keep]))
    return found

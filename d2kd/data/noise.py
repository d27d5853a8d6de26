from typing import Any, Dict, List

import torch

from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks


def noise_batch(
    num_images: int, height: int, width: int, boxes: int, num_classes: int, num_keypoints: int = 0
) -> List[Dict[str, Any]]:
    """
    Training input of random noise with random boxes, on the CPU like that of a data loader. Each
    box is also its own mask (for Mask R-CNN) and its own proposal (for MODEL.LOAD_PROPOSALS); its
    keypoints are random points inside it.
    """
    batch = []
    for _ in range(num_images):
        corner = torch.rand(boxes, 2) * torch.tensor([width, height]) / 2
        size = (0.1 + torch.rand(boxes, 2) * 0.4) * min(height, width)
        corners = torch.cat([corner, corner + size], dim=1)
        outlines = corners[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
        instances = Instances((height, width), gt_boxes=Boxes(corners))
        instances.gt_masks = PolygonMasks([[x] for x in outlines])
        instances.gt_classes = torch.randint(num_classes, (boxes,))
        if num_keypoints:
            inside = corner[:, None] + torch.rand(boxes, num_keypoints, 2) * size[:, None]
            visible = torch.full((boxes, num_keypoints, 1), 2.0)
            instances.gt_keypoints = Keypoints(torch.cat([inside, visible], dim=2))
        proposals = Instances((height, width), proposal_boxes=Boxes(corners))
        proposals.objectness_logits = torch.zeros(boxes)
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        said = {"image": image, "instances": instances, "proposals": proposals}
        batch.append({**said, "height": height, "width": width})
    return batch

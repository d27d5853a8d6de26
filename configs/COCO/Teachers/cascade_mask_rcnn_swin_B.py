# Cascade Mask R-CNN on Swin-B, from ImageNet-21k (Detectron2's projects/ViTDet: 53.9 box AP). Newer
# than 0.6, with timm.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import SwinTransformer
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
constants = model_zoo.get_config("common/data/constants.py").constants
model.update(
    pixel_mean=constants.imagenet_rgb256_mean,
    pixel_std=constants.imagenet_rgb256_std,
    input_format="RGB",
)
model.backbone.update(
    bottom_up=L(SwinTransformer)(depths=[2, 2, 18, 2], embed_dim=128, num_heads=[4, 8, 16, 32]),
    in_features=("p0", "p1", "p2", "p3"),
    norm="LN",
    square_pad=1024,
)
model.proposal_generator.head.conv_dims = [-1, -1]
heads = model.roi_heads
for key in ("box_head", "box_predictor", "proposal_matcher"):
    heads.pop(key)
heads.mask_head.conv_norm = "LN"
# A box head for each stage of the cascade, of an IoU from which a proposal counts as an object, and
# of the scale of its deltas
stages = ((0.5, 10, 5), (0.6, 20, 10), (0.7, 30, 15))
heads.update(
    _target_=CascadeROIHeads,
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[256] * 4,
            fc_dims=[1024],
            conv_norm="LN",
        )
        for _ in stages
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=(xy, xy, wh, wh)),
            num_classes="${...num_classes}",
            cls_agnostic_bbox_reg=True,
            test_score_thresh=0.05,
        )
        for _, xy, wh in stages
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou, _, _ in stages
    ],
)

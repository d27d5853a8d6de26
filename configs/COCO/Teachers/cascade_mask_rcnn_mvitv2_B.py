# Cascade Mask R-CNN on MViTv2-B, ImageNet-21k (Detectron2's projects/ViTDet: 55.6 box AP). Newer
# than 0.6, with timm.
from functools import partial

from torch import nn

from detectron2.config import LazyCall as L
from detectron2.modeling import MViT

from .cascade_mask_rcnn_swin_B import model

model.backbone.bottom_up = L(MViT)(
    embed_dim=96,
    depth=24,
    num_heads=1,
    last_block_indexes=(1, 4, 20, 23),
    residual_pooling=True,
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
    out_features=("scale2", "scale3", "scale4", "scale5"),
)
model.backbone.in_features = ("scale2", "scale3", "scale4", "scale5")

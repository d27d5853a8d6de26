# Mask R-CNN on ViTDet, ViT-L (projects/ViTDet of Detectron2: 55.5 AP). Newer than 0.6, with timm
from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net.embed_dim = 1024
model.backbone.net.depth = 24
model.backbone.net.num_heads = 16
# Attention within windows, but in every sixth block
model.backbone.net.window_block_indexes = [i for i in range(24) if i % 6 != 5]

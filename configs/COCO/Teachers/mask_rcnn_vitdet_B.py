# Mask R-CNN on ViTDet, ViT-B (projects/ViTDet of Detectron2: 51.6 AP). Newer than 0.6, with timm
from detectron2 import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model

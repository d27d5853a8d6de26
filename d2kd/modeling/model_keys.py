from detectron2.config import CfgNode


def add_model_config(cfg: CfgNode) -> None:
    """Add MODEL.FCOS and MODEL.SWIN; defaults are those of upstream's LazyConfigs."""
    node = cfg.MODEL.FCOS = CfgNode()
    node.NUM_CLASSES = 80
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    node.NUM_CONVS = 4
    node.NORM = "GN"  # of the towers
    node.PRIOR_PROB = 0.01
    node.CENTER_SAMPLING_RADIUS = 1.5  # in strides
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    node.SCORE_THRESH_TEST = 0.2  # of sqrt(class score x centerness)
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.6

    node = cfg.MODEL.SWIN = CfgNode()
    # Defaults are Swin-T; Swin-S: DEPTHS [2, 2, 18, 2]; Swin-B: EMBED_DIM 128, HEADS [4, 8, 16, 32]
    node.EMBED_DIM = 96
    node.DEPTHS = [2, 2, 6, 2]
    node.NUM_HEADS = [3, 6, 12, 24]
    node.WINDOW_SIZE = 7
    node.DROP_PATH_RATE = 0.2
    node.FREEZE_AT = -1  # stages kept frozen; -1: none
    # Stages that feed the pyramid, "p0" (stride 4) to "p3" (stride 32)
    node.OUT_FEATURES = ["p0", "p1", "p2", "p3"]

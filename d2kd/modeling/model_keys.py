from detectron2.config import CfgNode


def add_model_config(cfg: CfgNode) -> None:
    """Add MODEL.FCOS and MODEL.SWIN; defaults are those of upstream's LazyConfigs."""
    node = cfg.MODEL.FCOS = CfgNode()
    node.NUM_CLASSES = 80  # without background
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]  # levels of the pyramid that the head reads
    node.NUM_CONVS = 4  # of each tower
    node.NORM = "GN"  # of the towers
    node.PRIOR_PROB = 0.01  # class score of every cell at the start
    node.CENTER_SAMPLING_RADIUS = 1.5  # in strides
    node.FOCAL_LOSS_ALPHA = 0.25  # weight of the positives
    node.FOCAL_LOSS_GAMMA = 2.0  # exponent
    node.SCORE_THRESH_TEST = 0.2  # of sqrt(class score x centerness)
    node.TOPK_CANDIDATES_TEST = 1000  # predictions kept on each level before NMS
    node.NMS_THRESH_TEST = 0.6  # IoU

    # Swin-T; Swin-S: DEPTHS [2, 2, 18, 2]; Swin-B: that, EMBED_DIM 128 and NUM_HEADS [4, 8, 16, 32]
    node = cfg.MODEL.SWIN = CfgNode()
    node.EMBED_DIM = 96  # channels of the first stage
    node.DEPTHS = [2, 2, 6, 2]  # blocks of each stage
    node.NUM_HEADS = [3, 6, 12, 24]  # attention heads of each stage
    node.WINDOW_SIZE = 7  # width of an attention window, tokens
    node.DROP_PATH_RATE = 0.2  # of stochastic depth, in the last block; less before
    node.FREEZE_AT = -1  # stages kept frozen; -1: none
    # Stages that feed the pyramid, "p0" (stride 4) to "p3" (stride 32)
    node.OUT_FEATURES = ["p0", "p1", "p2", "p3"]

from detectron2.config import CfgNode


def add_model_config(cfg: CfgNode) -> None:
    """
    Add MODEL.FCOS, MODEL.SWIN, MODEL.TIMM and MODEL.REPPOINTS; defaults are those of upstream's
    LazyConfigs, and for RepPoints the published ones.
    """
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

    node = cfg.MODEL.REPPOINTS = CfgNode()
    node.NUM_CLASSES = 80  # without background
    # Levels of the pyramid that the head reads, each with twice the stride of the one before
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    node.NUM_CONVS = 3  # of each tower
    node.NORM = "GN"  # of the towers
    node.PRIOR_PROB = 0.01  # class score of every cell at the start
    # The size of object, in strides, from which on a level learns the initial points; the box
    # losses measure in it
    node.POINT_SCALE = 4.0
    # For classes and refined points, as in MODEL.RETINANET, but the IoU of ground truth with the
    # boxes of the initial points
    node.IOU_THRESHOLDS = [0.4, 0.5]
    node.IOU_LABELS = [0, -1, 1]
    node.FOCAL_LOSS_ALPHA = 0.25  # weight of the positives
    node.FOCAL_LOSS_GAMMA = 2.0  # exponent
    node.SMOOTH_L1_LOSS_BETA = 0.11  # of POINT_SCALE strides, below which the loss is quadratic
    node.INIT_LOSS_WEIGHT = 0.5  # of the boxes of the initial points
    node.REFINE_LOSS_WEIGHT = 1.0  # of the boxes of the refined points
    node.SCORE_THRESH_TEST = 0.05  # of the class score
    node.TOPK_CANDIDATES_TEST = 1000  # predictions kept on each level before NMS
    node.NMS_THRESH_TEST = 0.5  # IoU

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

    # With MODEL.BACKBONE.NAME build_timm_fpn_backbone (two-stage detectors) or
    # build_retinanet_timm_fpn_backbone (dense ones). MODEL.WEIGHTS: a file of timm's weights, or
    # timm://NAME.TAG for its hub
    node = cfg.MODEL.TIMM = CfgNode()
    node.NAME = "mobilenetv3_large_100"  # a model of timm with features_only
    # Of the features that the pyramid is built from; []: 4 to 32, and 8 to 32 for dense detectors
    node.STRIDES = []
    # What its BatchNorms do: "BN" train, "SyncBN" with statistics of all processes, "EvalBN" train
    # weight and bias only, "FrozenBN" stay as they are
    node.NORM = "BN"
    # All that the features of this stride depend on stays frozen; 0: none
    node.FREEZE_TO_STRIDE = 0
    node.DROP_PATH_RATE = 0.0  # of stochastic depth, in the last block; less before

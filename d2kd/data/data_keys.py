from detectron2.config import CfgNode


def add_data_config(cfg: CfgNode) -> None:
    """
    Add the keys of d2kd's data sets under DATASETS; see :func:`register_datasets`.

    Args:
        cfg: a node of detectron2's `get_cfg()`, changed in place
    """
    # Your own sets in COCO's format, a list of {NAME: my_train, JSON: a/train.json, IMAGES:
    # a/images}. DATASETS.TRAIN and DATASETS.TEST may then use the names.
    cfg.DATASETS.COCO_FORMAT = []

    # The built-in synthetic sets, drawn on first use: d2kd_shapes_train; d2kd_shapes_val, for
    # choosing weights, settings and best checkpoints; d2kd_shapes_test, for final results only.
    cfg.DATASETS.SHAPES = CfgNode()
    # Folder for the sets. Empty: $DETECTRON2_DATASETS, or ./datasets if that is not set
    cfg.DATASETS.SHAPES.ROOT = ""
    # Image i of a split depends only on this seed, the split, i and the keys from IMAGE_SIZE on
    cfg.DATASETS.SHAPES.SEED = 0
    # Number of images per split
    cfg.DATASETS.SHAPES.NUM_TRAIN = 4000
    cfg.DATASETS.SHAPES.NUM_VAL = 300
    cfg.DATASETS.SHAPES.NUM_TEST = 1000
    # Width and height of an image, pixels. COCO's "large" starts at 96 x 96
    cfg.DATASETS.SHAPES.IMAGE_SIZE = 144
    # Number of objects per image. Fewer are drawn if there is no room, but at least one
    cfg.DATASETS.SHAPES.MIN_OBJECTS = 1
    cfg.DATASETS.SHAPES.MAX_OBJECTS = 4
    # Longer side of an object, log-uniform between MIN_SIZE pixels and MAX_SIZE x IMAGE_SIZE,
    # MAX_SIZE in (0, 1]
    cfg.DATASETS.SHAPES.MIN_SIZE = 24
    cfg.DATASETS.SHAPES.MAX_SIZE = 1.0
    # Smallest share of an object that stays visible behind others and the border, in (0, 0.9]
    cfg.DATASETS.SHAPES.MIN_VISIBLE = 0.6
    # Probability that an object has roughly the colour of its class, [0, 1]. All other figures
    # have a random colour, so that colour is a hint but shape decides
    cfg.DATASETS.SHAPES.OWN_COLOUR = 0.9
    # Strength of the texture of the background and of all figures, [0, 1]
    cfg.DATASETS.SHAPES.TEXTURE = 0.2
    # Largest number of background figures that belong to no class, per image
    cfg.DATASETS.SHAPES.CLUTTER = 2
    # Largest standard deviation of the pixel noise, grey levels (0..255)
    cfg.DATASETS.SHAPES.NOISE = 6.0
    # Largest standard deviation of the Gaussian blur, pixels
    cfg.DATASETS.SHAPES.BLUR = 0.5
    # Write the masks of the visible pixels, as RLE, for detectors with MODEL.MASK_ON and
    # INPUT.MASK_FORMAT "bitmask". The images are the same
    cfg.DATASETS.SHAPES.MASKS = False

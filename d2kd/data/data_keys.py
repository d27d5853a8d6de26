from detectron2.config import CfgNode


def add_data_config(cfg: CfgNode) -> None:
    """
    Add the keys of d2kd's data sets under DATASETS, see :func:`register_datasets`.

    Args:
        cfg: a node of detectron2's `get_cfg()`, changed in place
    """
    # Any set in COCO's format, named in YAML: a list of {NAME: my_train, JSON: a/train.json,
    # IMAGES: a/images}. DATASETS.TRAIN and DATASETS.TEST may then use the name.
    cfg.DATASETS.COCO_FORMAT = []

    # The built-in synthetic sets, drawn on first use: d2kd_shapes_train; d2kd_shapes_val, on which
    # weights, settings and best checkpoints are chosen; d2kd_shapes_test, on which nothing is.
    cfg.DATASETS.SHAPES = CfgNode()
    # Folder that receives the sets. Empty: $DETECTRON2_DATASETS, or ./datasets without it
    cfg.DATASETS.SHAPES.ROOT = ""
    # Image i of a split depends on this seed, the split, i and the keys from IMAGE_SIZE on only
    cfg.DATASETS.SHAPES.SEED = 0
    # Number of images per split
    cfg.DATASETS.SHAPES.NUM_TRAIN = 4000
    cfg.DATASETS.SHAPES.NUM_VAL = 300
    cfg.DATASETS.SHAPES.NUM_TEST = 1000
    # Width and height of an image, pixels. COCO's "large" starts at 96 x 96
    cfg.DATASETS.SHAPES.IMAGE_SIZE = 144
    # Number of objects per image. Fewer are drawn where no room is left, but at least one
    cfg.DATASETS.SHAPES.MIN_OBJECTS = 1
    cfg.DATASETS.SHAPES.MAX_OBJECTS = 4
    # Longer side of an object, log-uniform between MIN_SIZE pixels and MAX_SIZE x IMAGE_SIZE,
    # MAX_SIZE in (0, 1]
    cfg.DATASETS.SHAPES.MIN_SIZE = 24
    cfg.DATASETS.SHAPES.MAX_SIZE = 1.0
    # Smallest share of an object that others and the image's border leave visible, in (0, 0.9]
    cfg.DATASETS.SHAPES.MIN_VISIBLE = 0.6
    # Probability that an object has about the colour of its class, [0, 1]. The others, and what
    # belongs to no class, have any colour: colour is a hint to begin with, shape decides
    cfg.DATASETS.SHAPES.OWN_COLOUR = 0.9
    # Strength of the texture of the background and of all figures, [0, 1]
    cfg.DATASETS.SHAPES.TEXTURE = 0.2
    # Largest number of background figures that belong to no class, per image
    cfg.DATASETS.SHAPES.CLUTTER = 2
    # Largest standard deviation of the pixel noise, grey levels of 255
    cfg.DATASETS.SHAPES.NOISE = 6.0
    # Largest standard deviation of the Gaussian blur, pixels
    cfg.DATASETS.SHAPES.BLUR = 0.5

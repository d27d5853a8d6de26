"""All keys that d2kd adds to Detectron2's config."""

from detectron2.config import CfgNode

from ..data.data_keys import add_data_config
from ..data.unlabelled import add_unlabelled_config
from ..heads import DISTILL_HEAD_REGISTRY
from ..heads.keys import add_head_keys
from ..modeling import add_model_config
from ..schedule import add_schedule_config
from ..views.region_sampler import add_region_config


def add_distill_config(cfg: CfgNode) -> None:
    """
    Add d2kd's keys to a config from detectron2.config.get_cfg().

    The keys of a head, DISTILL.<NAME>.*, come from its constructor (d2kd/heads/keys.py), also for
    heads registered by users: import those before this call.
    """
    add_data_config(cfg)
    add_model_config(cfg)
    # "SGD": Detectron2's, or "ADAMW": PyTorch's with its default betas. Both use BASE_LR and the
    # WEIGHT_DECAY keys
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Metric of Detectron2's evaluator that selects model_best.pth, on the first of several test
    # sets unless it begins with a set's name ("my_val/bbox/AP"). "": none is saved
    cfg.TEST.BEST_METRIC = "bbox/AP"

    node = cfg.DISTILL = CfgNode()
    # False: train the student alone, exactly as without d2kd, and log it
    node.ENABLED = True
    # The student's own meta-architecture, such as "RetinaNet", "FCOS" or "GeneralizedRCNN";
    # MODEL.META_ARCHITECTURE is "Distiller"
    node.STUDENT_META_ARCHITECTURE = ""
    # Distillation methods, applied together, such as ["MGD"]; their keys are DISTILL.<NAME>.*
    node.HEADS = []
    # [[student level, teacher level], ...]; []: pair the levels of equal stride
    node.LEVELS = []
    # Parts of the student initialised from the teacher before training, after MODEL.WEIGHTS:
    # "neck" (the pyramid without its backbone), "head" (everything else that predicts)
    node.INHERIT = []
    # Put a 1x1 convolution, which starts as the identity, between the two also where they have
    # equally many channels: for a student with a trained pyramid of its own, whose channel i means
    # something else than the teacher's
    node.ADAPT_EQUAL_CHANNELS = False
    # Several teachers in sequence; the student is kept, heads and optimizer start anew. []: one
    # stage. Each stage is a mapping with ITERATIONS (which must add up to SOLVER.MAX_ITER) and,
    # where it differs from the run, TEACHER (one with its own CONFIG_FILE or BACKBONE takes neither
    # the run's WEIGHTS nor its OPTS, CLASSES and ALIASES), HEADS, INHERIT (default from the second
    # stage on: nothing), and OPTS, as on the command line: keys of heads, DISTILL.LEVELS,
    # ADAPT_EQUAL_CHANNELS, REGIONS and SOLVER's learning rate keys. ENABLED False ignores stages
    node.STAGES = []
    # Several teachers at once. Each is a mapping with NAME, which its losses are called by, and
    # as in STAGES, where it differs from the run, TEACHER, HEADS, INHERIT (default from the second
    # on: nothing), and OPTS: keys of heads, DISTILL.LEVELS, ADAPT_EQUAL_CHANNELS and REGIONS. []:
    # one teacher
    node.TEACHERS = []
    # "restart": SOLVER's schedule in each stage, with warm-up, and STEPS at the same fractions of
    # the stage as of the run. "continue": one schedule over the whole run
    node.STAGE_LR = "restart"

    add_unlabelled_config(node)
    node.TEACHER = CfgNode()
    # YAML or LazyConfig .py: a path, or a name in Detectron2's model zoo, such as
    # "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    node.TEACHER.CONFIG_FILE = ""
    # In place of CONFIG_FILE: a model of timm that was never a detector, such as
    # "vit_small_patch14_dinov2.lvd142m", for heads that compare features
    node.TEACHER.BACKBONE = ""
    # Of the levels that it teaches; a map that it has of another stride is resampled
    node.TEACHER.BACKBONE_STRIDES = [16]
    # Weights of the trained detector: a path or URL; "": those of the model zoo's CONFIG_FILE.
    # Of a BACKBONE: a file of timm's weights, or timm://NAME.TAG for its hub
    node.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config, as on the command line: ["MODEL.RETINANET.NUM_CLASSES", 4]
    node.TEACHER.OPTS = []
    # Its class names, in order; []: those of the first data set in its config. If its classes are
    # not the student's, heads that compare logits compare the common classes
    node.TEACHER.CLASSES = []
    # [[student's class, teacher's class], ...] that are the same under different names; if a class
    # is in several pairs, its partners are merged. Classes listed here are matched by these pairs
    # only, not by name; "" on one side: the other class has no counterpart
    node.TEACHER.ALIASES = []
    # Of the student's classes, those that its class logits, and its detections in place of labels,
    # are for; []: all that both have. Of several teachers, each class is for one
    node.TEACHER.FOR_CLASSES = []
    # Continue if there are no common classes, with heads that compare features
    node.TEACHER.ALLOW_OTHER_CLASSES = False
    # Number of images of the first test set to evaluate the teacher on before training; 0: none
    node.TEACHER.EVAL_IMAGES = 100
    # Smallest box AP (COCO, percent) of this evaluation with which training starts
    node.TEACHER.MIN_AP = 1.0
    # Fold frozen norms into the preceding convolutions. With any of the first four of these keys,
    # the teacher is compared with the unchanged float32 one before training
    node.TEACHER.FOLD_NORMS = False
    # Store weights and feature maps in channels-last memory format
    node.TEACHER.CHANNELS_LAST = False
    # "float32", "bfloat16" or "float16", independent of SOLVER.AMP; "": as the student
    node.TEACHER.PRECISION = ""
    # Compile the bottom-up network with torch.compile, which takes minutes
    node.TEACHER.COMPILE = False
    # Device of the teacher, such as "cuda:1" or "cpu"; "": the student's
    node.TEACHER.DEVICE = ""
    # Only for tests and benchmarks: allow a teacher with random weights
    node.TEACHER.ALLOW_RANDOM_WEIGHTS = False

    node.REGIONS = CfgNode()
    add_region_config(node.REGIONS)

    # Monitor the effect of each loss on the student's pyramid: a table in the log, curves in
    # TensorBoard. False also disables the check that every loss has an effect
    node.LIVENESS = CfgNode()
    node.LIVENESS.ENABLED = True
    # Number of steps in which each head is checked, from the first with a nonzero weight. A loss
    # that is constant, or has no gradient, in all of them stops the run
    node.LIVENESS.FIRST_STEPS = 3
    # Iterations between measurements after that; 0: none. Each costs, per loss, one backward pass
    # to the pyramid; the log has the time
    node.LIVENESS.PERIOD = 1000
    # Target share of the gradient, in (0, 1), for suggested loss weights; none is applied
    node.LIVENESS.WANTED_SHARE = 0.5

    for name, head in DISTILL_HEAD_REGISTRY:
        head_node = node[name[: -len("Head")]] = CfgNode()
        add_head_keys(head_node, head)
        add_schedule_config(head_node)

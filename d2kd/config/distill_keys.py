"""Every key d2kd adds to Detectron2's config."""

from detectron2.config import CfgNode

from ..data.data_keys import add_data_config
from ..heads import DISTILL_HEAD_REGISTRY
from ..heads.keys import add_head_keys
from ..modeling import add_model_config
from ..schedule import add_schedule_config
from ..views.region_sampler import add_region_config


def add_distill_config(cfg: CfgNode) -> None:
    """
    Add d2kd's keys to a config from detectron2.config.get_cfg().

    The keys of a head, DISTILL.<NAME>.*, come from its constructor (d2kd/heads/keys.py), so that a
    head registered by a user has them too: import it before this call.
    """
    add_data_config(cfg)
    add_model_config(cfg)
    # "SGD", Detectron2's, or "ADAMW": PyTorch's, with PyTorch's betas. Both read BASE_LR and the
    # WEIGHT_DECAY keys
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Metric of Detectron2's evaluator by which model_best.pth is chosen; "": none is kept
    cfg.TEST.BEST_METRIC = "bbox/AP"

    node = cfg.DISTILL = CfgNode()
    # False trains the student alone: exactly the run without d2kd. Said in the log.
    node.ENABLED = True
    # The student's own meta-architecture, such as "RetinaNet", "FCOS" or "GeneralizedRCNN";
    # MODEL.META_ARCHITECTURE is "Distiller"
    node.STUDENT_META_ARCHITECTURE = ""
    # Methods to apply together, such as ["MGD"]; their keys are DISTILL.<NAME>.*
    node.HEADS = []
    # [[student level, teacher level], ...]; []: pair the levels of equal stride
    node.LEVELS = []
    # Parts of the student initialised from the teacher before training, after MODEL.WEIGHTS:
    # "neck" (the pyramid without its backbone), "head" (everything else that predicts)
    node.INHERIT = []
    # Several teachers in turn, the student carried over, heads and optimizer anew; [] is one stage.
    # Each is a mapping of ITERATIONS, which must add up to SOLVER.MAX_ITER, and where it differs
    # from the run, TEACHER (with a CONFIG_FILE of its own, nothing of the run's), HEADS, INHERIT
    # (from the second stage on nothing by default), and OPTS, as on the command line: a head's
    # keys, DISTILL.LEVELS, DISTILL.REGIONS and the learning rate's of SOLVER. DISTILL.ENABLED False
    # ignores stages.
    node.STAGES = []
    # "restart": each stage has SOLVER's schedule, warm-up included, with STEPS at the same shares
    # of the stage as of the run. "continue": one schedule over the whole run
    node.STAGE_LR = "restart"

    node.TEACHER = CfgNode()
    # YAML or LazyConfig .py: a path, or a name in Detectron2's model zoo, such as
    # "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    node.TEACHER.CONFIG_FILE = ""
    # Trained detector: a path or URL; "": the checkpoint that belongs to a model-zoo name
    node.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config, as on the command line: ["MODEL.RETINANET.NUM_CLASSES", 4]
    node.TEACHER.OPTS = []
    # Names of its classes, in order; []: those of the first data set in its config. Of classes that
    # are not the student's, heads that compare logits compare the common ones
    node.TEACHER.CLASSES = []
    # [[student's class, teacher's class], ...] that are the same, of other names; several of one
    # side are joined. A class that is named here is what the pairs say and nothing else, whatever
    # its name; "" on one side: the other has no equal
    node.TEACHER.ALIASES = []
    # Go on where no class is in both, with heads that compare features
    node.TEACHER.ALLOW_OTHER_CLASSES = False
    # Images of the first test set on which the teacher is evaluated before training; 0: it is not
    node.TEACHER.EVAL_IMAGES = 100
    # COCO's box AP in percent below which the run is refused then
    node.TEACHER.MIN_AP = 1.0
    # Fold frozen norms into the convolutions before them. With this and the next three, what the
    # teacher says is compared before the first step with what it says as it is
    node.TEACHER.FOLD_NORMS = False
    # Keep its weights and maps with the channels last in memory
    node.TEACHER.CHANNELS_LAST = False
    # "float32", "bfloat16" or "float16", also under the student's SOLVER.AMP; "": as the student
    node.TEACHER.PRECISION = ""
    # Compile its bottom-up network with torch.compile, which takes minutes
    node.TEACHER.COMPILE = False
    # Where it runs, such as "cuda:1" or "cpu"; "": where the student does
    node.TEACHER.DEVICE = ""
    # Only for tests and benchmarks: go on with a teacher that knows nothing
    node.TEACHER.ALLOW_RANDOM_WEIGHTS = False

    node.REGIONS = CfgNode()
    add_region_config(node.REGIONS)

    # What each loss does to the student's pyramid, as a table in the log and in TensorBoard. False:
    # neither, and nothing stops a run in which a term does nothing
    node.LIVENESS = CfgNode()
    node.LIVENESS.ENABLED = True
    # Steps in which each head is watched, from the first in which its weight is not 0. A term that
    # is constant, or has no gradient, in all of them stops the run
    node.LIVENESS.FIRST_STEPS = 3
    # Iterations between two looks after that; 0: none. A look costs, for each term, a backward from
    # it to the pyramid; the log says how long it took
    node.LIVENESS.PERIOD = 1000
    # Share of the gradient, in (0, 1), for which loss weights are suggested; nothing is changed
    node.LIVENESS.WANTED_SHARE = 0.5

    for name, head in DISTILL_HEAD_REGISTRY:
        head_node = node[name[: -len("Head")]] = CfgNode()
        add_head_keys(head_node, head)
        add_schedule_config(head_node)

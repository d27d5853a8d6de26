from detectron2.config import CfgNode


def distils(cfg: CfgNode) -> bool:
    """Whether a run has a teacher."""
    return cfg.MODEL.META_ARCHITECTURE == "Distiller" and cfg.DISTILL.ENABLED

"""
Run by verify.py in a separate process, in which d2kd cannot be imported: build the exported
student with stock Detectron2, load its weights, and run it on given images.

    python fresh_process.py FOLDER IMAGES RESULT
"""

import sys


class NoD2kd:
    """Import hook that makes d2kd unavailable, as on a machine without it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "d2kd":
            raise ImportError("d2kd must not be imported here")


sys.meta_path.insert(0, NoD2kd())


def main(folder: str, images: str, result: str) -> None:
    import os

    import torch

    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    given = torch.load(images, weights_only=False)  # verify.py's own file; proposals are Instances
    torch.set_num_threads(given["threads"])
    cfg = get_cfg()
    cfg.merge_from_file(os.path.join(folder, "student.yaml"))
    config = {key: plain(cfg[key]) for key in ("MODEL", "INPUT", "TEST")}
    any_score = [x for key in given["score_keys"] for x in (key, 0.0)]
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *any_score])
    model = build_model(cfg).eval()
    weights = os.path.join(folder, cfg.MODEL.WEIGHTS)
    state = torch.load(weights, weights_only=True)["model"]
    keys = {"missing": sorted(set(model.state_dict()) - set(state))}
    keys["unexpected"] = sorted(set(state) - set(model.state_dict()))
    DetectionCheckpointer(model).load(weights)  # as a user would
    with torch.no_grad():
        instances = [x["instances"] for x in model(given["inputs"])]
    outputs = [{k: getattr(v, "tensor", v) for k, v in x.get_fields().items()} for x in instances]
    imported = sorted(x for x in sys.modules if x.split(".")[0] == "d2kd")
    found = {"keys": keys, "config": config, "outputs": outputs, "imported": imported}
    torch.save({**found, "loaded": model.state_dict()}, result)


def plain(value):
    """A config as plain dicts and lists, which can be saved."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(x) for x in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    main(*sys.argv[1:])

"""
Pseudo-labels: a teacher's detections on unlabelled images, of each class those from the score at
which a labelled set shows the precision that is wanted. `d2kd label` writes them.
"""

from .detector import category_ids, load_detector
from .inference import detect
from .labelled_set import LabelledSet, read_labelled_set
from .matches import ClassMatches, match
from .sheet import write_worst
from .table import gate_table, gate_warnings
from .thresholds import Gate, choose_gate, choose_gates
from .write import describe_labels, label_json, training_yaml

__all__ = [
    "ClassMatches",
    "Gate",
    "LabelledSet",
    "category_ids",
    "choose_gate",
    "choose_gates",
    "describe_labels",
    "detect",
    "gate_table",
    "gate_warnings",
    "label_json",
    "load_detector",
    "match",
    "read_labelled_set",
    "training_yaml",
    "write_worst",
]

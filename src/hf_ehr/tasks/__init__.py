"""Prediction tasks: their language, the named ones, exchange with ACES, and the leakage audit."""

from hf_ehr.tasks.aces import from_aces, to_aces
from hf_ehr.tasks.audit import LeakageError, SplitManifest, fingerprint
from hf_ehr.tasks.definition import Censoring, Matching, Outcome, Predicate, Rule, Window
from hf_ehr.tasks.labels import label_dataset, read_labels
from hf_ehr.tasks.library import get_task
from hf_ehr.tasks.spec import TaskSpec

__all__ = [
    "Censoring",
    "LeakageError",
    "Matching",
    "Outcome",
    "Predicate",
    "Rule",
    "SplitManifest",
    "TaskSpec",
    "Window",
    "fingerprint",
    "from_aces",
    "get_task",
    "label_dataset",
    "read_labels",
    "to_aces",
]

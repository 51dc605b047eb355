"""The baselines of MedM-PLM on visits with the stock ``Trainer``: codes alone, notes alone, both end to end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from transformers import TrainingArguments

from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.training._visit_models import VISIT_BASELINES, VISIT_READERS, new_visit_baseline
from hf_ehr.training._visit_processors import fit_visit_processor
from hf_ehr.training.finetuning import check_earlier_stage
from hf_ehr.training.visits import VisitArguments, VisitTask, fit_and_save

VISIT_BASELINE_RECIPE = {"learning_rate": 5e-4, "per_device_train_batch_size": 10, "num_train_epochs": 20.0}
"""Batches and epochs of MedM-PLM; the rate is G-BERT's, for encoders that start anew. A trained one wants 2e-5."""


@dataclass
class VisitBaselineArguments(VisitTask):
    """What a baseline predicts of visits, and what it starts from."""

    task: str = field(
        metadata={"help": "As for medmplm: medication_recommendation, readmission_30d, icd_coding_top50, …"}
    )
    baseline: str = field(
        default="rnn", metadata={"help": "rnn, gbert, medbert, note, note+gbert, note+medbert or cnn."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Folder of a MedM-PLM or G-BERT whose vocabularies are read; fitted if left out."},
    )
    note_encoder: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a text encoder; that which `model` began with, or a new one."},
    )
    code_encoder: str | None = field(
        default=None,
        metadata={"help": "Folder of a pre-trained G-BERT, Med-BERT or (its code encoder) MedM-PLM; else a new one."},
    )
    preset: str = field(default="base", metadata={"help": "Sizes of what is new: `base` or `tiny`."})
    model_options: str = field(default="{}", metadata={"help": "Further fields of the configuration as JSON."})
    min_patients: int = field(default=11, metadata={"help": "Codes of fewer training patients back off to ancestors."})
    note_max_length: int = field(default=512, metadata={"help": "Most tokens of a note."})
    note_vocab_size: int = field(default=20_000, metadata={"help": "Size of a vocabulary of notes that is fitted."})
    cleaning: str = field(default="none", metadata={"help": "none, clinicalbert (the paper's), bert_xml, caml, edin."})
    train_patients: int | None = field(
        default=None, metadata={"help": "Use this many training patients only (nested subsets for one `draw`)."}
    )
    draw: int = field(default=0, metadata={"help": "Which random order the subset is taken from."})
    linear_probe: bool = field(
        default=True, metadata={"help": "Start a yes-or-no head from a regression on frozen features (not the CNN)."}
    )
    target_text: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        known = {"baseline": (self.baseline, VISIT_BASELINES), "preset": (self.preset, ("base", "tiny"))}
        for name, (value, choices) in known.items():
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def finetune_visit_baseline(
    data: VisitArguments, options: VisitBaselineArguments, training: TrainingArguments
) -> Path:
    """Trains a baseline; the folder is like that of :func:`hf_ehr.training.visits.finetune_visits`.

    Raises:
        LeakageError: A patient held out here was seen when an encoder was trained, or the vocabularies saw others.
        EhrDataError: As :func:`hf_ehr.training.visits.finetune_visits`.
        ValueError: An option has no meaning for this task or baseline.
    """
    for earlier in {options.model, options.note_encoder, options.code_encoder} - {None}:
        check_earlier_stage(str(earlier), data.manifest(data.splits()))
    return fit_and_save(
        data, options, training,
        lambda train: baseline_processor(data, options, train),
        lambda names, processor: new_visit_baseline(options.baseline, options, names, processor, training.seed),
    )  # fmt: skip


def baseline_processor(data: VisitArguments, options: VisitBaselineArguments, train: np.ndarray) -> MedMPLMProcessor:
    """The processor of `options.model`, or one that is fitted on the training patients; notes only where read."""
    notes = "note" in VISIT_READERS[options.baseline]
    if options.model is None:
        return fit_visit_processor(
            data.data, train, min_patients=options.min_patients, notes=notes, note_encoder=options.note_encoder,
            note_max_length=options.note_max_length, note_vocab_size=options.note_vocab_size,
            cleaning=options.cleaning,  # type: ignore[arg-type]
        )  # fmt: skip
    processor = MedMPLMProcessor.from_pretrained(options.model)
    return processor if notes else MedMPLMProcessor(*processor.code_tokenizers.values())


__all__ = [
    "VISIT_BASELINE_RECIPE", "VisitBaselineArguments", "baseline_processor", "finetune_visit_baseline",
    "new_visit_baseline",
]  # fmt: skip

"""MedM-PLM and G-BERT on visits with the stock ``Trainer``: pre-training, and classifiers of three tasks.

records ─ codes and words, fitted on the training patients ─▶ visits ─▶ codes from codes and from notes (pre-training)
        ─ a task's labels ─▶ visits as known when asked ─▶ recommended drugs, outcomes, or codes of a visit
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from transformers import Trainer, TrainingArguments

from hf_ehr.metrics import best_f1_threshold
from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import SplitManifest, check_fitted_on
from hf_ehr.tasks.labels import read_labels
from hf_ehr.tasks.recommendation import ICD_CODING, MEDICATION_RECOMMENDATION, label_codes
from hf_ehr.training._runs import (
    PRETRAIN_FILE,
    SPLITS_FILE,
    Run,
    output_of,
    patient_splits,
    run_arguments,
    salted_manifest,
    train_from_last_checkpoint,
)
from hf_ehr.training._visit_fitting import (
    VisitTruth,
    asked_visits,
    fit_visits,
    held_out_visits,
    maskings,
    predict_visits,
    store_visit_thresholds,
    without_answers,
)
from hf_ehr.training._visit_models import (
    ARCHITECTURES,
    architecture_of,
    new_visit_classifier,
    new_visit_model,
    take_code_encoder,
    visit_processor,
)
from hf_ehr.training._visit_processors import fit_visit_processor
from hf_ehr.training.finetuning import (
    FINETUNE_FILE,
    FINETUNE_SETTINGS,
    check_earlier_stage,
    task_labels,
    task_name,
)
from hf_ehr.visit_collators import VisitCollator
from hf_ehr.visit_datasets import Setting, build_visit_examples
from hf_ehr.vocabulary import MIN_PATIENTS

if TYPE_CHECKING:
    import datasets

VISIT_PRETRAIN_RECIPE = {"learning_rate": 5e-4, "per_device_train_batch_size": 32, "num_train_epochs": 200.0}
"""MedM-PLM: Adam without weight decay or warm-up; the authors stop early by the drugs predicted from drugs."""
VISIT_FINETUNE_RECIPE = {"learning_rate": 2e-5, "per_device_train_batch_size": 10, "num_train_epochs": 20.0}
"""MedM-PLM's readmission; 5e-5 for recommendation, 1e-5 for coding."""
PRESETS = ("base", "paper", "tiny")


@dataclass
class VisitArguments:
    """Which visits a run reads, and how."""

    data: str = field(metadata={"help": "Prepared folder; drugs in ATC (`hf-ehr map-drugs`) for recommendation."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient (7:1:2)."})
    max_visits: int = field(default=10, metadata={"help": "Most visits of a patient; older ones go first."})
    note_category: str | None = field(
        default=None,
        metadata={"help": "Read the last note of this category, e.g. `Discharge summary`; else the last of each."},
    )
    notes_of_the_day: bool = field(
        default=False, metadata={"help": "Notes known by date only count as written when asked on that day."}
    )

    def splits(self) -> dict[str, np.ndarray]:
        """Patients of `train`, `validation` and `test`."""
        return patient_splits(self.data, self.split_seed)

    def manifest(self, splits: dict[str, np.ndarray]) -> SplitManifest:
        """The splits as hashes, salted with a secret that stays in the prepared folder."""
        return salted_manifest(Path(self.data), splits)

    def reading(self) -> dict[str, Any]:
        """What :func:`hf_ehr.visit_datasets.build_visit_examples` takes of it."""
        return {name: getattr(self, name) for name in ("max_visits", "note_category", "notes_of_the_day")}


@dataclass
class VisitPretrainArguments:
    """What is pre-trained on visits."""

    architecture: str = field(default="medmplm", metadata={"help": "`medmplm`, or `gbert`, which reads no notes."})
    preset: str = field(default="base", metadata={"help": "`base` (the authors' sizes), `paper` or `tiny`."})
    model_options: str = field(
        default="{}",
        metadata={"help": 'Further fields of MedMPLMConfig as JSON, {"code_config": {…}} those of the code encoder.'},
    )
    min_patients: int = field(default=11, metadata={"help": "Codes of fewer training patients back off to ancestors."})
    note_encoder: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a text encoder; a new one if left out."},
    )
    note_max_length: int = field(default=512, metadata={"help": "Most tokens of a note."})
    note_vocab_size: int = field(default=20_000, metadata={"help": "Size of a vocabulary of notes that is fitted."})
    cleaning: str = field(default="none", metadata={"help": "none, clinicalbert (the paper's), bert_xml, caml, edin."})

    def __post_init__(self) -> None:
        known = {
            "architecture": (self.architecture, ARCHITECTURES),
            "preset": (self.preset, PRESETS),
        }
        for name, (value, choices) in known.items():
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


class VisitTask:
    """How a task is read, of arguments that name one."""

    task: str

    @property
    def setting(self) -> Setting:
        """How :func:`hf_ehr.visit_datasets.build_visit_examples` reads the task."""
        if self.task == MEDICATION_RECOMMENDATION:
            return "recommendation"
        return "admission" if self.coded is None else "coding"

    @property
    def coded(self) -> int | None:
        """How many codes are coded."""
        match = re.fullmatch(rf"{ICD_CODING}_top([1-9]\d*)", self.task)
        return None if match is None else int(match[1])


@dataclass
class VisitFinetuneArguments(VisitTask):
    """What is predicted of visits, from which checkpoint, with how many patients."""

    task: str = field(
        metadata={"help": "medication_recommendation, icd_coding_topN (icd_coding_top50), readmission_30d or another "
                  "yes-or-no task asked within visits, or a YAML definition."}
    )  # fmt: skip
    model: str = field(metadata={"help": "Folder or Hub id of a pre-trained MedM-PLM or G-BERT."})
    architecture: str | None = field(
        default=None, metadata={"help": "`gbert` on a MedM-PLM takes its code encoder; that of the model if left out."}
    )
    target_text: str = field(
        default="none", metadata={"help": "Notes of a recommended visit: none; augmented_dx, full (both optimistic)."}
    )
    train_patients: int | None = field(
        default=None, metadata={"help": "Use this many training patients only (nested subsets for one `draw`)."}
    )
    draw: int = field(default=0, metadata={"help": "Which random order the subset is taken from."})
    untrained: bool = field(default=False, metadata={"help": "Keep architecture and text encoder, forget the rest."})
    linear_probe: bool = field(
        default=True, metadata={"help": "Start a yes-or-no head from a regression on frozen features."}
    )


def pretrain_visits(
    data: VisitArguments, options: VisitPretrainArguments, training: TrainingArguments
) -> dict[str, float]:
    """Predicts the codes of training patients' visits from codes, part of them hidden, and from notes.

    `pretraining_loss` of the configuration says which codes are predicted. Writes model, processor, split manifest and
    `pretraining.json` to `output_dir`.

    Returns:
        Figures of validation visits (:func:`hf_ehr.training.held_out_visits`).

    Raises:
        EhrDataError: The folder holds no codes or no notes, or `output_dir` holds another run.
        ValueError: An option is not known.
    """
    splits, run = data.splits(), Run(training, PRETRAIN_FILE, data, options)
    if run.finished:
        return run.record()["held_out"]
    processor = fit_visit_processor(
        data.data, splits["train"], min_patients=options.min_patients, notes=options.architecture == "medmplm",
        note_encoder=options.note_encoder, note_max_length=options.note_max_length,
        note_vocab_size=options.note_vocab_size, cleaning=options.cleaning,  # type: ignore[arg-type]
    )  # fmt: skip
    examples = {
        name: build_visit_examples(
            data.data, processor, subject_ids=splits[name], cache_dir=output_of(training) / "examples" / name,
            **data.reading(),
        )
        for name in ("train", "validation")
    }  # fmt: skip
    model = new_visit_model(options, processor, training.seed)
    trainer = Trainer(
        model, run_arguments(training, remove_unused_columns=False),
        VisitCollator.of(model.config, masking=maskings(processor, training.seed)), train_dataset=examples["train"],
    )  # fmt: skip
    train_from_last_checkpoint(trainer)
    figures = held_out_visits(model, examples["validation"], processor)
    if trainer.is_world_process_zero():
        trainer.save_model(str(training.output_dir))
        processor.save_pretrained(training.output_dir)
        data.manifest(splits).save(output_of(training) / SPLITS_FILE)
        run.finish({"held_out": figures, **asdict(options)})
    return figures


def finetune_visits(data: VisitArguments, options: VisitFinetuneArguments, training: TrainingArguments) -> Path:
    """Fine-tunes a classifier; the folder holds model, processor, thresholds, splits and how it was made.

    The best epoch on validation patients is kept, and thresholds are tuned on them and stored in `config.thresholds`:
    one for all drugs, one a code, or that of the outcome with the best F1.

    Raises:
        LeakageError: A patient held out here was seen in pre-training, or the vocabularies saw other patients.
        EhrDataError: Nothing is asked of these visits, no code is frequent enough, or `output_dir` holds another run.
        ValueError: An option has no meaning for this task.
    """
    check_earlier_stage(options.model, data.manifest(data.splits()))
    return fit_and_save(
        data, options, training,
        lambda train: visit_processor(options),
        lambda names, processor: new_visit_classifier(options, names, training.seed),
    )  # fmt: skip


def fit_and_save(
    data: VisitArguments,
    options: Any,
    training: TrainingArguments,
    open_processor: Callable[[np.ndarray], MedMPLMProcessor],
    open_model: Callable[[list[str], MedMPLMProcessor], Any],
) -> Path:
    """What :func:`finetune_visits` does with any classifier of visits.

    Args:
        data: The visits and their split.
        options: A :class:`VisitTask` with `target_text`, `train_patients`, `draw` and `linear_probe`.
        training: Settings of the run.
        open_processor: Training patients → processor.
        open_model: Names of the labels and processor → classifier.
    """
    splits = data.splits()
    output, run = output_of(training), Run(training, FINETUNE_FILE, data, options)
    if run.finished:
        return output
    processor = open_processor(splits["train"])
    for tokenizer in processor.code_tokenizers.values():
        check_fitted_on(tokenizer.init_kwargs.get("fitted_on") or "", splits["train"])
    names = label_names(data, options, processor, splits["train"])
    model = open_model(names, processor)
    train, validation = (
        labelled_visits(data, options, processor, names, splits, name, output / "examples" / name)
        for name in ("train", "validation")
    )
    fit_visits(model, train, validation, training, options.linear_probe)
    p = predict_visits(model, validation)
    if options.setting == "admission":
        threshold = best_f1_threshold(np.asarray(validation["labels"]), p)
        model.config.thresholds = {task_name(options.task): float(threshold)}
    else:
        truth = asked_visits(validation, len(names)).truth
        store_visit_thresholds(model, truth, p, common=options.setting == "recommendation")
    if training.process_index == 0:
        model.save_pretrained(output)
        processor.save_pretrained(output)
        data.manifest(splits).save(output / SPLITS_FILE)
        settings = {name: getattr(training, name) for name in FINETUNE_SETTINGS}
        run.finish({"data": asdict(data), "options": asdict(options), "training": settings})
    return output


def visit_labels(data: VisitArguments, options: VisitTask) -> pa.Table:
    """LABELS of the task; the file in the prepared folder, written now if it is not there."""
    if options.setting == "admission":
        return task_labels(data, options.task)  # type: ignore[arg-type]
    name = MEDICATION_RECOMMENDATION if options.setting == "recommendation" else ICD_CODING
    path = Path(data.data) / "labels" / f"{name}.parquet"
    return read_labels(path if path.is_file() else label_codes(name, data.data))


def label_names(data: VisitArguments, options: VisitTask, processor: MedMPLMProcessor, train: np.ndarray) -> list[str]:
    """What is predicted, in the order of the labels; known from training patients alone.

    Returns:
        The drugs of the vocabulary; or the codes of most training visits among those of at least 11 training patients
        (of equally frequent ones the first by name); or `no` and the task.

    Raises:
        EhrDataError: No code has so many patients.
    """
    if options.setting == "admission":
        return ["no", task_name(options.task)]
    if options.setting == "recommendation":
        words: Any = processor.medication_tokenizer
        return words.convert_ids_to_tokens(list(range(len(words.all_special_ids), len(words))))
    labels = pl.DataFrame(visit_labels(data, options).select(["subject_id", "codes"]))
    codes = labels.filter(pl.col("subject_id").is_in(pl.Series(train).implode())).explode("codes").drop_nulls()
    counts = codes.group_by("codes").agg(visits=pl.len(), patients=pl.col("subject_id").n_unique())
    frequent = counts.filter(pl.col("patients") >= MIN_PATIENTS).sort(["visits", "codes"], descending=[True, False])
    if frequent.is_empty():
        raise EhrDataError(f"`{options.task}` needs codes of at least {MIN_PATIENTS} training patients, found none.")
    return frequent["codes"].to_list()[: options.coded]


def labelled_visits(
    data: VisitArguments,
    options: Any,
    processor: MedMPLMProcessor,
    names: Sequence[str],
    splits: dict[str, np.ndarray],
    name: str,
    cache: Path | None = None,
) -> datasets.Dataset:
    """Examples of one split for a task; the training split is cut to `train_patients` (nested within a `draw`)."""
    labels, ids = visit_labels(data, options), splits[name]
    if name == "train" and options.train_patients is not None:
        asked = np.intersect1d(ids, labels["subject_id"].to_numpy())
        ids = np.random.default_rng(options.draw).permutation(asked)[: options.train_patients]
    coded = names if options.setting == "coding" else None
    return build_visit_examples(
        data.data, processor, labels=labels, setting=options.setting, label_names=coded, subject_ids=ids,
        cache_dir=cache, target_text=options.target_text != "none", **data.reading(),
    )  # fmt: skip


__all__ = [
    "VISIT_FINETUNE_RECIPE",
    "VISIT_PRETRAIN_RECIPE",
    "VisitArguments",
    "VisitFinetuneArguments",
    "VisitPretrainArguments",
    "VisitTask",
    "VisitTruth",
    "architecture_of",
    "asked_visits",
    "finetune_visits",
    "fit_and_save",
    "fit_visits",
    "held_out_visits",
    "label_names",
    "labelled_visits",
    "new_visit_classifier",
    "new_visit_model",
    "predict_visits",
    "pretrain_visits",
    "take_code_encoder",
    "visit_labels",
    "visit_processor",
    "without_answers",
]  # fmt: skip

"""What the cells of a report of stays are made of, each made once and kept in the work folder.

patients ─▶ hourly features ─▶ stage 1 ─▶ stage 2 ─▶ examples and summaries of each task
         └▶ notes of the training patients ─▶ text encoder ─┘
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
from transformers import TrainingArguments

from hf_ehr.experiments.shared import SILENT, SPLITS, json_fields, train_note_encoder
from hf_ehr.experiments.spec import digest, expanded
from hf_ehr.experiments.stays.spec import ADMISSION, OBJECTIVES, StagesSpec, StayData, StayRow, StaySpec
from hf_ehr.hourly import fit_hourly_features
from hf_ehr.models.feature_extraction_hourly import HourlyFeatureExtractor
from hf_ehr.prepare import prepare
from hf_ehr.schema import atomic_folder
from hf_ehr.stay_datasets import build_stay_examples
from hf_ehr.training import (
    DataArguments,
    check_earlier_stage,
    task_labels,
    task_name,
)
from hf_ehr.training.stays import StayArguments, StayPretrainArguments, pretrain_stays
from hf_ehr.version import __version__

if TYPE_CHECKING:
    import datasets

    from hf_ehr.training.admissions import AdmissionPretrainArguments

PRETRAINING_FILE = "pretraining.json"
OBJECTIVE_WEIGHTS = {"mcp": "masked_code_weight", "cl": "contrastive_weight"}


@dataclass
class WholeStays(StayArguments):
    """A folder whose test patients train as well, where the test is another folder."""

    def splits(self) -> dict[str, np.ndarray]:
        """Patients of `train` and `validation`; nobody is in `test`."""
        splits = super().splits()
        everyone = np.sort(np.concatenate([splits["train"], splits["test"]]))
        return {"train": everyone, "validation": splits["validation"], "test": everyone[:0]}


class StayCohort:
    """A data set of a report in its work folder.

    Args:
        spec: What it is.
        work: Folder that everything is kept in.
    """

    def __init__(self, spec: StayData, work: Path):
        self.spec = spec
        self.key = digest(spec.source, spec.input, spec.options, spec.folder, spec.test, __version__)
        self.folder = work / "stay-cohorts" / self.key
        kind = StayArguments if spec.test is None else WholeStays
        self.data = kind(data=self._place(spec, "data"))
        self.outside = (
            None if spec.test is None else StayArguments(data=self._place(StayData("", **spec.test), "test"))
        )

    def make(self, tasks: tuple[str, ...] = ()) -> None:
        """Prepares the records, and the labels of ``tasks``."""
        parts = [(self.spec, self.data)]
        if self.outside is not None:
            parts.append((StayData(self.spec.name, **(self.spec.test or {})), self.outside))
        for spec, arguments in parts:
            if spec.source is not None:
                path = None if spec.input is None else expanded(spec.input, spec.name)
                options = json.loads(json.dumps(spec.options))
                prepare(cast(Any, spec.source), path, Path(arguments.data), options=options)
        for task in tasks:
            for split in SPLITS:
                self.labels(task, split)

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """Patients of the splits; outside test patients are all of their folder."""
        splits = self.data.splits()
        if self.outside is not None:
            splits["test"] = np.sort(np.concatenate(list(self.outside.splits().values())))
        return splits

    def place(self, split: str) -> StayArguments:
        """The folder that a split lies in."""
        return self.outside if split == "test" and self.outside is not None else self.data

    def labels(self, task: str, split: str) -> pa.Table:
        """LABELS of the patients of a split."""
        labels = task_labels(DataArguments(data=self.place(split).data), task)
        wanted = pl.Series(np.asarray(self.splits[split], np.int64)).implode()
        return pl.DataFrame(labels).filter(pl.col("subject_id").is_in(wanted)).to_arrow().cast(labels.schema)

    def features(self, row: StayRow) -> Features:
        """The hourly features that a row reads."""
        return Features(self, self.spec.features | row.features)

    def _place(self, spec: StayData, name: str) -> str:
        return spec.folder if spec.folder is not None else str(self.folder / name)


class Features:
    """Hourly features of a cohort, and what is read with them.

    Args:
        cohort: The patients.
        options: Arguments of ``fit_hourly_features``.
    """

    def __init__(self, cohort: StayCohort, options: dict[str, Any]):
        self.cohort, self.options = cohort, options
        self.key = digest(options)
        self.folder = cohort.folder / "features" / self.key

    @property
    def extractor_folder(self) -> Path:
        """Where the extractor lies."""
        return self.folder / "extractor"

    def make(self) -> None:
        """Fits the extractor on the training patients."""
        train = self.cohort.splits["train"]
        extractor = fit_hourly_features(self.cohort.data.data, subject_ids=train, **self.options)
        with atomic_folder(self.extractor_folder) as temporary:
            extractor.save_pretrained(temporary)

    def extractor(self) -> HourlyFeatureExtractor:
        """The fitted extractor."""
        return HourlyFeatureExtractor.from_pretrained(self.extractor_folder)

    def blank(self, stages: StagesSpec) -> Path:
        """Where codes, notes and shape of the level of admissions lie: a processor beside a model without training."""
        given = [stages.part("admissions", "options"), stages.part("stays", "options"), stages.notes]
        return self.folder / "blank" / digest(*given)

    def examples_folder(self, spec: StaySpec, task: str, split: str) -> Path:
        """Where the examples of a split lie that the rows of a report read."""
        task, level = task_name(task), spec.level
        if level == ADMISSION:
            level = f"{level}-{self.blank(spec.pretraining).name}"
        return self.folder / "examples" / f"{level}-{task}" / split

    def stage1(self, stages: StagesSpec, seed: int) -> Path:
        """Where the stay stage of one seed lies."""
        return self.folder / "stage1" / f"{digest(stages.stays)}-{seed}"

    def stage2(self, stages: StagesSpec, row: StayRow, seed: int) -> Path:
        """Where the admission stage of a row and a seed lies."""
        parts = [stages.admissions, stages.notes, stages.part("stays", "options"), sorted(row.objectives)]
        parts += [stages.stays if row.init == "a+s" else None]
        return self.folder / "stage2" / f"{digest(*parts)}-{seed}"

    def moved(self, source: Path, name: str) -> Path:
        """Where a checkpoint of other features lies after its move to these."""
        return self.folder / "moved" / f"{name}-{source.parent.name}-{source.name}"


def make_stage1(features: Features, stages: StagesSpec, seed: int) -> None:
    """Pre-trains stays of the training patients by reconstruction."""
    options = json_fields(stages.part("stays", "options"))
    training = TrainingArguments(
        output_dir=str(features.stage1(stages, seed)), seed=seed, **(SILENT | stages.part("stays", "training"))
    )
    arguments = StayPretrainArguments(features=str(features.extractor_folder), **options)
    pretrain_stays(features.cohort.data, arguments, training)


def make_stage2(features: Features, stages: StagesSpec, row: StayRow, seed: int) -> None:
    """Pre-trains admissions of the training patients, with or without the stay stage before."""
    from hf_ehr.training.admissions import pretrain_admissions

    training = TrainingArguments(
        output_dir=str(features.stage2(stages, row, seed)), seed=seed,
        **(SILENT | stages.part("admissions", "training")),
    )  # fmt: skip
    stays = features.stage1(stages, seed) if row.init == "a+s" else None
    pretrain_admissions(features.cohort.data, admission_arguments(features, stages, stays, row.objectives), training)


def admission_arguments(
    features: Features, stages: StagesSpec, stays: Path | None = None, objectives: Collection[str] = OBJECTIVES
) -> AdmissionPretrainArguments:
    """The options of the admission stage, after a stay stage or without; losses that are not named weigh nothing."""
    from hf_ehr.training.admissions import AdmissionPretrainArguments

    given, shape = stages.part("admissions", "options"), stages.part("stays", "options")
    model = shape.get("model_options", {}) | given.get("model_options", {})
    model |= {weight: 0.0 for name, weight in OBJECTIVE_WEIGHTS.items() if name not in objectives}
    options: dict[str, Any] = {"preset": shape["preset"]} if "preset" in shape else {}
    options |= given | {"model_options": json.dumps(model)}
    if stages.notes is not None:
        options["note_encoder"] = str(note_encoder_folder(features.cohort, stages))
    # The features of a stay stage lie beside it.
    source: dict[str, Any] = {"features": str(features.extractor_folder)} if stays is None else {"stays": str(stays)}
    return AdmissionPretrainArguments(**source, **options)


def make_blank(features: Features, stages: StagesSpec) -> None:
    """Fits the tokenizers of codes on the training patients, and makes a model of their shape without training."""
    from hf_ehr.training.admissions import admission_processor, new_admission_model

    arguments, cohort = admission_arguments(features, stages), features.cohort
    processor = admission_processor(cohort.data, arguments, cohort.splits["train"])
    model = new_admission_model(arguments, processor, seed=0)
    with atomic_folder(features.blank(stages)) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def note_encoder_folder(cohort: StayCohort, stages: StagesSpec) -> Path:
    """Where the text encoder lies that was trained on the notes of the training patients."""
    return cohort.folder / "notes" / digest(stages.notes) / "encoder"


def make_note_encoder(cohort: StayCohort, stages: StagesSpec) -> None:
    """Trains a small text encoder on the notes of the training patients, and on nobody else's."""
    data, train = cohort.data, cohort.splits["train"]
    train_note_encoder(data.data, train, data.split_seed, note_encoder_folder(cohort, stages), stages.notes or {})


def make_examples(features: Features, spec: StaySpec, task: str, split: str) -> None:
    """Writes the examples of one split for a task, at the level of the report; of notes it is their vectors."""
    cohort = features.cohort
    given: dict[str, Any] = {"labels": cohort.labels(task, split), "subject_ids": cohort.splits[split]}
    data = cohort.place(split).data
    if spec.level == ADMISSION:
        from hf_ehr.admission_datasets import build_admission_examples
        from hf_ehr.training.admissions import frozen_notes

        processor, model = open_blank(features, spec.pretraining)
        examples = build_admission_examples(data, processor, note_vectors=frozen_notes(model, processor), **given)
    else:
        examples = build_stay_examples(data, features.extractor(), **given)
    with atomic_folder(features.examples_folder(spec, task, split)) as temporary:
        examples.save_to_disk(str(temporary))


def load_examples(features: Features, spec: StaySpec, task: str, split: str) -> datasets.Dataset:
    """The examples of all labelled patients of a split."""
    import datasets

    return datasets.load_from_disk(str(features.examples_folder(spec, task, split)))


def make_move(source: Path, features: Features, seed: int, name: str) -> None:
    """Gives a checkpoint the features of another cohort; what was kept is in its ``transfer.json``.

    Raises:
        LeakageError: A patient held out here was seen in its training.
    """
    from hf_ehr.models.modeling_medhmp import MedHMPForAdmissionPreTraining, MedHMPForStayPreTraining
    from hf_ehr.models.modeling_medhmp_transfer import with_new_features

    extractor, cohort = features.extractor(), features.cohort
    check_earlier_stage(str(source), cohort.data.manifest(cohort.data.splits()))
    kind: Any = MedHMPForStayPreTraining if name == "s" else MedHMPForAdmissionPreTraining
    model = kind.from_pretrained(source)
    moved, report = with_new_features(model, extractor.num_hourly_features, extractor.num_demographics, seed)
    with atomic_folder(features.moved(source, name)) as temporary:
        moved.save_pretrained(temporary)
        extractor.save_pretrained(temporary)
        (temporary / "transfer.json").write_text(json.dumps(report._asdict(), indent=1) + "\n")


def open_blank(features: Features, stages: StagesSpec) -> tuple[Any, Any]:
    """What encodes admissions, and the model of their shape without training."""
    from hf_ehr.models.modeling_medhmp import MedHMPForAdmissionPreTraining
    from hf_ehr.models.processing_medhmp import MedHMPProcessor

    folder = features.blank(stages)
    return MedHMPProcessor.from_pretrained(folder), MedHMPForAdmissionPreTraining.from_pretrained(folder)

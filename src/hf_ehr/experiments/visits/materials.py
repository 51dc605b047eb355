"""What the cells of a report of visits are made of, each made once and kept in the work folder.

patients ─▶ text encoder of their notes ─▶ vocabularies ─┬▶ checkpoints: MedM-PLM, G-BERT, Med-BERT, or blank
                                                         └▶ examples of each task
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, TrainingArguments

from hf_ehr.experiments.shared import SILENT, SPLITS, train_note_encoder
from hf_ehr.experiments.spec import digest, expanded
from hf_ehr.experiments.visits.corpora import corpus_examples, make_corpus
from hf_ehr.experiments.visits.spec import ENTITIES, GBERT, MEDMPLM, VisitData, VisitRow, VisitSpec, setting_of
from hf_ehr.models.modeling_medbert import MedBertForPreTraining
from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.prepare import prepare
from hf_ehr.schema import atomic_folder, atomic_path
from hf_ehr.training import DataArguments, PretrainArguments, model_config, pretrain, task_name
from hf_ehr.training.visits import (
    VisitArguments,
    VisitFinetuneArguments,
    VisitPretrainArguments,
    fit_visit_processor,
    label_names,
    labelled_visits,
    new_visit_model,
    pretrain_visits,
    visit_labels,
)
from hf_ehr.version import __version__
from hf_ehr.vocabulary import fit_tokenizer

if TYPE_CHECKING:
    import datasets

PRETRAINING_FILE = "pretraining.json"
CODES = ("diagnoses", "medications")


class VisitCohort:
    """A data set of a report in its work folder, with what the report reads of it.

    Args:
        data: What it is.
        spec: The report.
        work: Folder that everything is kept in.
    """

    def __init__(self, data: VisitData, spec: VisitSpec, work: Path):
        self.spec, self.stages, self.max_length = data, spec.pretraining, spec.note_max_length
        source = digest(data.source, data.input, data.options, data.folder, data.corpus, __version__)
        self.home = work / "visit-cohorts" / source
        self.arguments = VisitArguments(
            data=str(self.home / "data") if data.folder is None else data.folder, split_seed=data.split_seed,
            note_category=data.note_category, notes_of_the_day=data.notes_of_the_day,
        )  # fmt: skip
        # What ids mean depends on the words of the text encoder.
        reading = [data.split_seed, data.min_patients, data.note_category, data.notes_of_the_day, data.notes]
        self.key = digest(source, *reading, self.max_length, self.stages.notes)
        self.folder = self.home / "read" / self.key

    def make(self, tasks: tuple[str, ...] = ()) -> None:
        """Prepares the records, and the labels of ``tasks``."""
        spec = self.spec
        path = None if spec.input is None else expanded(spec.input, spec.name)
        options, folder = json.loads(json.dumps(spec.options)), Path(self.arguments.data)
        if spec.source is not None:
            prepare(cast(Any, spec.source), path, folder, options=options)
        elif spec.corpus is not None:
            make_corpus(spec.corpus, path, options, folder)
        for task in tasks:
            if setting_of(task) != ENTITIES:
                visit_labels(self.arguments, VisitFinetuneArguments(task, ""))

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """Patients of the splits."""
        return self.arguments.splits()

    @property
    def text_folder(self) -> Path:
        """Where the text encoder lies that was trained on the notes of the training patients."""
        return self.home / "notes" / digest(self.stages.notes, self.spec.split_seed) / "encoder"

    @property
    def processor_folder(self) -> Path:
        """Where the vocabularies lie."""
        return self.folder / "processor"

    @property
    def codes_folder(self) -> Path:
        """Where Med-BERT's vocabulary of both kinds of codes lies."""
        return self.folder / "codes"

    def processor(self) -> MedMPLMProcessor:
        """The vocabularies, fitted on the training patients."""
        return MedMPLMProcessor.from_pretrained(self.processor_folder)

    def words(self) -> Any:
        """The tokenizer of the text encoder."""
        return AutoTokenizer.from_pretrained(self.text_folder)

    def make_text_encoder(self) -> None:
        """Trains the text encoder."""
        train, seed = self.splits["train"], self.spec.split_seed
        train_note_encoder(self.arguments.data, train, seed, self.text_folder, self.stages.notes or {})

    def make_processor(self) -> None:
        """Fits the vocabularies of codes."""
        train, data = self.splits["train"], self.arguments.data
        codes = fit_tokenizer(data, subject_ids=train, min_patients=self.spec.min_patients, kinds=CODES)
        processor = fit_visit_processor(data, train, **self._vocabularies())
        for folder, part in ((self.codes_folder, codes), (self.processor_folder, processor)):
            if folder.is_dir():  # of a run that was stopped between the two
                continue
            with atomic_folder(folder) as temporary:
                part.save_pretrained(temporary)

    def checkpoint(self, row: VisitRow, seed: int) -> Path:
        """Where the encoders lie that a row starts from, pre-trained with a seed or blank."""
        family = str(row.checkpoint)
        parts = [family, row.pretrain_options, self.stages.part(family, "options")]
        parts += [self._codes_like_medmplm()] if family == GBERT else []
        if row.trains_checkpoint:
            return self.folder / "pretrained" / f"{digest(*parts, self.stages.part(family, 'training'))}-{seed}"
        return self.folder / "blank" / f"{digest(*parts)}-{seed}"

    def make_checkpoint(self, row: VisitRow, seed: int) -> None:
        """Pre-trains the encoders of a row, or writes them as they start."""
        folder, family = self.checkpoint(row, seed), str(row.checkpoint)
        settings = SILENT | {"use_cpu": not torch.cuda.is_available()} | self.stages.part(family, "training")
        training = TrainingArguments(output_dir=str(folder), seed=seed, **settings)
        if family == "medbert":
            self._medbert(row, training)
        elif row.trains_checkpoint:
            pretrain_visits(self.arguments, self.pretrain_arguments(row), training)
        else:
            processor = self.processor()
            model = new_visit_model(self.pretrain_arguments(row), processor, seed)
            with atomic_folder(folder) as temporary:
                model.save_pretrained(temporary)
                processor.save_pretrained(temporary)
                (temporary / PRETRAINING_FILE).write_text(json.dumps({"trained": False}) + "\n")

    def pretrain_arguments(self, row: VisitRow) -> VisitPretrainArguments:
        """What MedM-PLM or G-BERT of a row is made with."""
        family = str(row.checkpoint)
        options = dict(self.stages.part(family, "options"))
        fields = options.pop("model_options", {}) | row.pretrain_options
        if family == GBERT:
            fields = self._codes_like_medmplm() | fields
        given = self._vocabularies() | {"architecture": family, "model_options": json.dumps(fields)} | options
        given.pop("notes")
        if family == GBERT:
            given["note_encoder"] = None
        return VisitPretrainArguments(**given)

    def options(self, task: str) -> VisitFinetuneArguments:
        """How a task is read."""
        return VisitFinetuneArguments(task, "")

    def label_names(self, task: str) -> list[str]:
        """What is predicted, in the order of the labels."""
        return json.loads(self.labels_path(task).read_text())

    def examples_folder(self, task: str, split: str) -> Path:
        """Where the examples of a split lie."""
        return self.folder / "examples" / task_name(task) / split

    def make_examples(self, task: str) -> None:
        """Writes the examples of all splits of a task, and the names of its labels."""
        if setting_of(task) == ENTITIES:
            names, parts = corpus_examples(self.arguments.data, self.splits, self.words(), self.max_length)
        else:
            processor, options = self.processor(), self.options(task)
            names = label_names(self.arguments, options, processor, self.splits["train"])
            given = (self.arguments, options, processor, names, self.splits)
            parts = {split: labelled_visits(*given, split) for split in SPLITS}
        for split, examples in parts.items():
            if not self.examples_folder(task, split).is_dir():
                with atomic_folder(self.examples_folder(task, split)) as temporary:
                    examples.save_to_disk(str(temporary))
        with atomic_path(self.labels_path(task)) as temporary:
            temporary.write_text(json.dumps(names, indent=1) + "\n")

    def labels_path(self, task: str) -> Path:
        """Where the names of the labels lie; written last."""
        return self.examples_folder(task, "train").parent / "labels.json"

    def examples(self, task: str, split: str) -> datasets.Dataset:
        """The examples of all labelled patients of a split."""
        import datasets

        return datasets.load_from_disk(str(self.examples_folder(task, split)))

    def _medbert(self, row: VisitRow, training: TrainingArguments) -> None:
        data = DataArguments(
            data=self.arguments.data, split_seed=self.spec.split_seed, min_patients=self.spec.min_patients
        )
        given = self.stages.part("medbert", "options")
        fields = given.get("model_options", {}) | row.pretrain_options
        options = PretrainArguments(
            **(given | {"tokenizer": str(self.codes_folder), "model_options": json.dumps(fields)})
        )
        if row.trains_checkpoint:
            pretrain(data, options, training)
            return
        tokenizer = EhrCodeTokenizer.from_pretrained(self.codes_folder)
        torch.manual_seed(training.seed)
        with atomic_folder(Path(str(training.output_dir))) as temporary:
            MedBertForPreTraining(model_config(data, options, tokenizer)).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / PRETRAINING_FILE).write_text(json.dumps({"trained": False}) + "\n")

    def _codes_like_medmplm(self) -> dict[str, Any]:
        """G-BERT has the shape of MedM-PLM's code encoder."""
        return self.stages.part(MEDMPLM, "options").get("model_options", {}).get("code_config", {})

    def _vocabularies(self) -> dict[str, Any]:
        """Arguments of :func:`fit_visit_processor`."""
        notes = self.spec.notes and self.stages.notes is not None
        return {
            "min_patients": self.spec.min_patients, "notes": notes, "note_max_length": self.max_length,
            "note_encoder": str(self.text_folder) if notes else None,
        }  # fmt: skip


__all__ = ["CODES", "PRETRAINING_FILE", "VisitCohort"]

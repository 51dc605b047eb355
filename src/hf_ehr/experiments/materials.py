"""What cells are made of, each made once and kept in the work folder: cohorts, tokenizers, checkpoints, embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from transformers import TrainingArguments

from hf_ehr.code_embeddings import ppmi_svd, time_window_skipgram
from hf_ehr.datasets import build_examples
from hf_ehr.experiments.shared import SPLITS
from hf_ehr.experiments.spec import DataSpec, PretrainSpec, digest, expanded
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.prepare import SourceName, prepare
from hf_ehr.schema import atomic_folder
from hf_ehr.training import (
    DataArguments,
    PretrainArguments,
    pretrain,
    task_labels,
    task_name,
)
from hf_ehr.transfer import TransferArguments, transfer
from hf_ehr.version import __version__
from hf_ehr.vocabulary import fit_tokenizer

if TYPE_CHECKING:
    import datasets


class Cohort:
    """A prepared data set with its tokenizer, splits and examples.

    Args:
        spec: What it is.
        work: Folder that everything is kept in.
    """

    def __init__(self, spec: DataSpec, work: Path):
        self.spec = spec
        self.key = digest(
            spec.source, spec.input, spec.options, spec.folder, spec.min_patients, spec.max_length, __version__,
            *(["days"] if spec.days else []),
        )  # fmt: skip
        self.folder = work / "cohorts" / self.key
        data = spec.folder if spec.folder is not None else str(self.folder / "data")
        self.data = DataArguments(data=data, min_patients=spec.min_patients, max_length=spec.max_length)

    def make(self, tasks: tuple[str, ...]) -> None:
        """Prepares the records, fits the tokenizer, writes the labels and the examples of ``tasks``."""
        if self.spec.source is not None:
            self._prepare()
        splits = self.data.splits()
        if not (self.folder / "tokenizer").is_dir():
            tokenizer = fit_tokenizer(
                self.data.data, subject_ids=splits["train"], min_patients=self.data.min_patients, days=self.spec.days
            )
            with atomic_folder(self.folder / "tokenizer") as temporary:
                tokenizer.save_pretrained(temporary)
        for task in tasks:
            for split in SPLITS:
                self._write_examples(task, split, splits[split])

    def tokenizer(self) -> EhrCodeTokenizer:
        """The tokenizer fitted on the training patients."""
        return EhrCodeTokenizer.from_pretrained(self.folder / "tokenizer")

    def examples(self, task: str, split: str) -> datasets.Dataset:
        """EXAMPLES of all labelled patients of a split."""
        import datasets

        return datasets.load_from_disk(str(self._examples_folder(task, split)))

    def _prepare(self) -> None:
        spec = self.spec
        path = None if spec.input is None else expanded(spec.input, spec.name)
        options = json.loads(json.dumps(spec.options))
        prepare(cast(SourceName, spec.source), path, Path(self.data.data), options=options)

    def _write_examples(self, task: str, split: str, ids: np.ndarray) -> None:
        folder = self._examples_folder(task, split)
        if folder.is_dir():
            return
        tokenizer, labels = self.tokenizer(), task_labels(self.data, task)
        kinds = tuple(tokenizer.kinds)
        examples = build_examples(
            self.data.data, tokenizer, labels, subject_ids=ids, max_length=self.data.max_length, kinds=kinds
        )
        with atomic_folder(folder) as temporary:
            examples.save_to_disk(str(temporary))

    def _examples_folder(self, task: str, split: str) -> Path:
        return self.folder / "examples" / task_name(task) / split


def checkpoint_folder(cohort: Cohort, spec: PretrainSpec, seed: int) -> Path:
    """Where the Med-BERT of one seed lies."""
    return cohort.folder / "pretrained" / f"{digest(spec.options, spec.training)}-{seed}"


def pretrain_arguments(cohort: Cohort, spec: PretrainSpec) -> PretrainArguments:
    """The options of pre-training, with the cohort's tokenizer."""
    options = spec.options | {"model_options": json.dumps(spec.options.get("model_options", {}))}
    return PretrainArguments(tokenizer=str(cohort.folder / "tokenizer"), **options)


def make_checkpoint(cohort: Cohort, spec: PretrainSpec, seed: int) -> None:
    """Pre-trains Med-BERT on the training patients of a cohort."""
    settings: dict[str, Any] = {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True} | spec.training
    folder = checkpoint_folder(cohort, spec, seed)
    arguments = TrainingArguments(output_dir=str(folder), seed=seed, **settings)
    pretrain(cohort.data, pretrain_arguments(cohort, spec), arguments)


def moved_folder(source: Cohort, target: Cohort, spec: PretrainSpec, seed: int) -> Path:
    """Where a checkpoint of ``source`` with the vocabulary of ``target`` lies."""
    return target.folder / "moved" / f"{source.key}-{checkpoint_folder(source, spec, seed).name}"


def move_checkpoint(source: Cohort, target: Cohort, spec: PretrainSpec, seed: int) -> None:
    """Gives a checkpoint of ``source`` the vocabulary of ``target``; what was kept is in its ``transfer.json``."""
    checkpoint, folder = checkpoint_folder(source, spec, seed), moved_folder(source, target, spec, seed)
    transfer(TransferArguments(str(checkpoint), str(target.folder / "tokenizer"), str(folder), seed=seed))


def embeddings_folder(cohort: Cohort, init: str, dim: int, seed: int) -> Path:
    """Where a table of static code embeddings lies."""
    return cohort.folder / "embeddings" / f"{init}-{dim}-{seed}"


def make_embeddings(cohort: Cohort, init: str, dim: int, seed: int) -> None:
    """Fits static code embeddings on the training patients of a cohort."""
    fit: Any = {"t-w2v": time_window_skipgram, "ppmi-svd": ppmi_svd}[init]
    train = cohort.data.splits()["train"]
    table = fit(cohort.data.data, cohort.tokenizer(), subject_ids=train, dim=dim, seed=seed)
    table.save(embeddings_folder(cohort, init, dim, seed))


class CodeEncoders:
    """MedHMP's two stages on the patients of a cohort, for models of patients that take its encoder of diagnoses.

    Args:
        cohort: The patients.
        given: ``features``, ``stays`` and ``admissions`` of the report.
        seeds: Pre-training seeds.
        work: Folder that everything is kept in.
    """

    def __init__(self, cohort: Cohort, given: dict[str, Any], seeds: int, work: Path):
        from hf_ehr.experiments.stays.materials import StayCohort
        from hf_ehr.experiments.stays.spec import StagesSpec, StayData, StayRow

        data = StayData(cohort.spec.name, folder=cohort.data.data, features=given.get("features", {}))
        self.row = StayRow("both stages", "medhmp", init="a+s")
        self.features = StayCohort(data, work).features(self.row)
        self.stages = StagesSpec(seeds, given.get("stays", {}), given.get("admissions", {}))

    def folder(self, seed: int) -> Path:
        """Where the second stage of a seed lies."""
        return self.features.stage2(self.stages, self.row, seed)

    def make(self, seed: int) -> None:
        """Runs both stages; the features are fitted before."""
        from hf_ehr.experiments.stays.materials import make_stage1, make_stage2

        make_stage1(self.features, self.stages, seed)
        make_stage2(self.features, self.stages, self.row, seed)

    def put_into(self, model: Any, tokenizer: EhrCodeTokenizer, seed: int) -> None:
        """Starts the encoder of visits of a code RNN from that of the checkpoint."""
        from hf_ehr.models.modeling_medhmp_transfer import load_code_encoder
        from hf_ehr.models.processing_medhmp import MedHMPProcessor

        known = MedHMPProcessor.from_pretrained(self.folder(seed)).diagnosis_tokenizer
        load_code_encoder(model, self.folder(seed), known, tokenizer)

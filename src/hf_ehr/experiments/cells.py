"""One cell of a report: a row fitted on one labelled draw, and its probabilities for validation and test patients."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, TrainingArguments

from hf_ehr import baselines
from hf_ehr.experiments.materials import (
    CodeEncoders,
    Cohort,
    checkpoint_folder,
    embeddings_folder,
    moved_folder,
    pretrain_arguments,
)
from hf_ehr.experiments.shared import SPLITS
from hf_ehr.experiments.spec import PPMI_LR, DataSpec, ReportSpec, RowSpec, digest, patients_at
from hf_ehr.metrics import auroc
from hf_ehr.models.configuration_ehrrnn import EhrRnnConfig
from hf_ehr.models.modeling_ehrrnn import EhrRnnForSequenceClassification
from hf_ehr.models.modeling_medbert import MedBertForSequenceClassification
from hf_ehr.schema import atomic_path, shard_paths
from hf_ehr.tasks.audit import OneShotTest
from hf_ehr.training import fit_classifier, model_config, predict, start_from_probe, task_name
from hf_ehr.transfer import load_code_embeddings

if TYPE_CHECKING:
    import datasets

    from hf_ehr.code_embeddings import CodeEmbeddings

TUNING_DRAW = 1_000_000
"""Learning rates are chosen on this draw, which no report shows."""
PPMI_DIM = 60


@dataclass(frozen=True)
class Cell:
    """What one fit is determined by, beside the report's settings."""

    data: DataSpec
    task: str
    row: RowSpec
    size: int | str
    draw: int

    @property
    def untuned(self) -> Cell:
        """The cell that the learning rate is chosen on."""
        return replace(self, draw=TUNING_DRAW)


class Bench:
    """Where the cells of a report are computed and kept.

    Args:
        spec: The report.
        work: Folder of everything that is kept; several reports may share it.
    """

    def __init__(self, spec: ReportSpec, work: Path):
        self.spec, self.work = spec, work

    def cohort(self, data: DataSpec) -> Cohort:
        """A data set in the work folder."""
        return Cohort(data, self.work)

    def code_encoders(self, data: DataSpec) -> CodeEncoders:
        """MedHMP's checkpoints of a data set."""
        return CodeEncoders(self.cohort(data), self.spec.medhmp, self.spec.pretraining.seeds, self.work)

    def path(self, cell: Cell) -> Path:
        """Where the probabilities of a cell lie."""
        return self.work / "cells" / f"{self._key(cell)}.npz"

    def rate_path(self, cell: Cell) -> Path:
        """Where the learning rate of a cell's row lies."""
        return self.work / "cells" / f"{self._key(cell.untuned)}.json"

    def examples(self, cell: Cell, split: str) -> datasets.Dataset:
        """The examples of a split that a cell sees: its labelled draw, or a fixed sample of validation or test."""
        limits = {"train": cell.size, "validation": self.spec.validation_patients, "test": self.spec.test_patients}
        examples = self.cohort(cell.data).examples(cell.task, split)
        return chosen_patients(examples, limits[split], cell.draw if split == "train" else 0)

    def run(self, cell: Cell) -> None:
        """Fits a cell and writes its probabilities."""
        started = time.monotonic()
        parts = {split: self.examples(cell, split) for split in SPLITS}
        fit = self._neural if cell.row.neural else self._classical
        validation, test = fit(cell, parts)
        seconds = time.monotonic() - started
        with atomic_path(self.path(cell)) as temporary, temporary.open("wb") as file:
            np.savez(
                file, validation=validation.astype(np.float32), test=test.astype(np.float32),
                n_train=len(parts["train"]), seconds=seconds,
            )  # fmt: skip

    def tune(self, cell: Cell) -> None:
        """Chooses the learning rate of a row by validation AUROC on the draw that is not reported."""
        draw = cell.untuned
        parts = {split: self.examples(draw, split) for split in ("train", "validation")}
        truth = np.asarray(parts["validation"]["labels"])
        scores = {}
        for rate in cell.row.learning_rates:
            model = self._fitted(draw, parts, rate)
            scores[rate] = float(auroc(truth, predict(model, parts["validation"], self.cohort(cell.data).tokenizer())))
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        with atomic_path(self.rate_path(cell)) as temporary:
            temporary.write_text(json.dumps({"learning_rate": best, "validation_auroc": scores}, indent=2))

    def test(self, data: DataSpec, task: str) -> tuple[np.ndarray, np.ndarray, float | None]:
        """Test labels, their patients, and the AUROC of the generator's own probabilities where they are known."""
        examples = self.examples(Cell(data, task, self.spec.rows[0], self.spec.sizes[0], 0), "test")
        truth, patients = OneShotTest(np.asarray(examples["labels"])).read(), np.asarray(examples["subject_id"])
        folder = Path(self.cohort(data).data.data)
        return truth, patients, oracle_auroc(folder, task_name(task), truth, "subject_id", patients)

    def seed(self, cell: Cell) -> int:
        """The pre-training seed of a draw."""
        return 0 if cell.draw == TUNING_DRAW else cell.draw % self.spec.pretraining.seeds

    def embedding_size(self, row: RowSpec) -> int:
        """Width of the static embeddings a row starts from."""
        return PPMI_DIM if row.model == PPMI_LR else self._rnn_config(row).embedding_size

    def _key(self, cell: Cell) -> str:
        spec, row = self.spec, asdict(replace(cell.row, name=""))
        pretraining = asdict(spec.pretraining) if cell.row.init == "pretrained" else None
        source = cell.row.pretrained_on and self.cohort(spec.data(cell.row.pretrained_on)).key
        settings = [spec.finetuning_of(cell.size), spec.rnn] if cell.row.neural else []
        settings += [spec.medhmp] if cell.row.init == "medhmp" else []
        limits = [spec.validation_patients, spec.test_patients, spec.pretraining.seeds]
        place = [self.cohort(cell.data).key, cell.task, cell.size, cell.draw]
        return digest(*place, row, pretraining, source, *settings, *limits)

    def _classical(self, cell: Cell, parts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = self.cohort(cell.data).tokenizer()
        options: dict[str, Any] = {"vocab_size": len(tokenizer), "seed": cell.draw}
        fit = baselines.BASELINES.get(cell.row.model, baselines.ppmi_svd_lr)
        if cell.row.model == PPMI_LR:
            options["embeddings"] = self._embeddings(cell, "ppmi-svd").for_tokenizer(tokenizer)[0]
        predictions = fit(*(parts[split] for split in SPLITS), **options)
        return predictions.validation, predictions.test

    def _neural(self, cell: Cell, parts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        rates = cell.row.learning_rates
        rate = json.loads(self.rate_path(cell).read_text())["learning_rate"] if len(rates) > 1 else rates[0]
        model, tokenizer = self._fitted(cell, parts, rate), self.cohort(cell.data).tokenizer()
        validation, test = (predict(model, parts[split], tokenizer) for split in ("validation", "test"))
        return validation, test

    def _fitted(self, cell: Cell, parts: dict[str, Any], learning_rate: float) -> PreTrainedModel:
        settings: dict[str, Any] = {
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "save_only_model": True,
        }
        settings |= self.spec.finetuning_of(cell.size)
        patience = settings.pop("patience", None)
        tokenizer = self.cohort(cell.data).tokenizer()
        torch.manual_seed(cell.draw)
        model = self._model(cell)
        if cell.row.linear_probe:
            start_from_probe(model, parts["train"], parts["validation"], tokenizer)
        with tempfile.TemporaryDirectory(dir=self.work, prefix=".run-") as folder:
            arguments = TrainingArguments(output_dir=folder, seed=cell.draw, learning_rate=learning_rate, **settings)
            fit_classifier(model, parts["train"], parts["validation"], tokenizer, arguments, patience)
        return model

    def _model(self, cell: Cell) -> PreTrainedModel:
        row = cell.row
        if row.model == "rnn":
            return self._rnn(cell)
        if row.init == "pretrained":
            return MedBertForSequenceClassification.from_pretrained(
                self._checkpoint(cell), head=row.head, num_labels=2
            )
        cohort = self.cohort(cell.data)
        config = model_config(cohort.data, pretrain_arguments(cohort, self.spec.pretraining), cohort.tokenizer())
        config.update({"head": row.head, "num_labels": 2})
        return MedBertForSequenceClassification(config)

    def _checkpoint(self, cell: Cell) -> Path:
        target, spec = self.cohort(cell.data), self.spec.pretraining
        if cell.row.pretrained_on in (None, cell.data.name):
            return checkpoint_folder(target, spec, self.seed(cell))
        source = self.cohort(self.spec.data(str(cell.row.pretrained_on)))
        return moved_folder(source, target, spec, self.seed(cell))

    def _rnn(self, cell: Cell) -> PreTrainedModel:
        tokenizer = self.cohort(cell.data).tokenizer()
        config = self._rnn_config(cell.row, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        model = EhrRnnForSequenceClassification(config)
        if cell.row.init == "medhmp":
            self.code_encoders(cell.data).put_into(model, tokenizer, self.seed(cell))
        elif cell.row.init != "random":
            load_code_embeddings(model, self._embeddings(cell, cell.row.init), tokenizer, freeze=cell.row.freeze)
        return model

    def _rnn_config(self, row: RowSpec, **fields: Any) -> EhrRnnConfig:
        head = row.head if row.neural else "gru"
        shape: dict[str, Any] = {"head": head, "level": row.level, "num_labels": 2}
        return EhrRnnConfig(**(shape | self.spec.rnn | fields))

    def _embeddings(self, cell: Cell, init: str) -> CodeEmbeddings:
        from hf_ehr.code_embeddings import CodeEmbeddings

        dim = self.embedding_size(cell.row)
        return CodeEmbeddings.load(embeddings_folder(self.cohort(cell.data), init, dim, self.seed(cell)))


def chosen_patients(examples: datasets.Dataset, size: int | str, draw: int) -> datasets.Dataset:
    """The examples of a random subset of their patients, nested over sizes.

    Args:
        examples: With ``subject_id``.
        size: As :func:`hf_ehr.experiments.spec.patients_at` has it.
        draw: Which subset.
    """
    subjects = np.asarray(examples.data["subject_id"].to_numpy())
    patients = np.unique(subjects)
    wanted = patients_at(size, len(patients))
    if wanted == len(patients):
        return examples
    chosen = np.random.default_rng(draw).permutation(patients)[:wanted]
    return examples.select(np.flatnonzero(np.isin(subjects, chosen)))


def oracle_auroc(folder: Path, task: str, truth: np.ndarray, key: str, ids: np.ndarray) -> float | None:
    """The AUROC of a generator's own probabilities, None where the data set knows none of the task.

    Args:
        folder: Prepared folder; ``truth/`` holds ``oracle_probability``, by ``task`` if it knows several.
        task: Name of the task; ``synthetic_outcome`` where the truth has no tasks.
        truth: Labels, (n,).
        key: Column of the truth that says whose a probability is.
        ids: Its values for the labels, (n,).
    """
    if not (folder / "truth").is_dir():
        return None
    paths = shard_paths(folder, "truth")
    by_task = "task" in pq.read_schema(paths[0]).names
    if not by_task and task != "synthetic_outcome":
        return None
    filters = [("task", "=", task)] if by_task else None
    columns = [key, "oracle_probability"]
    known = pa.concat_tables(pq.read_table(path, columns=columns, filters=filters) for path in paths)
    owners, p = (known[column].to_numpy() for column in columns)
    order = np.argsort(owners)
    if len(np.unique(owners)) < len(owners) or not np.isin(ids, owners).all():
        return None
    return float(auroc(truth, p[order][np.searchsorted(owners[order], ids)]))

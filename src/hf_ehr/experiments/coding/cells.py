"""The cells of a coding report: one row on one data set with one seed, fitted, scored and kept."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from transformers import AutoTokenizer, TrainingArguments

from hf_ehr import note_baselines
from hf_ehr.experiments.cells import TUNING_DRAW
from hf_ehr.experiments.coding.materials import (
    PRETRAINING_FILE,
    SPLITS,
    CodedNotes,
    checkpoint_folder,
    checkpoint_settings,
    make_checkpoint,
    save_scores,
)
from hf_ehr.experiments.coding.spec import EHRBERT, CodingData, CodingRow, CodingSpec
from hf_ehr.experiments.runner import Job
from hf_ehr.experiments.spec import digest, expanded
from hf_ehr.models.configuration_ehrtext import EhrTextConfig
from hf_ehr.models.modeling_ehrtext import EhrTextForICDCoding
from hf_ehr.multilabel import multilabel_scores
from hf_ehr.note_datasets import build_coding_examples
from hf_ehr.schema import EhrDataError, atomic_path
from hf_ehr.training import CoderArguments, check_earlier_stage, fit_coder, new_coder, predict_codes
from hf_ehr.training.icd_coding import SELECTION
from hf_ehr.word_embeddings import supervised_word_embeddings

SHARE_OF_BEST = 0.9
"""Of the best validation figure above chance: how soon it is reached says how fast a row learns."""
BASELINES = {"bow_lr": "bow_logistic_regression", "tfidf_lr": "tfidf_logistic_regression", "frequency": "frequency"}


@dataclass(frozen=True)
class CodingCell:
    """What one fit is determined by, beside the report's settings."""

    data: CodingData
    row: CodingRow
    draw: int

    @property
    def name(self) -> str:
        """What a failure is reported under."""
        return f"{self.row.name}, {self.data.name}, seed {self.draw}"

    @property
    def untuned(self) -> CodingCell:
        """The cell that the learning rate is chosen on."""
        return replace(self, draw=TUNING_DRAW)


def cells(spec: CodingSpec) -> list[CodingCell]:
    """All cells that can run, seed by seed, so that a run that is stopped has some seeds of everything."""
    found = [
        CodingCell(data, row, draw)
        for data in spec.datasets
        for row in spec.rows_of(data)
        for draw in range(spec.draws_of(row))
    ]
    return sorted(found, key=lambda cell: cell.draw)


def stages(bench: CodingBench) -> dict[str, list[Job]]:
    """The jobs of a report; those of one stage wait for none of their own."""
    spec, encoders, rates, fits = bench.spec, {}, [], []
    for cell in cells(spec):
        notes, row = bench.notes(cell.data), cell.row
        if row.needs_checkpoint:
            # Seed 0 also serves the choice of the learning rate.
            arguments = (notes, spec, row, bench.seed(cell))
            done = checkpoint_folder(*arguments) / PRETRAINING_FILE
            name = f"Encoder of {row.name}, {cell.data.name}, seed {bench.seed(cell)}"
            encoders[done] = Job(name, make_checkpoint, arguments, done)
        if row.neural and len(row.learning_rates) > 1 and cell.draw == 0:
            rates.append(
                Job(f"Learning rate of {row.name}, {cell.data.name}", bench.tune, (cell,), bench.rate_path(cell))
            )
        fits.append(Job(cell.name, bench.run, (cell,), bench.path(cell)))
    return {"Pre-training": list(encoders.values()), "Learning rates": rates, "Cells": fits}


class CodingBench:
    """Where the cells of a coding report are computed and kept.

    Args:
        spec: The report.
        work: Folder of everything that is kept; several reports may share it.
    """

    def __init__(self, spec: CodingSpec, work: Path):
        self.spec, self.work = spec, work

    def notes(self, data: CodingData) -> CodedNotes:
        """A data set in the work folder."""
        return CodedNotes(data, self.spec.tokenizer, self.work)

    def path(self, cell: CodingCell) -> Path:
        """Where the scores of a cell lie."""
        return self.work / "coding-cells" / f"{self._key(cell)}.npz"

    def rate_path(self, cell: CodingCell) -> Path:
        """Where the learning rate of a cell's row lies."""
        return self.work / "coding-cells" / f"{self._key(cell.untuned)}.json"

    def seed(self, cell: CodingCell) -> int:
        """The pre-training seed of a cell."""
        return 0 if cell.draw == TUNING_DRAW else cell.draw % self.spec.pretraining.seeds

    def run(self, cell: CodingCell) -> None:
        """Fits a cell and writes its scores of validation and test notes; no model is shown a test code."""
        started = time.monotonic()
        validation, test, epochs = (self._neural if cell.row.neural else self._classical)(cell)
        save_scores(
            self.path(cell), validation=validation.astype(np.float32), test=test.astype(np.float32),
            seconds=time.monotonic() - started, epochs=epochs,
        )  # fmt: skip

    def tune(self, cell: CodingCell) -> None:
        """Chooses the learning rate by what compares epochs, on validation, with a seed that is not reported."""
        found, metric = {}, self.selection(cell.row)
        for rate in cell.row.learning_rates:
            model, tokenizer, _ = self._fitted(cell.untuned, rate)
            predictions = predict_codes(model, self._examples(cell, "validation", tokenizer), tokenizer)
            found[rate] = multilabel_scores(predictions, thresholds=0.5)[metric]
        best = max(found, key=lambda rate: (found[rate], -rate))
        with atomic_path(self.rate_path(cell)) as temporary:
            temporary.write_text(json.dumps({"learning_rate": best, f"validation_{metric}": found}, indent=2))

    def selection(self, row: CodingRow) -> str:
        """The validation figure by which epochs and learning rates of a row are compared."""
        settings = self.spec.finetuning | row.training
        return settings.get("metric_for_best_model", SELECTION).removeprefix("eval_")

    def _key(self, cell: CodingCell) -> str:
        spec, row = self.spec, replace(cell.row, name="", datasets=None)
        notes = self.notes(cell.data)
        parts: list[Any] = [notes.key, cell.draw, asdict(row)]
        if row.neural:
            parts += [spec.finetuning]
            if len(row.learning_rates) > 1 and self.selection(row) != SELECTION:
                parts += [self.selection(row)]  # cells of versions that compared rates by AUROC are others
        if row.model == EHRBERT:
            parts += [checkpoint_settings(notes, spec, row), spec.pretraining.seeds]
        return digest(*parts)

    def _classical(self, cell: CodingCell) -> tuple[np.ndarray, np.ndarray, int]:
        notes, options = self.notes(cell.data), cell.row.model_options
        scope, texts = notes.scope, {split: notes.texts(split) for split in SPLITS}
        if cell.row.model == "string_match":
            found = [note_baselines.string_match(texts[split], scope.descriptions, **options) for split in SPLITS[1:]]
            return found[0], found[1], 0
        hidden = sparse.csr_array(scope.truth["test"].shape, dtype=np.int8)
        truth = scope.truth | {"test": hidden}
        parts = [note_baselines.CodedTexts.of(texts[split], truth[split], len(scope.codes)) for split in SPLITS]
        return *getattr(note_baselines, BASELINES[cell.row.model])(*parts, **options), 0

    def _neural(self, cell: CodingCell) -> tuple[np.ndarray, np.ndarray, int]:
        rates = cell.row.learning_rates
        rate = json.loads(self.rate_path(cell).read_text())["learning_rate"] if len(rates) > 1 else rates[0]
        model, tokenizer, epochs = self._fitted(cell, rate)
        validation, test = (
            predict_codes(model, self._examples(cell, split, tokenizer).remove_columns("labels"), tokenizer).dense()
            for split in SPLITS[1:]
        )
        return validation, test, epochs

    def _fitted(self, cell: CodingCell, learning_rate: float) -> tuple[Any, Any, int]:
        """The trained model, its tokenizer, and the epochs until it was nearly as good as at its best."""
        settings: dict[str, Any] = {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        settings |= {"use_cpu": not torch.cuda.is_available()}  # else bf16 is refused without an accelerator
        settings |= self.spec.finetuning | cell.row.training
        patience = settings.pop("patience", None)
        model, tokenizer = self._coder(cell)
        train, validation = (self._examples(cell, split, tokenizer) for split in SPLITS[:2])
        with tempfile.TemporaryDirectory(dir=self.work, prefix=".run-") as folder:
            arguments = TrainingArguments(output_dir=folder, seed=cell.draw, learning_rate=learning_rate, **settings)
            fit_coder(model, train, validation, tokenizer, arguments, patience)
            return model, tokenizer, epochs_to_share(Path(folder))

    def _examples(self, cell: CodingCell, split: str, tokenizer: Any) -> Any:
        notes, row = self.notes(cell.data), cell.row
        examples = build_coding_examples(
            notes.arguments.folder, tokenizer, notes.scope.codes, note_ids=notes.arguments.splits[split],
            max_length=row.max_length, max_segments=row.max_segments,
        )  # fmt: skip
        if examples["note_id"][:] != notes.scope.note_ids[split]:
            raise EhrDataError(f"Notes of {split} were read in another order than their codes.")
        return examples

    def _coder(self, cell: CodingCell) -> tuple[Any, Any]:
        """A new model for the codes in scope, and its tokenizer."""
        notes, row = self.notes(cell.data), cell.row
        if row.model != EHRBERT:
            return self._text_model(cell, notes)
        source = self._encoder(cell, notes)
        check_earlier_stage(source, notes.arguments.manifest())
        tokenizer = AutoTokenizer.from_pretrained(source)
        options = CoderArguments(
            model=source, head=row.head, model_options=json.dumps(row.model_options), label_init=row.label_init,
            untrained=row.init == "random",
        )  # fmt: skip
        return new_coder(options, notes.scope.codes, tokenizer, row.max_length, cell.draw)[0], tokenizer

    def _encoder(self, cell: CodingCell, notes: CodedNotes) -> str:
        if cell.row.needs_checkpoint:
            return str(checkpoint_folder(notes, self.spec, cell.row, self.seed(cell)))
        return expanded(str(cell.row.encoder), cell.row.name, "encoder")

    def _text_model(self, cell: CodingCell, notes: CodedNotes) -> tuple[Any, Any]:
        tokenizer, codes = notes.tokenizer(), notes.scope.codes
        preset = "multi_head_attention" if cell.row.model == "multi_head" else cell.row.model
        config = getattr(EhrTextConfig, preset)(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, id2label=dict(enumerate(codes)),
            label2id={code: index for index, code in enumerate(codes)}, **cell.row.model_options,
        )  # fmt: skip
        torch.manual_seed(cell.draw)
        model = EhrTextForICDCoding(config)
        if cell.row.model == "multi_head":
            train = self._examples(cell, "train", tokenizer).with_format("arrow")[:]
            vectors = supervised_word_embeddings(
                train["input_ids"], train["labels"], vocab_size=len(tokenizer), num_labels=len(codes),
                dim=config.embedding_size, seed=cell.draw,
            )  # fmt: skip
            vectors.put_into(model)
        return model, tokenizer


def epochs_to_share(folder: Path) -> int:
    """Epochs until the validation figure, above chance, was at least ``SHARE_OF_BEST`` of its best.

    Args:
        folder: Output of a run that kept its last checkpoint.
    """
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    history = json.loads(states[-1].read_text())["log_history"]
    above = np.array([entry["eval_auroc_micro"] for entry in history if "eval_auroc_micro" in entry]) - 0.5
    return int(np.argmax(above >= SHARE_OF_BEST * above.max())) + 1

"""One cell of a report of visits: a row fitted on one labelled draw, and what it says of held-out patients."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainingArguments

from hf_ehr.experiments.cells import TUNING_DRAW, chosen_patients
from hf_ehr.experiments.shared import SILENT, SPLITS
from hf_ehr.experiments.spec import digest
from hf_ehr.experiments.visits.classical import classical, dictionary
from hf_ehr.experiments.visits.corpora import true_entities
from hf_ehr.experiments.visits.materials import VisitCohort
from hf_ehr.experiments.visits.models import fit, new_model, read_columns
from hf_ehr.experiments.visits.scores import Asked, entity_arrays, primary_of
from hf_ehr.experiments.visits.spec import ADMISSION, ENTITIES, VisitData, VisitRow, VisitSpec, setting_of
from hf_ehr.schema import atomic_path
from hf_ehr.tasks.audit import OneShotTest
from hf_ehr.training.entities import tag_notes
from hf_ehr.training.visits import asked_visits, predict_visits, without_answers

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class VisitCell:
    """What one fit is determined by, beside the report's settings."""

    data: VisitData
    task: str
    row: VisitRow
    size: int | str
    draw: int

    @property
    def name(self) -> str:
        """What a failure is reported under."""
        return f"{self.row.name}, {self.data.name}, {self.task}, {self.size} patients, draw {self.draw}"

    @property
    def untuned(self) -> VisitCell:
        """The cell that the learning rate is chosen on."""
        return replace(self, draw=TUNING_DRAW)


class VisitBench:
    """Where the cells of a report of visits are computed and kept.

    Args:
        spec: The report.
        work: Folder of everything that is kept; several reports may share it.
    """

    def __init__(self, spec: VisitSpec, work: Path):
        self.spec, self.work = spec, work

    def cohort(self, data: VisitData) -> VisitCohort:
        """A data set in the work folder."""
        return VisitCohort(data, self.spec, self.work)

    def path(self, cell: VisitCell) -> Path:
        """Where what a cell says lies."""
        return self.work / "visit-cells" / f"{self.key(cell)}.npz"

    def rate_path(self, cell: VisitCell) -> Path:
        """Where the learning rate of a cell's row lies."""
        return self.work / "visit-cells" / f"{self.key(cell.untuned)}.json"

    def seed(self, cell: VisitCell) -> int:
        """The pre-training seed of a draw."""
        return 0 if cell.draw == TUNING_DRAW else cell.draw % self.spec.pretraining.seeds

    def examples(self, cell: VisitCell, split: str) -> datasets.Dataset:
        """The examples of a split that a cell sees: its labelled draw, or a fixed sample of validation or test.

        Those of ``test`` carry no labels: what they are, only :meth:`asked` says.
        """
        found = self._all_examples(cell, split)
        return without_answers(found) if split == "test" else found

    def asked(self, cell: VisitCell, split: str) -> Asked:
        """What is true of validation or test."""
        examples, setting = self._all_examples(cell, split), setting_of(cell.task)
        cohort = self.cohort(cell.data)
        if setting == ENTITIES:
            found = true_entities(cohort.arguments.data, list(examples["note_id"]))
            return Asked(found, np.asarray(examples["subject_id"]), None)
        if setting == ADMISSION:
            truth = OneShotTest(np.asarray(examples["labels"])).read()
            return Asked(truth, np.asarray(examples["subject_id"]), None)
        visits = asked_visits(examples, len(cohort.label_names(cell.task)))
        previous = visits.previous if "diagnosis_ids" in examples.column_names else None
        return Asked(OneShotTest(visits.truth).read(), visits.subject_ids, previous)

    def run(self, cell: VisitCell) -> None:
        """Fits a cell and writes what it says; no row is shown a test label."""
        started = time.monotonic()
        parts = {split: self.examples(cell, split) for split in SPLITS}
        found = (self._entities if setting_of(cell.task) == ENTITIES else self._probabilities)(cell, parts)
        found |= {"n_train": len(np.unique(parts["train"]["subject_id"])), "seconds": time.monotonic() - started}
        with atomic_path(self.path(cell)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **found)

    def tune(self, cell: VisitCell) -> None:
        """Chooses the learning rate of a row by the figure of its task on validation, on the draw not reported."""
        draw, scores = cell.untuned, {}
        parts = {split: self.examples(draw, split) for split in SPLITS[:2]}
        asked = self.asked(draw, "validation")
        for rate in cell.row.learning_rates:
            model = self.fitted(draw, parts, rate)
            scores[rate] = primary_of(setting_of(cell.task), asked, self._said(model, cell, parts["validation"]))
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        with atomic_path(self.rate_path(cell)) as temporary:
            temporary.write_text(json.dumps({"learning_rate": best, "validation": scores}, indent=2))

    def rate(self, cell: VisitCell) -> float:
        """The learning rate of a cell."""
        rates = cell.row.learning_rates
        return json.loads(self.rate_path(cell).read_text())["learning_rate"] if len(rates) > 1 else rates[0]

    def settings(self, cell: VisitCell) -> dict[str, Any]:
        """Fields of ``TrainingArguments`` of a cell, and ``patience``."""
        spec, quiet = self.spec, {name: value for name, value in SILENT.items() if name != "save_strategy"}
        given = spec.finetuning | spec.finetuning_of_task.get(cell.task, {}) | cell.row.training
        return quiet | {"use_cpu": not torch.cuda.is_available(), "save_only_model": True} | given

    def fitted(self, cell: VisitCell, parts: dict[str, Any], rate: float) -> Any:
        """The trained model of a cell."""
        cohort, settings = self.cohort(cell.data), self.settings(cell)
        model = new_model(cohort, cell.row, cell.task, self.seed(cell), cell.draw)
        patience = settings.pop("patience", None)
        tokenizer = cohort.words() if setting_of(cell.task) == ENTITIES else None
        train, validation = (read_columns(parts[split], cell.row) for split in SPLITS[:2])
        with tempfile.TemporaryDirectory(dir=self.work, prefix=".run-") as folder:
            arguments = TrainingArguments(output_dir=folder, seed=cell.draw, learning_rate=rate, **settings)
            fit(model, cell.row, train, validation, tokenizer, arguments, patience)
        return model

    def key(self, cell: VisitCell) -> str:
        """The digest of everything that determines a cell."""
        spec, row, cohort = self.spec, asdict(replace(cell.row, name="", tasks=None)), self.cohort(cell.data)
        place = [cohort.key, cell.task, cell.size, cell.draw]
        settings: list[Any] = [spec.validation_patients, spec.test_patients]
        if cell.row.neural:
            settings += [spec.finetuning | spec.finetuning_of_task.get(cell.task, {})]
        if cell.row.checkpoint is not None:
            settings += [cohort.checkpoint(cell.row, self.seed(cell)).name]
        return digest(*place, row, *settings)

    def _all_examples(self, cell: VisitCell, split: str) -> datasets.Dataset:
        limits = {"train": cell.size, "validation": self.spec.validation_patients, "test": self.spec.test_patients}
        examples = self.cohort(cell.data).examples(cell.task, split)
        return chosen_patients(examples, limits[split], cell.draw if split == "train" else 0)

    def _said(self, model: Any, cell: VisitCell, examples: datasets.Dataset) -> Any:
        if setting_of(cell.task) == ENTITIES:
            return tag_notes(model, examples, self.cohort(cell.data).words())
        return predict_visits(model, read_columns(examples, cell.row))

    def _probabilities(self, cell: VisitCell, parts: dict[str, Any]) -> dict[str, Any]:
        if cell.row.neural:
            model = self.fitted(cell, parts, self.rate(cell))
            found = {split: self._said(model, cell, parts[split]) for split in SPLITS[1:]}
        else:
            both = classical(cell.row.model, self.cohort(cell.data), cell.task, parts, cell.draw)
            found = dict(zip(SPLITS[1:], both, strict=True))
        return {split: np.asarray(values, np.float32) for split, values in found.items()}

    def _entities(self, cell: VisitCell, parts: dict[str, Any]) -> dict[str, Any]:
        if cell.row.neural:
            found = self._said(self.fitted(cell, parts, self.rate(cell)), cell, parts["test"])
        else:
            found = dictionary(self.cohort(cell.data), parts["train"], parts["test"])
        return entity_arrays(found)

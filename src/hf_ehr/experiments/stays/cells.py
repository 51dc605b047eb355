"""One cell of a report of stays: a row fitted on one labelled draw, and its probabilities for held-out patients."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from hf_ehr.baselines import Predictions
from hf_ehr.experiments.cells import TUNING_DRAW, chosen_patients, oracle_auroc
from hf_ehr.experiments.shared import SILENT, SPLITS
from hf_ehr.experiments.spec import digest
from hf_ehr.experiments.stays.materials import (
    Features,
    StayCohort,
    load_examples,
)
from hf_ehr.experiments.stays.models import Collate, collator, fit, new_model, probabilities, set_head
from hf_ehr.experiments.stays.spec import (
    ADMISSION,
    MEDHMP,
    PREVALENCE,
    StayData,
    StayRow,
    StaySpec,
)
from hf_ehr.experiments.stays.summaries import load_summaries
from hf_ehr.metrics import auroc
from hf_ehr.schema import atomic_path
from hf_ehr.stay_baselines import STAY_BASELINES
from hf_ehr.tasks.audit import OneShotTest
from hf_ehr.training import task_name

MEMBER_SEEDS = 1_000
"""Seeds of the members of an ensemble lie this far apart, so that no draw's member is another draw's."""


@dataclass(frozen=True)
class StayCell:
    """What one fit is determined by, beside the report's settings."""

    data: StayData
    task: str
    row: StayRow
    size: int | str
    draw: int

    @property
    def name(self) -> str:
        """What a failure is reported under."""
        return f"{self.row.name}, {self.data.name}, {self.task}, {self.size} patients, draw {self.draw}"

    @property
    def untuned(self) -> StayCell:
        """The cell that the learning rate is chosen on."""
        return replace(self, draw=TUNING_DRAW)


class StayBench:
    """Where the cells of a report of stays are computed and kept.

    Args:
        spec: The report.
        work: Folder of everything that is kept; several reports may share it.
    """

    def __init__(self, spec: StaySpec, work: Path):
        self.spec, self.work = spec, work

    def cohort(self, data: StayData) -> StayCohort:
        """A data set in the work folder."""
        return StayCohort(data, self.work)

    def features(self, cell: StayCell) -> Features:
        """What a cell's row reads of the hours."""
        return self.cohort(cell.data).features(cell.row)

    def path(self, cell: StayCell) -> Path:
        """Where the probabilities of a cell lie."""
        return self.work / "stay-cells" / f"{self.key(cell)}.npz"

    def rate_path(self, cell: StayCell) -> Path:
        """Where the learning rate of a cell's row lies."""
        return self.work / "stay-cells" / f"{self.key(cell.untuned)}.json"

    def summaries_path(self, cell: StayCell) -> Path:
        """Where the summaries of a column's stays lie."""
        return self.cohort(cell.data).folder / "summaries" / f"{self.spec.level}-{task_name(cell.task)}.npz"

    def all_examples(self, cell: StayCell, split: str) -> Any:
        """The examples of all labelled patients of a split."""
        return load_examples(self.features(cell), self.spec, cell.task, split)

    def examples(self, cell: StayCell, split: str) -> Any:
        """The examples of a split that a cell sees: its labelled draw, or a fixed sample of validation or test."""
        limits = {"train": cell.size, "validation": self.spec.validation_patients, "test": self.spec.test_patients}
        return chosen_patients(self.all_examples(cell, split), limits[split], cell.draw if split == "train" else 0)

    def seed(self, cell: StayCell, member: int = 0) -> int:
        """The pre-training seed of a draw and a member of its ensemble."""
        return member if cell.draw == TUNING_DRAW else (cell.draw + member) % self.spec.pretraining.seeds

    def run(self, cell: StayCell) -> None:
        """Fits a cell and writes its probabilities; no row is shown a test label."""
        started = time.monotonic()
        parts = {split: self.examples(cell, split) for split in SPLITS}
        validation, test = (self._neural if cell.row.neural else self._classical)(cell, parts)
        with atomic_path(self.path(cell)) as temporary, temporary.open("wb") as file:
            np.savez(
                file, validation=validation.astype(np.float32), test=test.astype(np.float32),
                n_train=len(np.unique(parts["train"]["subject_id"])), seconds=time.monotonic() - started,
            )  # fmt: skip

    def tune(self, cell: StayCell) -> None:
        """Chooses the learning rate of a row by validation AUROC on the draw that is not reported."""
        draw = replace(cell.untuned, row=replace(cell.row, ensemble=1))
        parts = {split: self.examples(draw, split) for split in SPLITS[:2]}
        collate, truth, scores = self.collator(draw), np.asarray(parts["validation"]["labels"]), {}
        for rate in cell.row.learning_rates:
            model = self.fitted(draw, parts, rate, collate)
            scores[rate] = float(auroc(truth, probabilities(model, parts["validation"], collate)))
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        with atomic_path(self.rate_path(cell)) as temporary:
            temporary.write_text(json.dumps({"learning_rate": best, "validation_auroc": scores}, indent=2))

    def rate(self, cell: StayCell) -> float:
        """The learning rate of a cell."""
        rates = cell.row.learning_rates
        return json.loads(self.rate_path(cell).read_text())["learning_rate"] if len(rates) > 1 else rates[0]

    def collator(self, cell: StayCell) -> Collate:
        """What makes batches of a cell's examples."""
        return collator(self.features(cell), self.spec)

    def settings(self, cell: StayCell) -> dict[str, Any]:
        """Fields of ``TrainingArguments`` of a cell, and ``patience``."""
        given = {"use_cpu": not torch.cuda.is_available()} | self.spec.finetuning_of(cell.size) | cell.row.training
        return {name: value for name, value in SILENT.items() if name != "save_strategy"} | given

    def start(self, cell: StayCell, parts: dict[str, Any], collate: Collate, member: int = 0) -> Any:
        """The model of a cell before it is trained."""
        torch.manual_seed(cell.draw + MEMBER_SEEDS * member)
        model = new_model(self, cell, self.seed(cell, member))
        row = cell.row
        if row.probe or (row.model == MEDHMP and row.linear_probe and row.init != "none"):
            set_head(model, parts["train"], parts["validation"], collate)
        return model

    def test(self, data: StayData, task: str) -> tuple[np.ndarray, np.ndarray, float | None]:
        """Test labels, their patients, and the AUROC of the generator's own probabilities where they are known."""
        examples = self.examples(StayCell(data, task, self.spec.rows[0], self.spec.sizes[0], 0), "test")
        truth, patients = OneShotTest(np.asarray(examples["labels"])).read(), np.asarray(examples["subject_id"])
        folder, key = Path(self.cohort(data).place("test").data), self.spec.key
        ids = np.asarray(examples[key])
        return truth, patients, oracle_auroc(folder, task_name(task), truth, key, ids)

    def key(self, cell: StayCell) -> str:
        """The digest of everything that determines a cell."""
        spec, row = self.spec, asdict(replace(cell.row, name=""))
        stages = spec.pretraining
        limits = [spec.validation_patients, spec.test_patients]
        place = [self.cohort(cell.data).key, cell.data.features, cell.task, spec.level, cell.size, cell.draw]
        settings: list[Any] = []
        if cell.row.neural:
            settings = [spec.finetuning_of(cell.size), spec.series, stages.part("stays", "options"), stages.seeds]
        if cell.row.init != "none" or spec.level == ADMISSION:
            settings.append(asdict(stages))
        if cell.row.pretrained_on is not None:
            source = spec.data(cell.row.pretrained_on)
            settings += [self.cohort(source).key, source.features]
        return digest(*place, row, *settings, *limits)

    def _classical(self, cell: StayCell, parts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if cell.row.model == PREVALENCE:
            share = float(np.mean(parts["train"]["labels"]))
            return np.full(len(parts["validation"]), share), np.full(len(parts["test"]), share)
        summaries = load_summaries(self.summaries_path(cell), parts)
        found: Predictions = STAY_BASELINES[cell.row.model](*(summaries[s] for s in SPLITS), seed=cell.draw)
        return found.validation, found.test

    def _neural(self, cell: StayCell, parts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        rate, collate = self.rate(cell), self.collator(cell)
        found: list[list[np.ndarray]] = []
        for member in range(cell.row.ensemble):
            model = self.fitted(cell, parts, rate, collate, member)
            found.append([probabilities(model, parts[split], collate) for split in SPLITS[1:]])
        validation, test = (np.mean(part, axis=0) for part in zip(*found, strict=True))
        return validation, test

    def fitted(self, cell: StayCell, parts: dict[str, Any], rate: float, collate: Collate, member: int = 0) -> Any:
        """The trained model of a cell, or of one member of its ensemble."""
        model = self.start(cell, parts, collate, member)
        if cell.row.probe:
            return model
        settings = self.settings(cell)
        patience = settings.pop("patience", None)
        seed = cell.draw + MEMBER_SEEDS * member
        with tempfile.TemporaryDirectory(dir=self.work, prefix=".run-") as folder:
            arguments = TrainingArguments(output_dir=folder, seed=seed, learning_rate=rate, **settings)
            fit(model, parts["train"], parts["validation"], collate, arguments, patience)
        return model

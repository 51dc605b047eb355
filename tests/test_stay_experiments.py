"""Reports of intensive care stays: what a cell sees, what is made once, and what the tables and curves say."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_ehr.experiments import ReportArguments, load_spec, report
from hf_ehr.experiments.cells import Cell
from hf_ehr.experiments.stays import StayBench, StaySpec
from hf_ehr.schema import DatasetInfo, shard_name
from tests.builders import day, patient, records, visit

TASK = "icu_mortality_t24"
SMALL = """
kind: stays
title: Small
datasets:
  - {name: made, folder: FOLDER/inside, test: {folder: FOLDER/outside}, features: &features {min_patients: 2, form: continuous, demographics: [age, sex], n_hours: 24}}
  - {name: elsewhere, folder: FOLDER/outside, tasks: [], features: *features}
tasks: [icu_mortality_t24]
sizes: ["25%"]
draws: 2
validation_patients: 30
test_patients: 60
pretraining:
  seeds: 1
  stays:
    options: {preset: tiny, model_options: {hidden_size: 8, demographics_hidden_size: 4, intermediate_size: 8, num_attention_heads: 2}}
    training: {num_train_epochs: 2, learning_rate: 5.0e-3, per_device_train_batch_size: 64}
finetuning: {num_train_epochs: 1, per_device_train_batch_size: 32, per_device_eval_batch_size: 512}
series: {hidden_size: 8, projection_size: 8, num_filters: 4, num_attention_heads: 2, intermediate_size: 8}
convergence: {rows: [MedHMP, Untrained], size: "25%", epochs: 2}
rows:
  - {name: Prevalence, model: Prevalence}
  - {name: LR, model: L2 LR on summaries}
  - {name: MedHMP, model: medhmp, init: s}
  - {name: Frozen, model: medhmp, init: s, probe: true}
  - {name: Untrained, model: medhmp, learning_rates: [1.0e-3, 1.0e-2]}
  - {name: Mean of two, model: medhmp, init: s, ensemble: 2}
  - {name: F-LSTM, model: lstm}
  - {name: LSTM + MedHMP, model: unimodal_lstm, medhmp_encoder: true, init: s}
  - {name: Moved, model: medhmp, init: s, pretrained_on: elsewhere, features: {form: binned}}
  - {name: Broken, model: cnn, model_options: {cnn_depth: 9}}
comparisons:
  - [MedHMP, Untrained]
  - [MedHMP, LR]
"""


def write_stays(folder: Path, patients: int, first: int = 1, seed: int = 0) -> None:
    """Patients whose heart rate rises where they die; one stay each."""
    rng, rows = np.random.default_rng(seed), []
    for subject in range(first, first + patients):
        dies = rng.random() < 0.4
        hours = np.sort(rng.uniform(0, 23, 8))
        values = 80 + (1.5 if dies else 0.0) * hours + rng.normal(0, 3, 8)
        measured = [
            {"hour": float(hour), "name": "X/HR", "value": float(value), "text": None}
            for hour, value in zip(hours, values, strict=True)
        ]
        stay = {"stay_id": 10 * subject, "start": day(1), "end": day(3), "measurements": measured}
        fields = {"discharged_to": "died" if dies else "home", "visit_id": subject}
        rows.append(patient(subject, [visit(0, 8, stays=[stay], **fields)], sex="F"))
    (folder / "records").mkdir(parents=True)
    for shard in range(2):
        part = records(*(row for row in rows if row["subject_id"] % 2 == shard))
        pq.write_table(part, folder / "records" / shard_name(shard, 2))
    DatasetInfo("made", {}, 2, "calendar").save(folder)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> StaySpec:
    folder = tmp_path_factory.mktemp("spec")
    write_stays(folder / "inside", 160)
    write_stays(folder / "outside", 80, first=1001, seed=1)
    (folder / "small.yaml").write_text(SMALL.replace("FOLDER", str(folder)))
    found = load_spec(folder / "small.yaml")
    assert isinstance(found, StaySpec)
    return found


@pytest.fixture(scope="module")
def output(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    paths = report(spec, ReportArguments(output=str(folder), work=str(folder / "work"), workers=1))
    return folder, paths


@pytest.fixture
def bench(spec, output) -> StayBench:
    return StayBench(spec, output[0] / "work")


def cell(spec: StaySpec, row: str, data: str = "made", size: int | str = "25%", draw: int = 0) -> Cell:
    return Cell(spec.data(data), TASK, spec.row(row), size, draw)


def kept(bench: StayBench, row: str, **place) -> dict[str, np.ndarray]:
    with np.load(bench.path(cell(bench.spec, row, **place))) as file:
        return dict(file)


def test_a_report_is_written_whole(spec, output):
    folder, paths = output
    assert {path.name for path in paths} == {
        "small.md", "small.csv", "small-differences.csv", "small.json", "small.png",
        "small-convergence.csv", "small-convergence.png",
    }  # fmt: skip
    assert paths[0].name == "small.md"
    text = paths[0].read_text()
    working = [row.name for row in spec.rows if row.name != "Broken"]
    assert all(f"| {name} |" in text for name in working)
    assert "Average precision" in text
    assert "25% of the labelled patients" in text
    assert {row["row"] for row in csv.DictReader((folder / "small.csv").open())} == set(working)

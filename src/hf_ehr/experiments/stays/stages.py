"""The jobs of a report of stays, in the order in which one needs the other."""

from __future__ import annotations

from collections.abc import Iterator

from hf_ehr.experiments.runner import Job, distinct
from hf_ehr.experiments.shared import SPLITS
from hf_ehr.experiments.spec import ALL
from hf_ehr.experiments.stays.cells import StayBench, StayCell
from hf_ehr.experiments.stays.convergence import curve_cells, curve_path, run_curve
from hf_ehr.experiments.stays.materials import (
    PRETRAINING_FILE,
    Features,
    make_blank,
    make_examples,
    make_move,
    make_note_encoder,
    make_stage1,
    make_stage2,
    note_encoder_folder,
)
from hf_ehr.experiments.stays.models import stage_folder
from hf_ehr.experiments.stays.spec import ADMISSION, PREVALENCE, StayData, StayRow, StaySpec
from hf_ehr.experiments.stays.summaries import make_summaries


def cells(spec: StaySpec) -> list[StayCell]:
    """All cells, draw by draw, so that a run that is stopped has some draws of everything."""
    found = [
        StayCell(data, task, row, size, draw)
        for data, task in spec.columns()
        for size in spec.sizes
        for row in spec.rows
        for draw in range(spec.draws_at(size))
    ]
    return sorted(found, key=lambda cell: cell.draw)


def stages(bench: StayBench) -> dict[str, list[Job]]:
    """The jobs of a report; those of one stage wait for none of their own."""
    return {
        "Hourly features": distinct(_features(bench)),
        "Text encoders": distinct(_note_encoders(bench)),
        "Codes": distinct(_blanks(bench)),
        "Stage 1": distinct(_first_stages(bench)),
        "Stage 2": distinct(_second_stages(bench)),
        "Moves": distinct(_moves(bench)),
        "Examples": distinct(_examples(bench)),
        "Summaries": distinct(_summaries(bench)),
        "Learning rates": distinct(_rates(bench)),
        "Cells": [Job(cell.name, bench.run, (cell,), bench.path(cell)) for cell in cells(bench.spec)],
        "Curves": [
            Job(f"Curve of {cell.name}", run_curve, (bench, cell), curve_path(bench, cell))
            for cell in curve_cells(bench)
        ],
    }


def _readers(bench: StayBench) -> Iterator[tuple[StayData, StayRow, Features]]:
    """Data sets, rows, and the features that weights of the row are made with; sources of moves too."""
    for data in bench.spec.datasets:
        for row in bench.spec.rows:
            if bench.spec.tasks_of(data):
                yield data, row, bench.cohort(data).features(row)
                if row.pretrained_on is not None:
                    source = bench.spec.data(row.pretrained_on)
                    yield source, row, bench.cohort(source).features(row)


def _pretrained(bench: StayBench) -> Iterator[tuple[StayData, StayRow, Features]]:
    """Those of :func:`_readers` whose checkpoints are made on these very data."""
    for data, row, features in _readers(bench):
        if row.pretrained_on in (None, data.name):
            yield data, row, features


def _features(bench: StayBench) -> Iterator[Job]:
    for data, _, features in _readers(bench):
        yield Job(f"Hourly features of {data.name}", features.make, (), features.extractor_folder)


def _note_encoders(bench: StayBench) -> Iterator[Job]:
    stages = bench.spec.pretraining
    for data, _, features in _readers(bench) if stages.notes is not None else ():
        done = note_encoder_folder(features.cohort, stages) / PRETRAINING_FILE
        yield Job(f"Text encoder of {data.name}", make_note_encoder, (features.cohort, stages), done)


def _blanks(bench: StayBench) -> Iterator[Job]:
    stages = bench.spec.pretraining
    for data, _, features in _readers(bench) if bench.spec.level == ADMISSION else ():
        yield Job(f"Codes of {data.name}", make_blank, (features, stages), features.blank(stages))


def _first_stages(bench: StayBench) -> Iterator[Job]:
    stages = bench.spec.pretraining
    for data, row, features in _pretrained(bench):
        for seed in range(stages.seeds) if row.init in ("s", "a+s") else ():
            done = features.stage1(stages, seed) / PRETRAINING_FILE
            yield Job(f"Stage 1 on {data.name}, seed {seed}", make_stage1, (features, stages, seed), done)


def _second_stages(bench: StayBench) -> Iterator[Job]:
    stages = bench.spec.pretraining
    for data, row, features in _pretrained(bench):
        for seed in range(stages.seeds) if row.needs_admissions else ():
            done = features.stage2(stages, row, seed) / PRETRAINING_FILE
            name = f"Stage 2 ({row.init}, {' and '.join(row.objectives)}) on {data.name}, seed {seed}"
            yield Job(name, make_stage2, (features, stages, row, seed), done)


def _moves(bench: StayBench) -> Iterator[Job]:
    spec = bench.spec
    for data, row, features in _readers(bench):
        if row.pretrained_on in (None, data.name):
            continue
        source = bench.cohort(spec.data(str(row.pretrained_on))).features(row)
        for seed in range(spec.pretraining.seeds):
            folder = stage_folder(source, spec, row, seed)
            done = features.moved(folder, row.init)
            yield Job(f"{row.name} to {data.name}, seed {seed}", make_move, (folder, features, seed, row.init), done)


def _examples(bench: StayBench) -> Iterator[Job]:
    spec = bench.spec
    for data, task in spec.columns():
        for row in spec.rows:
            features = bench.cohort(data).features(row)
            for split in SPLITS:
                arguments, done = (features, spec, task, split), features.examples_folder(spec, task, split)
                yield Job(f"Examples of {data.name}, {task}, {split}", make_examples, arguments, done)


def _summaries(bench: StayBench) -> Iterator[Job]:
    spec = bench.spec
    for data, task in spec.columns():
        for row in spec.rows:
            if not row.neural and row.model != PREVALENCE:
                path = bench.summaries_path(StayCell(data, task, row, ALL, 0))
                arguments = (bench.cohort(data), spec.level, task, path)
                yield Job(f"Summaries of {data.name}, {task}", make_summaries, arguments, path)


def _rates(bench: StayBench) -> Iterator[Job]:
    for cell in [*cells(bench.spec), *curve_cells(bench)]:
        if cell.draw == 0 and cell.row.neural and not cell.row.probe and len(cell.row.learning_rates) > 1:
            yield Job(f"Learning rate of {cell.name}", bench.tune, (cell,), bench.rate_path(cell))

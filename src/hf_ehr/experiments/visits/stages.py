"""The jobs of a report of visits, in the order in which one needs the other."""

from __future__ import annotations

from collections.abc import Iterator

from hf_ehr.experiments.runner import Job, distinct
from hf_ehr.experiments.visits.cells import VisitBench, VisitCell
from hf_ehr.experiments.visits.materials import PRETRAINING_FILE
from hf_ehr.experiments.visits.spec import VisitSpec


def cells(spec: VisitSpec) -> list[VisitCell]:
    """All cells, draw by draw, so that a run that is stopped has some draws of everything."""
    found = [
        VisitCell(data, task, row, size, draw)
        for data, task in spec.columns()
        for size in spec.sizes
        for row in spec.rows_of(data, task)
        for draw in range(spec.draws_of(row, size))
    ]
    return sorted(found, key=lambda cell: cell.draw)


def stages(bench: VisitBench) -> dict[str, list[Job]]:
    """The jobs of a report; those of one stage wait for none of their own."""
    return {
        "Text encoders": distinct(_text_encoders(bench)),
        "Vocabularies": distinct(_processors(bench)),
        "Pre-training": distinct(_checkpoints(bench)),
        "Examples": distinct(_examples(bench)),
        "Learning rates": distinct(_rates(bench)),
        "Cells": [Job(cell.name, bench.run, (cell,), bench.path(cell)) for cell in cells(bench.spec)],
    }


def _text_encoders(bench: VisitBench) -> Iterator[Job]:
    for data in bench.spec.datasets if bench.spec.pretraining.notes is not None else ():
        cohort = bench.cohort(data)
        if data.notes:
            done = cohort.text_folder / PRETRAINING_FILE
            yield Job(f"Text encoder of {data.name}", cohort.make_text_encoder, (), done)


def _processors(bench: VisitBench) -> Iterator[Job]:
    for data in bench.spec.datasets:
        cohort = bench.cohort(data)
        yield Job(f"Vocabularies of {data.name}", cohort.make_processor, (), cohort.processor_folder)


def _checkpoints(bench: VisitBench) -> Iterator[Job]:
    for cell in cells(bench.spec):
        if cell.row.checkpoint is not None:
            cohort, seed = bench.cohort(cell.data), bench.seed(cell)
            name = f"{cell.row.checkpoint} of {cell.row.name}, {cell.data.name}, seed {seed}"
            done = cohort.checkpoint(cell.row, seed) / PRETRAINING_FILE
            yield Job(name, cohort.make_checkpoint, (cell.row, seed), done)


def _examples(bench: VisitBench) -> Iterator[Job]:
    for data, task in bench.spec.columns():
        cohort = bench.cohort(data)
        yield Job(f"Examples of {data.name}, {task}", cohort.make_examples, (task,), cohort.labels_path(task))


def _rates(bench: VisitBench) -> Iterator[Job]:
    for cell in cells(bench.spec):
        if cell.draw == 0 and cell.row.neural and len(cell.row.learning_rates) > 1:
            yield Job(f"Learning rate of {cell.name}", bench.tune, (cell,), bench.rate_path(cell))

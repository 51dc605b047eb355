"""Reports of visits, codes and notes together, from a YAML file with ``kind: visits`` to tables and figures.

VisitSpec (YAML) ─▶ materials: cohorts, text encoder, vocabularies, checkpoints, examples ─▶ cells ─▶ tables, curves
"""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from hf_ehr.experiments.runner import run_stages
from hf_ehr.experiments.visits.cells import VisitBench
from hf_ehr.experiments.visits.spec import KIND, VisitSpec
from hf_ehr.experiments.visits.stages import cells, stages
from hf_ehr.experiments.visits.tables import collect, write

__all__ = ["KIND", "VisitBench", "VisitSpec", "cells", "report", "run"]


def run(spec: VisitSpec, work: Path, workers: int | None = None) -> dict[str, str]:
    """Computes every cell that is not there yet; a second run goes on where the first stopped.

    Returns:
        Failed job → error. The other jobs have run all the same.
    """
    bench = VisitBench(spec, work)
    for data in tqdm(spec.datasets, desc="Cohorts", unit="cohort"):
        bench.cohort(data).make(spec.tasks_of(data))
    return run_stages(stages(bench), workers)


def report(spec: VisitSpec, work: Path, output: Path, workers: int | None = None) -> list[Path]:
    """Computes what is not there yet and writes the tables.

    Returns:
        The files written, the Markdown first.
    """
    failures = run(spec, work, workers)
    return write(collect(VisitBench(spec, work), failures), output)

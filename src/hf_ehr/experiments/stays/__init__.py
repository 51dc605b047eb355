"""Reports of intensive care stays and admissions, from a YAML file with ``kind: stays`` to tables and figures.

StaySpec (YAML) ─▶ materials: cohorts, hourly features, both stages of MedHMP, examples ─▶ cells ─▶ tables, curves
"""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from hf_ehr.experiments.runner import run_stages
from hf_ehr.experiments.stays.cells import StayBench
from hf_ehr.experiments.stays.spec import KIND, StaySpec
from hf_ehr.experiments.stays.stages import cells, stages
from hf_ehr.experiments.stays.tables import write_stays

__all__ = ["KIND", "StayBench", "StaySpec", "cells", "report", "run"]


def run(spec: StaySpec, work: Path, workers: int | None = None) -> dict[str, str]:
    """Computes every cell that is not there yet; a second run goes on where the first stopped.

    Returns:
        Failed job → error. The other jobs have run all the same.
    """
    bench = StayBench(spec, work)
    for data in tqdm(spec.datasets, desc="Cohorts", unit="cohort"):
        bench.cohort(data).make(spec.tasks_of(data))
    return run_stages(stages(bench), workers)


def report(spec: StaySpec, work: Path, output: Path, workers: int | None = None) -> list[Path]:
    """Computes what is not there yet and writes the tables.

    Returns:
        The files written, the Markdown first.
    """
    return write_stays(StayBench(spec, work), run(spec, work, workers), output)

"""Reports of coding experiments: rows × data sets × seeds, from a YAML file with ``kind: coding`` to tables.

CodingSpec (YAML) ─▶ materials: notes, labels in scope, tokenizers, encoders ─▶ cells: scores ─▶ tables
"""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from hf_ehr.experiments.coding.cells import CodingBench, cells, stages
from hf_ehr.experiments.coding.spec import KIND, CodingSpec
from hf_ehr.experiments.coding.tables import write
from hf_ehr.experiments.runner import run_stages

__all__ = ["KIND", "CodingBench", "CodingSpec", "cells", "report", "run"]


def run(spec: CodingSpec, work: Path, workers: int | None = None) -> dict[str, str]:
    """Computes every cell that is not there yet; a second run goes on where the first stopped.

    Returns:
        Failed job → error. The other jobs have run all the same.
    """
    bench = CodingBench(spec, work)
    for data in tqdm(spec.datasets, desc="Notes", unit="data set"):
        bench.notes(data).make()
    return run_stages(stages(bench), workers)


def report(spec: CodingSpec, work: Path, output: Path, workers: int | None = None) -> list[Path]:
    """Computes what is not there yet and writes the tables.

    Returns:
        The files written, the Markdown first.
    """
    return write(CodingBench(spec, work), run(spec, work, workers), output)

"""Reports of a paper's experiments: rows × tasks × sizes × draws, from a YAML file to tables and figures.

ReportSpec (YAML) ─▶ materials: cohorts, tokenizers, checkpoints, embeddings ─▶ cells ─▶ tables
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_ehr.experiments.runner import run_cells
from hf_ehr.experiments.spec import ReportSpec
from hf_ehr.experiments.tables import collect, write

__all__ = ["ReportArguments", "ReportSpec", "report"]


@dataclass
class ReportArguments:
    """Arguments of `hf-ehr report`."""

    output: str = field(default="reports", metadata={"help": "Folder for the tables and figures."})
    work: str = field(
        default="reports-work", metadata={"help": "Folder for cohorts, checkpoints and cells; reports may share it."}
    )
    workers: int | None = field(default=None, metadata={"help": "Processes; one per core when left out."})
    draws: int | None = field(default=None, metadata={"help": "Fewer draws than the specification, for a first look."})


def report(spec: ReportSpec, arguments: ReportArguments) -> list[Path]:
    """Computes what is not there yet and writes the tables.

    Returns:
        The files written, the Markdown table first.

    Raises:
        EhrDataError: A data set cannot be read.
    """
    work = Path(arguments.work)
    if arguments.draws is not None:
        note = f"A first look with `--draws {arguments.draws}`, not the specification's number of draws."
        spec = replace(spec, draws=arguments.draws, notes=(*spec.notes, note))
    failures = run_cells(spec, work, arguments.workers)
    return write(collect(spec, work, failures), Path(arguments.output))

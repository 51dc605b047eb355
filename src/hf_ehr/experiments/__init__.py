"""Reports of a paper's experiments: rows × tasks × sizes × draws, from a YAML file to tables and figures.

ReportSpec (YAML) ─▶ materials: cohorts, tokenizers, checkpoints, embeddings ─▶ cells ─▶ tables

A file with ``kind: coding`` compares coders of notes instead, by the modules of ``coding/`` in the same order, one
with ``kind: stays`` models of intensive care stays and admissions, by those of ``stays/``, one with ``kind: visits``
models of codes and notes, by those of ``visits/``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_ehr.experiments import coding, stays, visits
from hf_ehr.experiments.coding import CodingSpec
from hf_ehr.experiments.runner import run_cells
from hf_ehr.experiments.spec import ReportSpec, read_yaml
from hf_ehr.experiments.stays import StaySpec
from hf_ehr.experiments.tables import collect, write
from hf_ehr.experiments.visits import VisitSpec

__all__ = ["CodingSpec", "ReportArguments", "ReportSpec", "StaySpec", "VisitSpec", "load_spec", "report"]

AnySpec = ReportSpec | CodingSpec | StaySpec | VisitSpec


@dataclass
class ReportArguments:
    """Arguments of `hf-ehr report`."""

    output: str = field(default="reports", metadata={"help": "Folder for the tables and figures."})
    work: str = field(
        default="reports-work", metadata={"help": "Folder for cohorts, checkpoints and cells; reports may share it."}
    )
    workers: int | None = field(default=None, metadata={"help": "Processes; one per core when left out."})
    draws: int | None = field(default=None, metadata={"help": "Fewer draws than the specification, for a first look."})


def load_spec(path: str | Path) -> AnySpec:
    """Reads a file, or a specification of the package by its name; its field ``kind`` says of what it is.

    Raises:
        EhrDataError: There is no such file, or a field is unknown, absent or out of range.
    """
    kinds: dict[str | None, type[CodingSpec] | type[StaySpec] | type[VisitSpec]] = {
        coding.KIND: CodingSpec,
        stays.KIND: StaySpec,
        visits.KIND: VisitSpec,
    }
    return kinds.get(read_yaml(path).get("kind"), ReportSpec).from_yaml(path)


def report(spec: AnySpec, arguments: ReportArguments) -> list[Path]:
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
    if isinstance(spec, CodingSpec):
        return coding.report(spec, work, Path(arguments.output), arguments.workers)
    if isinstance(spec, StaySpec):
        return stays.report(spec, work, Path(arguments.output), arguments.workers)
    if isinstance(spec, VisitSpec):
        return visits.report(spec, work, Path(arguments.output), arguments.workers)
    failures = run_cells(spec, work, arguments.workers)
    return write(collect(spec, work, failures), Path(arguments.output))

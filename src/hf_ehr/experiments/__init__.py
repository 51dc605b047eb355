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
from hf_ehr.experiments.cells import Bench
from hf_ehr.experiments.coding import CodingSpec
from hf_ehr.experiments.coding.cells import stages as coding_stages
from hf_ehr.experiments.runner import Job, run_cells, stages
from hf_ehr.experiments.spec import ReportSpec, read_yaml
from hf_ehr.experiments.stays import StaySpec
from hf_ehr.experiments.stays.stages import stages as stay_stages
from hf_ehr.experiments.tables import collect, write
from hf_ehr.experiments.visits import VisitSpec
from hf_ehr.experiments.visits.stages import stages as visit_stages

__all__ = ["CodingSpec", "ReportArguments", "ReportSpec", "StaySpec", "VisitSpec", "load_spec", "plan", "report"]

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
    dry_run: bool = field(default=False, metadata={"help": "Say what would be computed and what is there."})


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
    work, spec = Path(arguments.work), _with_draws(spec, arguments.draws)
    if isinstance(spec, CodingSpec):
        return coding.report(spec, work, Path(arguments.output), arguments.workers)
    if isinstance(spec, StaySpec):
        return stays.report(spec, work, Path(arguments.output), arguments.workers)
    if isinstance(spec, VisitSpec):
        return visits.report(spec, work, Path(arguments.output), arguments.workers)
    failures = run_cells(spec, work, arguments.workers)
    return write(collect(spec, work, failures), Path(arguments.output))


def plan(spec: AnySpec, arguments: ReportArguments) -> str:
    """What a report computes, stage by stage, and how much of it is in the work folder; nothing is written."""
    work, spec = Path(arguments.work), _with_draws(spec, arguments.draws)
    lines = [f"{spec.title}: {len(spec.rows)} rows", f"{'stage':22}{'jobs':>8}{'done':>8}"]
    for title, jobs in _stages(spec, work).items():
        if jobs:
            lines.append(f"{title:22}{len(jobs):8,}{sum(job.done.exists() for job in jobs):8,}")
    return "\n".join(lines)


def _stages(spec: AnySpec, work: Path) -> dict[str, list[Job]]:
    if isinstance(spec, CodingSpec):
        return coding_stages(coding.CodingBench(spec, work))
    if isinstance(spec, StaySpec):
        return stay_stages(stays.StayBench(spec, work))
    if isinstance(spec, VisitSpec):
        return visit_stages(visits.VisitBench(spec, work))
    return stages(Bench(spec, work))


def _with_draws(spec: AnySpec, draws: int | None) -> AnySpec:
    if draws is None:
        return spec
    note = f"A first look with `--draws {draws}`, not the specification's number of draws."
    return replace(spec, draws=draws, notes=(*spec.notes, note))

"""Runs the cells of a report over several processes; what is done stays done, what failed is named."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_ehr.experiments.cells import Bench, Cell
from hf_ehr.experiments.materials import (
    checkpoint_folder,
    embeddings_folder,
    make_checkpoint,
    make_embeddings,
    move_checkpoint,
    moved_folder,
)
from hf_ehr.experiments.spec import PPMI_LR, DataSpec, ReportSpec, RowSpec


@dataclass(frozen=True)
class Job:
    """One call in a worker process.

    Attributes:
        name: What a failure is reported under.
        call: A function of this module.
        arguments: Its arguments.
        done: The file or folder that shows that it ran.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    done: Path


def run_cells(spec: ReportSpec, work: Path, workers: int | None = None) -> dict[str, str]:
    """Computes every cell of a report that is not there yet.

    Args:
        spec: The report.
        work: Folder that results are kept in; a second run goes on where the first stopped.
        workers: Processes; one per core if None.

    Returns:
        Failed job → error. The other jobs have run all the same.
    """
    bench = Bench(spec, work)
    for data in tqdm(spec.datasets, desc="Cohorts", unit="cohort"):
        bench.cohort(data).make(spec.tasks_of(data))
        features = bench.code_encoders(data).features
        if any(row.init == "medhmp" for row in spec.rows) and not features.extractor_folder.is_dir():
            features.make()
    return run_stages(stages(bench), workers)


def stages(bench: Bench) -> dict[str, list[Job]]:
    """The jobs of a report, stage by stage."""
    return {
        "Pre-training": _materials(bench), "Moving vocabularies": _moves(bench), "Learning rates": _tuning(bench),
        "Cells": _cells(bench),
    }  # fmt: skip


def run_stages(stages: Mapping[str, Sequence[Job]], workers: int | None = None) -> dict[str, str]:
    """Runs the jobs of one stage after the other that are not done; one process a core if ``workers`` is None.

    Returns:
        Failed job → error.
    """
    failures: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context, initializer=_start_worker) as pool:
        try:
            for title, jobs in stages.items():
                failures |= _run(pool, title, jobs)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each job once."""
    return list({job.done: job for job in jobs}.values())


def cells(spec: ReportSpec) -> list[Cell]:
    """All cells, draw by draw, so that a run that is stopped has some draws of everything."""
    found = [
        Cell(data, task, row, size, draw)
        for data, task in spec.columns()
        for size in spec.sizes
        for row in spec.rows
        for draw in range(spec.draws_at(size))
    ]
    return sorted(found, key=lambda cell: cell.draw)


def _materials(bench: Bench) -> list[Job]:
    """Pre-trained checkpoints and static embeddings, one a cohort and seed."""
    spec, jobs = bench.spec, {}
    for data, row in _rows_by_data(spec):
        cohort = bench.cohort(data)
        for seed in range(spec.pretraining.seeds):
            if row.init == "pretrained":
                source = bench.cohort(spec.data(row.pretrained_on)) if row.pretrained_on else cohort
                done = checkpoint_folder(source, spec.pretraining, seed) / "pretraining.json"
                jobs[done] = Job(f"Med-BERT, seed {seed}", make_checkpoint, (source, spec.pretraining, seed), done)
            elif row.init == "medhmp":
                encoders = bench.code_encoders(data)
                done = encoders.folder(seed) / "pretraining.json"
                jobs[done] = Job(f"MedHMP, seed {seed}", encoders.make, (seed,), done)
            elif row.init in ("t-w2v", "ppmi-svd") or row.model == PPMI_LR:
                init, dim = "ppmi-svd" if row.model == PPMI_LR else row.init, bench.embedding_size(row)
                done = embeddings_folder(cohort, init, dim, seed)
                jobs[done] = Job(f"{init}, seed {seed}", make_embeddings, (cohort, init, dim, seed), done)
    return list(jobs.values())


def _moves(bench: Bench) -> list[Job]:
    """Checkpoints that get another cohort's vocabulary."""
    spec, jobs = bench.spec, {}
    for data, row in _rows_by_data(spec):
        if row.pretrained_on in (None, data.name):
            continue
        source, target = bench.cohort(spec.data(str(row.pretrained_on))), bench.cohort(data)
        for seed in range(spec.pretraining.seeds):
            arguments = (source, target, spec.pretraining, seed)
            done = moved_folder(*arguments)
            jobs[done] = Job(f"{row.name}, seed {seed}", move_checkpoint, arguments, done)
    return list(jobs.values())


def _tuning(bench: Bench) -> list[Job]:
    first = [
        cell for cell in cells(bench.spec) if cell.draw == 0 and cell.row.neural and len(cell.row.learning_rates) > 1
    ]
    return [Job(_name(cell), bench.tune, (cell,), bench.rate_path(cell)) for cell in first]


def _cells(bench: Bench) -> list[Job]:
    return [Job(_name(cell), bench.run, (cell,), bench.path(cell)) for cell in cells(bench.spec)]


def _rows_by_data(spec: ReportSpec) -> Iterable[tuple[DataSpec, RowSpec]]:
    return ((data, row) for data in spec.datasets if spec.tasks_of(data) for row in spec.rows)


def _name(cell: Cell) -> str:
    return f"{cell.row.name}, {cell.data.name}, {cell.task}, {cell.size} patients, draw {cell.draw}"


def _run(pool: ProcessPoolExecutor, title: str, jobs: Sequence[Job]) -> dict[str, str]:
    """Runs the jobs that are not done, with a bar that shows how long the rest will take."""
    todo = [job for job in jobs if not job.done.exists()]
    failures: dict[str, str] = {}
    waiting = {pool.submit(_error_of, job): job for job in todo}
    for future in tqdm(as_completed(waiting), total=len(jobs), initial=len(jobs) - len(todo), desc=title):
        error = future.result()
        if error is not None:
            failures[waiting[future].name] = error
    return failures


def _error_of(job: Job) -> str | None:
    """Runs a job; what went wrong comes back as text, for some exceptions cannot be sent between processes."""
    try:
        job.call(*job.arguments)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def _start_worker() -> None:
    """One thread a process, and no bars or notices inside the one bar."""
    import logging

    import datasets
    import torch
    from transformers.utils import logging as hf_logging

    torch.set_num_threads(1)
    logging.getLogger("hf_ehr").setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()

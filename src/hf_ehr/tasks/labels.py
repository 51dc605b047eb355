"""RECORDS → LABELS of a whole prepared folder, shard by shard, with the cohort flow; and reading label files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, atomic_path, shard_paths, validate_labels
from hf_ehr.tasks.events import History, code_kinds, unreadable_share
from hf_ehr.tasks.library import get_task
from hf_ehr.tasks.matching import match_controls
from hf_ehr.tasks.spec import TaskSpec


def label_dataset(task: TaskSpec | str, directory: str | Path, *, progress: bool = True) -> Path:
    """Labels every patient of a prepared folder; memory is that of a shard.

    Writes ``labels/<task>.parquet`` (LABELS) and, last, ``labels/<task>.json``: the definition as YAML, the cohort
    flow (candidates, excluded by reason, labels, patients, positives, prevalence) and warnings.

    Args:
        task: A task, or the name of one.
        directory: A prepared folder.
        progress: Whether to show a progress bar.

    Returns:
        The path of the Parquet file.

    Raises:
        EhrDataError: The folder is not prepared, knows no intervals but the task needs them (of visits: but the task
            compares them), or holds no candidate.
        ValueError: No task has this name.
    """
    directory = Path(directory)
    spec = _find_task(task, directory) if isinstance(task, str) else task
    _check_intervals(spec, DatasetInfo.load(directory))
    paths = shard_paths(directory, "records")
    columns = [_columns(path, spec) for path in paths]
    shards = list(zip(paths, columns, strict=True))
    present = _confirming_data(spec, shards, progress)
    target, flow = directory / "labels" / f"{spec.name}.parquet", _Flow()
    target.with_suffix(".json").unlink(missing_ok=True)
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, LABEL_SCHEMA, compression="zstd") as writer:
        people, found = [], []
        for path, names in tqdm(shards, desc=f"Labelling {spec.name}", unit="shard", disable=not progress):
            records = pq.ParquetFile(path).read(columns=names)
            labels, excluded = spec.label(records, present=present)
            flow.excluded.update(excluded)
            if spec.matching is None:
                writer.write_table(labels)
                flow.add(labels)
            else:  # controls come from all shards
                found.append(labels)
                people.append(records.select(["subject_id", "birth_time", *spec.matching.fields]))
        if spec.matching is not None:
            labels, unmatched = match_controls(pa.concat_tables(found), pa.concat_tables(people), spec.matching)
            writer.write_table(labels)
            flow.add(labels)
            flow.excluded.update(unmatched)
        flow.check(spec)
    report = flow.report(spec, present)
    report["warnings"] += _unreadable(spec, pq.ParquetFile(paths[0]).read(columns=columns[0]))
    with atomic_path(target.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return target


def read_labels(path: str | Path) -> pa.Table:
    """LABELS from a Parquet file or a folder of them, ours or of any tool that writes the MEDS label schema (ACES).

    Optional columns that are missing are filled with nulls, others are dropped.

    Raises:
        EhrDataError: There is no such file, or it breaks the contract of LABELS.
    """
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise EhrDataError(
            f"`{path}` must be a Parquet file of labels, or a folder of them. Make one with `label_dataset`."
        )
    return pa.concat_tables(validate_labels(pq.read_table(file)) for file in files)


class _Flow:
    """The cohort flow, summed over shards."""

    def __init__(self) -> None:
        self.excluded: Counter[str] = Counter()
        self.labels = self.patients = self.positives = 0

    def add(self, labels: pa.Table) -> None:
        self.labels += labels.num_rows
        self.patients += pc.count_distinct(labels["subject_id"]).as_py()
        self.positives += pc.sum(labels["boolean_value"]).as_py() or 0

    @property
    def candidates(self) -> int:
        return self.labels + self.excluded.total()

    def check(self, spec: TaskSpec) -> None:
        if not self.candidates:
            trigger = spec.predicates.get(spec.trigger)
            raise EhrDataError(
                f"`{spec.name}` found no candidate: its trigger `{spec.trigger}` ({trigger}) never holds here. "
                "Look at the kinds of visits and the vocabularies in dataset.json, or change the definition."
            )

    def report(self, spec: TaskSpec, present: frozenset[str]) -> dict:
        prevalence = self.positives / self.labels if self.labels else None
        warnings = spec.warnings(present)
        low, high = spec.expected_prevalence or (0, 1)
        if prevalence is not None and not low <= prevalence <= high:
            warnings.append(f"The prevalence {prevalence:.4f} lies outside the expected {low} to {high}.")
        if self.labels and not self.positives:
            warnings.append(
                f"No label is positive: `{spec.outcome.predicate}` may not be recorded in these data at all, and then "
                "nobody is known to be a negative."
            )
        return {
            "task": spec.name,
            "candidates": self.candidates,
            "excluded": dict(self.excluded),
            "labels": self.labels,
            "patients": self.patients,
            "positives": self.positives,
            "prevalence": prevalence,
            "warnings": warnings,
            "definition": spec.to_yaml(),
        }


def _find_task(name: str, directory: Path) -> TaskSpec:
    file = directory / "labels" / f"{name}.parquet"
    try:
        return get_task(name)
    except ValueError:
        if not file.is_file():
            raise
    raise ValueError(f"`{name}` has no definition: {file} came with the source. Read it with `read_labels`.")


def _check_intervals(spec: TaskSpec, info: DatasetInfo) -> None:
    if info.time_axis == "order" and spec.uses_intervals:
        raise EhrDataError(
            f"`{spec.name}` needs intervals between events, but `{info.source}` knows only their order, so "
            "intervals are unknown (time_axis: order). Use the label file that came with the data set (labels/)."
        )
    if info.time_axis == "visit" and spec.compares_visits:
        raise EhrDataError(
            f"`{spec.name}` compares visits, but in `{info.source}` times are true within a visit only (time_axis: "
            "visit): the distance of visits, and some of their order, is made up. Take a task that asks about one "
            "visit (icu_mortality_t48, prolonged_stay_at_48h), or data with dates."
        )


def _confirming_data(spec: TaskSpec, shards: list, progress: bool) -> frozenset[str]:
    """What could confirm anything in the whole data set: decided once, so that all shards follow one rule."""
    present: frozenset[str] = frozenset()
    wanted = {name for predicate in spec.predicates.values() for name in predicate.confirmed_by}
    for path, names in tqdm(
        shards, desc="Looking for confirming data", unit="shard", disable=not progress or not wanted
    ):
        if present >= wanted:
            break
        present |= spec.confirming_data(pq.ParquetFile(path).read(columns=names))
    return present


def _unreadable(spec: TaskSpec, records: pa.Table) -> list[str]:
    """Confirming predicates that miss codes because these are numbers of another vocabulary, judged by one shard."""
    history, notes = History(records), []
    for name in dict.fromkeys(name for predicate in spec.predicates.values() for name in predicate.confirmed_by):
        share = unreadable_share(history, spec.predicates[name])
        if share > 0.01:
            notes.append(
                f"`{name}` cannot read {share:.0%} of the {spec.predicates[name].kind} codes: they are numbers of a "
                "vocabulary it does not name. Map them (drugs to ATC) when the source is prepared."
            )
    return notes


def _columns(path: Path, spec: TaskSpec) -> list[str]:
    """The Parquet columns the task reads: no notes, and measurements only if a predicate may look at them."""
    measured = any("measurement" in code_kinds(predicate) for predicate in spec.predicates.values())
    stays = any(predicate.kind in ("stay", "stay_end") for predicate in spec.predicates.values())
    skipped = {"notes", *(() if measured else ("measurements",) if stays else ("stays",))}
    paths = [column.path for column in pq.ParquetFile(path).schema]
    return [name for name in paths if not skipped.intersection(name.split("."))]

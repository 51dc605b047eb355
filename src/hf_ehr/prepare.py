"""Raw tables → a prepared folder: EVENTS and RECORDS in shards of whole patients, restartable at every step.

Stage 1 streams each input table of the source into ``.staging``, partitioned by shard. Stage 2 sorts, checks and
assembles each shard in a process of its own. Whatever is finished carries its final name and is not done again;
``dataset.json`` is written last. Memory is that of a shard per worker, next to the engine's limit in stage 1.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_ehr._sorting import sort_order
from hf_ehr.records import assemble
from hf_ehr.schema import (
    CODE_KINDS,
    EVENT_SCHEMA,
    KINDS,
    REJECTED_SCHEMA,
    DatasetInfo,
    EhrDataError,
    atomic_path,
    shard_name,
    shard_paths,
    validate_events,
    validate_labels,
    write_parquet,
)

if TYPE_CHECKING:
    from hf_ehr.sources.engine import Source

EVENTS_PER_SHARD = 3_000_000
"""Aimed at by the default number of shards: two workers and the driver then stay below 3 GiB."""
BYTES_PER_EVENT = 8
"""Of compressed input; uncompressed text is counted as a fifth. Too low means smaller shards, never larger ones."""
SYNTHETIC_EVENTS_PER_PATIENT = 45
STAGING = ".staging"
OUTPUTS = ("events", "records", "truth", "labels")
_CODE_EVENTS = {name.removesuffix("s") if name != "diagnoses" else "diagnosis" for name in CODE_KINDS}

SourceName = Literal[
    "synthetic", "mimic3", "mimic4", "omop", "meds", "table", "eicu", "physionet2012", "physionet2019"
]


def prepare(
    source: SourceName | Callable[..., Source],
    input_dir: str | Path | None,
    output_dir: str | Path,
    *,
    engine: Literal["duckdb", "spark"] = "duckdb",
    shards: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    options: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> DatasetInfo:
    """Converts raw tables into a prepared folder, or resumes where an interrupted conversion stopped.

    Args:
        source: Name of a source, or a function ``(engine, input_dir, **options) -> Source``.
        input_dir: Folder (or file) of the raw tables; None for ``synthetic``.
        output_dir: The prepared folder: ``events/``, ``records/``, ``rejected.parquet``, ``labels/`` and ``truth/``
            where the source has them, ``dataset.json``.
        engine: What runs the relational part.
        shards: Number of shards, ``subject_id % shards`` decides where a patient lives; by the size of the input if
            None.
        workers: Processes of stage 2, all cores if None.
        progress: Whether to show progress bars.
        options: Options of the source; for ``synthetic`` the fields of ``SyntheticConfig``.
        overwrite: Whether to discard what ``output_dir`` holds of another preparation.

    Returns:
        What ``dataset.json`` says.

    Raises:
        EhrDataError: The input breaks a contract, or the folder holds a preparation of something else.
        ValueError: The source is unknown, or an argument is out of its range.
    """
    output = Path(output_dir)
    job = _plan(source, input_dir, output, engine, shards, options or {})
    if _is_whole(output, job["fingerprint"], overwrite):
        return DatasetInfo.load(output)
    staging = output / STAGING
    if job["source"] == "synthetic":
        described: dict[str, Any] = {"time_axis": "calendar", "warnings": [], "extracts": []}
    else:
        from hf_ehr.sources._staging import stage_tables

        function = source_function(source) if isinstance(source, str) else source
        described = stage_tables(
            function, Path(job["input_dir"]), job["options"], staging,
            engine=engine, shards=job["shards"], progress=progress,
        )  # fmt: skip
    summaries = _finish_shards(job, output, described["extracts"], workers, progress)
    if job["source"] == "synthetic":
        _label_synthetic(output, staging)
    summary = _merge(summaries)
    summary["rejected"] = _collect_rejected(staging, described["extracts"], output)
    summary["fingerprint"] = job["fingerprint"]
    if not summary["events"]:
        raise EhrDataError(f"No event came out of {input_dir}: {_reasons(summary['rejected'])}. Check `input_dir`.")
    info = DatasetInfo(
        source=job["source"], options=job["options"], shards=job["shards"], time_axis=described["time_axis"],
        summary=summary, warnings=described["warnings"],
    )  # fmt: skip
    _move_labels(staging, output)
    info.save(output)
    shutil.rmtree(staging)
    return info


def format_summary(info: DatasetInfo) -> str:
    """A few lines of text: what a prepared folder holds, what was rejected and why, what to know about it."""
    summary = info.summary
    rows = [("source", info.source), ("time axis", info.time_axis), ("shards", f"{info.shards:,}")]
    rows += [(name, f"{summary[name]:,}") for name in ("patients", "visits", "events", "codes")]
    rows.append(("distinct codes", f"{summary['distinct_codes']:,}"))
    if summary["first_time"]:
        rows.append(("dates", f"{summary['first_time'][:10]} to {summary['last_time'][:10]}"))
    rejected = summary["rejected"]
    rows.append(("rejected rows", f"{sum(rejected.values()):,}"))
    lines = [f"{name:<16}{value}" for name, value in rows]
    lines += [f"  {count:>12,}  {reason}" for reason, count in rejected.items()]
    return "\n".join(lines + [f"warning: {warning}" for warning in info.warnings])


def source_function(name: str) -> Callable[..., Source]:
    """The function of a source by its name.

    Raises:
        ValueError: There is none of this name.
    """
    if name == "mimic3":
        from hf_ehr.sources.mimic3 import mimic3

        return mimic3
    if name == "mimic4":
        from hf_ehr.sources.mimic4 import mimic4

        return mimic4
    if name == "omop":
        from hf_ehr.sources.omop import omop

        return omop
    if name == "meds":
        from hf_ehr.sources.meds import meds

        return meds
    if name == "table":
        from hf_ehr.sources.table import table

        return table
    if name == "eicu":
        from hf_ehr.sources.eicu import eicu

        return eicu
    if name == "physionet2012":
        from hf_ehr.sources.physionet2012 import physionet2012

        return physionet2012
    if name == "physionet2019":
        from hf_ehr.sources.physionet2019 import physionet2019

        return physionet2019
    raise ValueError(f"`source` must be one of {', '.join(get_args(SourceName))}, got {name!r}.")


# What is to be done


def _plan(
    source: str | Callable[..., Source],
    input_dir: str | Path | None,
    output: Path,
    engine: str,
    shards: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    if shards is not None and shards < 1:
        raise ValueError(f"`shards` must be at least 1, got {shards}.")
    if source == "synthetic" and (input_dir is not None or engine != "duckdb"):
        raise ValueError("The source `synthetic` reads nothing: leave out `input_dir` and `engine`.")
    if source != "synthetic" and (input_dir is None or not Path(input_dir).exists()):
        raise EhrDataError(f"`input_dir` must be an existing folder, got {input_dir}.")
    if isinstance(source, str) and source != "synthetic":
        source_function(source)
    files = [] if input_dir is None else _list_files(Path(input_dir), output)
    name = source if isinstance(source, str) else source.__name__
    job = {
        "source": name,
        "options": json.loads(json.dumps(options, default=str)),
        "shards": shards or _default_shards(files, options),
        "input_dir": None if input_dir is None else str(Path(input_dir).resolve()),
    }
    described = json.dumps([job["source"], job["options"], job["shards"], files], sort_keys=True)
    return job | {"fingerprint": hashlib.sha256(described.encode()).hexdigest()[:16]}


def _list_files(input_dir: Path, output: Path) -> list[tuple[str, int, int]]:
    """(name, size, time of change) of the input files, hidden ones and the output left out."""
    paths = sorted(input_dir.rglob("*")) if input_dir.is_dir() else [input_dir]
    inside = output.resolve()
    kept = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in kept if inside not in path.resolve().parents]
    return [(str(path.relative_to(input_dir.parent)), path.stat().st_size, path.stat().st_mtime_ns) for path in kept]


def _default_shards(files: list[tuple[str, int, int]], options: dict[str, Any]) -> int:
    if files:
        compressed = sum(size if name.endswith((".gz", ".parquet")) else size // 5 for name, size, _ in files)
        events = compressed / BYTES_PER_EVENT
    else:
        events = options.get("patients", 10_000) * SYNTHETIC_EVENTS_PER_PATIENT
    return max(1, round(events / EVENTS_PER_SHARD))


def _is_whole(output: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether ``output`` holds just this, finished. Makes it ready for the work if not."""
    marker, plan = output / "dataset.json", output / STAGING / "plan.json"
    found = None
    if marker.is_file():
        found = DatasetInfo.load(output).summary.get("fingerprint", "")
    elif plan.is_file():
        found = json.loads(plan.read_text())["fingerprint"]
    elif any((output / name).exists() for name in OUTPUTS):
        found = ""
    if found is not None and found != fingerprint:
        if not overwrite:
            raise EhrDataError(
                f"{output} holds a preparation of other input, options or shards. "
                "Choose another `output_dir`, or pass `overwrite` to discard it."
            )
        marker.unlink(missing_ok=True)  # the marker first: what follows makes the folder incomplete
        for name in (*OUTPUTS, STAGING):
            shutil.rmtree(output / name, ignore_errors=True)
        (output / "rejected.parquet").unlink(missing_ok=True)
    elif marker.is_file():
        shutil.rmtree(output / STAGING, ignore_errors=True)
        return True
    _write_json(plan, {"fingerprint": fingerprint})
    return False


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, default=str))


# Stage 2: staged events → shards


def _finish_shards(
    job: dict[str, Any], output: Path, extracts: list[str], workers: int | None, progress: bool
) -> list[dict[str, Any]]:
    """Finishes every shard that is not there yet; returns the summaries of all."""
    from tqdm import tqdm

    todo = [index for index in range(job["shards"]) if not _summary_path(output, index).is_file()]
    processes = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    with tqdm(total=job["shards"], initial=job["shards"] - len(todo), desc="shards", disable=not progress) as bar:
        if processes == 1:
            for index in todo:
                _finish_shard(job, output, extracts, index)
                bar.update()
        else:
            with ProcessPoolExecutor(processes, mp_context=_fresh_processes()) as pool:
                futures = [pool.submit(_finish_shard, job, output, extracts, index) for index in todo]
                for future in as_completed(futures):
                    future.result()
                    bar.update()
    return [json.loads(_summary_path(output, index).read_text()) for index in range(job["shards"])]


def _fresh_processes() -> multiprocessing.context.BaseContext:
    """Processes without the threads of this one's engine, forked from one that has done the imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _summary_path(output: Path, index: int) -> Path:
    return output / STAGING / f"summary-{index}.json"


def _finish_shard(job: dict[str, Any], output: Path, extracts: list[str], index: int) -> None:
    """Events, records and, last, the summary of one shard."""
    name = shard_name(index, job["shards"])
    if job["source"] == "synthetic":
        from hf_ehr.sources.synthetic import SyntheticConfig, generate_shard

        events, truth = generate_shard(SyntheticConfig(**job["options"]), index, job["shards"])
        write_parquet(truth, output / "truth" / name)
        events = _with_dictionaries(events)
    else:
        events = _read_staged(output / STAGING, extracts, index)
    events = sort_events(events)
    write_parquet(validate_events(events), output / "events" / name)
    records = assemble(events)
    write_parquet(records, output / "records" / name)
    _write_json(_summary_path(output, index), _summarise(events, records))


def _read_staged(staging: Path, extracts: list[str], index: int) -> pa.Table:
    tables = []
    for extract in extracts:
        for path in sorted((staging / f"extract-{extract}" / "events" / f"shard={index}").glob("*.parquet")):
            file = pq.ParquetFile(path, read_dictionary=["code", "kind"])
            tables.append(_with_dictionaries(file.read(columns=EVENT_SCHEMA.names)))
    return pa.concat_tables([_with_dictionaries(EVENT_SCHEMA.empty_table()), *tables])


def _with_dictionaries(events: pa.Table) -> pa.Table:
    """EVENTS with ``code`` and ``kind`` dictionary-encoded: a tenth of the memory, and sorted by integers."""
    encoded = pa.dictionary(pa.int32(), pa.string())
    types = [encoded if field.name in ("code", "kind") else field.type for field in EVENT_SCHEMA]
    columns = [events[name].cast(kind) for name, kind in zip(EVENT_SCHEMA.names, types, strict=True)]
    return pa.table(columns, names=EVENT_SCHEMA.names)


def sort_events(events: pa.Table) -> pa.Table:
    """EVENTS by subject, time (static ones first), kind and position, equal ones by their other columns.

    The order depends on the content alone, not on the order in which an engine happened to write the rows.

    Args:
        events: EVENTS with dictionary-encoded ``code`` and ``kind``.
    """
    events = events.unify_dictionaries()
    names = ("subject_id", "time", "kind", "position", "visit_id", "stay_id", "code", "available_at", "numeric_value")
    order = sort_order([_sort_key(events[name], name) for name in (*names, "text_value")])
    return events if order is None else events.take(pa.array(order))


def _sort_key(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """The column as integers that sort as its values do, nulls first (of texts only equality matters)."""
    if name == "text_value":
        import polars as pl

        return pl.from_arrow(column).hash(0).to_numpy().view(np.int64)  # type: ignore[union-attr]
    if pa.types.is_dictionary(column.type):
        values = column.chunk(0).dictionary if column.num_chunks else pa.array([], pa.string())
        ranks = pc.index_in(values, value_set=pa.array(KINDS)) if name == "kind" else pc.rank(values)
        ranks = pc.fill_null(ranks.cast(pa.int64()), -1).to_numpy()
        return ranks[np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks] or [np.empty(0, int)])]
    if name == "numeric_value":
        bits = column.combine_chunks().fill_null(float("-inf")).to_numpy().view(np.int32).astype(np.int64)
        return np.where(bits < 0, np.iinfo(np.int32).min - bits, bits)
    column = column.cast(pa.int64())
    if column.null_count:
        column = pc.fill_null(column, (pc.min(column).as_py() or 0) - 1)
    return column.to_numpy()


def _label_synthetic(output: Path, staging: Path) -> None:
    """The outcome that the truth holds, as LABELS."""
    from hf_ehr.sources.synthetic import TASK, labels

    columns = ["subject_id", "prediction_time", "label"]
    parts = [labels(pq.read_table(path, columns=columns)) for path in shard_paths(output, "truth")]
    write_parquet(validate_labels(pa.concat_tables(parts)), staging / "labels" / f"{TASK}.parquet")


# Summary


def _summarise(events: pa.Table, records: pa.Table) -> dict[str, Any]:
    kinds = events["kind"].cast(pa.string())
    coded = events.filter(pc.is_in(kinds, pa.array(sorted(_CODE_EVENTS))))
    span = pc.min_max(events.filter(pc.is_in(kinds, pa.array(["admission", "discharge", *_CODE_EVENTS])))["time"])
    return {
        "patients": records.num_rows,
        "visits": pc.sum(pc.list_value_length(records["visits"])).as_py() or 0,
        "events": events.num_rows,
        "codes": coded.num_rows,
        "distinct_codes": pc.unique(coded["code"].cast(pa.string())).to_pylist(),
        "first_time": span["min"].as_py(),
        "last_time": span["max"].as_py(),
    }


def _merge(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {
        name: sum(summary[name] for summary in summaries) for name in ("patients", "visits", "events", "codes")
    }
    merged["distinct_codes"] = len({code for summary in summaries for code in summary["distinct_codes"]})
    for name, pick in (("first_time", min), ("last_time", max)):
        times = [datetime.fromisoformat(summary[name]) for summary in summaries if summary[name]]
        merged[name] = pick(times).isoformat(sep=" ") if times else None
    return merged


def _collect_rejected(staging: Path, extracts: list[str], output: Path) -> dict[str, int]:
    """Writes ``rejected.parquet``, table by table, and counts its rows by reason."""
    counts: Counter[str] = Counter()
    with atomic_path(output / "rejected.parquet") as path, pq.ParquetWriter(path, REJECTED_SCHEMA) as writer:
        for extract in extracts:
            for part in sorted((staging / f"extract-{extract}").glob("rejected.parquet")):
                table = pq.read_table(part).sort_by([(name, "ascending") for name in REJECTED_SCHEMA.names])
                writer.write_table(table)
                for pair in pc.value_counts(pc.binary_join_element_wise(table["file"], table["reason"], ": ")):
                    counts[pair["values"].as_py()] += pair["counts"].as_py()
    return dict(counts.most_common())


def _reasons(rejected: dict[str, int]) -> str:
    return "; ".join(f"{count:,} rows rejected, {reason}" for reason, count in rejected.items()) or "no rows"


def _move_labels(staging: Path, output: Path) -> None:
    for path in sorted((staging / "labels").glob("*.parquet")):
        (output / "labels").mkdir(exist_ok=True)
        path.replace(output / "labels" / path.name)

"""Stage 2 of ``prepare``: staged events of a shard, or generated ones, → sorted EVENTS, RECORDS and what they hold.

Each shard is done in a process of its own; its summary is written last and says that the shard is whole.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_ehr._sorting import sort_order
from hf_ehr.records import assemble
from hf_ehr.schema import CODE_KINDS, EVENT_SCHEMA, KINDS, atomic_path, shard_name, validate_events, write_parquet
from hf_ehr.sources._generated import generate_shard

STAGING = ".staging"
_CODE_EVENTS = {name.removesuffix("s") if name != "diagnoses" else "diagnosis" for name in CODE_KINDS}


def finish_shards(
    job: dict[str, Any], output: Path, extracts: list[str], workers: int | None, progress: bool
) -> dict[str, Any]:
    """Finishes every shard that is not there yet.

    Args:
        job: ``source``, whether it is ``generated``, its ``options`` and ``shards``.
        output: The prepared folder, with staged events of every extract in ``.staging``.
        extracts: Names of the extracts; none for a generated world.
        workers: Processes, all cores if None.
        progress: Whether to show a progress bar.

    Returns:
        The summary of all shards together.
    """
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
    return _merge([json.loads(_summary_path(output, index).read_text()) for index in range(job["shards"])])


def _fresh_processes() -> multiprocessing.context.BaseContext:
    """Processes without the threads of this one's engine, forked from one that has done the imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` in one step; what JSON does not know (times) becomes text."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, default=str))


def _summary_path(output: Path, index: int) -> Path:
    return output / STAGING / f"summary-{index}.json"


def _finish_shard(job: dict[str, Any], output: Path, extracts: list[str], index: int) -> None:
    """Events, records and, last, the summary of one shard."""
    name = shard_name(index, job["shards"])
    if job["generated"]:
        events, truth = generate_shard(job["source"], job["options"], index, job["shards"])
        write_parquet(truth, output / "truth" / name)
        events = _with_dictionaries(events)
    else:
        events = _read_staged(output / STAGING, extracts, index)
    events = sort_events(events)
    write_parquet(validate_events(events), output / "events" / name)
    records = assemble(events)
    write_parquet(records, output / "records" / name)
    write_json(_summary_path(output, index), _summarise(events, records))


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

"""Tables of a source → staged EVENTS, partitioned by shard: the first stage of ``prepare``.

A folder ``extract-NAME`` per input table with its events in ``events/shard=K/`` and its rejected rows; the labels that
come with the data; ``source.json`` last.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ibis
from tqdm import tqdm

from hf_ehr.schema import LABEL_SCHEMA, REJECTED_SCHEMA, atomic_path, validate_labels, write_parquet
from hf_ehr.sources.engine import Engine, Extract, Source, readable


def stage_tables(
    function: Callable[..., Source],
    input_dir: Path,
    options: dict[str, Any],
    staging: Path,
    *,
    engine: Literal["duckdb", "spark"],
    shards: int,
    progress: bool,
) -> dict[str, Any]:
    """Stages every table that is not there yet.

    Args:
        function: The source, called as ``function(engine, input_dir, **options)``.
        input_dir: Folder or file of the raw tables.
        options: Options of the source.
        staging: Where to put everything, parsed text files and spilled memory included.
        engine: What runs the relational part.
        shards: A patient goes to shard ``subject_id % shards``.
        progress: Whether to show a progress bar.

    Returns:
        ``time_axis``, ``warnings`` and the names of the ``extracts``.

    Raises:
        EhrDataError: The input breaks a contract.
    """
    done = staging / "source.json"
    if done.is_file():
        return json.loads(done.read_text())
    tables = staging / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    connection = Engine.connect(engine, temp_directory=tables)
    try:
        source = function(connection, input_dir, **options)
        names = [extract.name for extract in source.extracts]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"Extracts of a source must have different names, got {repeated} more than once.")
        for extract in tqdm(source.extracts, desc="tables", unit="table", disable=not progress):
            target = staging / f"extract-{extract.name}"
            if not target.is_dir():
                with _whole_folder(target) as folder, readable(Path(extract.name)):
                    _write_extract(connection, extract, folder, shards)
        _write_labels(source, staging)
    finally:
        connection.close()
    result = {"time_axis": source.time_axis, "warnings": source.warnings, "extracts": names}
    with atomic_path(done) as temporary:
        temporary.write_text(json.dumps(result))
    return result


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder that takes its name only when it is complete."""
    folder = target.with_name(f".{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    folder.replace(target)


def _write_extract(engine: Engine, extract: Extract, folder: Path, shards: int) -> None:
    subject = extract.events["subject_id"]
    events = extract.events.mutate(shard=(subject % shards + shards) % shards)
    if engine.name == "duckdb":
        engine.con.raw_sql(f"SET partitioned_write_flush_threshold = {max(10_000, 2_000_000 // shards)}")
        engine.con.to_parquet(events, folder / "events", partition_by="shard")
    else:
        engine.con.to_parquet(events, folder / "events", partitionBy="shard")
    if extract.rejected:
        rejected = extract.rejected[0] if len(extract.rejected) == 1 else ibis.union(*extract.rejected)
        write_parquet(rejected.to_pyarrow().cast(REJECTED_SCHEMA), folder / "rejected.parquet")


def _write_labels(source: Source, staging: Path) -> None:
    for name, labels in source.labels.items():
        table = labels.to_pyarrow().select(LABEL_SCHEMA.names).cast(LABEL_SCHEMA)
        write_parquet(validate_labels(table), staging / "labels" / f"{name}.parquet")

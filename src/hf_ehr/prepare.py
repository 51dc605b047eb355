"""Raw tables → a prepared folder: EVENTS and RECORDS in shards of whole patients, restartable at every step.

Stage 1 streams each input table of the source into ``.staging``, partitioned by shard. Stage 2 sorts, checks and
assembles each shard in a process of its own. Whatever is finished carries its final name and is not done again;
``dataset.json`` is written last. Memory is that of a shard per worker, next to the engine's limit in stage 1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_ehr._shards import STAGING, finish_shards, write_json
from hf_ehr.schema import (
    REJECTED_SCHEMA,
    DatasetInfo,
    EhrDataError,
    atomic_path,
    shard_paths,
    validate_labels,
    write_parquet,
)
from hf_ehr.sources._generated import GENERATED, expected_events, generated_labels

if TYPE_CHECKING:
    from hf_ehr.sources.engine import Source

EVENTS_PER_SHARD = 3_000_000
"""Aimed at by the default number of shards: two workers and the driver then stay below 3 GiB."""
BYTES_PER_EVENT = 8
"""Of compressed input; uncompressed text is counted as a fifth. Too low means smaller shards, never larger ones."""
COMPRESSED = (".gz", ".tgz", ".xz", ".bz2", ".parquet")
OUTPUTS = ("events", "records", "truth", "labels")

SourceName = Literal[
    "synthetic",
    "synthetic_icu",
    "synthetic_text_codes",
    "mimic3",
    "mimic4",
    "omop",
    "meds",
    "table",
    "eicu",
    "physionet2012",
    "physionet2019",
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
        input_dir: Folder (or file) of the raw tables; None for the synthetic ones.
        output_dir: The prepared folder: ``events/``, ``records/``, ``rejected.parquet``, ``labels/`` and ``truth/``
            where the source has them, ``dataset.json``.
        engine: What runs the relational part.
        shards: Number of shards, ``subject_id % shards`` decides where a patient lives; by the size of the input if
            None.
        workers: Processes of stage 2, all cores if None.
        progress: Whether to show progress bars.
        options: Options of the source; for the synthetic ones the fields of their configuration.
        overwrite: Whether to discard what ``output_dir`` holds of another preparation.

    Returns:
        What ``dataset.json`` says.

    Raises:
        EhrDataError: The input breaks a contract, or the folder holds a preparation of something else.
        ValueError: The source is unknown, or an argument is out of its range.
    """
    output = Path(output_dir)
    job = _job(source, input_dir, output, engine, shards, options or {})
    job["fingerprint"] = _fingerprint(job, output, progress)
    if _is_whole(output, job["fingerprint"], overwrite):
        return DatasetInfo.load(output)
    staging = output / STAGING
    if job["generated"]:
        described: dict[str, Any] = {"time_axis": "calendar", "warnings": [], "extracts": []}
    else:
        described = _stage(source, job, staging, engine, progress)
    summary = finish_shards(job, output, described["extracts"], workers, progress)
    if job["generated"]:
        _write_generated_labels(output, staging, job["source"])
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


def plan(
    source: SourceName | Callable[..., Source],
    input_dir: str | Path | None,
    output_dir: str | Path,
    *,
    engine: Literal["duckdb", "spark"] = "duckdb",
    shards: int | None = None,
    options: dict[str, Any] | None = None,
) -> str:
    """What :func:`prepare` would do with the same arguments: the input is opened and its columns are looked at.

    It is read whole only where `output_dir` holds a preparation, to say whether it is this one.

    Raises:
        EhrDataError: The input breaks a contract that can be seen without reading it whole.
        ValueError: The source is unknown, or an argument is out of its range.
    """
    from hf_ehr.sources.engine import Engine

    output = Path(output_dir)
    job = _job(source, input_dir, output, engine, shards, options or {})
    lines = [f"{job['source']}: {job['shards']} shard{'s' * (job['shards'] > 1)} in {output}"]
    if job["generated"]:
        lines.append(f"some {expected_events(job['source'], job['options']):,.0f} events")
    else:
        function = source_function(source) if isinstance(source, str) else source
        beside = next(folder for folder in output.resolve().parents if folder.is_dir())
        with tempfile.TemporaryDirectory(dir=beside, prefix=".dry-run-") as folder:
            connection = Engine.connect(engine, temp_directory=Path(folder))
            try:
                found = function(connection, Path(job["input_dir"]), **job["options"])
            finally:
                connection.close()
        files = _list_files(Path(job["input_dir"]), output)
        size, events = sum(file.size for file in files) / 2**20, _events_in(files)
        plural = "s" * (len(files) > 1)
        lines.append(f"{len(files):,} file{plural}, {size:,.1f} MiB, some {events:,.0f} events by their size")
        lines += ["tables: " + ", ".join(extract.name for extract in found.extracts), *found.warnings]
    there = _found_fingerprint(output)
    if there is None:
        return "\n".join(lines)
    if there == _fingerprint(job, output, progress=True):
        whole = (output / "dataset.json").is_file()
        lines.append("It is there already, whole." if whole else "It was begun, and would go on where it stopped.")
    else:
        lines.append(f"{output} holds another preparation, and this one would be refused: choose another folder.")
    return "\n".join(lines)


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


def _job(
    source: str | Callable[..., Source],
    input_dir: str | Path | None,
    output: Path,
    engine: str,
    shards: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    if shards is not None and shards < 1:
        raise ValueError(f"`shards` must be at least 1, got {shards}.")
    generated = isinstance(source, str) and source in GENERATED
    if generated and (input_dir is not None or engine != "duckdb"):
        raise ValueError(f"The source `{source}` reads nothing: leave out `input_dir` and `engine`.")
    if not generated and (input_dir is None or not Path(input_dir).exists()):
        raise EhrDataError(f"`input_dir` must be an existing folder, got {input_dir}.")
    if isinstance(source, str) and not generated:
        source_function(source)
    files = [] if input_dir is None else _list_files(Path(input_dir), output)
    name = source if isinstance(source, str) else source.__name__
    return {
        "source": name,
        "generated": generated,
        "options": json.loads(json.dumps(options, default=str)),
        "shards": shards or _default_shards(expected_events(name, options) if generated else _events_in(files)),
        "input_dir": None if input_dir is None else str(Path(input_dir).resolve()),
    }


def _fingerprint(job: dict[str, Any], output: Path, progress: bool) -> str:
    """Of a preparation: source, options, shards, and all that its input says. Reads every file."""
    files = [] if job["input_dir"] is None else _list_files(Path(job["input_dir"]), output)
    shown = tqdm(files, "Input files", unit="file", disable=not (progress and files))
    contents = [(file.name, _digest(file.path)) for file in shown]
    described = json.dumps([job["source"], job["options"], job["shards"], contents], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


class _InputFile(NamedTuple):
    name: str
    path: Path
    size: int


def _list_files(input_dir: Path, output: Path) -> list[_InputFile]:
    """The input files, hidden ones and the output left out."""
    paths = sorted(input_dir.rglob("*")) if input_dir.is_dir() else [input_dir]
    inside = output.resolve()
    kept = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in kept if inside not in path.resolve().parents]
    folder = input_dir if input_dir.is_dir() else input_dir.parent
    return [_InputFile(str(path.relative_to(folder)), path, path.stat().st_size) for path in kept]


def _digest(path: Path) -> str:
    """Of what a file says: its time would change with every copy of the same tables."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _default_shards(events: float) -> int:
    return max(1, round(events / EVENTS_PER_SHARD))


def _events_in(files: list[_InputFile]) -> float:
    sizes = (file.size if file.name.lower().endswith(COMPRESSED) else file.size // 5 for file in files)
    return sum(sizes) / BYTES_PER_EVENT


def _is_whole(output: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether ``output`` holds just this, finished. Makes it ready for the work if not."""
    marker, found = output / "dataset.json", _found_fingerprint(output)
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
    write_json(output / STAGING / "plan.json", {"fingerprint": fingerprint})
    return False


def _found_fingerprint(output: Path) -> str | None:
    """Which preparation a folder holds, whole or begun; empty for none that is known, ``None`` for nothing."""
    begun = output / STAGING / "plan.json"
    if (output / "dataset.json").is_file():
        return DatasetInfo.load(output).summary.get("fingerprint", "")
    if begun.is_file():
        return json.loads(begun.read_text())["fingerprint"]
    return "" if any((output / name).exists() for name in OUTPUTS) else None


# Stage 1: raw tables → staged events, and what lies beside the shards


def _stage(
    source: str | Callable[..., Source],
    job: dict[str, Any],
    staging: Path,
    engine: Literal["duckdb", "spark"],
    progress: bool,
) -> dict[str, Any]:
    from hf_ehr.sources._staging import stage_tables

    function = source_function(source) if isinstance(source, str) else source
    return stage_tables(
        function, Path(job["input_dir"]), job["options"], staging,
        engine=engine, shards=job["shards"], progress=progress,
    )  # fmt: skip


def _write_generated_labels(output: Path, staging: Path, source: str) -> None:
    """The outcomes that the truth holds, as LABELS."""
    for name, labels in generated_labels(source, shard_paths(output, "truth")).items():
        write_parquet(validate_labels(labels), staging / "labels" / f"{name}.parquet")


def _collect_rejected(staging: Path, extracts: list[str], output: Path) -> dict[str, int]:
    """Writes ``rejected.parquet``, table by table, and counts its rows by file (or folder of files) and reason."""
    counts: Counter[str] = Counter()
    with atomic_path(output / "rejected.parquet") as path, pq.ParquetWriter(path, REJECTED_SCHEMA) as writer:
        for extract in extracts:
            for part in sorted((staging / f"extract-{extract}").glob("rejected.parquet")):
                table = pq.read_table(part).sort_by([(name, "ascending") for name in REJECTED_SCHEMA.names])
                writer.write_table(table)
                # Where each patient has a file of its own, its name is the patient's: the folder stands for them.
                places = pc.replace_substring_regex(table["file"], "/[^/]*$", "")
                for pair in pc.value_counts(pc.binary_join_element_wise(places, table["reason"], ": ")):
                    counts[pair["values"].as_py()] += pair["counts"].as_py()
    return dict(counts.most_common())


def _reasons(rejected: dict[str, int]) -> str:
    return "; ".join(f"{count:,} rows rejected, {reason}" for reason, count in rejected.items()) or "no rows"


def _move_labels(staging: Path, output: Path) -> None:
    for path in sorted((staging / "labels").glob("*.parquet")):
        (output / "labels").mkdir(exist_ok=True)
        path.replace(output / "labels" / path.name)

"""Events to one row per patient against polars and pandas (goal G8), in CPU seconds.

"polars, same records" makes what `records.assemble` makes of these events: visits with start and end, each code once
per visit with the time it became available; the two results are compared before the clock starts. The plain list
aggregations make one list of codes and one of times per patient, less than RECORDS hold.
Run: python benchmarks/cohort_build.py [--events 2000000] [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hf_ehr.records import assemble
from hf_ehr.schema import EVENT_SCHEMA, TIMESTAMP


def write_events(path: Path, count: int, shuffled: bool) -> None:
    """Diagnoses of patients with about 72 codes in about 9 visits, 82,603 distinct codes, EVENTS layout."""
    random = np.random.default_rng(0)
    subject = np.sort(random.integers(0, max(count // 72, 1), count))
    visit = subject * 100 + random.integers(0, 9, count)
    days = (visit % 100) * 30 + 15_000
    order = random.permutation(count) if shuffled else np.lexsort((visit, subject))
    seconds = (days * 86_400 * 1_000_000)[order]
    codes = pa.array([f"ICD10CM/{i:05d}" for i in range(82_603)])
    when = pa.array(seconds, pa.int64()).cast(TIMESTAMP)
    columns = {
        "subject_id": pa.array(subject[order]),
        "time": when,
        "code": pa.DictionaryArray.from_arrays(pa.array(random.integers(0, 82_603, count), pa.int32()), codes),
        "visit_id": pa.array(visit[order]),
        "kind": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count), pa.int32()), pa.array(["diagnosis"])),
        "available_at": when,
    }
    arrays = [columns.get(f.name, pa.nulls(count, f.type)) for f in EVENT_SCHEMA]
    pq.write_table(pa.table(arrays, names=EVENT_SCHEMA.names), path)


def ours(path: Path) -> int:
    return assemble(pq.read_table(path, read_dictionary=["code", "kind"])).num_rows


def with_polars_records(path: Path) -> pl.DataFrame:
    events = pl.read_parquet(path, columns=["subject_id", "visit_id", "time", "code", "available_at"])
    visit = ["subject_id", "visit_id"]
    bounds = events.group_by(visit).agg(start=pl.col("time").min(), end=pl.col("time").max())
    codes = (
        events.sort("subject_id", "visit_id", "time", "code")
        .unique([*visit, "code"], keep="first", maintain_order=True)
        .group_by(visit, maintain_order=True)
        .agg(diagnoses="code", diagnoses_at="available_at")
    )
    visits = codes.join(bounds, on=visit).sort("subject_id", "start", "visit_id")
    struct = pl.struct("visit_id", "start", "end", "diagnoses", "diagnoses_at").alias("visits")
    return visits.group_by("subject_id", maintain_order=True).agg(struct)


def check_equal(path: Path) -> None:
    """Stops unless `assemble` and "polars, same records" give the same visits."""
    names = ["visit_id", "start", "end", "diagnoses", "diagnoses_at"]
    theirs = with_polars_records(path).select("subject_id", "visits").explode("visits").unnest("visits")
    records = assemble(pq.read_table(path, read_dictionary=["code", "kind"]))
    mine = pl.from_arrow(records.select(["subject_id", "visits"])).explode("visits").unnest("visits")
    if not mine.select("subject_id", *names).equals(theirs.cast({"diagnoses": pl.List(pl.String)})):
        raise SystemExit("assemble and polars disagree about these events.")


def with_polars(path: Path) -> int:
    events = pl.read_parquet(path, columns=["subject_id", "time", "code"]).sort("subject_id", "time")
    return events.group_by("subject_id", maintain_order=True).agg("code", "time").height


def with_pandas(path: Path) -> int:
    events = pd.read_parquet(path, columns=["subject_id", "time", "code"]).sort_values(["subject_id", "time"])
    return len(events.astype({"code": str}).groupby("subject_id").agg({"code": list, "time": list}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ways = {
        "assemble": ours,
        "polars, same records": with_polars_records,
        "polars list-agg": with_polars,
        "pandas list-agg": with_pandas,
    }
    with tempfile.TemporaryDirectory() as folder:
        for shuffled in (True, False):
            path = Path(folder) / "events.parquet"
            write_events(path, arguments.events, shuffled)
            check_equal(path)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.rounds):
                for name, way in ways.items():
                    started = time.process_time()
                    way(path)
                    seconds[name].append(time.process_time() - started)
            rows = "shuffled" if shuffled else "sorted by patient"
            for rival in list(ways)[1:]:
                pairs = zip(seconds[rival], seconds["assemble"], strict=True)
                ratios = [theirs / mine for theirs, mine in pairs]
                print(
                    f"{arguments.events:,} events {rows}: "
                    f"assemble {statistics.median(seconds['assemble']):.2f} CPU s, "
                    f"{rival} {statistics.median(seconds[rival]):.2f}; ratio {statistics.median(ratios):.1f} "
                    f"[{min(ratios):.1f}, {max(ratios):.1f}]"
                )


if __name__ == "__main__":
    main()

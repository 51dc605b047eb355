"""The relational part on a real local Spark session gives what DuckDB gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ehr.prepare import prepare
from hf_ehr.records import assemble, assemble_partition
from hf_ehr.schema import EVENT_SCHEMA, RECORD_SCHEMA, EhrDataError, shard_paths
from hf_ehr.sources.eicu import eicu
from hf_ehr.sources.engine import Column, Engine, Source
from hf_ehr.sources.mimic3 import mimic3
from hf_ehr.sources.mimic4 import mimic4
from hf_ehr.sources.physionet2012 import physionet2012
from hf_ehr.sources.physionet2019 import physionet2019

from .tables import MIMIC3, MIMIC4, write_tables
from .test_eicu import write_unit
from .test_physionet import write_sets_of_2012, write_sets_of_2019

pytest.importorskip("pyspark", reason="the extra `spark` is not installed")
pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java, which is not installed")


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    engine = Engine.connect("spark", threads=2, temp_directory=tmp_path_factory.mktemp("spark"))
    engine.con._session.conf.set("spark.sql.shuffle.partitions", "2")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def duckdb() -> Engine:
    return Engine.connect("duckdb", threads=2)


def events_of(source: Source) -> list[str]:
    events = ibis.union(*[extract.events for extract in source.extracts]).to_pyarrow()
    return sorted(map(str, events.cast(EVENT_SCHEMA).to_pylist()))


def rejected_of(source: Source) -> list[str]:
    """Rejected rows without the row number, which Spark does not know."""
    rejected = ibis.union(*[table for extract in source.extracts for table in extract.rejected]).to_pyarrow()
    return sorted(map(str, rejected.drop_columns("row").to_pylist()))


@pytest.mark.parametrize(
    ("function", "tables"), [(mimic3, MIMIC3), pytest.param(mimic4, MIMIC4, marks=pytest.mark.slow)]
)
def test_a_hospital_gives_the_same_events_and_rejected_rows(spark, duckdb, tmp_path, function, tables):
    folder = write_tables(tmp_path, tables)
    options = {"measurements": function is mimic3}
    ours, theirs = (function(engine, folder, **options) for engine in (duckdb, spark))
    assert events_of(theirs) == events_of(ours)
    assert rejected_of(theirs) == rejected_of(ours)
    assert theirs.warnings == ours.warnings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "write", "options"),
    [(physionet2012, write_sets_of_2012, {}), (physionet2019, write_sets_of_2019, {}),
     (eicu, write_unit, {"yaib": "grid"})],
)  # fmt: skip
def test_intensive_care_gives_the_same_events_and_rejected_rows(spark, duckdb, tmp_path, function, write, options):
    folder = write(tmp_path)
    ours, theirs = (function(engine, folder, **options) for engine in (duckdb, spark))
    assert events_of(theirs) == events_of(ours)
    assert rejected_of(theirs) == rejected_of(ours)
    assert theirs.warnings == ours.warnings


@pytest.mark.slow
def test_the_mimic_iii_demo_gives_the_same_events(spark, duckdb, real_data):
    folder = real_data("mimic3_demo")
    assert events_of(mimic3(spark, folder)) == events_of(mimic3(duckdb, folder))


def test_texts_mean_the_same_values(spark, duckdb, tmp_path):
    texts = [
        "1", "+1", "1.0", "1.5", "1e3", ".5", "inf", "NaN", "1e39", "-1e999", "1d", "0x1", "1_0", "", " 7 ",
        "99999999999999999999",
        "2020-01-31", "2020-1-5", "20200131", "20201301", "2020-02-30", "2020-01-31 10:00", "2020-01-31T10:00:05.25",
        "2020-01-31 10:00:00Z", "2020-01-31 10:00:00+02:00", "2020-01-31 10:00:00 +02", "2020-01-31 24:30:00",
        "31.01.2020", "now", "true", "2020",
    ]  # fmt: skip
    path = tmp_path / "t.csv"
    path.write_text("n,i,f,t,d\n" + "".join(f"{i},{x},{x},{x},{x}\n" for i, x in enumerate(texts)))
    for name, dtype in (("i", "int64"), ("f", "float64"), ("t", "timestamp"), ("d", "date")):
        results = []
        for engine in (duckdb, spark):
            scan = engine.scan(path, {"n": Column(), name: Column(dtype)})
            rows = {row["n"]: row[name] for row in scan.table.to_pyarrow().to_pylist()}
            results.append((rows, sorted(row["value"] for row in scan.rejected.to_pyarrow().to_pylist())))
        assert results[0] == results[1]
        assert len(results[0][0]) + len(results[0][1]) == len(texts)


def test_a_malformed_file_is_an_error_without_its_content(spark, tmp_path):
    (tmp_path / "t.csv").write_text("id,note\n1,a\n4711-SECRET,x,y\n")
    with pytest.raises(EhrDataError, match=r"t\.csv cannot be read") as error:
        spark.scan(tmp_path / "t.csv", {"id": Column(), "note": Column()})
    assert "SECRET" not in str(error.value)


@pytest.mark.slow
def test_the_driver_writes_the_same_folder(spark, tmp_path):
    folder = write_tables(tmp_path / "raw", MIMIC3)
    for engine in ("duckdb", "spark"):
        prepare(mimic3, folder, tmp_path / engine, engine=engine, shards=2, workers=1, progress=False)
    for arrow in ("events", "records"):
        for left, right in zip(*(shard_paths(tmp_path / name, arrow) for name in ("duckdb", "spark")), strict=True):
            assert pq.read_table(left).equals(pq.read_table(right))


def test_records_are_assembled_by_map_in_arrow(spark, duckdb, tmp_path):
    from pyspark.sql.pandas.types import from_arrow_schema

    source = mimic3(duckdb, write_tables(tmp_path, MIMIC3), measurements=True)
    events = pa.concat_tables([extract.events.to_pyarrow().cast(EVENT_SCHEMA) for extract in source.extracts])
    pq.write_table(events, tmp_path / "events.parquet")
    session = spark.con._session
    frame = session.read.parquet(str(tmp_path / "events.parquet"))
    shards = frame.repartition(3, "subject_id")
    rows = shards.mapInArrow(assemble_partition, from_arrow_schema(RECORD_SCHEMA)).toArrow()
    assert rows.cast(RECORD_SCHEMA).sort_by("subject_id").equals(assemble(events))


def test_the_working_directory_stays_clean(spark):
    assert not {"spark-warehouse", "metastore_db", "derby.log"} & {path.name for path in Path.cwd().iterdir()}

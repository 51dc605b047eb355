"""EVENTS → RECORDS: hand-made shards, order, and no leak through de-duplication."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr._sorting import sort_order
from hf_ehr.records import assemble
from hf_ehr.schema import CODE_KINDS, EVENT_SCHEMA, RECORD_SCHEMA, check_schema, validate_events

from .builders import day


def event(subject_id: int, kind: str, code: str, time: float | None = None, **fields) -> dict:
    row = dict.fromkeys(EVENT_SCHEMA.names) | {"subject_id": subject_id, "kind": kind, "code": code}
    row["time"] = None if time is None else day(time)
    if fields.get("available_at") is not None:
        fields["available_at"] = day(fields["available_at"])
    return row | fields


def table(rows: list[dict]) -> pa.Table:
    return validate_events(pa.Table.from_pylist(rows, schema=EVENT_SCHEMA))


def records_of(rows: list[dict]) -> list[dict]:
    result = assemble(table(rows))
    assert check_schema(result, RECORD_SCHEMA, "RECORDS").equals(result)
    result.validate(full=True)
    return result.to_pylist()


def admitted(subject_id: int, visit_id: int, start: float, end: float | None, **fields) -> list[dict]:
    rows = [event(subject_id, "admission", "Visit/inpatient", start, visit_id=visit_id, **fields)]
    if end is not None:
        rows.append(event(subject_id, "discharge", "Discharge/home", end, visit_id=visit_id))
    return rows


PATIENT = [
    event(7, "static", "Sex/F"),
    event(7, "static", "Race/BLACK/AFRICAN AMERICAN"),
    event(7, "birth", "MEDS_BIRTH", -20_000),
    event(7, "death", "MEDS_DEATH", 400.5),
    *admitted(7, 90, 100, 110, numeric_value=1.0),
    *admitted(7, 91, 10, 15, numeric_value=0.0),
    event(7, "diagnosis", "ICD9CM/428.0", 15, visit_id=91, position=2),
    event(7, "diagnosis", "ICD9CM/584.9", 15, visit_id=91, position=1),
    event(7, "procedure", "ICD9Proc/39.95", 12, visit_id=91, position=1, available_at=16),
    event(7, "medication", "DRUG/B", 11, visit_id=91),
    event(7, "medication", "DRUG/A", 11.5, visit_id=91),
    event(7, "note", "Note/Nursing", 12, visit_id=91, text_value="second"),
    event(7, "note", "Note/Physician", 11, visit_id=91, text_value="first"),
    event(7, "admission", "Stay/icu", 11, visit_id=91, stay_id=5),
    event(7, "discharge", "Stay/icu", 12, visit_id=91, stay_id=5),
    event(7, "measurement", "LOINC/8867-4", 11.5, stay_id=5, numeric_value=80.0),
    event(7, "measurement", "LOINC/8867-4", 11.25, visit_id=91, stay_id=5, text_value="fast"),
]


def test_a_hand_made_patient_becomes_the_record_written_by_hand():
    (record,) = records_of(PATIENT)
    assert (record["sex"], record["race"], record["language"]) == ("F", "BLACK/AFRICAN AMERICAN", None)
    assert (record["birth_time"], record["death_time"]) == (day(-20_000), day(400.5))
    early, late = record["visits"]
    assert (early["visit_id"], early["start"], early["end"], early["planned"]) == (91, day(10), day(15), False)
    assert (late["visit_id"], late["planned"], late["kind"], late["discharged_to"]) == (90, True, "inpatient", "home")
    assert early["diagnoses"] == ["ICD9CM/584.9", "ICD9CM/428.0"]
    assert early["diagnoses_at"] == [day(15), day(15)]
    assert (early["procedures"], early["procedures_at"]) == (["ICD9Proc/39.95"], [day(16)])
    assert (early["medications"], early["medications_at"]) == (["DRUG/B", "DRUG/A"], [day(11), day(11.5)])
    assert [(note["category"], note["text"]) for note in early["notes"]] == [
        ("Physician", "first"), ("Nursing", "second"),
    ]  # fmt: skip
    (stay,) = early["stays"]
    assert (stay["stay_id"], stay["start"], stay["end"]) == (5, day(11), day(12))
    assert stay["measurements"] == [
        {"hour": 6.0, "name": "LOINC/8867-4", "value": None, "text": "fast"},
        {"hour": 12.0, "name": "LOINC/8867-4", "value": 80.0, "text": None},
    ]
    assert late["diagnoses"] == late["notes"] == late["stays"] == []


def test_the_order_of_the_rows_and_the_encoding_of_codes_change_nothing():
    rows = [*PATIENT, *admitted(3, 1, 5, 6), event(3, "diagnosis", "ICD9CM/401.9", 6, visit_id=1)]
    expected = assemble(table(rows))
    for seed in range(5):
        shuffled = table(rows).take(pa.array(np.random.default_rng(seed).permutation(len(rows))))
        assert assemble(shuffled).equals(expected)
        for name in ("code", "kind"):
            index = shuffled.schema.get_field_index(name)
            shuffled = shuffled.set_column(index, name, shuffled[name].dictionary_encode())
        parts = pa.concat_tables([shuffled.slice(0, 4), shuffled.slice(4)])
        assert assemble(parts).equals(expected)


def test_codes_without_a_visit_are_grouped_by_calendar_day():
    (record,) = records_of(
        [
            event(1, "diagnosis", "ICD10CM/I10", 40.75),
            event(1, "diagnosis", "ICD10CM/E11.9", 40.25, position=1),
            event(1, "medication", "ATC/A10BA02", 39.5),
            event(1, "diagnosis", "ICD10CM/Z00", 41.0),
        ]
    )
    assert [visit["start"] for visit in record["visits"]] == [day(39.5), day(40.25), day(41)]
    visit = record["visits"][1]
    epoch_day = (day(40) - datetime(1970, 1, 1)).days
    assert visit["visit_id"] == -(epoch_day + 1_000_000)
    assert (visit["end"], visit["kind"], visit["discharged_to"]) == (day(40.75), "unknown", None)
    assert visit["diagnoses"] == ["ICD10CM/E11.9", "ICD10CM/I10"]
    assert visit["diagnoses_at"] == [day(40.25), day(40.75)]  # no visit: known when it happened


def test_days_before_1970_are_days_too():
    epoch = (datetime(1970, 1, 1) - day(0)) / timedelta(days=1)
    hours = {"A/1": -20, "A/2": -4, "A/3": 4}
    (record,) = records_of([event(1, "diagnosis", code, epoch + hour / 24) for code, hour in hours.items()])
    assert [visit["diagnoses"] for visit in record["visits"]] == [["A/1", "A/2"], ["A/3"]]


@pytest.mark.parametrize("with_more", [False, True])
def test_codes_that_do_not_say_so_are_known_at_the_end_of_their_visit_and_drugs_at_once(with_more):
    rows = [
        *admitted(1, 8, 0, 9),
        event(1, "diagnosis", "A/1", 2, visit_id=8),
        event(1, "procedure", "A/2", 3, visit_id=8),
    ]
    rows += [event(1, "medication", "A/3", 4, visit_id=8)]
    if with_more:
        rows += [event(1, "diagnosis", "A/4", 20), event(1, "diagnosis", "A/5", 2, visit_id=8, available_at=1)]
    visit = records_of(rows)[0]["visits"][0]
    assert visit["diagnoses_at"] == [day(9), day(1)][: len(visit["diagnoses"])]
    assert (visit["procedures_at"], visit["medications_at"]) == ([day(9)], [day(4)])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.sampled_from([-(2**63), -5, 0, 1, 2**40, 2**63 - 1])] * 3), min_size=1, max_size=40),
    low_bits=st.lists(st.integers(0, 2**20), min_size=40, max_size=40),
)
def test_packed_words_sort_as_their_keys_do(rows, low_bits):
    keys = [np.array(column) for column in zip(*rows, strict=True)] + [np.array(low_bits[: len(rows)])]
    order = sort_order(keys)
    order = np.arange(len(rows)) if order is None else order
    assert sorted(order) == list(range(len(rows)))
    expected = np.lexsort(keys[::-1])
    for key in keys:
        assert key[order].tolist() == key[expected].tolist()


def test_a_visit_without_discharge_ends_with_its_last_event():
    rows = [*admitted(1, 8, 3, None), event(1, "diagnosis", "A/1", 4.5, visit_id=8)]
    ((visit,),) = [record["visits"] for record in records_of(rows)]
    assert (visit["start"], visit["end"], visit["discharged_to"]) == (day(3), day(4.5), None)
    assert visit["diagnoses_at"] == [day(4.5)]


def test_a_patient_with_demographics_only_has_a_record_without_visits():
    first, second = records_of([event(2, "static", "Sex/M"), event(1, "death", "MEDS_DEATH", 3)])
    assert (first["subject_id"], first["visits"], first["death_time"]) == (1, [], day(3))
    assert (second["subject_id"], second["sex"], second["visits"]) == (2, "M", [])


def test_an_empty_shard_gives_no_records():
    assert assemble(EVENT_SCHEMA.empty_table()).equals(RECORD_SCHEMA.empty_table())


def test_one_visit_id_of_two_patients_is_two_visits():
    rows = [event(subject, "diagnosis", f"A/{subject}", 1, visit_id=4) for subject in (2, 1)]
    assert [record["visits"][0]["diagnoses"] for record in records_of(rows)] == [["A/1"], ["A/2"]]


def test_of_a_repeated_code_the_first_available_occurrence_gives_the_position():
    rows = [
        *admitted(1, 8, 0, 9),
        event(1, "diagnosis", "A/twice", 1, visit_id=8, position=1, available_at=9),
        event(1, "diagnosis", "A/other", 1, visit_id=8, position=2, available_at=5),
        event(1, "diagnosis", "A/twice", 1, visit_id=8, position=3, available_at=2),
    ]
    ((visit,),) = [record["visits"] for record in records_of(rows)]
    assert visit["diagnoses"] == ["A/other", "A/twice"]
    assert visit["diagnoses_at"] == [day(5), day(2)]


def test_codes_equal_to_a_plain_python_reference_on_random_events():
    generator = np.random.default_rng(0)
    rows = [*admitted(1, 1, 0, 30), *admitted(2, 2, 0, 30), *admitted(2, 3, 31, 60)]
    for _ in range(400):
        visit_id = int(generator.integers(1, 4))
        when = float(generator.integers(0, 30)) + (31 if visit_id == 3 else 0)
        position = int(generator.integers(1, 9)) if generator.random() < 0.7 else None
        kind = ["diagnosis", "procedure", "medication"][generator.integers(3)]
        code = f"A/{generator.integers(20)}"
        rows.append(event(2 if visit_id > 1 else 1, kind, code, when, visit_id=visit_id, position=position,
                          available_at=when + float(generator.integers(4))))  # fmt: skip
    for record in records_of(rows):
        for visit in record["visits"]:
            for name, kind in zip(CODE_KINDS, ("diagnosis", "procedure", "medication"), strict=True):
                mine = [row for row in rows if row["visit_id"] == visit["visit_id"] and row["kind"] == kind]
                rank = lambda row: (row["position"] or 999, row["time"])  # noqa: E731
                best = {}
                for row in sorted(mine, key=lambda row: (row["available_at"], *rank(row))):
                    best.setdefault(row["code"], row)
                expected = sorted(best.values(), key=lambda row: (*rank(row), row["code"]))
                assert visit[name] == [row["code"] for row in expected]
                assert visit[f"{name}_at"] == [row["available_at"] for row in expected]


CODE_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["diagnosis", "procedure", "medication"]),
        st.sampled_from(["A/1", "A/2", "A/3"]),
        st.integers(0, 6),  # time
        st.integers(0, 6),  # delay until it is available
        st.one_of(st.none(), st.integers(1, 4)),  # position
        st.one_of(st.none(), st.sampled_from([1, 2])),  # visit
    ),
    max_size=14,
)


def visible(record: dict | None, moment: datetime) -> list:
    """All codes available at ``moment`` in the order of the record."""
    return [
        (visit["visit_id"], kind, code, at)
        for visit in (record["visits"] if record else [])
        for kind in CODE_KINDS
        for code, at in zip(visit[kind], visit[f"{kind}_at"], strict=True)
        if at <= moment
    ]


@settings(max_examples=150, deadline=None)
@given(drawn=CODE_EVENTS, moment=st.integers(0, 10), gone=st.sets(st.integers(0, 13)))
def test_deleting_what_became_available_later_changes_nothing_that_was_visible(drawn, moment, gone):
    fixed = [*admitted(1, 1, 0, 3), *admitted(1, 2, 4, 7)]
    codes = [
        event(1, kind, code, time, visit_id=visit_id, position=position, available_at=time + delay)
        for kind, code, time, delay, position, visit_id in drawn
    ]
    rest = [row for i, row in enumerate(codes) if not (i in gone and row["available_at"] > day(moment))]
    before, after = records_of([*fixed, *codes])[0], records_of([*fixed, *rest])[0]
    assert visible(before, day(moment)) == visible(after, day(moment))


@settings(max_examples=100, deadline=None)
@given(drawn=CODE_EVENTS, moment=st.integers(0, 10))
def test_cutting_all_events_at_a_time_changes_nothing_that_was_visible_before(drawn, moment):
    def cut(rows: list[dict]) -> list[dict]:
        ends = {1: day(3), 2: day(7)}
        known = {"diagnosis": ends, "procedure": ends}
        return [row for row in rows if known.get(row["kind"], {}).get(row["visit_id"], row["time"]) <= day(moment)]

    rows = [*admitted(1, 1, 0, 3), *admitted(1, 2, 4, 7)]
    rows += [
        event(1, kind, code, (3 if visit_id == 1 else 7) if visit_id else time, visit_id=visit_id, position=position)
        for kind, code, time, _, position, visit_id in drawn
    ]
    before, rest = records_of(rows)[0], cut(rows)
    after = records_of(rest)[0] if rest else None
    assert visible(before, day(moment)) == visible(after, day(moment))


@pytest.mark.parametrize("with_visits", [True, False])
def test_many_events_come_out_as_the_list_aggregation_of_polars_has_them(with_visits):
    import polars as pl

    generator = np.random.default_rng(1)
    size = 20_000
    subject = generator.integers(0, 500, size) * 7
    days = generator.integers(0, 30, size)
    frame = pl.DataFrame(
        {"subject_id": subject, "time": np.datetime64("2020-01-01", "us") + days.astype("timedelta64[D]"),
         "code": [f"A/{number}" for number in range(size)], "kind": ["diagnosis"] * size,
         "visit_id": days + 100, "position": generator.permutation(size)}
    )  # fmt: skip
    frame = frame if with_visits else frame.with_columns(visit_id=pl.lit(None, pl.Int64))
    expected = frame.sort("subject_id", "time", "position").group_by("subject_id", maintain_order=True)
    expected = expected.agg(pl.col("code"))
    columns = frame.columns if with_visits else ["subject_id", "time", "code", "kind", "position"]
    result = pl.from_arrow(assemble(frame.select(columns).to_arrow()))
    flat = result.select("subject_id", code=pl.col("visits").list.eval(pl.element().struct.field("diagnoses")))
    assert flat["subject_id"].to_list() == expected["subject_id"].to_list()
    assert [list(chain(*codes)) for codes in flat["code"].to_list()] == expected["code"].to_list()

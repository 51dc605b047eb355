"""Summaries of stays: the numbers by hand, nothing from later, columns of the training rows, and two fair rivals."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.metrics import auroc
from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, shard_name
from hf_ehr.stay_baselines import STATISTICS, STAY_BASELINES, StaySummaries, admission_summaries, stay_summaries
from tests.builders import day, patient, records, visit


def measurement(hour, name, value=None, text=None):
    return {"hour": float(hour), "name": name, "value": value, "text": text}


def write(folder, patients, shards=2):
    (folder / "records").mkdir(parents=True)
    for shard in range(shards):
        rows = [row for row in patients if row["subject_id"] % shards == shard]
        pq.write_table(records(*rows), folder / "records" / shard_name(shard, shards))
    DatasetInfo("made", {}, shards, "calendar").save(folder)
    return folder


def person(subject, *measured, sex="F", end=5):
    stay = {"stay_id": subject, "start": day(1), "end": day(end), "measurements": list(measured)}
    return patient(subject, [visit(0, 8, stays=[stay])], sex=sex)


def asked(*rows) -> pa.Table:
    """LABELS of (subject, hours since day 1, value)."""
    made = [{"subject_id": s, "prediction_time": day(1) + timedelta(hours=h), "boolean_value": v} for s, h, v in rows]
    return pa.Table.from_pylist(made, schema=LABEL_SCHEMA)


def value(found: StaySummaries, row: int, name: str) -> float:
    return float(found.matrix[row, found.names.index(name)])


def world(after=None):
    """40 patients of two days; what is measured from hour `after` on may be changed."""
    rng = np.random.default_rng(0)
    rows = []
    for subject in range(1, 41):
        hours = np.sort(rng.uniform(0, 47, 15))
        kinds = rng.choice(["X/HR", "X/NA", "X/KIND"], 15)
        shift = 0 if after is None else np.where(hours >= after, 700.0, 0.0)
        values = rng.normal(80, 9, 15) + shift
        rows.append(
            person(
                subject,
                *(
                    measurement(hour, kind, None, f"{number > 400} {number > 80}")
                    if kind == "X/KIND"
                    else measurement(hour, kind, float(number))
                    for hour, kind, number in zip(hours, kinds, values, strict=True)
                ),
            )
        )
    return rows


def test_seven_statistics_by_hand(tmp_path):
    measured = [
        measurement(0, "X/UNIT", text="Medical"), measurement(1, "X/HR", 90.0), measurement(5, "X/HR", 60.0),
        measurement(5, "X/NA", 140.0), measurement(9, "X/HR", 75.0), measurement(10, "X/HR", 200.0),
    ]  # fmt: skip
    data = write(tmp_path / "data", [person(1, *measured), person(2, sex="M")])
    names = ["age", "sex = F", "sex = M", "X/UNIT = Medical"]
    names += [f"{statistic} of {variable}" for variable in ("X/HR", "X/NA") for statistic in STATISTICS]
    found = stay_summaries(data, labels=asked((1, 10, True), (2, 10, False)), names=names)
    assert found.subject_id.tolist() == [2, 1]  # in the order of the shards
    assert found.labels.tolist() == [0, 1]
    by_name = dict(zip(names, found.matrix[1].tolist(), strict=True))
    expected = {"first": 90, "last": 75, "mean": 75, "min": 60, "max": 90, "std": np.sqrt(150), "count": 3}
    assert {name: by_name[f"{name} of X/HR"] for name in STATISTICS} == pytest.approx(expected)
    once = dict.fromkeys(STATISTICS, 140.0) | {"std": 0.0, "count": 1.0}
    assert {name: by_name[f"{name} of X/NA"] for name in STATISTICS} == once
    assert [by_name[name] for name in names[1:4]] == [1, 0, 1]
    assert by_name["age"] == pytest.approx(60, abs=0.01)
    nothing = dict(zip(names, found.matrix[0].tolist(), strict=True))
    assert np.isnan(nothing["mean of X/HR"])
    assert [nothing[name] for name in ("count of X/HR", "X/UNIT = Medical", "sex = M")] == [0, 0, 1]
    assert found.fields["X/UNIT"].tolist() == [None, "Medical"]
    assert found.fields["sex"].tolist() == ["M", "F"]


@settings(max_examples=8, deadline=None)
@given(st.floats(0.5, 47))
def test_nothing_measured_after_the_prediction_time_is_summarised(tmp_path_factory, hour):
    labels = asked(*((subject, hour, subject % 2 == 0) for subject in range(1, 41)))
    one, changed = (
        stay_summaries(write(tmp_path_factory.mktemp("world") / "data", world(after)), labels=labels)
        for after in (None, hour)
    )
    assert one.names == changed.names
    np.testing.assert_array_equal(one.matrix, changed.matrix)


def test_columns_are_chosen_on_the_given_rows_and_kept_for_others(tmp_path):
    rows = [person(s, measurement(1, "X/HR", 70.0 + s), measurement(2, "X/UNIT", text="A")) for s in range(1, 13)]
    rows += [person(s, measurement(1, "X/RARE", 5.0), measurement(2, "X/UNIT", text="B")) for s in range(13, 17)]
    data = write(tmp_path / "data", rows)
    labels = asked(*((subject, 10, subject % 3 == 0) for subject in range(1, 17)))
    train = stay_summaries(data, labels=labels)
    assert train.names == ["age", "X/UNIT = A", "sex = F", *(f"{name} of X/HR" for name in STATISTICS)]
    held = stay_summaries(data, labels=labels, subject_ids=[1, 13, 14], names=train.names)
    assert held.names == train.names
    assert held.subject_id.tolist() == [14, 1, 13]
    np.testing.assert_array_equal(held.matrix, train.matrix[np.isin(train.subject_id, [1, 13, 14])])
    other = stay_summaries(data, labels=labels, subject_ids=[13, 14, 15, 16], names=["count of X/RARE"])
    moved = other.columns(["mean of X/HR", "count of X/HR", "count of X/RARE", "sex = F"])
    np.testing.assert_array_equal(moved, np.tile(np.array([np.nan, 0, 1, 0], np.float32), (4, 1)))


def test_how_records_are_cut_into_shards_changes_nothing(tmp_path):
    labels = asked(*((subject, 20, subject % 2 == 0) for subject in range(1, 41)))
    one, many = (stay_summaries(write(tmp_path / str(n), world(), n), labels=labels) for n in (1, 7))
    assert one.names == many.names
    order, other = np.argsort(one.stay_id), np.argsort(many.stay_id)
    np.testing.assert_array_equal(one.matrix[order], many.matrix[other])
    np.testing.assert_array_equal(one.labels[order], many.labels[other])


def test_without_a_stay_there_is_nothing_to_summarise(tmp_path):
    data = write(tmp_path / "data", [person(1), person(2)])
    with pytest.raises(EhrDataError, match="No stay is left of 1 labels"):
        stay_summaries(data, labels=asked((1, -5, True)))
    with pytest.raises(EhrDataError, match="`boolean_value` in every row"):
        stay_summaries(data, labels=asked((1, 5, None)))


def drawn(rows, seed, unknown=0.3):
    """One column of signal that is missing at times, where being missing says something too, and two of noise."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, 4)).astype(np.float32)
    missing = rng.random(rows) < unknown
    score = np.where(missing, 0.8, 2 * matrix[:, 0])
    labels = (rng.random(rows) < 1 / (1 + np.exp(-score))).astype(np.int64)
    matrix[missing, :2] = np.nan
    matrix[0, 3] = 1e6  # one absurd value
    ids = np.arange(rows)
    return StaySummaries(ids, ids, labels, matrix, ["mean of A", "last of A", "mean of B", "mean of C"], {})


@pytest.mark.parametrize("name", STAY_BASELINES)
def test_a_baseline_ranks_new_stays_and_reads_no_test_label(name):
    train, validation, test = (drawn(rows, seed) for seed, rows in enumerate((400, 200, 500)))
    found = STAY_BASELINES[name](train, validation, test, seed=0)
    assert found.validation.shape == (200,)
    assert auroc(test.labels, found.test) > 0.75
    blind = replace(test, labels=1 - test.labels)
    again = STAY_BASELINES[name](train, validation, blind, seed=0)
    np.testing.assert_array_equal(again.test, found.test)


@pytest.mark.parametrize("name", STAY_BASELINES)
def test_the_columns_are_those_of_the_training_rows_in_any_order(name):
    train, validation, test = (drawn(rows, seed) for seed, rows in enumerate((300, 200, 100)))
    found = STAY_BASELINES[name](train, validation, test, seed=0)
    turned = [
        replace(split, matrix=np.c_[split.matrix[:, ::-1], split.labels], names=[*split.names[::-1], "mean of LEAK"])
        for split in (validation, test)
    ]
    np.testing.assert_array_equal(STAY_BASELINES[name](train, *turned, seed=0).test, found.test)


@pytest.mark.parametrize("name", STAY_BASELINES)
def test_a_split_of_one_class_is_refused(name):
    train, validation, test = (drawn(100, seed) for seed in range(3))
    with pytest.raises(ValueError, match="`validation` must hold both classes"):
        STAY_BASELINES[name](train, replace(validation, labels=np.zeros(100, np.int64)), test, seed=0)


def test_what_is_unknown_of_all_training_rows_breaks_nothing():
    train, validation, test = (drawn(100, seed) for seed in range(3))
    train.matrix[:, 2] = np.nan
    for baseline in STAY_BASELINES.values():
        assert np.isfinite(baseline(train, validation, test, seed=0).test).all()


def test_rows_come_in_the_order_of_examples_or_not_at_all():
    ids, labels = np.array([7, 3, 7, 5]), np.array([1, 0, 0, 1])
    made = StaySummaries(
        ids * 10, ids, labels, np.arange(4, dtype=np.float32)[:, None], ["age"], {"age": np.arange(4)}
    )
    found = made.in_order(np.array([3, 7, 5, 7]), np.array([0, 0, 1, 1]))
    assert found.matrix[:, 0].tolist() == found.fields["age"].tolist() == [1, 2, 3, 0]
    assert found.subject_id.tolist() == [30, 70, 50, 70]
    assert made.in_order(np.array([3, 7, 5]), np.array([0, 0, 1])).matrix[:, 0].tolist() == [1, 2, 3]
    for other, others in (([3, 8], [0, 1]), ([3, 7, 5, 7], [0, 0, 0, 1]), ([7, 7], [1, 1])):
        with pytest.raises(EhrDataError, match="and are not"):
            made.in_order(np.array(other), np.array(others))


def test_an_admission_that_is_asked_about_several_times_keeps_the_order_of_its_questions():
    ids, labels = np.array([7, 3, 7, 7, 5]), np.array([1, 0, 0, 1, 1])
    made = StaySummaries(ids * 10, ids, labels, np.arange(5, dtype=np.float32)[:, None], ["age"], {})
    found = made.in_order(np.array([5, 7, 7, 7]), np.array([1, 0, 1, 1]))  # patient 30 is not in the draw
    assert found.matrix[:, 0].tolist() == [4, 2, 0, 3]
    with pytest.raises(EhrDataError, match="and are not"):  # which of the two?
        made.in_order(np.array([5, 7]), np.array([1, 1]))


def admitted(later=0.0):
    """One patient with two stays and codes, of which some come later; and one without any."""
    first = [measurement(0, "X/HR", 60.0), measurement(10, "X/HR", 80.0)]
    second = [measurement(5, "X/HR", 100.0), measurement(40, "X/HR", 300.0 + later)]
    stays = [
        {"stay_id": 11, "start": day(1), "end": day(2), "measurements": first},
        {"stay_id": 12, "start": day(3), "end": day(6), "measurements": second},
        {"stay_id": 13, "start": day(5), "end": day(6), "measurements": [measurement(0, "X/HR", 500.0 + later)]},
    ]
    codes = ["ICD10CM/I10", "ICD10CM/E11.9", f"ICD10CM/A{later:02.0f}"]
    times = [day(2), day(4), day(6)]
    one = visit(
        0, 8, stays=stays, diagnoses=codes, diagnoses_at=times, medications=["ATC/A10BA02"], medications_at=[day(1)]
    )
    earlier = visit(-20, -15, diagnoses=["ICD10CM/Z99"])
    outpatient = visit(3.5, 4.5, kind="outpatient")
    return [patient(1, [earlier, one, outpatient], sex="F"), patient(2, [visit(0, 8)], sex="M")]


CODES = ("diagnoses = ICD10CM/I10", "diagnoses = ICD10CM/E11.9", "diagnoses = ICD10CM/A00", "diagnoses = ICD10CM/A07")
ADMISSION_COLUMNS = [
    *("age", "sex = F", *CODES, "diagnoses = ICD10CM/Z99", "medications = ATC/A10BA02"),
    *(f"{name} of X/HR" for name in STATISTICS),
]


def test_admissions_by_hand(tmp_path):
    data = write(tmp_path / "data", admitted())
    found = admission_summaries(data, labels=asked((1, 72, True), (2, 72, False)), names=ADMISSION_COLUMNS)
    assert found.stay_id.tolist() == [0, 0]
    assert found.subject_id.tolist() == [2, 1]
    known = found.matrix[1].tolist()
    assert known[0] == pytest.approx(60, abs=0.01)
    assert known[1:8] == [1, 1, 1, 0, 0, 0, 1]
    seen = [60.0, 80.0, 100.0]
    assert known[8:] == pytest.approx([60, 100, 80, 60, 100, np.std(seen), 3])
    nothing = found.matrix[0].tolist()
    assert nothing[1:8] == [0] * 7
    assert np.isnan(nothing[8])
    assert nothing[-1] == 0
    assert found.fields["sex"].tolist() == ["M", "F"]


def test_nothing_of_an_admission_that_comes_later_is_summarised(tmp_path):
    labels = asked((1, 72, True), (2, 72, False))
    folders = [write(tmp_path / str(later), admitted(later)) for later in (0.0, 7.0)]
    one, other = (admission_summaries(data, labels=labels, names=ADMISSION_COLUMNS) for data in folders)
    np.testing.assert_array_equal(one.matrix, other.matrix)
    with pytest.raises(EhrDataError, match="No admission is left of 1 labels"):
        admission_summaries(tmp_path / "0.0", labels=asked((1, -24 * 8, True)))

"""Examples of stays see what was measured before they are asked, and belong to the stay that was running."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.hourly import fit_hourly_features
from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, shard_name
from hf_ehr.stay_datasets import build_stay_examples
from tests.builders import day, patient, records, visit

SUBJECTS = range(1, 41)


def stay(number: int, start: float, end: float | None, *measured: tuple[float, str, float]) -> dict:
    rows = [{"hour": hour, "name": name, "value": value, "text": None} for hour, name, value in sorted(measured)]
    return {"stay_id": number, "start": day(start), "end": None if end is None else day(end), "measurements": rows}


def world(change_after: float | None = None) -> list[dict]:
    """40 patients with a stay of two days each, some with a second one; what comes after an hour may be changed."""
    rng = np.random.default_rng(0)
    patients = []
    for subject in SUBJECTS:
        measured = [(float(hour), "X/HR", float(rng.normal(80, 9))) for hour in rng.uniform(0, 47, 20)]
        if change_after is not None:
            measured = [(hour, name, value if hour < change_after else value + 500) for hour, name, value in measured]
        stays = [stay(subject, 1, 3, *measured)]
        if subject % 4 == 0:
            stays.append(stay(100 + subject, 5, None, (0.5, "X/HR", 70.0)))
        patients.append(patient(subject, [visit(0, 8, stays=stays)], sex="F" if subject % 2 else "M"))
    return patients


def folder(path, patients):
    (path / "records").mkdir(parents=True)
    for shard in range(2):
        rows = [row for row in patients if row["subject_id"] % 2 == shard]
        pq.write_table(records(*rows), path / "records" / shard_name(shard, 2))
    DatasetInfo("made", {}, 2, "calendar").save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("data") / "data", world())


@pytest.fixture(scope="module")
def extractor(data):
    return fit_hourly_features(data, subject_ids=list(SUBJECTS), min_patients=2, demographics=("age", "sex"))


def labels(*rows) -> pa.Table:
    """LABELS of (subject, hours since day 1, value)."""
    made = [{"subject_id": s, "prediction_time": day(1) + timedelta(hours=h), "boolean_value": v} for s, h, v in rows]
    return pa.Table.from_pylist(made, schema=LABEL_SCHEMA)


def test_every_stay_is_an_example_without_labels(data, extractor):
    examples = build_stay_examples(data, extractor)
    assert sorted(examples["stay_id"]) == [*SUBJECTS, *(100 + s for s in SUBJECTS if s % 4 == 0)]
    assert set(examples["stay_hours"]) == {48, 1}
    assert "labels" not in examples.column_names
    for row in examples:
        assert len(row["feature_counts"]) == row["stay_hours"]
        assert sum(row["feature_counts"]) == len(row["feature_ids"])


def test_a_label_belongs_to_the_stay_that_was_running_and_sees_its_hours(data, extractor):
    asked = labels((1, 12, True), (4, 24, False), (4, 4 * 24 + 10, True), (2, 3.5, False))
    examples = build_stay_examples(data, extractor, labels=asked)
    found = {row["stay_id"]: (row["stay_hours"], row["labels"]) for row in examples}
    assert found == {1: (12, 1), 4: (24, 0), 104: (10, 1), 2: (4, 0)}


def test_labels_outside_of_stays_are_counted_and_left_out(data, extractor, caplog):
    asked = labels((1, -1, True), (1, 49, True), (1, 48, False), (999, 5, True))
    examples = build_stay_examples(data, extractor, labels=asked)
    assert examples["labels"][:] == [0]
    assert "2 labels are asked outside of any stay" in caplog.text
    with pytest.raises(EhrDataError, match="No example is left of 1 labels"):
        build_stay_examples(data, extractor, labels=labels((1, 49, True)))


def test_a_split_takes_its_patients_only_and_files_hold_what_memory_does(data, extractor, tmp_path):
    asked = labels(*((subject, 20, subject % 3 == 0) for subject in SUBJECTS))
    some = [3, 8, 12]
    examples = build_stay_examples(data, extractor, labels=asked, subject_ids=some)
    assert sorted(examples["subject_id"]) == some
    filed = build_stay_examples(data, extractor, labels=asked, subject_ids=some, cache_dir=tmp_path)
    assert filed.to_list() == examples.to_list()


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 47))
def test_nothing_measured_after_the_prediction_time_is_seen(data, extractor, tmp_path_factory, hour):
    asked = labels(*((subject, hour, True) for subject in SUBJECTS))
    other = folder(tmp_path_factory.mktemp("changed") / "data", world(change_after=hour))
    one, changed = (build_stay_examples(path, extractor, labels=asked) for path in (data, other))
    assert one.to_list() == changed.to_list()


def test_the_continuous_form_carries_values(data):
    extractor = fit_hourly_features(data, subject_ids=list(SUBJECTS), min_patients=2, form="continuous")
    row = build_stay_examples(data, extractor)[0]
    assert len(row["feature_values"]) == len(row["feature_ids"]) > 0


def test_labels_without_a_value_are_refused(data, extractor):
    with pytest.raises(EhrDataError, match="`boolean_value` in every row"):
        build_stay_examples(data, extractor, labels=labels((1, 12, None)))

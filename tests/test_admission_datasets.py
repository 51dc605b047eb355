"""Examples of admissions hold what was known of one visit at the prediction time, and nothing that came later."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr import EhrCodeTokenizer, HourlyFeatureExtractor, MedHMPProcessor
from hf_ehr.admission_datasets import build_admission_examples
from hf_ehr.hourly import fit_hourly_features, hourly_examples
from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, shard_name
from hf_ehr.stay_collators import AdmissionCollator
from tests.builders import day, patient, records, visit

DIAGNOSES = [f"ICD10CM/A0{n}" for n in range(8)]
DRUGS = [f"ATC/A0{n}" for n in range(8)]
SUBJECTS = range(1, 31)


def stay(number: int, start: float, *measured: tuple[float, float], end: float | None = None) -> dict:
    rows = [{"hour": hour, "name": "X/HR", "value": value, "text": None} for hour, value in sorted(measured)]
    return {"stay_id": number, "start": day(start), "end": None if end is None else day(end), "measurements": rows}


def note(when: float, category: str, text: str) -> dict:
    return {"time": day(when), "category": category, "text": text}


def folder(path, patients, shards: int = 2):
    (path / "records").mkdir(parents=True)
    for shard in range(shards):
        rows = [row for row in patients if row["subject_id"] % shards == shard]
        pq.write_table(records(*rows), path / "records" / shard_name(shard, shards))
    DatasetInfo("made", {}, shards, "calendar").save(path)
    return path


def world(change_after: float | None = None) -> list[dict]:
    """30 patients, each with an inpatient visit of days 1 to 9; what becomes known after a day may be another."""
    rng = np.random.default_rng(0)
    limit = np.inf if change_after is None else change_after
    patients = []
    for subject in SUBJECTS:
        fields = {}
        for kind, codes in (("diagnoses", DIAGNOSES), ("medications", DRUGS)):
            when = np.sort(rng.uniform(1, 9, 4))
            chosen = [codes[n] for n in rng.permutation(7)[:4]]
            fields[kind] = [code if at <= limit else codes[7] for code, at in zip(chosen, when, strict=True)]
            fields[f"{kind}_at"] = [day(at) for at in when]
        stays = []
        for number, start in ((subject, 2.0), (100 + subject, 5.0)):
            measured = [(float(hour), float(rng.normal(80, 9))) for hour in rng.uniform(0, 40, 10)]
            changed = [(hour, value + 500 * (start + hour / 24 >= limit)) for hour, value in measured]
            stays.append(stay(number, start, *changed, end=start + 2))
        notes = [
            note(at, category, text if at <= limit else "later")
            for at, category, text in ((2.5, "Nursing", "early"), (4.5, "Nursing", "late"), (6.5, "Other", "last"))
        ]
        outside = visit(0, 0.5, kind="outpatient", diagnoses=[DIAGNOSES[0]])
        patients.append(patient(subject, [outside, visit(1, 9, stays=stays, notes=notes, **fields)], sex="F"))
    return patients


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("data") / "data", world())


@pytest.fixture(scope="module")
def processor(data) -> MedHMPProcessor:
    extractor = fit_hourly_features(data, subject_ids=list(SUBJECTS), min_patients=2, demographics=("age", "sex"))
    words = EhrCodeTokenizer.from_codes(["early", "late", "last", "later"])  # white space parts them
    return MedHMPProcessor(
        extractor,
        EhrCodeTokenizer.from_codes(DIAGNOSES, kinds=["diagnoses"]),
        EhrCodeTokenizer.from_codes(DRUGS, kinds=["medications"]),
        words,
    )


def labels(*rows) -> pa.Table:
    """LABELS of (subject, day, value)."""
    made = [{"subject_id": s, "prediction_time": day(at), "boolean_value": value} for s, at, value in rows]
    return pa.Table.from_pylist(made, schema=LABEL_SCHEMA)


def silent(processor: MedHMPProcessor) -> MedHMPProcessor:
    """The same without a tokenizer of notes."""
    return MedHMPProcessor(processor.feature_extractor, processor.diagnosis_tokenizer, processor.medication_tokenizer)


def test_an_example_by_hand(tmp_path, processor):
    measured = stay(7, 2, (0.5, 80.0), (30.0, 90.0), end=6)
    later = stay(8, 5, (0.5, 80.0), end=6)
    notes = [note(1.5, "Nursing", "early"), note(2.5, "Nursing", "late"), note(2, "Other", "last")]
    fields = {"diagnoses": DIAGNOSES[:3], "diagnoses_at": [day(1), day(3), day(9)]}
    fields |= {"medications": [DRUGS[1]], "medications_at": [day(3.5)], "stays": [measured, later], "notes": notes}
    path = folder(tmp_path / "data", [patient(2, [visit(1, 9, **fields)], sex="F")], shards=1)
    row = build_admission_examples(path, processor, labels=labels((2, 3, True)))[0]
    assert (row["subject_id"], row["visit_id"], row["labels"]) == (2, 10, 1)
    assert processor.diagnosis_tokenizer.convert_ids_to_tokens(row["diagnosis_ids"]) == DIAGNOSES[:2]
    assert row["medication_ids"] == []
    assert row["stay_hours"] == [24]  # the stay from day 2 to day 3; the other began later
    assert processor.note_tokenizer.convert_ids_to_tokens(row["note_input_ids"]) == ["late", "last"]


def test_everything_of_a_visit_is_there_without_labels(data, processor):
    examples = build_admission_examples(data, processor)
    assert sorted(examples["subject_id"]) == list(SUBJECTS)
    assert all(row["stay_hours"] == [48, 48] for row in examples)
    assert all(len(row["diagnosis_ids"]) == 4 == len(row["medication_ids"]) for row in examples)
    assert "labels" not in examples.column_names


def test_stays_of_an_admission_have_the_hours_that_they_have_alone(data, processor):
    extractor: HourlyFeatureExtractor = processor.feature_extractor
    alone = {row["stay_id"]: row for row in hourly_examples(data, extractor).table.to_pylist()}
    for row in build_admission_examples(data, processor):
        parts = [alone[row["subject_id"]], alone[100 + row["subject_id"]]]
        for name in ("feature_ids", "feature_counts", "demographics"):
            assert row[name] == parts[0][name] + parts[1][name]


def test_an_inpatient_visit_that_holds_nothing_is_no_example_but_a_label_on_it_is(tmp_path, processor):
    rows = [patient(1, [visit(1, 3), visit(5, 6, diagnoses=[DIAGNOSES[0]])]), patient(2, [])]
    rows += [patient(3, [visit(1, 2, kind="emergency", diagnoses=[DIAGNOSES[0]])])]
    path = folder(tmp_path / "data", rows)
    assert build_admission_examples(path, processor)["visit_id"][:] == [50]
    (row,) = build_admission_examples(path, processor, labels=labels((1, 3, False)))
    assert row["visit_id"] == 10
    lists = ("stay_hours", "feature_ids", "feature_counts", "demographics", "diagnosis_ids", "medication_ids")
    assert all(row[name] == [] for name in (*lists, "note_input_ids"))


def test_a_label_belongs_to_the_visit_that_it_ends_and_not_to_the_one_that_begins_then(tmp_path, processor, caplog):
    visits = [visit(1, 4, diagnoses=[DIAGNOSES[0]]), visit(4, 6, diagnoses=[DIAGNOSES[1]]), visit(8, 8)]
    path = folder(tmp_path / "data", [patient(1, visits)], shards=1)
    asked = labels((1, 4, True), (1, 5, False), (1, 8, True), (1, 7, True), (1, 0.5, True), (9, 4, True))
    examples = build_admission_examples(path, processor, labels=asked)
    assert list(zip(examples["visit_id"], examples["labels"], strict=True)) == [(10, 1), (40, 0), (80, 1)]
    assert "2 labels are asked outside of any inpatient visit" in caplog.text
    with pytest.raises(EhrDataError, match="No example is left of 1 labels"):
        build_admission_examples(path, processor, labels=labels((1, 7, True)))


def test_one_visit_may_be_asked_several_times(data, processor):
    asked = labels((4, 3, True), (4, 9, False), (4, 5.5, True))
    rows = {
        row["labels"] * len(row["stay_hours"]): row for row in build_admission_examples(data, processor, labels=asked)
    }
    assert set(rows) == {0, 1, 2}
    assert rows[1]["stay_hours"] == [24]
    assert rows[2]["stay_hours"] == [48, 12]
    assert rows[0]["stay_hours"] == [48, 48]


@settings(max_examples=15, deadline=None)
@given(st.floats(1.01, 8.99))
def test_nothing_that_becomes_known_later_is_seen(data, processor, tmp_path_factory, when):
    asked = labels(*((subject, when, True) for subject in SUBJECTS))
    # Times are whole microseconds, and the change is made where the label is asked.
    at = (asked["prediction_time"][0].as_py() - day(0)) / timedelta(days=1)
    other = folder(tmp_path_factory.mktemp("changed") / "data", world(change_after=at))
    one, changed = (build_admission_examples(path, processor, labels=asked) for path in (data, other))
    assert one.to_list() == changed.to_list()
    later = labels(*((subject, 9, True) for subject in SUBJECTS))
    one, changed = (build_admission_examples(path, processor, labels=later) for path in (data, other))
    assert one.to_list() != changed.to_list()


def test_a_code_whose_availability_is_unknown_is_seen_in_pretraining_only(tmp_path, processor):
    fields = {"diagnoses": DIAGNOSES[:2], "diagnoses_at": [None, day(2)]}
    path = folder(tmp_path / "data", [patient(1, [visit(1, 4, **fields)])], shards=1)
    asked = build_admission_examples(path, processor, labels=labels((1, 4, True)))
    assert len(asked[0]["diagnosis_ids"]) == 1
    assert len(build_admission_examples(path, processor)[0]["diagnosis_ids"]) == 2


def test_vectors_of_notes_stand_in_place_of_tokens_and_equal_texts_are_read_once(data, processor):
    read: list[str] = []

    def vectors(texts):
        read.extend(texts)
        return np.array([[len(text), 0.5] for text in texts], np.float32)

    asked = labels(*((subject, 2, True) for subject in SUBJECTS[:3]), *((s, 5, False) for s in SUBJECTS[3:]))
    examples = build_admission_examples(data, processor, labels=asked, note_vectors=vectors)
    assert "note_input_ids" not in examples.column_names
    assert {(row["labels"], tuple(row["note_vector"])) for row in examples} == {(1, ()), (0, (4.0, 0.5))}
    assert read == ["late"] * 2  # once a shard
    with pytest.raises(ValueError, match="a row for each of 1 texts, got 0"):
        build_admission_examples(data, processor, labels=asked, note_vectors=lambda texts: [])


def test_a_split_takes_its_patients_only_and_files_hold_what_memory_does(data, processor, tmp_path):
    asked = labels(*((subject, 9, subject % 3 == 0) for subject in SUBJECTS))
    some = [3, 8, 12]
    examples = build_admission_examples(data, processor, labels=asked, subject_ids=some)
    assert sorted(examples["subject_id"]) == some
    filed = build_admission_examples(data, processor, labels=asked, subject_ids=some, cache_dir=tmp_path)
    assert filed.to_list() == examples.to_list()


def test_without_a_tokenizer_of_notes_no_note_is_read(data, processor):
    assert not [name for name in build_admission_examples(data, silent(processor)).column_names if "note" in name]


def test_rows_and_raw_admissions_make_the_same_batch(data, processor):
    """The examples of a folder, collated, against the processor on the same visits written as raw admissions."""
    examples = build_admission_examples(data, processor)
    people = {row["subject_id"]: row for row in world()}
    raw = []
    for row in examples:
        person = people[row["subject_id"]]
        seen = person["visits"][1]
        stays = []
        for one in seen["stays"]:
            age = (one["start"] - person["birth_time"]) / timedelta(days=365.25)
            hours = (one["end"] - one["start"]) / timedelta(hours=1)
            stays.append({"hours": hours, "measurements": one["measurements"], "demographics": {"age": age}})
        codes = {kind: seen[kind] for kind in ("diagnoses", "medications")}
        raw.append({"stays": stays, "demographics": {"sex": "F"}, "note": "last\n\nlate", **codes})
    batch = processor(raw)
    collate = AdmissionCollator(
        processor.diagnosis_tokenizer, processor.medication_tokenizer,
        processor.feature_extractor.num_demographics, processor.note_tokenizer,
    )  # fmt: skip
    expected = collate(examples.to_list())
    assert set(batch) == set(expected)
    assert all((batch[name] == expected[name]).all() for name in expected)


def test_labels_without_a_value_are_refused(data, processor):
    with pytest.raises(EhrDataError, match="`boolean_value` in every row"):
        build_admission_examples(data, processor, labels=labels((1, 3, None)))


def test_a_stay_that_two_visits_share_is_refused(tmp_path, processor):
    visits = [visit(1, 4, stays=[stay(7, 2, (0.5, 80.0))]), visit(5, 9, stays=[stay(7, 6, (0.5, 80.0))])]
    path = folder(tmp_path / "data", [patient(1, visits)], shards=1)
    with pytest.raises(EhrDataError, match="an id of its own"):
        build_admission_examples(path, processor)

"""Examples: who is in which split, what is visible at a prediction time, what is left out and counted."""

import logging

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.collators import CodeMasking, PackedCollator, PaddedCollator
from hf_ehr.datasets import build_examples, prolonged_stay, split_patients
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.samplers import PackedDataset
from hf_ehr.schema import EhrDataError, shard_name, write_parquet
from hf_ehr.tasks.future import scramble_future, truncate_future

from .builders import day, patient, records, visit

CODES = [f"V/{letter}" for letter in "ABCDEF"]
TOKENIZER = EhrCodeTokenizer.from_codes(CODES)


def labels(*rows, column="boolean_value", kind=None):
    """LABELS of (subject, day, value)."""
    subjects, days, values = zip(*rows, strict=True)
    times = pa.array([day(number) for number in days], pa.timestamp("us"))
    return pa.table({"subject_id": subjects, "prediction_time": times, column: pa.array(values, kind)})


def ids(*letters):
    return [5 + "ABCDEF".index(letter) for letter in letters]


@st.composite
def patients(draw):
    """RECORDS of a few patients whose codes become available before, in and after their visits."""
    rows = []
    for subject in draw(st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True)):
        visits = []
        for start in sorted(draw(st.lists(st.integers(0, 30), max_size=4, unique=True))):
            fields = {}
            for kind in ("diagnoses", "procedures"):
                fields[kind] = draw(st.lists(st.sampled_from([*CODES, "V/unknown"]), max_size=4, unique=True))
                delays = draw(st.lists(st.integers(-2, 9), min_size=len(fields[kind]), max_size=len(fields[kind])))
                fields[f"{kind}_at"] = [day(start + delay) for delay in delays]
            visits.append(visit(start, start + draw(st.integers(0, 9)), **fields))
        rows.append(patient(subject, visits, sex=draw(st.sampled_from(["F", "M", None]))))
    return records(*rows)


@st.composite
def cohort(draw, labels_per_patient):
    """RECORDS and LABELS of them."""
    table = draw(patients())
    rows = [
        (subject, time, draw(st.booleans()))
        for subject in table["subject_id"].to_pylist()
        for time in draw(st.lists(st.integers(0, 40), min_size=1, max_size=labels_per_patient, unique=True))
    ]
    return table, labels(*rows)


def expected_streams(row, time, kinds, max_length=512):
    """The rule of visibility, code by code."""
    visits = [
        [
            code
            for kind in kinds
            for code, at in zip(visit[kind], visit[f"{kind}_at"], strict=True)
            if at <= time and visit["start"] <= time
        ]
        for visit in row["visits"]
    ]
    return TOKENIZER.encode_patient([codes for codes in visits if codes], max_length=max_length)


@given(cohort(labels_per_patient=3), st.sampled_from([("diagnoses",), ("procedures", "diagnoses")]), st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_an_example_holds_exactly_the_codes_that_were_available_in_visits_that_had_begun(data, kinds, max_length):
    table, asked = data
    rows = {row["subject_id"]: row for row in table.to_pylist()}
    expected = []
    for label in asked.to_pylist():
        streams = expected_streams(rows[label["subject_id"]], label["prediction_time"], kinds, max_length)
        if streams["input_ids"]:
            expected.append({**label, **streams})
    if not expected:
        with pytest.raises(EhrDataError, match="No example is left"):
            build_examples(table, TOKENIZER, asked, kinds=kinds, max_length=max_length)
        return
    built = build_examples(table, TOKENIZER, asked, kinds=kinds, max_length=max_length).to_list()
    assert len(built) == len(expected)
    for row in expected:
        (same,) = (
            candidate
            for candidate in built
            if (candidate["subject_id"], candidate["prediction_time"]) == (row["subject_id"], row["prediction_time"])
        )
        for name in ("input_ids", "visit_ids", "serial_ids"):
            assert same[name] == row[name], name
        assert same["labels"] == row["boolean_value"]
        assert same["length"] == len(row["input_ids"])


def batch_bytes(dataset):
    """Every collator's batches of a data set, as bytes."""
    masking = CodeMasking(TOKENIZER, 0.3, seed=1)
    unlabelled = dataset.remove_columns("labels")
    batches = [
        PaddedCollator(TOKENIZER)(list(dataset)),
        PackedCollator(TOKENIZER)(list(dataset)),
        PackedCollator(TOKENIZER, masking)([PackedDataset(unlabelled, 1000)[0]]),
    ]
    return [
        {name: value if isinstance(value, int) else value.numpy().tobytes() for name, value in batch.items()}
        for batch in batches
    ]


@given(cohort(labels_per_patient=1), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_deleting_or_rewriting_the_future_leaves_examples_and_batches_byte_identical(data, seed):
    table, asked = data
    kinds = ("diagnoses", "procedures")
    try:
        original = build_examples(table, TOKENIZER, asked, kinds=kinds)
    except EhrDataError:
        original = None
    for other in (truncate_future(table, asked), scramble_future(table, asked, seed)):
        if original is None:
            with pytest.raises(EhrDataError, match="No example is left"):
                build_examples(other, TOKENIZER, asked, kinds=kinds)
            continue
        changed = build_examples(other, TOKENIZER, asked, kinds=kinds)
        assert changed.data.table.equals(original.data.table)
        assert batch_bytes(changed) == batch_bytes(original)


def test_a_visit_without_a_visible_code_does_not_count():
    empty_then_coded = patient(1, [visit(0), visit(5, 9, diagnoses=["V/A"]), visit(6, diagnoses=["V/B"])])
    # On day 7 the diagnoses of the visit that ends on day 9 are not coded yet, so visit 1 is the one of day 6.
    (row,) = build_examples(records(empty_then_coded), TOKENIZER, labels((1, 7, True))).to_list()
    assert (row["input_ids"], row["visit_ids"]) == (ids("B"), [1])


def test_a_code_is_invisible_before_its_visit_begins_even_if_it_is_said_to_be_available():
    table = records(patient(1, [visit(0, diagnoses=["V/A"]), visit(10, diagnoses=["V/B"], diagnoses_at=[day(1)])]))
    (row,) = build_examples(table, TOKENIZER, labels((1, 5, True))).to_list()
    assert row["input_ids"] == ids("A")


def test_without_labels_every_patient_is_one_example_of_the_whole_history():
    table = records(
        patient(9, [visit(0, 7, diagnoses=["V/B", "V/A"]), visit(20, diagnoses=["V/B"])], sex="M"),
        patient(2, [visit(3, 11.5, diagnoses=["V/C"])], sex="X"),
        patient(4, [visit(3, 30)], sex="F"),
    )
    rows = build_examples(table, TOKENIZER).to_list()
    assert [row["subject_id"] for row in rows] == [9, 2]
    assert rows[0]["input_ids"] == ids("B", "A", "B")
    assert rows[0]["visit_ids"] == [1, 1, 2]
    assert rows[0]["serial_ids"] == [0, 1, 0]
    assert [row["sex"] for row in rows] == [2, 0]
    assert [row["prolonged_stay_labels"] for row in rows] == [0, 1]
    assert all(np.isnan(row["age"]) and row["prediction_time"] is None for row in rows)


def test_seven_days_are_no_prolonged_stay_and_eight_are():
    table = records(
        patient(1, [visit(0, 7)]),
        patient(2, [visit(0, 8), visit(20)]),
        patient(3, []),
        patient(4, [visit(0) | {"end": None}]),
    )
    assert prolonged_stay(table).tolist() == [0, 1, 0, 0]
    assert prolonged_stay(table.slice(1)).tolist() == [1, 0, 0]


def test_age_is_in_years_at_the_prediction_time_and_nan_without_a_birth():
    table = records(
        patient(1, [visit(0, diagnoses=["V/A"])], birth_time=day(-365.25 * 40)),
        patient(2, [visit(0, diagnoses=["V/A"])], birth_time=None),
    )
    ages = build_examples(table, TOKENIZER, labels((1, 365.25 * 2, True), (2, 1, True)))["age"]
    assert ages[0] == pytest.approx(42, abs=1e-5)
    assert np.isnan(ages[1])


def test_what_is_left_out_is_counted(caplog):
    table = records(
        patient(1, [visit(0, diagnoses=["V/A", "V/B", "V/C"])]),
        patient(2, [visit(0, diagnoses=["V/A", "V/B"]), visit(1, diagnoses=["V/A"])]),
        patient(3, [visit(0, diagnoses=["V/A", "V/B", "V/C", "V/D"])]),
        patient(4, [visit(0)]),
    )
    with caplog.at_level(logging.WARNING):
        kept = build_examples(table, TOKENIZER, min_unique_codes=3, drop_long=True, max_length=3)
    assert kept["subject_id"][:] == [1]
    for reason in ("1 × no visible code", "1 × fewer than 3 distinct codes", "1 × longer than 3 codes"):
        assert reason in kept.info.description
        assert reason in caplog.text


def test_three_unique_codes_are_enough_and_a_long_history_is_cut_at_a_visit():
    table = records(
        patient(
            3, [visit(0, diagnoses=["V/A", "V/B"]), visit(1, diagnoses=["V/C", "V/D"]), visit(2, diagnoses=["V/A"])]
        )
    )
    (row,) = build_examples(table, TOKENIZER, min_unique_codes=3, max_length=4).to_list()
    assert (row["input_ids"], row["visit_ids"]) == (ids("C", "D", "A"), [1, 1, 2])


def test_a_label_of_an_unknown_patient_is_counted_and_never_invents_an_example():
    table = records(patient(1, [visit(0, diagnoses=["V/A"])]))
    built = build_examples(table, TOKENIZER, labels((8, 5, True), (1, 5, False)))
    assert built["subject_id"][:] == [1]
    assert "1 × label of a patient without a record" in built.info.description


def test_subject_ids_select_patients_with_and_without_labels():
    table = records(*(patient(number, [visit(0, diagnoses=["V/A"])]) for number in range(6)))
    assert build_examples(table, TOKENIZER, subject_ids=[4, 1, 77])["subject_id"][:] == [1, 4]
    asked = labels(*((number, 3, True) for number in range(6)))
    assert build_examples(table, TOKENIZER, asked, subject_ids=np.array([5, 2]))["subject_id"][:] == [2, 5]


@pytest.mark.parametrize(
    ("column", "kind", "values", "names", "expected"),
    [
        ("boolean_value", None, (True, False), None, [1, 0]),
        ("integer_value", pa.int64(), (3, 7), None, [3, 7]),
        ("float_value", pa.float64(), (0.5, 2.0), None, [0.5, 2.0]),
        ("categorical_value", pa.string(), ("late", "early"), ["early", "late"], [1, 0]),
        ("codes", pa.list_(pa.string()), (["V/C", "V/unseen"], []), ["V/A", "V/C"], [[0.0, 1.0], [0.0, 0.0]]),
    ],
)
def test_each_kind_of_label_becomes_its_target(column, kind, values, names, expected):
    table = records(*(patient(number, [visit(0, diagnoses=["V/A"])]) for number in (1, 2)))
    asked = labels((1, 3, values[0]), (2, 3, values[1]), column=column, kind=kind)
    assert build_examples(table, TOKENIZER, asked, label_names=names)["labels"][:] == expected


def test_labels_that_cannot_become_targets_are_refused():
    table = records(patient(1, [visit(0, diagnoses=["V/A"])]))
    classes = labels((1, 3, "late"), column="categorical_value")
    with pytest.raises(EhrDataError, match=r"must be one of `label_names` \['early'\], got \['late'\]"):
        build_examples(table, TOKENIZER, classes, label_names=["early"])
    with pytest.raises(ValueError, match="`label_names` must name the classes"):
        build_examples(table, TOKENIZER, classes)
    with pytest.raises(ValueError, match="`label_names` must be None for"):
        build_examples(table, TOKENIZER, labels((1, 3, True)), label_names=["no", "yes"])
    mixed = labels((1, 3, True), (1, 4, None)).append_column("integer_value", pa.array([None, 3], pa.int64()))
    with pytest.raises(EhrDataError, match="one value column"):
        build_examples(table, TOKENIZER, mixed)
    with pytest.raises(ValueError, match="`kinds` must name code lists"):
        build_examples(table, TOKENIZER, kinds=("diagnosis",))


def test_a_null_code_is_refused():
    with pytest.raises(EhrDataError, match="no null code, got 1"):
        build_examples(records(patient(1, [visit(0, diagnoses=["V/A", None])])), TOKENIZER)


def test_code_and_time_lists_of_different_length_are_refused():
    broken = records(patient(1, [visit(0, diagnoses=["V/A", "V/B"], diagnoses_at=[day(0)])]))
    with pytest.raises(EhrDataError, match="`diagnoses` and `diagnoses_at` must be equally long"):
        build_examples(broken, TOKENIZER)


def many_patients(count=30):
    rng = np.random.default_rng(0)
    return [
        patient(
            number,
            [
                visit(start, start + 2, diagnoses=list(rng.permutation(CODES)[: rng.integers(0, 5)]))
                for start in range(0, int(rng.integers(5, 40)), 5)
            ],
        )
        for number in range(count)
    ]


def write_shards(directory, rows, shards=3):
    for shard in range(shards):
        mine = records(*(row for row in rows if row["subject_id"] % shards == shard))
        write_parquet(mine, directory / "records" / shard_name(shard, shards))


def test_shards_on_disk_give_the_examples_of_one_table_in_memory_mapped_files(tmp_path):
    rows = many_patients()
    write_shards(tmp_path, rows)
    asked = labels(*((number, time, time > 9) for time in (20, 8) for number in range(30)))
    in_memory = build_examples(records(*rows), TOKENIZER, asked).to_list()
    mapped = build_examples(tmp_path, TOKENIZER, asked, cache_dir=tmp_path / "examples")
    assert [file["filename"] for file in mapped.cache_files] == [
        str(tmp_path / "examples" / f"examples-{shard:05d}.arrow") for shard in range(3)
    ]

    def key(row):
        return row["subject_id"], row["prediction_time"]

    assert sorted(mapped.to_list(), key=key) == sorted(in_memory, key=key)


def test_pieces_of_a_shard_give_the_same_examples_as_the_whole(monkeypatch):
    table, asked = records(*many_patients()), labels(*((number, 30, True) for number in range(30)))
    whole = build_examples(table, TOKENIZER, asked).to_list()
    monkeypatch.setattr("hf_ehr._histories.PATIENTS_PER_BATCH", 7)
    monkeypatch.setattr("hf_ehr.datasets.CODES_PER_CHUNK", 20)
    pieces = build_examples(table, TOKENIZER, asked)
    assert len(pieces.data.table["input_ids"].chunks) > 5
    assert pieces.to_list() == whole


def test_a_build_that_fails_leaves_no_example_file(tmp_path):
    write_shards(tmp_path, many_patients())
    broken = records(patient(2, [visit(0, diagnoses=["V/A"], diagnoses_at=[])]))
    write_parquet(broken, tmp_path / "records" / shard_name(2, 3))
    with pytest.raises(EhrDataError, match="equally long"):
        build_examples(tmp_path, TOKENIZER, cache_dir=tmp_path / "examples")
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == [
        "examples-00000.arrow",
        "examples-00001.arrow",
    ]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(0, 2**32))
def test_splits_are_disjoint_and_complete(subjects, seed):
    parts = split_patients(np.array(subjects, np.int64), seed=seed)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == sorted(set(subjects))


@given(st.sets(st.integers(0, 10**12), min_size=1), st.data())
def test_the_split_of_a_patient_does_not_depend_on_the_others(subjects, data):
    subjects = sorted(subjects)
    some = data.draw(st.lists(st.sampled_from(subjects), min_size=1))
    everyone, few = split_patients(subjects, seed=3), split_patients(some, seed=3)
    for name in everyone:
        assert set(few[name].tolist()) == set(everyone[name].tolist()) & set(some)


def test_splits_have_their_share_and_change_with_the_seed():
    subjects = np.arange(50_000)
    parts = split_patients(subjects)
    assert [len(part) / 50_000 for part in parts.values()] == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    other = split_patients(subjects, seed=1)
    assert np.isin(other["test"], parts["test"]).mean() == pytest.approx(0.2, abs=0.02)
    halves = split_patients(subjects, fractions={"left": 0.5, "right": 0.5})
    assert len(halves["left"]) == pytest.approx(25_000, rel=0.02)
    with pytest.raises(ValueError, match="add up to 1"):
        split_patients(subjects, fractions={"train": 0.7, "test": 0.2})

"""The days of visits from records to batches: what models that read intervals are given (acceptance row 100)."""

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hf_ehr import EhrCodeTokenizer, EhrRnnConfig, EhrRnnForSequenceClassification
from hf_ehr.cli.main import main
from hf_ehr.collators import CodeMasking, PackedCollator, PaddedCollator, SetMasking
from hf_ehr.datasets import build_examples
from hf_ehr.samplers import FlatBatch, FlatExamples
from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, shard_name, write_parquet
from hf_ehr.vocabulary import fit_tokenizer
from tests.builders import day, patient, records, visit

CODES = [f"ICD10CM/A{number:02}" for number in range(6)]
A, B, C, *_ = CODES
TOKENIZER = EhrCodeTokenizer.from_codes(CODES, days=True)


def labels(*rows) -> pa.Table:
    columns = [{"subject_id": subject, "prediction_time": time, "boolean_value": True} for subject, time in rows]
    return pa.Table.from_pylist(columns, schema=LABEL_SCHEMA)


def test_days_count_from_the_first_visit_by_the_calendar():
    record = patient(1, [visit(10.9, 11, diagnoses=[A, B]), visit(11.1, diagnoses=[C]), visit(376, diagnoses=[A])])
    assert TOKENIZER.encode_patient(record)["day_ids"] == [1, 1, 2, 367]


def test_a_visit_without_codes_is_no_first_visit_and_one_without_a_time_is_unknown():
    timeless = visit(0, diagnoses=[B]) | {"start": None}
    record = patient(1, [visit(2), timeless, visit(5, diagnoses=[A]), visit(9, diagnoses=[B, C])])
    assert TOKENIZER.encode_patient(record)["day_ids"] == [0, 1, 5, 5]
    assert TOKENIZER.encode_patient([[A], [B, C]])["day_ids"] == [0, 0, 0]


def test_a_history_that_is_cut_counts_from_the_first_visit_left():
    record = patient(1, [visit(0, diagnoses=[A, B]), visit(30, diagnoses=[B]), visit(37, diagnoses=[C])])
    assert TOKENIZER.encode_patient(record, max_length=3)["day_ids"] == [1, 8]
    assert TOKENIZER.encode_patient(record)["day_ids"] == [1, 1, 31, 38]


def test_separators_have_the_day_of_their_visit():
    tokenizer = EhrCodeTokenizer.from_codes(CODES, days=True, visit_separators=True, ages=True)
    history = tokenizer.encode_patient(patient(1, [visit(0, diagnoses=[A]), visit(3, diagnoses=[B])]))
    assert history["day_ids"] == [1, 1, 1, 4, 4]
    assert history["age_ids"] == [61] * 5  # born 60 years before day 0


def test_a_tokenizer_without_the_option_leaves_no_trace_of_it(tmp_path):
    plain = EhrCodeTokenizer.from_codes(CODES)
    record = patient(1, [visit(0, diagnoses=[A])])
    assert "day_ids" not in plain.encode_patient(record)
    assert "day_ids" not in build_examples(records(record), plain).column_names
    assert "days" not in plain.init_kwargs
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.days
    assert loaded.encode_patient(record) == TOKENIZER.encode_patient(record)
    fitted = fit_tokenizer(records(record), subject_ids=[1], min_patients=1, days=True)
    assert fitted.encode_patient(record)["day_ids"] == [1]


def prepared(folder, time_axis: str, patients: int = 1):
    """A prepared folder of patients with two visits, 9 days apart."""
    rows = [patient(n, [visit(2, diagnoses=[A]), visit(11, diagnoses=[B, C])]) for n in range(patients)]
    write_parquet(records(*rows), folder / "records" / shard_name(0, 1))
    DatasetInfo("table", time_axis=time_axis).save(folder)
    return folder


@pytest.mark.parametrize("time_axis", ["order", "visit"])
def test_days_are_refused_where_time_between_visits_is_not_known(time_axis, tmp_path):
    folder = prepared(tmp_path, time_axis)
    with pytest.raises(EhrDataError, match=r"`days=False` for .* time between its visits is not known"):
        build_examples(folder, TOKENIZER)
    assert len(build_examples(folder, EhrCodeTokenizer.from_codes(CODES))) == 1  # without days they are examples


@pytest.mark.parametrize("time_axis", ["calendar", "shifted"])
def test_days_are_built_where_intervals_are_true(time_axis, tmp_path):
    assert build_examples(prepared(tmp_path, time_axis), TOKENIZER)["day_ids"][:] == [[1, 10, 10]]


@pytest.mark.parametrize("days", [False, True])
def test_a_tokenizer_with_days_is_fitted_by_the_command(days, tmp_path):
    words = ["fit-tokenizer", "--data", str(prepared(tmp_path / "data", "calendar", 40)), "--min_patients", "1"]
    assert main([*words, "--output", str(tmp_path / "out"), *(["--days"] if days else [])]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").days == days


@st.composite
def histories(draw) -> list[dict]:
    """Patients whose visits, some without codes, follow each other after up to 400 days."""
    rows = []
    for subject in range(draw(st.integers(1, 4))):
        gaps = draw(st.lists(st.integers(0, 400), min_size=1, max_size=5))
        starts = np.cumsum(gaps).tolist()
        codes = [draw(st.lists(st.sampled_from(CODES), max_size=3, unique=True)) for _ in starts]
        codes[0] = codes[0] or [A]
        rows.append(patient(subject, [visit(s, diagnoses=c) for s, c in zip(starts, codes, strict=True)]))
    return rows


@given(histories(), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_examples_are_the_encoded_patients_whatever_the_length(rows, max_length):
    built = build_examples(records(*rows), TOKENIZER, max_length=max_length)
    assert built["day_ids"][:] == [TOKENIZER.encode_patient(row, max_length=max_length)["day_ids"] for row in rows]


@given(histories(), st.integers(0, 1500))
@settings(max_examples=30, deadline=None)
def test_what_comes_after_the_prediction_time_changes_no_day(rows, cut):
    times = labels(*((row["subject_id"], day(cut)) for row in rows if row["visits"][0]["start"] <= day(cut)))
    if not len(times):
        return
    built = build_examples(records(*rows), TOKENIZER, times)
    later = [
        row
        | {
            "visits": [
                entry if entry["start"] <= day(cut) else entry | {"start": entry["start"] + timedelta(days=999)}
                for entry in row["visits"]
            ]
            + [visit(9000, diagnoses=[B])]
        }
        for row in rows
    ]
    assert build_examples(records(*later), TOKENIZER, times)["day_ids"][:] == built["day_ids"][:]


def many(patients=40):
    generator = np.random.default_rng(0)
    made = []
    for subject in range(patients):
        starts = np.sort(generator.choice(4000, generator.integers(1, 6), replace=False))
        visits = [visit(int(start), diagnoses=list(generator.choice(CODES, 3, replace=False))) for start in starts]
        made.append(patient(subject, visits))
    return build_examples(records(*made), TOKENIZER)


def test_padded_packed_and_gathered_batches_carry_the_days():
    dataset = many()
    rows = [dataset[index] for index in (4, 0, 7)]
    padded, packed = PaddedCollator(TOKENIZER)(rows), PackedCollator(TOKENIZER)(rows)
    binned = PackedCollator(TOKENIZER)([FlatExamples(dataset).gather([4, 0, 7])])
    real = padded["attention_mask"].bool()
    expected = [day_id for row in rows for day_id in row["day_ids"]]
    assert max(expected) > 1
    assert padded["day_ids"][real].tolist() == packed["day_ids"][0].tolist() == expected
    assert binned["day_ids"][0].tolist() == expected
    assert (padded["day_ids"][~real] == 0).all()
    assert (padded["day_ids"].dtype, packed["day_ids"].dtype) == (torch.int64, torch.int64)
    assert "day_ids" in FlatBatch.from_rows(rows).streams


@pytest.mark.parametrize("objective", [CodeMasking, SetMasking])
def test_a_code_that_stays_keeps_its_day(objective):
    batch = FlatExamples(many()).gather(np.arange(40), key=(0, 0))
    masked, _ = objective(TOKENIZER, 0.5)(batch)
    day_of = {
        (int(owner), int(visit_id)): int(day_id)
        for owner, visit_id, day_id in zip(
            np.repeat(np.arange(40), batch.lengths), batch.streams["visit_ids"], batch.streams["day_ids"], strict=True
        )
    }
    owners = np.repeat(np.arange(40), masked.lengths)
    kept = zip(owners, masked.streams["visit_ids"], masked.streams["day_ids"], strict=True)
    assert all(day_of[int(owner), int(visit_id)] == day_id for owner, visit_id, day_id in kept)


@pytest.mark.parametrize("collator", [PaddedCollator, PackedCollator])
def test_the_trainer_hands_the_days_to_hitanet(collator, tmp_path):
    """Rows of the library's data set lose the columns that `forward` does not name."""
    torch.manual_seed(0)
    rows = many(6).remove_columns(["prolonged_stay_labels"])
    config = EhrRnnConfig.tiny(vocab_size=len(TOKENIZER), head="hitanet", level="visit")
    model = EhrRnnForSequenceClassification(config)
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, report_to="none", use_cpu=True)
    predicted = Trainer(model, arguments, collator(TOKENIZER)).predict(rows).predictions
    with torch.no_grad():
        expected = model(**PaddedCollator(TOKENIZER)([rows[index] for index in range(6)])).logits
    np.testing.assert_allclose(predicted, expected.numpy(), atol=1e-5)

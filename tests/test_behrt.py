"""BEHRT's input from records to batches: [CLS] and [SEP], ages, one patient as in bulk (acceptance row 26)."""

import json
from collections import Counter
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, TrainingArguments

from hf_ehr import EhrCodeTokenizer, MedBertConfig, MedBertForMaskedLM, MedBertForPreTraining
from hf_ehr.collators import CodeMasking, PackedCollator, PaddedCollator, SetMasking
from hf_ehr.datasets import build_examples
from hf_ehr.prepare import prepare
from hf_ehr.samplers import FlatBatch, FlatExamples, PackedDataset
from hf_ehr.schema import LABEL_SCHEMA
from hf_ehr.training import DataArguments, PretrainArguments, pretrain
from hf_ehr.vocabulary import fit_tokenizer

from .builders import day, patient, records, visit

CODES = ["ICD10CM/I50.9", "ICD10CM/E11.6", "ICD10CM/E11", "ICD9CM/428.0", "ATC/A10BA02"]
I50, E116, E11, HF9, METFORMIN = range(5, 10)
UNK, CLS, SEP, MASK = 1, 2, 3, 4
BEHRT = {"visit_separators": True, "ages": True}
STREAMS = ("input_ids", "visit_ids", "serial_ids", "age_ids")


@pytest.fixture(scope="module")
def tokenizer():
    return EhrCodeTokenizer.from_codes(CODES, **BEHRT)


def test_a_patient_by_hand(tokenizer):
    record = patient(
        1,
        [
            visit(0, diagnoses=["ICD9CM/428.0", "ICD10CM/E11.65"]),  # 2020-01-01
            visit(100),  # no codes: not a visit of the history
            visit(200, diagnoses=["ICD10CM/I50.9"]),  # 2020-07-19
            visit(400, diagnoses=["NDC/1", "ICD10CM/E11"]),  # 2021-02-04
        ],
        birth_time=datetime(1960, 6, 15),
    )
    history = tokenizer.encode_patient(record)
    assert history == {
        "input_ids": [CLS, HF9, E116, SEP, I50, SEP, UNK, E11, SEP],
        "visit_ids": [1, 1, 1, 1, 2, 2, 3, 3, 3],
        "serial_ids": [0, 1, 2, 3, 0, 1, 0, 1, 2],
        "age_ids": [60, 60, 60, 60, 61, 61, 61, 61, 61],  # 59, 60 and 60 years, and one
        "attention_mask": [1] * 9,
    }
    model = MedBertForMaskedLM(MedBertConfig.behrt(vocab_size=10, hidden_size=12, num_hidden_layers=1)).eval()
    segments: list = []
    model.model.embeddings.visit_embeddings.register_forward_pre_hook(lambda _, ids: segments.extend(ids[0][0]))
    with torch.no_grad():
        model(**{name: torch.tensor([values]) for name, values in history.items()})
    assert [int(segment) for segment in segments] == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    places = [number - 1 for number in history["visit_ids"]]
    assert places == [0, 0, 0, 0, 1, 1, 2, 2, 2]  # separators seen before
    assert tokenizer.decode_patient(history["input_ids"], history["visit_ids"]) == [
        ["ICD9CM/428.0", "ICD10CM/E11.6"], ["ICD10CM/I50.9"], ["[UNK]", "ICD10CM/E11"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("birth", "start", "age"),
    [
        (datetime(2001, 1, 1), datetime(2002, 1, 1), 1),  # 365 days are a year of age
        (datetime(2001, 1, 1), datetime(2001, 12, 31, 23, 59, 59), 0),
        (datetime(1960, 6, 15, 12), datetime(2020, 6, 15, 11, 59), 59),
        (datetime(1960, 6, 15, 12), datetime(2020, 6, 15, 12), 60),
        (datetime(2000, 2, 29), datetime(2001, 2, 28), 0),
        (datetime(2000, 2, 29), datetime(2001, 3, 1), 1),
        (datetime(1720, 1, 1), datetime(2020, 1, 1), 300),
        (datetime(2020, 1, 2), datetime(2020, 1, 1), None),  # before birth
        (None, datetime(2020, 1, 1), None),
        (datetime(2020, 1, 2), None, None),
    ],
)
def test_ages_are_whole_years_at_the_start_of_the_visit(tokenizer, birth, start, age):
    record = {"birth_time": birth, "visits": [{"start": start, "diagnoses": ["ICD10CM/I50.9"]}]}
    assert tokenizer.encode_patient(record)["age_ids"] == [0 if age is None else age + 1] * 3


moments = st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1))


@settings(max_examples=200, deadline=None)
@given(moments, moments)
def test_ages_follow_the_calendar(birth, start):
    tokenizer = EhrCodeTokenizer.from_codes(["X/1"], ages=True)
    record = {"birth_time": birth, "visits": [{"start": start, "diagnoses": ["X/1"]}]}
    had_birthday = (start.month, start.day, start.time()) >= (birth.month, birth.day, birth.time())
    years = start.year - birth.year - (not had_birthday)
    assert tokenizer.encode_patient(record)["age_ids"] == [max(years + 1, 0)]


def test_a_history_without_times_has_unknown_ages_and_one_without_codes_no_cls(tokenizer):
    assert tokenizer.encode_patient([["ICD10CM/I50.9"]])["age_ids"] == [0, 0, 0]
    assert tokenizer.encode_patient([[], []])["input_ids"] == []
    both = tokenizer.encode_patients([[], [["ICD10CM/I50.9"]]])
    assert both["input_ids"] == [[], [CLS, I50, SEP]]


@pytest.mark.parametrize(
    ("lengths", "max_length", "kept"),
    [
        ([3, 4, 5], 16, [3, 4, 5]),  # 12 codes, [CLS] and three [SEP]
        ([3, 4, 5], 15, [4, 5]),
        ([3, 4, 5], 12, [4, 5]),
        ([3, 4, 5], 11, [5]),
        ([3, 4, 5], 7, [5]),
        ([3, 4, 5], 6, [4]),  # the newest visit alone is too long: its first codes
        ([3, 4, 5], 3, [1]),
        ([1, 9, 1], 6, [1]),
    ],
)
def test_separators_count_and_cls_stays_when_old_visits_go(lengths, max_length, kept):
    wide = EhrCodeTokenizer.from_codes([f"X/{number}" for number in range(400)], **BEHRT)
    visits = [[f"X/{100 * index + rank}" for rank in range(count)] for index, count in enumerate(lengths)]
    history = wide.encode_patient(visits, max_length=max_length)
    newest = [visit[:count] for visit, count in zip(visits[-len(kept) :], kept, strict=True)]
    expected = [CLS]
    for codes in newest:
        expected += [*wide.convert_tokens_to_ids(codes), SEP]
    assert history["input_ids"] == expected
    assert len(expected) <= max_length
    assert wide.decode_patient(history["input_ids"], history["visit_ids"]) == newest


def test_less_than_three_places_are_too_few_for_a_history_with_separators(tokenizer):
    with pytest.raises(ValueError, match="`max_length` must be at least 3 or None, got 2"):
        tokenizer.encode_patient([["ICD10CM/I50.9"]], max_length=2)


def spelled_out(tokenizer, record: dict, max_length: int) -> dict[str, list[int]]:
    """BEHRT's rules in plain Python."""
    visits = []
    for entry in record["visits"]:
        ids = list(dict.fromkeys(tokenizer.codes_to_ids(entry["diagnoses"]).tolist()))
        if ids:
            known = record["birth_time"] and entry["start"]
            visits.append((ids, 1 + entry["start"].year - record["birth_time"].year if known else 0))
    while len(visits) > 1 and 1 + sum(len(ids) + 1 for ids, _ in visits) > max_length:
        visits.pop(0)
    tokens: list[tuple[int, int, int]] = []
    for number, (ids, age) in enumerate(visits, 1):
        opening = [CLS] if number == 1 else []
        tokens += [(index, number, age) for index in [*opening, *ids[: max_length - 2], SEP]]
    ranks: Counter = Counter()
    serial = []
    for _, number, _ in tokens:
        serial.append(ranks[number])
        ranks[number] += 1
    return {
        "input_ids": [index for index, _, _ in tokens], "visit_ids": [number for _, number, _ in tokens],
        "serial_ids": serial, "age_ids": [age for _, _, age in tokens],
    }  # fmt: skip


some_codes = st.sampled_from([*CODES, "ICD10CM/E11.65", "ICD10CM/E11.69", "NDC/1", "NDC/2"])


@st.composite
def histories(draw):
    """Records with visits on birthdays."""
    birth = draw(st.none() | st.just(datetime(1930, 1, 1)))
    years = sorted(draw(st.lists(st.integers(0, 99), max_size=6)))
    visits = []
    for year in years:
        start = draw(st.none() | st.just(datetime(1930 + year, 1, 1)))
        visits.append({"start": start, "diagnoses": draw(st.lists(some_codes, max_size=6))})
    return {"birth_time": birth, "visits": visits}


@settings(max_examples=150, deadline=None)
@given(st.lists(histories(), max_size=5), st.integers(3, 14))
@example([], 5)
@example([{"birth_time": None, "visits": []}], 5)
def test_bulk_and_single_encoding_follow_the_rules_spelled_out(patients, max_length):
    tokenizer = EhrCodeTokenizer.from_codes(CODES, **BEHRT)
    expected = [spelled_out(tokenizer, record, max_length) for record in patients]
    alone = [tokenizer.encode_patient(record, max_length=max_length) for record in patients]
    assert [{name: history[name] for name in STREAMS} for history in alone] == expected
    visits = [entry for record in patients for entry in record["visits"]]
    column = tokenizer.encode_column(
        pa.array([code for entry in visits for code in entry["diagnoses"]], pa.string()).dictionary_encode(),
        [len(entry["diagnoses"]) for entry in visits],
        [len(record["visits"]) for record in patients],
        max_length=max_length,
        birth_times=np.array([record["birth_time"] for record in patients], "M8[us]"),
        visit_starts=np.array([entry["start"] for entry in visits], "M8[us]"),
    )
    for name in STREAMS:
        assert getattr(column, name).dtype == np.int32
        pieces = np.split(getattr(column, name), column.offsets[1:-1]) if patients else []
        assert [piece.tolist() for piece in pieces] == [history[name] for history in alone]


HISTORIES = [
    patient(1, [visit(0, 3, diagnoses=["ICD10CM/I50.9", "ICD10CM/E11"]), visit(400, diagnoses=["NDC/1"])]),
    patient(2, [visit(10, diagnoses=["ICD10CM/E11.65"])], birth_time=None),
    patient(3, [visit(5), visit(700, diagnoses=["ICD9CM/428.0"] * 1), visit(900, diagnoses=["ATC/A10BA02"])]),
]


@pytest.mark.parametrize("max_length", [3, 5, 512])
def test_examples_are_the_encoded_patients(tokenizer, tmp_path, max_length):
    for cache in (None, tmp_path):
        built = build_examples(records(*HISTORIES), tokenizer, max_length=max_length, cache_dir=cache)
        for row, record in zip(built, HISTORIES, strict=True):
            expected = tokenizer.encode_patient(record, max_length=max_length)
            assert {name: row[name] for name in STREAMS} == {name: expected[name] for name in STREAMS}
            assert row["length"] == len(expected["input_ids"])


def labels(*rows):
    columns = [{"subject_id": subject, "prediction_time": time, "boolean_value": True} for subject, time in rows]
    return pa.Table.from_pylist(columns, schema=LABEL_SCHEMA)


def test_nothing_after_the_prediction_time_enters(tokenizer):
    times = labels((1, day(5)), (1, day(500)), (3, day(800)))
    built = build_examples(records(*HISTORIES), tokenizer, times)
    assert built["input_ids"][:] == [
        [CLS, I50, E11, SEP], [CLS, I50, E11, SEP, UNK, SEP], [CLS, HF9, SEP],
    ]  # fmt: skip
    assert built["age_ids"][:] == [[61] * 4, [61] * 4 + [62] * 2, [62] * 3]  # born 60 years before day 0
    later = [dict(record) for record in HISTORIES]
    for record in later:
        record["visits"] = [
            entry if entry["start"] <= day(800) else entry | {"start": entry["start"] + timedelta(days=9000)}
            for entry in record["visits"]
        ] + [visit(9900, diagnoses=["ICD10CM/I50.9"])]
    assert build_examples(records(*later), tokenizer, times).to_dict() == built.to_dict()


def test_without_the_options_examples_and_encodings_have_no_trace_of_them():
    plain = EhrCodeTokenizer.from_codes(CODES)
    built = build_examples(records(*HISTORIES), plain)
    assert "age_ids" not in built.column_names
    assert built["input_ids"][:] == [[I50, E11, UNK], [E116], [HF9, METFORMIN]]
    assert list(plain.encode_patient(HISTORIES[0])) == ["input_ids", "visit_ids", "serial_ids", "attention_mask"]
    assert plain.encode_column(["ICD10CM/I50.9"], [1], [1]).age_ids is None
    assert "visit_separators" not in plain.init_kwargs
    only_separators = EhrCodeTokenizer.from_codes(CODES, visit_separators=True)
    assert "age_ids" not in build_examples(records(*HISTORIES), only_separators).column_names
    only_ages = EhrCodeTokenizer.from_codes(CODES, ages=True)
    assert only_ages.encode_patient(HISTORIES[0])["input_ids"] == [I50, E11, UNK]
    assert only_ages.encode_patient(HISTORIES[0])["age_ids"] == [61, 61, 62]


def test_separators_count_for_what_is_too_long(tokenizer):
    built = build_examples(records(*HISTORIES), tokenizer, max_length=5, drop_long=True)
    assert built["subject_id"][:] == [2, 3]  # 6, 3 and 5 tokens
    assert "1 × longer than 5 codes" in built.info.description


def test_the_options_are_saved_with_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.visit_separators, loaded.ages) == (True, True)
    assert loaded.encode_patient(HISTORIES[0]) == tokenizer.encode_patient(HISTORIES[0])
    with pytest.raises(ValueError, match="`visit_separators` must be False under `code_exact`"):
        EhrCodeTokenizer.from_codes(CODES, code_exact=True, visit_separators=True)


def many(tokenizer, patients=400):
    generator = np.random.default_rng(0)
    made = []
    for subject in range(patients):
        starts = np.sort(generator.choice(4000, generator.integers(1, 6), replace=False))
        visits = [visit(int(start), diagnoses=list(generator.choice(CODES, 3, replace=False))) for start in starts]
        made.append(patient(subject, visits))
    return build_examples(records(*made), tokenizer)


@pytest.mark.parametrize("objective", [CodeMasking, SetMasking])
def test_masking_leaves_separators_and_ages_where_they_are(tokenizer, objective):
    batch = FlatExamples(many(tokenizer)).gather(np.arange(400), key=(0, 0))
    masking = CodeMasking(tokenizer, 0.5) if objective is CodeMasking else SetMasking(tokenizer)
    masked, targets = masking(batch)
    before, after = batch.streams["input_ids"], masked.streams["input_ids"]
    assert not np.isin(targets, [CLS, SEP]).any()
    assert [(after == token).sum() for token in (CLS, SEP)] == [(before == token).sum() for token in (CLS, SEP)]
    assert (after[masked.offsets[:-1]] == CLS).all()
    assert (after[masked.offsets[1:] - 1] == SEP).all()
    if objective is CodeMasking:
        assert len(after) == len(before)  # BEHRT's own code loses every kept token here
        kept = np.isin(before, [CLS, SEP])
        assert (after[kept] == before[kept]).all()
        assert (targets[~kept] != -100).mean() == pytest.approx(0.5, abs=0.03)
        assert (masked.streams["age_ids"] == batch.streams["age_ids"]).all()
    else:
        assert len(masked.streams["age_ids"]) == len(after) < len(before)


def test_padded_packed_and_gathered_batches_carry_the_ages(tokenizer):
    dataset = many(tokenizer, 20)
    rows = [dataset[index] for index in (4, 0, 7)]
    assert FlatBatch.from_rows(rows).streams.keys() == set(STREAMS)
    padded, packed = PaddedCollator(tokenizer)(rows), PackedCollator(tokenizer)(rows)
    binned = PackedCollator(tokenizer)([FlatExamples(dataset).gather([4, 0, 7])])
    real = padded["attention_mask"].bool()
    assert padded["age_ids"][real].tolist() == packed["age_ids"][0].tolist() == binned["age_ids"][0].tolist()
    assert packed["age_ids"][0].tolist() == [age for row in rows for age in row["age_ids"]]
    assert (padded["age_ids"][~real] == 0).all()
    assert (padded["age_ids"].dtype, packed["age_ids"].dtype) == (torch.int64, torch.int64)
    shuffled = dataset.shuffle(seed=1)
    assert FlatExamples(shuffled).gather([3]).streams["age_ids"].tolist() == shuffled[3]["age_ids"]


def test_padded_and_packed_batches_give_the_model_the_same_scores(tokenizer):
    torch.manual_seed(0)
    config = MedBertConfig.behrt(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, hidden_dropout_prob=0.0
    )
    model, rows = MedBertForPreTraining(config).eval(), list(many(tokenizer, 6))
    with torch.no_grad():
        padded, packed = (model(**kind(tokenizer)(rows)) for kind in (PaddedCollator, PackedCollator))
    real = PaddedCollator(tokenizer)(rows)["attention_mask"].bool()
    torch.testing.assert_close(padded.prediction_logits[real], packed.prediction_logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.stay_logits, packed.stay_logits, atol=1e-5, rtol=0)


def test_a_few_steps_learn_which_code_comes_with_which_age(tokenizer):
    """Nothing but the age tells the hidden code, so only a model that reads ages gets it right."""
    made = [
        patient(subject, [visit(subject % 300, diagnoses=[CODES[0] if subject % 2 else CODES[3]])],
                birth_time=day(-365.25 * (70 if subject % 2 else 20)))
        for subject in range(200)
    ]  # fmt: skip
    torch.manual_seed(0)
    masking = CodeMasking(tokenizer, max_predictions=1, mask_share=1.0, random_share=0.0)
    bins, collate = PackedDataset(build_examples(records(*made), tokenizer), 700), PackedCollator(tokenizer, masking)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 24, "hidden_dropout_prob": 0.0}
    losses = {}
    for max_age in (120, None):
        model = MedBertForPreTraining(MedBertConfig.behrt(vocab_size=10, max_age=max_age, **sizes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            outputs = model(**collate([bins[0]]))
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[max_age] = outputs.mlm_loss.item()
        assert outputs.loss.item() == pytest.approx(losses[max_age])  # masked codes alone
    assert losses[120] < 0.1
    assert losses[None] > 0.6  # a fair coin: ln 2


def test_it_pretrains_through_the_command_with_the_presets_options(tmp_path):
    world = {"world": "C", "patients": 250, "conditions": 18, "synonyms": 2, "noise_codes": 5}
    prepare("synthetic", None, tmp_path / "data", shards=1, workers=1, progress=False, options=world)
    data = DataArguments(data=str(tmp_path / "data"), max_length=64, min_patients=2)
    fitted = fit_tokenizer(data.data, subject_ids=data.splits()["train"], min_patients=2, **BEHRT)
    fitted.save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    options = PretrainArguments(
        preset="behrt", model_options=json.dumps(sizes), tokenizer=str(tmp_path / "tokenizer"), max_tokens=2048
    )
    settings = {"use_cpu": True, "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "model"), max_steps=3, save_strategy="no", **settings)
    figures = pretrain(data, options, arguments)
    assert np.isfinite(figures["code_loss"])
    assert "stay_auroc" not in figures  # that head is not trained
    loaded, info = MedBertForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.model.embeddings.age_embeddings.weight.shape == (122, 24)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").visit_separators

"""The tokenizer of coded histories: ids, back-off, truncation, bulk against the rules spelled out, save and load."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_ehr.models.code_hierarchy import ancestors
from hf_ehr.models.configuration_medbert import MedBertConfig
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer

from .builders import patient, visit

CODES = ["ICD10CM/I50.9", "ICD10CM/E11.6", "ICD10CM/E11", "ICD9CM/428.0", "ATC/A10BA02"]
I50, E116, E11, HF9, METFORMIN = range(5, 10)
UNK = 1


@pytest.fixture(scope="module")
def tokenizer():
    return EhrCodeTokenizer.from_codes(CODES)


@pytest.fixture(scope="module")
def exact():
    return EhrCodeTokenizer.from_codes(CODES, code_exact=True)


def test_special_tokens_come_first_and_codes_follow_in_order(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert tokenizer.convert_tokens_to_ids(CODES) == [5, 6, 7, 8, 9]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (0, 1, 4)
    assert len(tokenizer) == 10
    assert sorted(tokenizer.get_vocab().values()) == list(range(10))


def test_code_exact_has_the_ids_of_the_published_code(exact):
    assert exact.pad_token_id == exact.mask_token_id == 0
    assert exact.convert_tokens_to_ids(CODES) == [1, 2, 3, 4, 5]
    assert len(exact) == 6
    assert exact.unk_token_id is None
    history = exact.encode_patient([["ICD10CM/E11.65", "NDC/1"], ["NDC/2"], ["ICD10CM/I50.9"]])
    assert (history["input_ids"], history["visit_ids"]) == ([2, 1], [1, 2])  # unknown codes are dropped
    assert exact.codes_to_ids(["NDC/1", "ICD10CM/I50.9"]).tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ICD10CM/I50.9", I50),
        ("ICD10CM/E11.65", E116),
        ("ICD10CM/E11.6", E116),
        ("ICD10CM/E11.21", E11),
        ("ICD10CM/E11", E11),
        ("ICD10CM/I50.22", UNK),  # its ancestors I50.2 and I50 are not in the vocabulary; a sibling is no help
        ("ICD9CM/428.01", HF9),
        ("ATC/A10BA", UNK),  # a child is no help
        ("NDC/0002", UNK),
        ("", UNK),
    ],
)
def test_unknown_codes_take_the_nearest_known_ancestor(tokenizer, code, expected):
    assert tokenizer.codes_to_ids([code]).tolist() == [expected]


def arrow_forms(codes: list[str]) -> dict[str, object]:
    """The same codes in every container that is taken in bulk."""
    half = len(codes) // 2
    return {
        "list": codes,
        "numpy objects": np.array(codes, dtype=object),
        "numpy strings": np.array(codes, dtype=str),
        "string": pa.array(codes, pa.string()),
        "large_string": pa.array(codes, pa.large_string()),
        "string_view": pa.array(codes, pa.string_view()),
        "sliced": pa.array(["NDC/x", *codes, "NDC/y"])[1:-1],
        "dictionary": pa.array(codes, pa.string()).dictionary_encode(),
        "sliced dictionary": pa.array(["NDC/x", *codes]).dictionary_encode()[1:],
        "chunks": pa.chunked_array([codes[:half], codes[half:]], pa.string()),
        "chunks with dictionaries of their own": pa.chunked_array(
            [pa.array(part, pa.string()).dictionary_encode() for part in (codes[:half], codes[half:])]
        ),
        "no chunks": pa.chunked_array([codes] if codes else [], pa.string()),
        "polars": pl.Series(codes, dtype=pl.String),
        "polars categorical": pl.Series(codes, dtype=pl.Categorical),
    }


some_codes = st.sampled_from(
    [*CODES, "ICD10CM/E11.65", "ICD10CM/E11.69", "ICD10CM/E11.21", "ICD10CM/I50.22", "NDC/1", "NDC/2", "ATC/A10BA"]
)


@settings(max_examples=30, deadline=None)
@given(st.lists(some_codes, max_size=60))
@example([])
def test_every_container_gives_the_ids_of_the_rule_spelled_out(codes):
    tokenizer = EhrCodeTokenizer.from_codes(CODES)  # fresh: nothing remembered
    known = tokenizer.get_vocab()
    expected = [next((known[c] for c in (code, *ancestors(code)) if c in known), UNK) for code in codes]
    for name, form in arrow_forms(codes).items():
        ids = tokenizer.codes_to_ids(form)
        assert ids.dtype == np.int32, name
        assert ids.tolist() == expected, name


def test_codes_added_later_are_looked_up(tokenizer):
    grown = EhrCodeTokenizer.from_codes(CODES)
    column = pa.array(["NDC/1", "ICD10CM/E11.65"] * 10)
    assert set(grown.codes_to_ids(column).tolist()) == {UNK, E116}
    grown.add_tokens(["NDC/1"])
    assert set(grown.codes_to_ids(column).tolist()) == {10, E116}


def test_nulls_and_other_types_are_refused(tokenizer):
    for codes in (pa.array(["NDC/1", None]), pa.array(["NDC/1", None]).dictionary_encode()):
        with pytest.raises(ValueError, match="`codes` must not be null; 1 are"):
            tokenizer.codes_to_ids(codes)
    with pytest.raises(ValueError, match="`codes` must hold strings"):
        tokenizer.codes_to_ids(["NDC/1", 428.0])


def test_a_history_by_hand(tokenizer):
    visits = [["ICD9CM/428.0", "ICD10CM/E11.65"], [], ["ICD10CM/E11.65", "NDC/1", "ICD10CM/I50.9", "ICD10CM/E11.69"]]
    assert tokenizer.encode_patient(visits) == {
        "input_ids": [HF9, E116, E116, UNK, I50],  # E11.69 is E11.6 as well, and the second in its visit
        "visit_ids": [1, 1, 2, 2, 2],  # the empty visit is not counted
        "serial_ids": [0, 1, 0, 1, 2],
        "attention_mask": [1, 1, 1, 1, 1],
    }


def test_a_record_is_read_by_the_kinds_of_the_tokenizer(tokenizer):
    record = patient(1, [visit(0, diagnoses=["ICD10CM/I50.9"], medications=["ATC/A10BA02"]), visit(3)])
    assert tokenizer.encode_patient(record)["input_ids"] == [I50]
    both = EhrCodeTokenizer.from_codes(CODES, kinds=["medications", "diagnoses"])
    assert both.encode_patient(record)["input_ids"] == [METFORMIN, I50]
    record["visits"][0]["medications"] = None
    assert both.encode_patient(record)["input_ids"] == [I50]


def test_one_list_of_codes_is_no_patient(tokenizer):
    with pytest.raises(ValueError, match="A patient must be a list of visits"):
        tokenizer.encode_patient(["ICD10CM/I50.9", "ICD10CM/E11"])


def distinct(count: int, start: int = 0) -> list[str]:
    return [f"X/{number}" for number in range(start, start + count)]


@pytest.fixture(scope="module")
def wide():
    return EhrCodeTokenizer.from_codes(distinct(2000))


@pytest.mark.parametrize(
    ("lengths", "max_length", "kept"),
    [
        ([3, 4, 5], 12, [3, 4, 5]),
        ([3, 4, 5], 11, [4, 5]),  # the oldest visit goes whole
        ([3, 4, 5], 9, [4, 5]),
        ([3, 4, 5], 8, [5]),
        ([3, 4, 5], 5, [5]),
        ([3, 4, 5], 4, [4]),  # the newest alone is too long: its first codes
        ([3, 4, 5], 1, [1]),
        ([1, 9, 1], 3, [1]),  # no older visit slips in past one that does not fit
        ([600], 512, [512]),
        ([5, 0], 3, [3]),  # the newest visit that has codes
    ],
)
def test_the_oldest_visits_go_whole(wide, lengths, max_length, kept):
    visits = [distinct(count, 100 * index) for index, count in enumerate(lengths)]
    history = wide.encode_patient(visits, max_length=max_length)
    newest = [visit for visit in visits if visit][-len(kept) :]
    expected = [visit[:count] for visit, count in zip(newest, kept, strict=True)]
    assert wide.decode_patient(history["input_ids"], history["visit_ids"]) == expected
    assert sorted(set(history["visit_ids"])) == list(range(1, len(kept) + 1))


def test_without_truncation_everything_stays(wide):
    assert len(wide.encode_patient([distinct(600), distinct(600)])["input_ids"]) == 512
    whole = wide.encode_patient([distinct(600), distinct(600)], truncation=False)
    assert len(whole["input_ids"]) == 1200
    assert whole["visit_ids"][-1] == 2


def test_more_than_999_visits_keep_the_last_999_with_a_warning(wide):
    visits = [[f"X/{number}"] for number in range(1002)]
    with pytest.warns(UserWarning, match="keep only the last 999"):
        history = wide.encode_patient(visits, max_length=5000)
    assert len(history["input_ids"]) == 999
    assert wide.decode_patient(history["input_ids"], history["visit_ids"])[0] == ["X/3"]
    assert (history["visit_ids"][0], history["visit_ids"][-1]) == (1, 999)


def test_short_histories_of_many_visits_do_not_warn(wide, recwarn):
    assert wide.encode_patient([["X/1"]] * 2000)["visit_ids"][-1] == 512
    assert not [warning for warning in recwarn if "999" in str(warning.message)]


def spelled_out(tokenizer, visits: list[list[str]], max_length: int) -> dict[str, list[int]]:
    """The rules of ``encode_patient`` in plain Python."""
    kept: list[list[int]] = []
    for codes in visits:
        ids = [index for index in tokenizer.codes_to_ids(codes).tolist() if index >= 0]
        if ids:
            kept.append(list(dict.fromkeys(ids)))
    while len(kept) > 1 and sum(map(len, kept)) > max_length:
        kept.pop(0)
    kept = [ids[:max_length] for ids in kept]
    return {
        "input_ids": [index for ids in kept for index in ids],
        "visit_ids": [number for number, ids in enumerate(kept, 1) for _ in ids],
        "serial_ids": [rank for ids in kept for rank in range(len(ids))],
        "attention_mask": [1 for ids in kept for _ in ids],
    }


histories = st.lists(st.lists(st.lists(some_codes, max_size=6), max_size=6), max_size=6)


@settings(max_examples=150, deadline=None)
@given(histories, st.integers(1, 12), st.booleans())
@example([], 5, False)
@example([[]], 5, False)
@example([[[]], [["NDC/1"]]], 5, True)
def test_bulk_encoding_follows_the_rules_spelled_out(patients, max_length, code_exact):
    tokenizer = EhrCodeTokenizer.from_codes(CODES, code_exact=code_exact)
    expected = [spelled_out(tokenizer, visits, max_length) for visits in patients]
    encoded = tokenizer.encode_patients(patients, max_length=max_length)
    assert [dict(zip(encoded, rows, strict=True)) for rows in zip(*encoded.values(), strict=True)] == expected
    assert [tokenizer.encode_patient(visits, max_length=max_length) for visits in patients] == expected
    visits = [visit for history in patients for visit in history]
    column = tokenizer.encode_column(
        pa.array([code for visit in visits for code in visit], pa.string()).dictionary_encode(),
        pa.array([len(visit) for visit in visits], pa.int32()),
        np.array([len(history) for history in patients], np.int64),
        max_length=max_length,
    )
    assert (column.input_ids.dtype, column.visit_ids.dtype, column.serial_ids.dtype) == (np.int32,) * 3
    assert column.offsets.dtype == np.int64
    assert column.offsets.tolist() == np.cumsum([0] + [len(row["input_ids"]) for row in expected]).tolist()
    for name in ("input_ids", "visit_ids", "serial_ids"):
        assert getattr(column, name).tolist() == [value for row in expected for value in row[name]]


@pytest.mark.parametrize(
    ("visit_lengths", "patient_lengths", "max_length", "message"),
    [
        ([1], [1], 5, "`visit_lengths` must add up to the 2 codes, got 1"),
        ([1, 1], [1], 5, "`patient_lengths` must add up to the 2 visits, got 1"),
        ([1, 1], [2], 0, "`max_length` must be at least 1 or None, got 0"),
    ],
)
def test_lengths_that_do_not_fit_are_named(tokenizer, visit_lengths, patient_lengths, max_length, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_column(CODES[:2], visit_lengths, patient_lengths, max_length=max_length)


def test_decoding_gives_the_visits_back_and_leaves_padding_out(tokenizer):
    visits = [["ICD10CM/I50.9", "ATC/A10BA02"], ["ICD10CM/E11"]]
    history = tokenizer.encode_patient(visits)
    padded_ids = np.array([*history["input_ids"], 0, 0])
    assert tokenizer.decode_patient(padded_ids, np.array([*history["visit_ids"], 0, 0])) == visits
    assert tokenizer.decode_patient([4, I50], [1, 1]) == [["[MASK]", "ICD10CM/I50.9"]]


def test_the_stock_calls_work_on_codes_with_spaces_between(tokenizer):
    text = "ICD10CM/I50.9 [MASK] ATC/A10BA02 NDC/1"
    batch = tokenizer([text, "ICD10CM/E11"], padding=True)
    assert batch["input_ids"] == [[I50, 4, METFORMIN, UNK], [E11, 0, 0, 0]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert tokenizer.decode([I50, METFORMIN]) == "ICD10CM/I50.9 ATC/A10BA02"
    assert tokenizer(text, truncation=True, max_length=2)["input_ids"] == [METFORMIN, UNK]  # the last codes stay


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (["A/1", "A/1"], "`codes` must be distinct"),
        (["[PAD]"], "`codes` must be distinct and none a special token"),
        (["A/1 2"], "hold white space, got 'A/1 2'"),
        ([""], "neither empty"),
        (["A/[MASK]"], "text of a special token"),
    ],
)
def test_codes_that_would_break_the_vocabulary_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        EhrCodeTokenizer.from_codes(codes)


PROBE = [["ICD10CM/E11.65", "ICD10CM/E11.69", "NDC/1"], ["ICD10CM/I50.9"]]


@pytest.mark.parametrize("code_exact", [False, True])
def test_it_saves_and_loads_through_autotokenizer_with_the_package(tmp_path, code_exact):
    made = EhrCodeTokenizer.from_codes(
        CODES, code_exact=code_exact, min_patients=11, fitted_on="abc", kinds=["diagnoses"]
    )
    made.save_pretrained(tmp_path)
    AutoTokenizer.register(MedBertConfig, EhrCodeTokenizer, exist_ok=True)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is EhrCodeTokenizer
    assert loaded.get_vocab() == made.get_vocab()
    assert loaded.encode_patient(PROBE) == made.encode_patient(PROBE)
    assert loaded.special_tokens_map == made.special_tokens_map
    assert (loaded.init_kwargs["min_patients"], loaded.init_kwargs["fitted_on"]) == (11, "abc")
    assert loaded.truncation_side == "left"


def test_it_loads_where_the_package_cannot_be_imported(tmp_path):
    answers = {}
    for name in ("default", "exact"):
        made = EhrCodeTokenizer.from_codes(CODES, code_exact=name == "exact", kinds=["diagnoses"])
        made.save_pretrained(tmp_path / name)
        record = patient(1, [visit(0, diagnoses=PROBE[0])])["visits"][0]["diagnoses"]
        answers[name] = {
            "vocab": made.get_vocab(),
            "history": made.encode_patient(PROBE),
            "record": made.encode_patient({"visits": [{"diagnoses": record}]}),
            "column": made.encode_column(pa.array(PROBE[0]).dictionary_encode(), [3], [1]).input_ids.tolist(),
            "strings": made.codes_to_ids(pa.array(PROBE[0] * 9)).tolist(),
            "decoded": made.decode_patient([1, 2], [1, 2]),
        }
    script = f"""
import sys
sys.modules["hf_ehr"] = None
import json
import pyarrow as pa
from transformers import AutoTokenizer
probe = {PROBE!r}
answers = {{}}
for name in ("default", "exact"):
    loaded = AutoTokenizer.from_pretrained(f"{tmp_path}/{{name}}", trust_remote_code=True)
    loaded.save_pretrained(f"{tmp_path}/{{name}}-again")
    loaded = AutoTokenizer.from_pretrained(f"{tmp_path}/{{name}}-again", trust_remote_code=True)
    answers[name] = {{
        "vocab": loaded.get_vocab(),
        "history": loaded.encode_patient(probe),
        "record": loaded.encode_patient({{"visits": [{{"diagnoses": probe[0]}}]}}),
        "column": loaded.encode_column(pa.array(probe[0]).dictionary_encode(), [3], [1]).input_ids.tolist(),
        "strings": loaded.codes_to_ids(pa.array(probe[0] * 9)).tolist(),
        "decoded": loaded.decode_patient([1, 2], [1, 2]),
    }}
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == answers


def test_saved_files_hold_the_code_and_no_padding_of_earlier_calls(tmp_path):
    used, fresh = EhrCodeTokenizer.from_codes(CODES), EhrCodeTokenizer.from_codes(CODES)
    used(["ICD10CM/I50.9", "ICD10CM/E11 ICD10CM/I50.9"], padding=True, truncation=True, max_length=16)
    used.save_pretrained(tmp_path / "used")
    fresh.save_pretrained(tmp_path / "fresh")
    names = sorted(path.name for path in (tmp_path / "fresh").iterdir())
    assert [name for name in names if name.endswith(".py")] == [
        "code_hierarchy.py",
        "ragged_visits.py",
        "tokenization_ehr.py",
    ]
    assert names[3:] == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "used" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_vocabulary_beyond_100_000_codes_survives_saving(tmp_path):
    # transformers inspects the pre-tokenizer of vocabularies above this size.
    made = EhrCodeTokenizer.from_codes(distinct(100_500))
    made.save_pretrained(tmp_path)
    loaded = EhrCodeTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == made.get_vocab()
    assert loaded("X/100499 X/0")["input_ids"] == [100_504, 5]
    assert loaded.codes_to_ids(pa.array(distinct(60_000, 50_000))).tolist()[-1] == UNK

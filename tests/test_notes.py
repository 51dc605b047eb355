"""Notes: what cleaning does to text and offsets, windows, vocabularies, filters, and the labels of notes."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_ehr.notes import (
    clean,
    clean_with_offsets,
    filter_notes,
    frequent_codes,
    impute_chronic_codes,
    keep_codes,
    label_ids,
    oov_per_note,
    segment_notes,
)
from hf_ehr.notes import fit_word_tokenizer as fit_published_words
from hf_ehr.notes import fit_wordpiece_tokenizer as fit_published_pieces
from hf_ehr.notes.cleaning import STEPS
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import LeakageError, check_fitted_on
from tests.builders import day

CLEANERS = list(STEPS)
fit_word_tokenizer = partial(fit_published_words, min_patients=1)
fit_wordpiece_tokenizer = partial(fit_published_pieces, min_patients=1)
CORPUS = [
    "Pt is a 63 yo M w/ chronic heart failure, seen by Dr. Grey on 3/4/2021.",
    "Chronic heart failure is stable. BP 120/80, temp 98.6. No fever; no chills.",
    "Paciente con insuficiencia cardíaca crónica. Sin fiebre.",
]


def notes(*texts: str | None, subjects=None, **columns) -> pa.Table:
    return pa.table(
        {
            "note_id": [f"n{row}" for row in range(len(texts))],
            "subject_id": pa.array(subjects or range(len(texts)), pa.int64()),
            "text": pa.array(texts, pa.string()),
            **columns,
        }
    )


def labels(*pairs: tuple[str, str], provenance: str = "native") -> pa.Table:
    note_ids, codes = zip(*pairs, strict=True)
    return pa.table({"note_id": note_ids, "code": codes, "provenance": [provenance] * len(pairs)})


# Cleaning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. [**Known lastname 7**] fell.", "mr.  fell."),
        ("[**Name\n(un) 3**] and [**2101-1-2**]", "and"),
        ("Dr. Grey, M.D. wrote", "doctor grey, md wrote"),
        ("hydr. dr. m.d.", "hydr. doctor md"),
        ("Admission Date: May Discharge Date: June", "may  june"),
        ("a -- b __ c == d", "a  b  c  d"),
        ("1. fever 2. temp 98.6 3.", "fever  temp 98.6"),
        ("one\r\ntwo", "one  two"),
    ],
)
def test_clinicalbert_cleaning_removes_marks_titles_headers_and_dashes(text, expected):
    assert clean([text], "clinicalbert") == [expected]


def test_bert_xml_cleaning_masks_every_digit_and_lowers():
    assert clean(["BP 120/80 on 3/4"], "bert_xml") == ["bp nnn/nn on n/n"]


def test_nothing_is_cleaned_by_default():
    assert clean(CORPUS) == CORPUS


@given(st.text(alphabet="aZ09_ .,-\n\té", max_size=60))
def test_caml_cleaning_keeps_the_lower_case_words_that_are_no_numbers(text):
    words = [word.lower() for word in re.findall(r"\w+", text) if not word.isnumeric()]
    assert clean([text], "caml") == [" ".join(words)]


@given(st.text(alphabet="aZ09_ .,-\n\té", max_size=60))
def test_edin_cleaning_keeps_the_ascii_words_that_are_no_numbers(text):
    words = [word for word in re.findall(r"[a-z0-9]+", text.lower()) if not word.isdigit()]
    assert clean([text], "edin") == [" ".join(words)]


@pytest.mark.parametrize("cleaning", CLEANERS)
@given(text=st.text(alphabet="aDrm9 .:-_=[*]\nİß日", max_size=80))
def test_offsets_and_bulk_cleaning_agree_and_every_kept_character_is_found_again(cleaning, text):
    cleaned = clean_with_offsets(text, cleaning)
    assert [cleaned.text] == clean([text], cleaning)
    assert len(cleaned.starts) == len(cleaned.ends) == len(cleaned.text)
    assert (np.diff(cleaned.starts) >= 0).all()
    assert (np.diff(cleaned.ends) >= 0).all()
    for character, start, end in zip(cleaned.text, cleaned.starts, cleaned.ends, strict=True):
        source = text[start:end]
        put_in = {" ", "n"} | set("doctormd")
        assert character in source + source.lower() or character in put_in, (character, source)


def test_a_span_of_the_cleaned_text_is_found_in_the_original():
    text = "Seen by Dr. Grey: [**Name**] has  BP 120/80 and COPD."
    cleaned = clean_with_offsets(text, "clinicalbert")
    for word, source in [("doctor", "Dr."), ("copd", "COPD"), ("grey", "Grey")]:
        start = cleaned.text.index(word)
        (first,), (last,) = cleaned.to_original([start], [start + len(word)])
        assert text[first:last] == source
    assert [end.tolist() for end in cleaned.to_original([0, len(cleaned.text)], [0, len(cleaned.text)])] == [
        [0, len(text)]
    ] * 2


def test_a_cleaning_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="`cleaning` must be one of none, bert_xml"):
        clean(["x"], "wash")


# Filters


def test_notes_below_fifty_characters_and_unwanted_types_are_counted_out():
    table = notes("x" * 50, "x" * 49, " " * 60 + "x", "y" * 80, "z" * 90, category=["A", "A", "A", " Student ", None])
    kept = filter_notes(table, exclude_categories=["student"])
    assert kept.notes["note_id"].to_pylist() == ["n0", "n4"]
    assert (kept.too_short, kept.excluded) == (2, {"student": 1})
    only = filter_notes(table, min_characters=0, categories=["a"])
    assert only.notes["note_id"].to_pylist() == ["n0", "n1", "n2"]
    assert only.excluded == {"student": 1, "": 1}


def test_filters_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="must differ"):
        filter_notes(notes("x"), categories=["A"], exclude_categories=["a"])


# Windows


@pytest.fixture(scope="module")
def word_tokenizer():
    return fit_word_tokenizer(notes(*CORPUS), subject_ids=[0, 1, 2], cleaning="none")


@pytest.mark.parametrize(
    ("words", "max_length", "lengths"),
    [
        (2_500, 1_024, [1_024, 1_024, 458]),  # 1,022 + 1,022 + 456 words, [CLS] and [SEP] around each
        (1_022, 1_024, [1_024]),
        (1_023, 1_024, [1_024, 3]),
        (0, 512, [2]),
    ],
)
def test_a_long_note_becomes_windows_that_hold_every_token_once(word_tokenizer, words, max_length, lengths):
    table = segment_notes(notes("fever " * words), word_tokenizer, max_length=max_length)
    assert [len(ids) for ids in table["input_ids"].to_pylist()] == lengths
    assert table["segment"].to_pylist() == list(range(len(lengths)))
    inside = [start for row in table["starts"].to_pylist() for start in row if start >= 0]
    assert inside == [6 * word for word in range(words)]
    for ids, starts in zip(table["input_ids"].to_pylist(), table["starts"].to_pylist(), strict=True):
        assert (ids[0], ids[-1]) == (word_tokenizer.cls_token_id, word_tokenizer.sep_token_id)
        assert (starts[0], starts[-1]) == (-1, -1)


def test_windows_of_one_note_do_not_depend_on_its_neighbours(word_tokenizer):
    texts = [*CORPUS, "", "fever " * 30] * 60  # more notes than are tokenised at a time
    together = segment_notes(notes(*texts), word_tokenizer, max_length=8)
    alone = [segment_notes(notes(text), word_tokenizer, max_length=8).drop("note_id") for text in texts[:5]]
    expected = pa.concat_tables(alone * 60)
    assert together.drop("note_id").equals(expected)


@pytest.mark.parametrize("cleaning", [name for name in CLEANERS if name != "none"])
def test_windows_of_cleaned_notes_point_into_the_original_text(word_tokenizer, cleaning):
    text = "Dr. Grey\n[**Name**] 1. CHRONIC  heart-failure 2021 -- stable, 98.6"
    table = segment_notes(notes(text), word_tokenizer, max_length=64, cleaning=cleaning)
    vocabulary = word_tokenizer.get_vocab()
    (ids,), (starts,), (ends,) = (table[name].to_pylist() for name in ("input_ids", "starts", "ends"))
    where = {index: text[start:end] for index, start, end in zip(ids, starts, ends, strict=True)}
    assert where[vocabulary["chronic"]] == "CHRONIC"
    assert where[vocabulary["failure"]] == "failure"
    assert where[vocabulary["stable"]] == "stable"


def test_a_note_of_200_000_characters_and_one_without_latin_letters_are_cut_too(word_tokenizer):
    table = segment_notes(notes("fever, " * 28_600, "患者は発熱 ☤ שלום"), word_tokenizer)
    assert pl.DataFrame(table).group_by("note_id", maintain_order=True).len()["len"].to_list() == [113, 1]
    assert set(table["ends"].to_pylist()[-1]) <= set(range(-1, 13))


def test_windows_need_a_fast_tokenizer_room_and_one_cleaning_only(word_tokenizer):
    with pytest.raises(ValueError, match="must exceed the 2 special tokens"):
        segment_notes(notes("x"), word_tokenizer, max_length=2)
    with pytest.raises(ValueError, match="must be a fast one"):
        segment_notes(notes("x"), object())
    cleaning = fit_word_tokenizer(notes(*CORPUS), subject_ids=[0])
    with pytest.raises(ValueError, match="the tokenizer itself cleans"):
        segment_notes(notes("x"), cleaning, cleaning="caml")


def test_a_note_without_text_is_refused_at_the_door(word_tokenizer):
    with pytest.raises(EhrDataError, match="`text` must not be null"):
        segment_notes(
            pa.table({"note_id": ["a"], "subject_id": [1], "text": pa.nulls(1, pa.string())}), word_tokenizer
        )


# Vocabularies


def test_the_word_vocabulary_holds_the_most_frequent_words_of_the_training_notes_only():
    table = notes("b b b a a c secret 12", "zebra zebra zebra zebra", subjects=[1, 2])
    tokenizer = fit_word_tokenizer(table, subject_ids=[1], vocab_size=8)
    assert tokenizer.get_vocab() == {
        "[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "b": 5, "a": 6, "c": 7,
    }  # fmt: skip
    check_fitted_on(tokenizer.init_kwargs["fitted_on"], [1])
    with pytest.raises(LeakageError):
        check_fitted_on(tokenizer.init_kwargs["fitted_on"], [1, 2])


def test_twenty_thousand_words_include_the_special_tokens():
    table = notes(" ".join(f"w{number}" for number in range(21_000)))
    assert len(fit_word_tokenizer(table, subject_ids=[0], cleaning="none")) == 20_000


@pytest.mark.parametrize("fit", [fit_word_tokenizer, fit_wordpiece_tokenizer])
def test_a_vocabulary_comes_back_from_disk_and_reads_raw_notes_as_before(fit, tmp_path):
    tokenizer = fit(notes(*CORPUS), subject_ids=[0, 1, 2], cleaning="bert_xml", vocab_size=120)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(CORPUS)["input_ids"] == tokenizer(CORPUS)["input_ids"]
    assert loaded.init_kwargs["fitted_on"] == tokenizer.init_kwargs["fitted_on"]
    assert loaded.init_kwargs["cleaning"] == "bert_xml"
    assert (loaded.mask_token, loaded.pad_token_id) == ("[MASK]", 0)
    pair = loaded("heart failure", "heart failure")["token_type_ids"]
    assert pair == sorted(pair)
    assert pair.count(0) == pair.count(1) + 1  # [CLS]


@pytest.mark.parametrize("cleaning", CLEANERS)
def test_the_cleaning_inside_a_tokenizer_is_the_one_outside(cleaning):
    texts = [*CORPUS, "Dr. A [**Name**] 1. temp 98.6 -- Admission Date: 3/4\n12 end 7"]
    inside = fit_word_tokenizer(notes(*texts), subject_ids=range(4), cleaning=cleaning)
    outside = fit_word_tokenizer(notes(*clean(texts, cleaning)), subject_ids=range(4), cleaning="none")
    assert inside.get_vocab() == outside.get_vocab()
    one = segment_notes(notes(*texts), inside)
    other = segment_notes(notes(*texts), outside, cleaning=cleaning)
    assert one["input_ids"].equals(other["input_ids"])


def test_the_same_notes_give_the_same_pieces_in_another_process():
    program = (
        "from tests.test_notes import *\n"
        "tokenizer = fit_wordpiece_tokenizer(notes(*CORPUS), subject_ids=range(3), vocab_size=90)\n"
        "print(sorted(tokenizer.get_vocab().items()))"
    )
    run = partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len({run(cwd=Path(__file__).parents[1]).stdout for _ in range(2)}) == 1


def test_wordpiece_splits_rare_words_and_keeps_accents():
    tokenizer = fit_wordpiece_tokenizer(notes(*CORPUS * 3), subject_ids=range(9), vocab_size=150)
    assert tokenizer.unk_token_id not in tokenizer("chronicity")["input_ids"]
    assert len(tokenizer.tokenize("chronicity")) > 1
    assert tokenizer.decode(tokenizer("crónica", add_special_tokens=False)["input_ids"]) == "crónica"


def test_out_of_vocabulary_words_are_counted_per_note():
    table = notes("fever fever chills", "fever")
    tokenizer = fit_word_tokenizer(table, subject_ids=[0, 1])
    report = oov_per_note(tokenizer, notes("fever fever rash, rash", "chills", "", "zoster"))
    assert (report.notes, report.words, report.out_of_vocabulary, report.unknown) == (4, 7, 4, 4)  # `,` is a word too
    assert (report.per_note, report.rate) == (1.0, 4 / 7)
    pieces = fit_wordpiece_tokenizer(table, subject_ids=[0, 1])
    split = oov_per_note(pieces, notes("fever feverish chillsfever"))
    assert (split.words, split.out_of_vocabulary) == (3, 2)


def test_a_vocabulary_needs_notes_and_room():
    with pytest.raises(EhrDataError, match="have no word of 1 patients"):
        fit_word_tokenizer(notes("fever"), subject_ids=[7])
    with pytest.raises(ValueError, match="`vocab_size` must exceed"):
        fit_wordpiece_tokenizer(notes("fever"), subject_ids=[0], vocab_size=5)
    with pytest.raises(EhrDataError, match="at least one note"):
        oov_per_note(fit_word_tokenizer(notes("fever"), subject_ids=[0]), notes())


def test_a_vocabulary_of_shards_is_that_of_the_whole(tmp_path):
    for number, text in enumerate(CORPUS):
        pq.write_table(notes(text, subjects=[number]), tmp_path / f"{number}.parquet")
    shards = fit_word_tokenizer(sorted(tmp_path.glob("*.parquet")), subject_ids=[0, 2])
    assert shards.get_vocab() == fit_word_tokenizer(notes(*CORPUS), subject_ids=[0, 2]).get_vocab()


@pytest.mark.parametrize("fit", [fit_published_words, fit_published_pieces])
def test_a_name_of_one_patient_is_no_token_however_often_it_stands_and_a_word_of_eleven_is(fit):
    """Twenty notes of one patient, one note of each of eleven others; `cough` has 11 patients, `fever` has ten."""
    texts = ["Zlatanovic Zlatanovic seen"] * 20 + ["seen for cough and fever"] * 10 + ["seen for cough"]
    table = notes(*texts, subjects=[0] * 20 + list(range(1, 12)))
    tokenizer = fit(table, subject_ids=range(12), cleaning="none")
    assert "cough" in tokenizer.get_vocab()
    assert not {"zlatanovic", "fever"} & set(tokenizer.get_vocab())
    assert "fever" in fit(table, subject_ids=range(12), cleaning="none", min_patients=10).get_vocab()
    with pytest.raises(ValueError, match="`min_patients` must be at least 1"):
        fit(table, subject_ids=range(12), min_patients=0)


def test_a_name_is_spelled_by_pieces_that_common_words_give():
    texts = ["Zlatanovic Zlatanovic Zlatanovic"] * 20 + ["lata cough"] * 11
    table = notes(*texts, subjects=[0] * 20 + list(range(1, 12)))
    tokenizer = fit_published_pieces(table, subject_ids=range(12))
    pieces = tokenizer.tokenize("zlatanovic")
    assert "".join(piece.removeprefix("##") for piece in pieces) == "zlatanovic"
    assert tokenizer.unk_token not in pieces
    learned = {one.removeprefix("##") for one in tokenizer.get_vocab() if len(one.removeprefix("##")) > 1}
    assert all(one in "lata" or one in "cough" or one.startswith("[") for one in learned), learned


def test_a_patient_is_counted_once_across_shards(tmp_path):
    """Two shards that share a patient are refused: the count of patients would be too high."""
    for number in range(2):
        pq.write_table(notes("Zlatanovic", subjects=[7]), tmp_path / f"{number}.parquet")
    with pytest.raises(EhrDataError, match="all notes of a patient in one shard"):
        fit_published_words(sorted(tmp_path.glob("*.parquet")), subject_ids=[7], min_patients=2)


# Labels


def test_a_code_of_exactly_the_bound_is_excluded_and_only_training_notes_count():
    table = labels(("a", "X/1"), ("b", "X/1"), ("a", "X/2"), ("b", "X/2"), ("c", "X/2"), ("test", "X/1"))
    assert frequent_codes(table, note_ids=["a", "b", "c"], more_than=2) == ["X/2"]
    assert frequent_codes(table, note_ids=["a", "b", "c"], more_than=1) == ["X/2", "X/1"]
    twice = pa.concat_tables([table, labels(("a", "X/1"), provenance="imputed")])
    assert frequent_codes(twice, note_ids=["a", "b", "c"], more_than=2) == ["X/2"]  # notes are counted, not rows
    with pytest.raises(EhrDataError, match="must be below 3"):
        frequent_codes(table, note_ids=["a", "b", "c"], more_than=3)


def test_exactly_a_thousand_notes_are_too_few_for_the_paper():
    pairs = [(f"n{row}", code) for code, count in (("X/1000", 1_000), ("X/1001", 1_001)) for row in range(count)]
    assert frequent_codes(labels(*pairs), note_ids=[f"n{row}" for row in range(1_001)]) == ["X/1001"]


def test_notes_without_codes_in_scope_stay_with_an_empty_list():
    table = labels(("n2", "X/2"), ("n0", "X/9"), ("n2", "X/1"), ("n2", "X/2"), ("elsewhere", "X/1"))
    assert keep_codes(table, ["X/9"])["note_id"].to_pylist() == ["n0"]
    ids = label_ids(notes("a", "b", "c"), table, ["X/1", "X/2"])
    assert ids.to_pylist() == [[], [], [0, 1]]
    with pytest.raises(ValueError, match="must not repeat"):
        label_ids(notes("a"), table, ["X/1", "X/1"])


CHRONIC, ACUTE = "ICD10CM/I50.9", "ICD10CM/J18.9"
FIVE_NOTES = notes(*"abcde", subjects=[1, 1, 1, 1, 2], time=[day(0), day(1), day(2), day(3), day(4)])


@pytest.mark.parametrize(
    ("mode", "imputed"),
    [("none", []), ("paper", ["n2"]), ("as_of", [])],
)
def test_a_chronic_code_seen_twice_is_carried_to_the_notes_between(mode, imputed):
    given_labels = labels(("n1", CHRONIC), ("n3", CHRONIC), ("n1", ACUTE), ("n3", ACUTE), ("n4", CHRONIC))
    table = impute_chronic_codes(given_labels, FIVE_NOTES, mode=mode)
    assert table.slice(0, 5).equals(given_labels.cast(table.schema))
    new = table.slice(5).to_pylist()
    assert new == [{"note_id": note, "code": CHRONIC, "provenance": "imputed"} for note in imputed]


@pytest.mark.parametrize(("mode", "imputed"), [("paper", ["n1", "n3"]), ("as_of", ["n3"])])
def test_as_of_waits_for_the_second_encounter_and_the_paper_does_not(mode, imputed):
    table = impute_chronic_codes(labels(("n0", CHRONIC), ("n2", CHRONIC)), FIVE_NOTES, mode=mode)
    assert table["note_id"].to_pylist()[2:] == imputed


def test_a_note_of_the_same_time_as_the_second_encounter_is_not_behind_it():
    table = notes(*"abc", subjects=[1, 1, 1], time=[day(0), day(1), day(1)])
    given_labels = labels(("n0", CHRONIC), ("n1", CHRONIC))
    assert impute_chronic_codes(given_labels, table, mode="as_of").num_rows == 2
    assert impute_chronic_codes(given_labels, table, mode="paper").num_rows == 3


def test_two_notes_of_one_visit_are_one_encounter():
    table = FIVE_NOTES.append_column("visit_id", pa.array([7, 7, 7, 8, 9]))
    once = labels(("n0", CHRONIC), ("n1", CHRONIC))
    assert impute_chronic_codes(once, table, mode="paper").num_rows == 2
    twice = impute_chronic_codes(labels(("n0", CHRONIC), ("n3", CHRONIC)), table, mode="paper")
    assert twice["note_id"].to_pylist()[2:] == ["n1", "n2"]


def test_imputed_labels_do_not_count_as_seen():
    table = pa.concat_tables([labels(("n0", CHRONIC)), labels(("n1", CHRONIC), provenance="imputed")])
    assert impute_chronic_codes(table, FIVE_NOTES, mode="paper").num_rows == 2


@settings(deadline=None)  # the first call opens libraries
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, unique=True), st.integers(1, 5))
def test_as_of_never_learns_from_a_later_note(pairs, cut):
    """Rule L10: dropping the notes from ``cut`` on leaves the labels before it as they were."""
    table = notes(*"abcdef", subjects=[1] * 6, time=[day(number) for number in range(6)])
    given_labels = labels(*((f"n{note}", f"X/{code}") for note, code in sorted(pairs)))
    early = [f"n{note}" for note in range(cut)]
    known = [(f"n{note}", f"X/{code}") for note, code in sorted(pairs) if note < cut] or [("n0", "X/9")]
    scope = {"X/0", "X/1"}

    def imputed(some: pa.Table, those: pa.Table) -> list:
        rows = impute_chronic_codes(some, those, mode="as_of", chronic_codes=scope).to_pylist()
        return [row for row in rows if row["provenance"] == "imputed" and row["note_id"] in early]

    assert imputed(given_labels, table) == imputed(labels(*known), table.slice(0, cut))


def test_imputation_needs_times_known_notes_and_a_mode():
    with pytest.raises(ValueError, match="`mode` must be one of none, paper, as_of"):
        impute_chronic_codes(labels(("n0", CHRONIC)), FIVE_NOTES, mode="always")
    with pytest.raises(EhrDataError, match="`time` must be set"):
        impute_chronic_codes(labels(("n0", CHRONIC)), notes("a"), mode="paper")
    with pytest.raises(EhrDataError, match="must name notes of NOTES"):
        impute_chronic_codes(labels(("elsewhere", CHRONIC)), FIVE_NOTES, mode="paper")

"""Prepared notes → examples: splits without a shared patient, windows of notes, pairs for pre-training."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hf_ehr import note_datasets
from hf_ehr.datasets import split_patients
from hf_ehr.note_datasets import build_coding_examples, build_pretraining_examples, split_notes
from hf_ehr.notes import NoteFolder, fit_word_tokenizer, prepare_notes
from hf_ehr.schema import EhrDataError

CODES = ["ICD10CM/I10", "ICD10CM/E11.9", "ICD10CM/J18.9"]
TEXTS = ["plain words " * 30, "fever. " * 20, "", "cough and chills\n" * 12]


def folder_of(texts, path, *, subjects=None, labels=(), shards=1, **columns) -> NoteFolder:
    """A prepared folder of notes ``n0``, ``n1``, …, empty ones too."""
    path = Path(path)
    notes = {
        "note_id": [f"n{row}" for row in range(len(texts))],
        "subject_id": pa.array(range(len(texts)) if subjects is None else subjects, pa.int64()),
        "text": pa.array(texts, pa.string()),
        **columns,
    }
    coded = {
        name: pa.array([row[place] for row in labels], pa.string()) for place, name in enumerate(("note_id", "code"))
    }
    pq.write_table(pa.table(notes), path / "notes.parquet")
    pq.write_table(pa.table(coded), path / "labels.parquet")
    return prepare_notes("table", path, path / "folder", shards=shards, min_characters=0)


def tokenizer_of(folder: NoteFolder, **options) -> PreTrainedTokenizerFast:
    subjects = [one for part in folder.notes() for one in part["subject_id"].to_pylist()]
    return fit_word_tokenizer(folder.notes(), subject_ids=subjects, cleaning="none", min_patients=1, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> NoteFolder:
    labels = [("n0", CODES[2]), ("n0", CODES[0]), ("n1", "ICD10CM/Z99"), ("n3", CODES[1])]
    return folder_of(TEXTS, tmp_path_factory.mktemp("small"), subjects=[1, 1, 2, 4], labels=labels, shards=2)


# Splits


SUBJECTS = st.one_of(st.integers(0, 5), st.integers(-(2**63), 2**63 - 1))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(SUBJECTS, st.sampled_from(["train", "test", "unlabelled"])), min_size=1, max_size=30),
    st.booleans(),
    st.integers(0, 5),
)
def test_no_patient_is_in_two_splits_whatever_the_ids(rows, official, seed):
    subjects, parts = zip(*rows, strict=True)
    columns = {"split": list(parts)} if official else {}
    with TemporaryDirectory() as path:
        splits = split_notes(folder_of(["text"] * len(rows), path, subjects=subjects, shards=2, **columns), seed)
    owner = {f"n{row}": subject for row, subject in enumerate(subjects)}
    patients = {name: {owner[note] for note in notes.to_pylist()} for name, notes in splits.items()}
    assert sum(map(len, patients.values())) == len(set().union(*patients.values()))
    placed = [note for notes in splits.values() for note in notes.to_pylist()]
    assert len(placed) == len(set(placed))
    if not official:
        assert set(placed) == set(owner)
        assert {name: sorted(ids) for name, ids in patients.items()} == {
            name: ids.tolist() for name, ids in split_patients(subjects, seed=seed).items()
        }
    else:
        stated = {f"n{row}": part for row, part in enumerate(parts)}
        assert set(splits["test"].to_pylist()) == {note for note, part in stated.items() if part == "test"}
        assert {stated[note] for name in ("train", "validation") for note in splits[name].to_pylist()} <= {"train"}
        tested = {subject for subject, part in rows if part == "test"}
        trained = {subject for subject, part in rows if part == "train"} - tested
        assert patients["train"] | patients["validation"] == trained


def test_an_official_train_part_is_cut_eighty_to_twenty_by_patient(tmp_path, caplog):
    subjects = [*range(2_000), 5, 6, 3_000]
    parts = ["train"] * 2_000 + ["test", "unlabelled", "unlabelled"]
    splits = split_notes(folder_of(["text"] * 2_003, tmp_path, subjects=subjects, split=parts))
    assert 1_500 < len(splits["train"]) < 1_700
    assert len(splits["train"]) + len(splits["validation"]) == 1_999
    assert (splits["test"].to_pylist(), splits["unlabelled"].to_pylist()) == (["n2000"], ["n2002"])
    assert "2 notes are left out" in caplog.text


def test_without_uncoded_notes_there_is_no_such_split(small):
    assert set(split_notes(small)) == {"train", "validation", "test"}


# Coding


def test_a_note_keeps_its_windows_and_its_codes(small):
    tokenizer = tokenizer_of(small)
    rows = {
        row["note_id"]: row
        for row in build_coding_examples(small, tokenizer, CODES, note_ids=["n0", "n1", "n2", "n3"], max_length=32)
    }
    assert {note: row["labels"] for note, row in rows.items()} == {"n0": [0, 2], "n1": [], "n2": [], "n3": [1]}
    assert {note: row["subject_id"] for note, row in rows.items()} == {"n0": 1, "n1": 1, "n2": 2, "n3": 4}
    assert rows["n0"]["segment_lengths"] == [32, 32]  # 60 words in windows of 30
    assert rows["n1"]["segment_lengths"] == [32, 12]  # 20 words and 20 full stops
    assert rows["n2"]["segment_lengths"] == [2]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert rows["n2"]["input_ids"] == [cls, sep]
    for number, text in enumerate(TEXTS):
        row = rows[f"n{number}"]
        ends = np.cumsum(row["segment_lengths"])
        windows = np.split(row["input_ids"], ends[:-1])
        assert all((window[0], window[-1]) == (cls, sep) for window in windows)
        own = np.concatenate([window[1:-1] for window in windows]).tolist()
        assert own == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_only_the_first_windows_stay_and_the_cut_notes_are_counted(small, caplog):
    tokenizer, ids = tokenizer_of(small), ["n0", "n1", "n2", "n3"]
    whole = build_coding_examples(small, tokenizer, CODES, note_ids=ids, max_length=32)
    cut = build_coding_examples(small, tokenizer, CODES, note_ids=ids, max_length=32, max_segments=1)
    for before, after in zip(whole, cut, strict=True):
        assert after["segment_lengths"] == before["segment_lengths"][:1]
        assert after["input_ids"] == before["input_ids"][: after["segment_lengths"][0]]
    assert "3 of 4 notes were cut to 1 windows" in caplog.text
    assert "cut to 1 windows: 3" in cut.info.description


def test_arrow_files_hold_what_memory_does_in_chunks_of_any_size(small, tmp_path, monkeypatch):
    tokenizer = tokenizer_of(small)
    options = {"note_ids": ["n3", "n0", "n2", "n1"], "max_length": 32}
    memory = build_coding_examples(small, tokenizer, CODES, **options)
    monkeypatch.setattr(note_datasets, "CHARACTERS_PER_CHUNK", 1)
    files = build_coding_examples(small, tokenizer, CODES, **options, cache_dir=tmp_path / "examples")
    assert files.to_list() == memory.to_list()
    assert files.features == memory.features
    assert {Path(file["filename"]).parent for file in files.cache_files} == {tmp_path / "examples"}


def test_only_the_notes_asked_for_are_read_and_unknown_ones_are_refused(small):
    tokenizer = tokenizer_of(small)
    assert build_coding_examples(small, tokenizer, CODES, note_ids=pa.array(["n1"]))["note_id"] == ["n1"]
    with pytest.raises(EhrDataError, match="1 of 2 are not"):
        build_coding_examples(small, tokenizer, CODES, note_ids=["n1", "n9"])
    with pytest.raises(EhrDataError, match="at least one note"):
        build_pretraining_examples(small, tokenizer, note_ids=[])
    with pytest.raises(ValueError, match="`max_segments` must be at least 1"):
        build_coding_examples(small, tokenizer, CODES, note_ids=["n1"], max_segments=0)


def test_a_label_set_of_one_code_that_no_note_has_gives_empty_labels(small):
    examples = build_coding_examples(small, tokenizer_of(small), ["ICD10CM/A00.0"], note_ids=["n0", "n3"])
    assert examples["labels"] == [[], []]


def test_long_and_non_latin_notes_become_examples(tmp_path):
    texts = ["x " * 100_000, "Боль в груди. Кашель.", "患者发热。咳嗽！", "ألم في الصدر؟ حمى.", "🤒 39.5 °C! 🤧 ok."]
    folder = folder_of(texts, tmp_path)
    ids = [f"n{row}" for row in range(len(texts))]
    tokenizer = tokenizer_of(folder)
    coded = build_coding_examples(folder, tokenizer, CODES, note_ids=ids, max_length=512)
    assert len(coded[0]["segment_lengths"]) == -(-100_000 // 510)
    pairs = build_pretraining_examples(folder, tokenizer, note_ids=ids, max_length=512)
    assert max(map(len, pairs["input_ids"])) <= 512
    assert tokenizer.unk_token_id not in set().union(*pairs["input_ids"])


# Pre-training


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> NoteFolder:
    """Notes in which each word names its note and place; sentences of seven words, lines of three sentences."""
    generator = np.random.default_rng(0)
    texts = []
    for note in range(400):
        words = [f"w{note}x{place}" for place in range(generator.integers(20, 120))]
        ends = [".\n" if place % 21 == 20 else "." if place % 7 == 6 else "" for place in range(len(words))]
        texts.append(" ".join(word + end for word, end in zip(words, ends, strict=True)))
    return folder_of(texts, tmp_path_factory.mktemp("numbered"), subjects=[note // 2 for note in range(400)])


@pytest.fixture(scope="module")
def words(numbered) -> PreTrainedTokenizerFast:
    return tokenizer_of(numbered, vocab_size=100_000)


def halves(row: dict, tokenizer) -> tuple[list[str], list[str]]:
    tokens = np.array(tokenizer.convert_ids_to_tokens(row["input_ids"]))
    types = np.array(row["token_type_ids"])
    first, second = tokens[types == 0].tolist(), tokens[types == 1].tolist()
    assert (first[0], first[-1], second[-1]) == ("[CLS]", "[SEP]", "[SEP]")
    assert types.tolist() == [0] * len(first) + [1] * len(second)
    return first[1:-1], second[:-1]


def place(token: str) -> tuple[int, int]:
    note, _, word = token.removeprefix("w").partition("x")
    return int(note), int(word)


ALL = [f"n{note}" for note in range(400)]


def test_halves_come_from_where_their_label_says(numbered, words):
    rows = build_pretraining_examples(numbered, words, note_ids=ALL, max_length=48)
    pairs = [(*halves(row, words), row["next_sentence_label"]) for row in rows]
    checked = 0
    for first, second, label in pairs:
        assert first
        assert second
        before, behind = ([place(token) for token in half if token != "."] for half in (first, second))
        for half in (before, behind):  # a stretch of one note
            assert half == [(half[0][0], half[0][1] + step) for step in range(len(half))]
        if before and behind:
            checked += 1
            (note, last), (other, start) = before[-1], behind[0]
            assert (other, start) == (note, last + 1) if label == 0 else note // 2 != other // 2
    assert checked > 0.9 * len(pairs)
    share = np.mean([label for *_, label in pairs])
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / len(pairs))
    assert max(len(row["input_ids"]) for row in rows) == 48


def test_a_window_is_cut_where_a_sentence_starts_nearest_to_a_uniform_place(numbered, words):
    rows = build_pretraining_examples(numbered, words, note_ids=ALL, max_length=48)
    pairs = [halves(row, words) for row in rows if row["next_sentence_label"] == 0]
    with_stop = [(first, second) for first, second in pairs if "." in first[:-1]]
    assert all(first[-1] == "." for first, _ in with_stop)
    assert all(place(second[0])[1] % 7 == 0 for first, second in pairs if first[-1] == ".")


def test_the_sentence_start_that_is_taken_is_the_nearest(tmp_path):
    """Of 45 tokens, sentences start at 10 and 20; of the 44 places, 15 are nearest to the first of them."""
    text = f"{'a ' * 8}a. {'b ' * 8}b. {'c ' * 25}"
    ids = [f"n{row}" for row in range(2_000)]
    folder = folder_of([text] * len(ids), tmp_path)
    tokenizer = tokenizer_of(folder)
    rows = build_pretraining_examples(folder, tokenizer, note_ids=ids, max_length=48).to_list()
    cuts = np.array([len(halves(row, tokenizer)[0]) for row in rows if row["next_sentence_label"] == 0])
    assert set(cuts.tolist()) == {10, 20}
    assert abs((cuts == 10).mean() - 15 / 44) < 4 * np.sqrt(0.25 / len(cuts))


@pytest.mark.parametrize(
    ("text", "second"),
    [
        ("one two\nthree", ["three"]),
        ("one two? three", ["three"]),
        ("3.5 mg", None),
        ("e.g.x b", None),
        ("热。咳", ["咳"]),
    ],
)
def test_sentences_end_where_a_reader_sees_it(tmp_path, text, second):
    folder = folder_of([text] * 20, tmp_path, subjects=[1] * 20)
    tokenizer = tokenizer_of(folder)
    rows = build_pretraining_examples(folder, tokenizer, note_ids=[f"n{row}" for row in range(20)], max_length=32)
    found = {tuple(halves(row, tokenizer)[1]) for row in rows}
    assert found == {tuple(second)} if second else len(found) > 1


def test_a_window_without_a_sentence_is_cut_between_any_two_tokens(tmp_path):
    folder = folder_of([" ".join(f"w{note}x{place}" for place in range(40)) for note in range(300)], tmp_path)
    tokenizer = tokenizer_of(folder, vocab_size=100_000)
    rows = build_pretraining_examples(folder, tokenizer, note_ids=[f"n{row}" for row in range(300)], max_length=64)
    cuts = [len(halves(row, tokenizer)[0]) for row in rows]
    assert (min(cuts) < 4, max(cuts) > 36) == (True, True)
    assert {len(row["input_ids"]) for row in rows if row["next_sentence_label"] == 0} == {43}


def test_the_length_of_a_pair_does_not_tell_its_kind(numbered, words):
    rows = build_pretraining_examples(numbered, words, note_ids=ALL, max_length=48)
    full = {
        label: [len(row["input_ids"]) == 48 for row in rows if row["next_sentence_label"] == label] for label in (0, 1)
    }
    assert abs(np.mean(full[0]) - np.mean(full[1])) < 0.1


def held_out_accuracy(feature: np.ndarray, label: np.ndarray) -> float:
    """How well the commoner kind of each value, learnt on one half of the pairs, tells those of the other."""
    even, right = np.arange(len(label)) % 2 == 0, 0
    _, value = np.unique(feature, return_inverse=True)
    for fitted in (even, ~even):
        votes = np.bincount(value[fitted], 2 * label[fitted] - 1, minlength=value.max() + 1)
        right += np.sum((votes[value[~fitted]] > 0) == label[~fitted])
    return float(right / len(label))


def shortcuts(rows, tokenizer) -> dict[str, float]:
    """Held-out accuracy of single features of a pair that say nothing of what its halves mean."""
    ids, types = (list(map(np.array, rows[name])) for name in ("input_ids", "token_type_ids"))
    last, length = np.array([one[-2] for one in ids]), np.array([len(one) for one in ids])
    features = {
        "last token is a stop": np.isin(last, tokenizer.convert_tokens_to_ids([".", "!", "?"])),
        "last token": last,
        "first token of the second half": np.array([one[kind.argmax()] for one, kind in zip(ids, types, strict=True)]),
        "full": length == length.max(),
        "length": length // 16,
        "length of the second half": np.array([kind.sum() for kind in types]) // 16,
    }
    label = np.array(rows["next_sentence_label"])
    return {name: held_out_accuracy(feature, label) for name, feature in features.items()}


def charted(path) -> tuple[NoteFolder, list[str]]:
    """1,500 notes of sentences that start with a capital word and end with a stop; most notes end with a name."""
    generator = np.random.default_rng(1)
    texts = []
    for note in range(1_500):
        sentences = [
            " ".join(["Start", *generator.choice(["a", "b", "c"], generator.integers(1, 9))]) + "."
            for _ in range(generator.integers(1, 60))
        ]
        texts.append("\n".join(sentences) + (" signed" if note % 3 else ""))
    return folder_of(texts, path), [f"n{note}" for note in range(len(texts))]


def test_no_token_or_length_tells_a_true_second_half_from_another_patients(tmp_path):
    folder, ids = charted(tmp_path)
    tokenizer = tokenizer_of(folder)
    rows = build_pretraining_examples(folder, tokenizer, note_ids=ids, max_length=256)
    found = shortcuts(rows, tokenizer)
    assert max(found.values()) < 0.56, found


def test_no_token_or_length_tells_the_pairs_of_real_notes(real_data, tmp_path):
    (archive,) = real_data("codiesp").glob("*.tar.xz")
    folder = prepare_notes("codiesp", archive, tmp_path / "folder", options={"language": "en"})
    splits = split_notes(folder)
    ids = splits["train"].to_pylist() + splits["unlabelled"].to_pylist()
    tokenizer = tokenizer_of(folder, vocab_size=4_000)
    rows = build_pretraining_examples(folder, tokenizer, note_ids=ids)
    found = shortcuts(rows, tokenizer)
    assert max(found.values()) < 0.56, found


def test_a_true_pair_loses_no_token(numbered, words):
    rows = build_pretraining_examples(numbered, words, note_ids=ALL, max_length=48)
    windows = build_pretraining_examples(numbered, words, note_ids=ALL, max_length=47, next_sentence=False)
    whole = {tuple(row[1:-1]) for row in windows["input_ids"]}
    for row in rows:
        if row["next_sentence_label"] == 0:
            first, second = halves(row, words)
            assert tuple(words.convert_tokens_to_ids(first + second)) in whole


def test_windows_without_pairs_hold_every_token_once(numbered, words):
    rows = build_pretraining_examples(numbered, words, note_ids=["n7", "n8"], max_length=16, next_sentence=False)
    assert rows.column_names == ["input_ids", "token_type_ids"]
    assert set().union(*rows["token_type_ids"]) == {0}
    texts = [text for part in numbered.notes(["n7", "n8"]) for text in part["text"].to_pylist()]
    expected = [one for text in texts for one in words(text, add_special_tokens=False)["input_ids"]]
    assert [one for ids in rows["input_ids"] for one in ids[1:-1]] == expected
    assert max(map(len, rows["input_ids"])) == 16


def test_pairs_depend_on_the_seed_alone(numbered, words):
    def build(seed):
        return build_pretraining_examples(numbered, words, note_ids=ALL[:50], max_length=48, seed=seed).to_list()

    assert build(1) == build(1)
    assert build(1) != build(2)


def test_a_patient_alone_has_no_random_pairs(numbered, words):
    rows = build_pretraining_examples(numbered, words, note_ids=["n2", "n3"], max_length=24)
    assert set(rows["next_sentence_label"]) == {0}


def test_windows_that_are_too_short_are_left_out_and_counted(tmp_path):
    folder = folder_of(["", "one", "one two", "one two three"], tmp_path)
    tokenizer, ids = tokenizer_of(folder), ["n0", "n1", "n2", "n3"]
    pairs = build_pretraining_examples(folder, tokenizer, note_ids=ids, max_length=8)
    assert len(pairs) == 2
    assert "2 examples; left out: 2 × window of fewer than 2 tokens" in pairs.info.description
    assert len(build_pretraining_examples(folder, tokenizer, note_ids=ids, max_length=8, next_sentence=False)) == 3
    with pytest.raises(EhrDataError, match="No example is left"):
        build_pretraining_examples(folder, tokenizer, note_ids=["n0", "n1"], max_length=8)
    with pytest.raises(ValueError, match="`max_length` must leave room for 2 tokens beside 3 special ones, got 4"):
        build_pretraining_examples(folder, tokenizer, note_ids=ids, max_length=4)


def test_a_tokenizer_lays_out_pairs_in_its_own_way(numbered, words, tmp_path):
    """RoBERTa's template: two separators between the halves, one token type."""
    from tokenizers.processors import TemplateProcessing

    words.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    template = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=special
    )
    tokenizer.backend_tokenizer.post_processor = template
    rows = build_pretraining_examples(numbered, tokenizer, note_ids=ALL[:20], max_length=32)
    assert set().union(*rows["token_type_ids"]) == {0}
    for row in rows:
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert tokens.count("[SEP]") == 3
        assert tokens[tokens.index("[SEP]") + 1] == "[SEP]"
        assert len(tokens) <= 32

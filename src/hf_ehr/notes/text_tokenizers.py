"""Vocabularies of the training notes: whole words (BERT-XML) or WordPiece, as fast tokenizers that load alone.

The cleaning is part of the tokenizer, which keeps offsets into the original text: a checkpoint reads raw notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import fingerprint

from .cleaning import CleaningName, clean, steps
from .tables import Notes, note_tables

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_BATCH = 256  # notes handed over at a time
_REPEATS = 4096  # of a word in one text for a trainer


@dataclass(frozen=True)
class OovReport:
    """How the words of some notes meet a vocabulary; a word is what the tokenizer splits text into before its model.

    Attributes:
        notes: Number of notes.
        words: Word occurrences.
        out_of_vocabulary: Word occurrences that are no single token: unknown, or split into pieces.
        unknown: Word occurrences that hold ``[UNK]``.
    """

    notes: int
    words: int
    out_of_vocabulary: int
    unknown: int

    @property
    def per_note(self) -> float:
        """Out-of-vocabulary words per note (BERT-XML reports 0.93, and 49.2 for the vocabulary of BERT base)."""
        return self.out_of_vocabulary / self.notes

    @property
    def rate(self) -> float:
        """Out-of-vocabulary words per word; 0 where there are no words."""
        return self.out_of_vocabulary / max(1, self.words)


def fit_word_tokenizer(
    notes: Notes,
    *,
    subject_ids: Any,
    vocab_size: int = 20_000,
    cleaning: CleaningName = "bert_xml",
    lowercase: bool = True,
    min_patients: int = 11,
    max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """The vocabulary of BERT-XML: the most frequent words of the training notes, all others ``[UNK]`` (§3.1).

    The paper does not say how words are found; here white space and punctuation part them. A vocabulary is data about
    patients and a rare word may be a name, which its own patient's notes repeat: words of fewer than ``min_patients``
    training patients are left out, however often they stand there.

    Args:
        notes: NOTES in memory, or paths of Parquet shards.
        subject_ids: The training patients, no others.
        vocab_size: Size of the vocabulary, the five special tokens included.
        cleaning: An option of :func:`hf_ehr.notes.clean`, built into the tokenizer.
        lowercase: Lower-case the text, whatever the cleaning does.
        min_patients: Fewest training patients who have a word. They are counted shard by shard: a patient whose notes
            lie in several shards counts once in each (prepared folders keep a patient in one).
        max_length: ``model_max_length`` of the tokenizer.

    Returns:
        The tokenizer (``[CLS] … [SEP]``). Its ``init_kwargs`` hold ``cleaning`` and ``fitted_on``, the fingerprint
        that :func:`hf_ehr.tasks.audit.check_fitted_on` compares.

    Raises:
        ValueError: ``vocab_size`` leaves no room for words, or an option is not known.
        EhrDataError: The training patients have no notes.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk"]))
    trainer = trainers.WordLevelTrainer(**_training_options(vocab_size))
    return _fit(tokenizer, trainer, notes, subject_ids, cleaning, lowercase, min_patients, max_length)


def fit_wordpiece_tokenizer(
    notes: Notes,
    *,
    subject_ids: Any,
    vocab_size: int = 20_000,
    cleaning: CleaningName = "none",
    lowercase: bool = True,
    min_patients: int = 11,
    max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """A WordPiece vocabulary of the training notes: the practical choice, no word is unknown to it for long.

    Takes and returns what :func:`fit_word_tokenizer` does. Pieces are learned from the words of ``min_patients``
    patients alone; of the others only single characters enter, so that they can be spelled. Accents are kept. A note
    set too small for ``vocab_size`` gives fewer pieces.

    Raises:
        ValueError: ``vocab_size`` leaves no room for pieces, or an option is not known.
        EhrDataError: The training patients have no notes.
    """
    from tokenizers import Tokenizer, decoders, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(**_training_options(vocab_size), min_frequency=2)
    return _fit(tokenizer, trainer, notes, subject_ids, cleaning, lowercase, min_patients, max_length)


def oov_per_note(tokenizer: PreTrainedTokenizerFast, notes: Notes, *, cleaning: CleaningName = "none") -> OovReport:
    """Counts the words of ``notes`` that a vocabulary does not hold as one token.

    Args:
        tokenizer: Any fast tokenizer.
        notes: NOTES in memory, or paths of Parquet shards.
        cleaning: Applied before the tokenizer; leave it out for one that cleans itself.

    Raises:
        EhrDataError: There are no notes.
    """
    notes_read = words = split = unknown = 0
    for texts in _texts(notes, None):
        encoded = tokenizer(clean(texts, cleaning), add_special_tokens=False, verbose=False)
        notes_read += len(texts)
        for row, ids in enumerate(encoded["input_ids"]):
            word = np.array(encoded.word_ids(row), np.int64)
            pieces = np.bincount(word)
            unknown_pieces = np.bincount(word[np.array(ids) == tokenizer.unk_token_id], minlength=len(pieces))
            words += int(np.count_nonzero(pieces))
            split += int(np.count_nonzero((pieces > 1) | (unknown_pieces > 0)))
            unknown += int(np.count_nonzero(unknown_pieces))
    if not notes_read:
        raise EhrDataError("`notes` must hold at least one note, got none.")
    return OovReport(notes_read, words, split, unknown)


def _training_options(vocab_size: int) -> dict[str, Any]:
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"`vocab_size` must exceed the {len(SPECIAL_TOKENS)} special tokens, got {vocab_size}.")
    return {
        "vocab_size": vocab_size,
        "special_tokens": list(SPECIAL_TOKENS.values()),
        "show_progress": False,
    }


def _fit(
    tokenizer: Tokenizer,
    trainer: Any,
    notes: Notes,
    subject_ids: Any,
    cleaning: CleaningName,
    lowercase: bool,
    min_patients: int,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """Trains ``tokenizer`` on the notes of the training patients and dresses it for transformers."""
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.normalizer = _normalizer(cleaning, lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    subjects = np.unique(np.asarray(subject_ids if hasattr(subject_ids, "__array__") else list(subject_ids), np.int64))
    if min_patients < 1:
        raise ValueError(f"`min_patients` must be at least 1, got {min_patients}. Choose 11 to publish a vocabulary.")
    tokenizer = _trained(tokenizer, trainer, _words(tokenizer, notes, pa.array(subjects)), min_patients)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise EhrDataError(
            f"The {len(subjects)} patients in `subject_ids` have no word of {min_patients} patients in `notes`. "
            "Check that the ids belong to them, or lower `min_patients`."
        )
    start, end = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        cleaning=cleaning,
        fitted_on=fingerprint(subjects),
        min_patients=min_patients,
        **{f"{name}_token": token for name, token in SPECIAL_TOKENS.items()},
    )


def _trained(tokenizer: Tokenizer, trainer: Any, words: pl.DataFrame, min_patients: int) -> Tokenizer:
    """Trained on the words of enough patients; of the others pieces of one character are known, and no more.

    The trainer numbers the pieces of one character that go on with a word in another order each time, and breaks ties
    by these numbers. Named beforehand they have a place: the same notes give the same vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    normalizer, pre_tokenizer, special = tokenizer.normalizer, tokenizer.pre_tokenizer, list(SPECIAL_TOKENS.values())
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.WhitespaceSplit()  # these are words already
    shared = words.filter(pl.col("patients") >= min_patients).sort("word")
    pieces = hasattr(trainer, "initial_alphabet")
    if pieces:
        alphabet = sorted(set().union(*words["word"].to_list()))
        trainer.initial_alphabet = alphabet
        trainer.special_tokens = special + ([f"##{one}" for one in alphabet] if shared.height else [])
    tokenizer.train_from_iterator(_repeated(shared), trainer)
    if pieces:  # anew, for special tokens would be looked for in raw text
        decoder = tokenizer.decoder
        tokenizer = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token=SPECIAL_TOKENS["unk"]))
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens(special)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return tokenizer


def _repeated(words: pl.DataFrame) -> Iterator[str]:
    """Each word as often as it occurs."""
    for word, times in words.select("word", "occurrences").iter_rows():
        for first in range(0, times, _REPEATS):
            yield " ".join([word] * min(_REPEATS, times - first))


def _words(tokenizer: Tokenizer, notes: Notes, subjects: pa.Array) -> pl.DataFrame:
    """``word``, ``patients`` who have it and ``occurrences``, as the tokenizer splits text into words."""
    found = pl.DataFrame(schema={"word": pl.String, "patients": pl.Int64, "occurrences": pl.Int64})
    seen = np.array([], np.int64)
    for table in note_tables(notes):
        table = table.filter(pc.is_in(table["subject_id"], value_set=subjects))
        there = np.unique(table["subject_id"].to_numpy())
        if np.isin(there, seen).any():
            raise EhrDataError(
                "`notes` must have all notes of a patient in one shard, or patients cannot be counted. Write them "
                "with `prepare_notes`, or give one table."
            )
        seen = np.concatenate([seen, there])
        found = pl.concat([found, _words_of(tokenizer, table, there)])
        found = found.group_by("word").agg(pl.col("patients", "occurrences").sum())
    return found


def _words_of(tokenizer: Tokenizer, table: pa.Table, subjects: np.ndarray) -> pl.DataFrame:
    """:func:`_words` of a shard, ``subjects`` being its patients."""
    from tokenizers import Tokenizer, models, trainers

    splitter = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk"]))
    splitter.normalizer, splitter.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    everything = trainers.WordLevelTrainer(vocab_size=1 << 31, min_frequency=0, show_progress=False)
    splitter.train_from_iterator(_texts([table], None), everything)
    vocabulary = splitter.get_vocab()
    owner = np.searchsorted(subjects, table["subject_id"].to_numpy())
    occurrences, parts, first = np.zeros(len(vocabulary), np.int64), [np.array([], np.int64)], 0
    for texts in _texts([table], None):
        ids = [one.ids for one in splitter.encode_batch(texts, add_special_tokens=False)]
        flat = np.fromiter(chain.from_iterable(ids), np.int64)
        occurrences += np.bincount(flat, minlength=len(vocabulary))
        patient = np.repeat(owner[first : first + len(texts)], [len(one) for one in ids])
        first += len(texts)
        parts.append(np.unique(patient * len(vocabulary) + flat))
    patients = np.bincount(np.unique(np.concatenate(parts)) % max(1, len(vocabulary)), minlength=len(vocabulary))
    place = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    return pl.DataFrame(
        {"word": list(vocabulary), "patients": patients[place], "occurrences": occurrences[place]}
    ).cast({"patients": pl.Int64, "occurrences": pl.Int64, "word": pl.String})


def _normalizer(cleaning: str, lowercase: bool) -> Any:
    """The cleaning in the tokenizer's own terms, behind BERT's (control characters, room around CJK characters)."""
    from tokenizers import Regex, normalizers

    parts = [
        normalizers.Lowercase() if step is None else normalizers.Replace(Regex(step[0]), step[1])
        for step in steps(cleaning)
    ]
    bert = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=lowercase
    )
    return normalizers.Sequence([*parts, bert])


def _texts(notes: Notes, subjects: pa.Array | None) -> Iterator[list[str]]:
    """Texts batch by batch, of the given patients only."""
    for table in note_tables(notes):
        if subjects is not None:
            table = table.filter(pc.is_in(table["subject_id"], value_set=subjects))
        for batch in tqdm(
            table.select(["text"]).to_batches(max_chunksize=_BATCH),
            desc="Reading notes",
            unit="batch",
            disable=table.num_rows < 16 * _BATCH,
        ):
            yield batch["text"].to_pylist()

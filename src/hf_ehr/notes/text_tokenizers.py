"""Vocabularies of the training notes: whole words (BERT-XML) or WordPiece, as fast tokenizers that load alone.

The cleaning is part of the tokenizer, which keeps offsets into the original text: a checkpoint reads raw notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
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
    min_frequency: int = 1,
    max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """The vocabulary of BERT-XML: the most frequent words of the training notes, all others ``[UNK]`` (§3.1).

    The paper does not say how words are found; here white space and punctuation part them. A vocabulary is data about
    patients and a rare word may be a name: raise ``min_frequency`` before you publish one.

    Args:
        notes: NOTES in memory, or paths of Parquet shards.
        subject_ids: The training patients, no others.
        vocab_size: Size of the vocabulary, the five special tokens included.
        cleaning: An option of :func:`hf_ehr.notes.clean`, built into the tokenizer.
        lowercase: Lower-case the text, whatever the cleaning does.
        min_frequency: Fewest occurrences of a word.
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
    trainer = trainers.WordLevelTrainer(**_training_options(vocab_size, min_frequency))
    return _fit(tokenizer, trainer, notes, subject_ids, cleaning, lowercase, max_length)


def fit_wordpiece_tokenizer(
    notes: Notes,
    *,
    subject_ids: Any,
    vocab_size: int = 20_000,
    cleaning: CleaningName = "none",
    lowercase: bool = True,
    min_frequency: int = 2,
    max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """A WordPiece vocabulary of the training notes: the practical choice, no word is unknown to it for long.

    Takes and returns what :func:`fit_word_tokenizer` does; ``min_frequency`` is that of a pair of pieces. Accents are
    kept. A note set too small for ``vocab_size`` gives fewer pieces.

    Raises:
        ValueError: ``vocab_size`` leaves no room for pieces, or an option is not known.
        EhrDataError: The training patients have no notes.
    """
    from tokenizers import Tokenizer, decoders, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(**_training_options(vocab_size, min_frequency))
    return _fit(tokenizer, trainer, notes, subject_ids, cleaning, lowercase, max_length)


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


def _training_options(vocab_size: int, min_frequency: int) -> dict[str, Any]:
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"`vocab_size` must exceed the {len(SPECIAL_TOKENS)} special tokens, got {vocab_size}.")
    return {
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
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
    max_length: int,
) -> PreTrainedTokenizerFast:
    """Trains ``tokenizer`` on the notes of the training patients and dresses it for transformers."""
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.normalizer = _normalizer(cleaning, lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    subjects = np.unique(np.asarray(subject_ids if hasattr(subject_ids, "__array__") else list(subject_ids), np.int64))
    tokenizer.train_from_iterator(_texts(notes, pa.array(subjects)), trainer)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise EhrDataError(
            f"The {len(subjects)} patients in `subject_ids` have no words in `notes`. "
            "Check that the ids belong to them, or lower `min_frequency`."
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
        **{f"{name}_token": token for name, token in SPECIAL_TOKENS.items()},
    )


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

"""What is fitted for models of visits: vocabularies of codes and, for a new text encoder, of notes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.notes.cleaning import CleaningName, steps
from hf_ehr.notes.text_tokenizers import fit_wordpiece_tokenizer
from hf_ehr.schema import shard_paths
from hf_ehr.vocabulary import fit_tokenizer

logger = logging.getLogger(__name__)

_NOTES = "visits.list.element.notes.list.element."


def fit_visit_processor(
    data: str,
    train: np.ndarray,
    *,
    min_patients: int = 11,
    notes: bool = True,
    note_encoder: str | None = None,
    note_max_length: int = 512,
    note_vocab_size: int = 20_000,
    cleaning: CleaningName = "none",
) -> MedMPLMProcessor:
    """The tokenizers of a model, fitted on the training patients.

    Args:
        data: Prepared folder.
        train: Its training patients.
        min_patients: Fewest patients of a code, and of a word.
        notes: Whether notes are read.
        note_encoder: Text encoder whose tokenizer is taken; a vocabulary is fitted without one. There is none where
            the training patients have no notes.
        note_max_length: Most tokens of a note.
        note_vocab_size: Size of a fitted vocabulary.
        cleaning: An option of :func:`hf_ehr.notes.clean`, which becomes part of the tokenizer.

    Raises:
        EhrDataError: The training patients have no codes, or their notes no words.
        ValueError: An option is not known.
    """
    diagnoses, medications = (
        fit_tokenizer(data, subject_ids=train, kinds=[kind], min_patients=min_patients)
        for kind in ("diagnoses", "medications")
    )
    words = None
    if notes and note_encoder is not None:
        words = cleaning_tokenizer(AutoTokenizer.from_pretrained(note_encoder), cleaning, note_max_length)
    elif notes and not any(table.num_rows for table in _training_notes(data, train)):
        logger.warning("The training patients of %s have no notes: codes alone are read.", data)
    elif notes:
        words = fit_wordpiece_tokenizer(
            _training_notes(data, train), subject_ids=train, vocab_size=note_vocab_size, cleaning=cleaning,
            min_patients=min_patients, max_length=note_max_length,
        )  # fmt: skip
    return MedMPLMProcessor(diagnoses, medications, words)


def cleaning_tokenizer(tokenizer: Any, cleaning: CleaningName, max_length: int) -> Any:
    """A tokenizer that cleans notes before all else, and reads so many tokens.

    Args:
        tokenizer: A fast one.
        cleaning: See :func:`fit_visit_processor`.
        max_length: Its new ``model_max_length``.
    """
    from tokenizers import Regex, Tokenizer, normalizers

    if not steps(cleaning):
        tokenizer.model_max_length = max_length
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    cleaners = [
        normalizers.Lowercase() if step is None else normalizers.Replace(Regex(step[0]), step[1])
        for step in steps(cleaning)
    ]
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*cleaners, *own])
    # The class of a family may build its normalizer anew when it is loaded; the general one reads what was saved.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=tokenizer.model_input_names,
        cleaning=cleaning,
        **tokenizer.special_tokens_map,
    )


def _training_notes(data: str, train: np.ndarray) -> Any:
    """NOTES of the training patients, shard by shard."""
    for path in shard_paths(data, "records"):
        columns = ["subject_id", f"{_NOTES}text"]
        records = pq.ParquetFile(path).read(columns=columns).combine_chunks()
        visits = records["visits"].combine_chunks()
        notes = pc.struct_field(visits.flatten(), "notes")
        patient = pc.list_parent_indices(visits).take(pc.list_parent_indices(notes))
        texts = pc.struct_field(notes.flatten(), "text")
        number = pa.array(np.arange(len(texts))).cast(pa.string())
        table = pa.table({"note_id": number, "subject_id": records["subject_id"].take(patient), "text": texts})
        yield table.filter(pc.and_(pc.is_in(table["subject_id"], pa.array(train)), pc.is_valid(table["text"])))


__all__ = ["cleaning_tokenizer", "fit_visit_processor"]

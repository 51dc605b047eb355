"""Clinical notes: cleaning with offsets kept, filters, windows of tokens, vocabularies, and the labels of notes."""

from .cleaning import CleanedText, CleaningName, clean, clean_with_offsets
from .corpus import FilteredNotes, filter_notes, segment_notes
from .folder import NoteFolder
from .labels import frequent_codes, impute_chronic_codes, imputed_cells, keep_codes, label_ids
from .leakage import NoteLeakage, note_leakage
from .prepare import format_notes_summary, prepare_notes
from .tables import (
    DISTRACTOR_KINDS,
    EVIDENCE_KINDS,
    LABEL_TABLE_SCHEMA,
    NOTE_TABLE_SCHEMA,
    SEGMENT_SCHEMA,
    SPAN_TABLE_SCHEMA,
)
from .text_tokenizers import OovReport, fit_word_tokenizer, fit_wordpiece_tokenizer, oov_per_note

__all__ = [
    "DISTRACTOR_KINDS",
    "EVIDENCE_KINDS",
    "LABEL_TABLE_SCHEMA",
    "NOTE_TABLE_SCHEMA",
    "SEGMENT_SCHEMA",
    "SPAN_TABLE_SCHEMA",
    "CleanedText",
    "CleaningName",
    "FilteredNotes",
    "NoteFolder",
    "NoteLeakage",
    "OovReport",
    "clean",
    "clean_with_offsets",
    "filter_notes",
    "fit_word_tokenizer",
    "fit_wordpiece_tokenizer",
    "format_notes_summary",
    "frequent_codes",
    "impute_chronic_codes",
    "imputed_cells",
    "keep_codes",
    "label_ids",
    "note_leakage",
    "oov_per_note",
    "prepare_notes",
    "segment_notes",
]

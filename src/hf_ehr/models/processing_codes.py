"""What the processors of codes and notes share: two tokenizers of codes, and one of notes that may be missing."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from .tokenization_ehr import EhrCodeTokenizer

NOTES = "note_tokenizer"


class CodesAndNotesProcessor(ProcessorMixin):
    """Saves, opens and applies the tokenizers; what a batch is made of is the subclass's.

    Args:
        *parts: What the subclass's `__init__` names before `note_tokenizer`, in that order.
        note_tokenizer: Tokenizer of the text encoder, its `model_max_length` the most tokens of a note; `None` where
            no tokens of notes are read.
    """

    diagnosis_tokenizer: EhrCodeTokenizer
    medication_tokenizer: EhrCodeTokenizer

    def __init__(self, *parts: Any, note_tokenizer: Any = None):
        super().__init__(*parts)
        if note_tokenizer is not None:
            self.check_argument_for_proper_class(NOTES, note_tokenizer)
        self._note_tokenizer = note_tokenizer

    @property
    def note_tokenizer(self) -> Any:
        """The tokenizer of notes, or `None`."""
        return self._note_tokenizer

    @property
    def code_tokenizers(self) -> dict[str, EhrCodeTokenizer]:
        """The tokenizers of codes, by what they are called in a batch."""
        return {"diagnosis": self.diagnosis_tokenizer, "medication": self.medication_tokenizer}

    @property
    def code_kinds(self) -> list[str]:
        """The lists of codes that are read, `diagnoses` and `medications`."""
        return [kind for tokenizer in self.code_tokenizers.values() for kind in tokenizer.kinds]

    def code_ids(self, rows: Sequence[Mapping[str, Any]], **limits: Any) -> dict[str, torch.Tensor]:
        """Lists of codes → `diagnosis_ids` and `medication_ids` (rows, codes) int64, padded.

        Args:
            rows: Mappings that may hold the `code_kinds`.
            **limits: Of `EhrCodeTokenizer.encode_patients`.
        """
        batch = {}
        for name, tokenizer in self.code_tokenizers.items():
            visits = [{"visits": [{kind: row.get(kind) or () for kind in tokenizer.kinds}]} for row in rows]
            ids = tokenizer.encode_patients(visits, **limits)["input_ids"]
            batch[f"{name}_ids"] = padded(ids, tokenizer.pad_token_id)
        return batch

    def note_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, special ones included, cut at the tokenizer's `model_max_length`."""
        if not texts:
            return []
        return self.note_tokenizer(list(texts), truncation=True, return_attention_mask=False)["input_ids"]

    def note_batch(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Texts → `note_input_ids` and `note_attention_mask` (texts, tokens); an empty text has no tokens."""
        ids = iter(self.note_ids([text for text in texts if text]))
        tokens = [next(ids) if text else [] for text in texts]
        mask = padded([[1] * len(each) for each in tokens], 0)
        return {"note_input_ids": padded(tokens, self.note_tokenizer.pad_token_id), "note_attention_mask": mask}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in the library; each tokenizer has a folder of its own."""
        if self.note_tokenizer is not None:
            self.note_tokenizer.save_pretrained(os.path.join(save_directory, NOTES))
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The state beside the tokenizers, and whether there is one of notes."""
        return super().to_dict() | {"reads_notes": self.note_tokenizer is not None}

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What every processor has; the library knows no part that may be missing."""
        return [name for name in super().get_attributes() if name != NOTES]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """The parts of a saved processor, in the order of `__init__`."""
        parts = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        if (processor_dict or {}).get("reads_notes"):
            parts.append(cls._load_tokenizer_from_pretrained(NOTES, pretrained_model_name_or_path, **kwargs))
        return parts


def check_fields(row: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuses a field that nothing reads: a misspelt one would be missing without a word."""
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise ValueError(f"{what} must hold the fields {', '.join(known)} only, got {unknown}. Correct the names.")


def padded(lists: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """(rows, longest) int64, at least one wide."""
    lengths = np.array([len(row) for row in lists])
    rectangle = np.full((len(lists), max(int(lengths.max()), 1)), padding, np.int64)
    flat = np.fromiter((index for row in lists for index in row), np.int64, lengths.sum())
    rectangle[np.arange(rectangle.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(rectangle)

"""Raw visits → what MedM-PLM and G-BERT read: sets of diagnoses and of medications, and the notes.

It joins two tokenizers of codes and, where a model reads text, the tokenizer of its text encoder. Visits of a prepared
folder go through :func:`hf_ehr.visit_datasets.build_visit_examples`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .tokenization_ehr import EhrCodeTokenizer

NOTES = "note_tokenizer"


class MedMPLMProcessor(ProcessorMixin):
    """Makes batches for the models of visits; saved in one folder, it opens with `AutoProcessor`.

    Args:
        diagnosis_tokenizer: Codes of the `kinds` it was fitted on, `diagnoses`.
        medication_tokenizer: Likewise, `medications`.
        note_tokenizer: Tokenizer of the text encoder, its `model_max_length` the most tokens of a note; `None` where
            notes are not read.
    """

    diagnosis_tokenizer: EhrCodeTokenizer
    medication_tokenizer: EhrCodeTokenizer
    max_codes = 60
    """Codes of a set that are read; the authors' 61 places hold `[CLS]` too."""

    def __init__(
        self,
        diagnosis_tokenizer: EhrCodeTokenizer,
        medication_tokenizer: EhrCodeTokenizer,
        note_tokenizer: Any = None,
    ):
        super().__init__(diagnosis_tokenizer, medication_tokenizer)
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
    def model_input_names(self) -> list[str]:
        """All that a batch may hold."""
        notes = [] if self.note_tokenizer is None else ["note_input_ids", "note_attention_mask"]
        return [*(f"{name}_ids" for name in self.code_tokenizers), *notes]

    def __call__(self, visits: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> BatchFeature:
        """A batch of visits or of patients. Whatever is missing is missing to the model too.

        Args:
            visits: Mappings, or one alone, all of one form. A visit holds `diagnoses` and `medications`, lists of
                `VOCABULARY/CODE` in order of priority, of which the first 60 are read and unknown ones back off as the
                tokenizer says; and `note`, a text. All may be left out or be None. A patient holds `visits`, oldest
                first; of the visit whose medications are asked for, the last, only `diagnoses` should be given.

        Returns:
            `diagnosis_ids` and `medication_ids` (visits, codes) int64, padded, of patients (patients, visits, codes);
            with a tokenizer of notes `note_input_ids` and `note_attention_mask`, with tokens in the last dimension.
            Shorter patients have visits of padding behind their own.

        Raises:
            ValueError: There is no visit, patients and visits are mixed, a field is not known, or a note is given that
                nothing reads.
        """
        rows = [visits] if isinstance(visits, Mapping) else list(visits)
        patients = [row for row in rows if "visits" in row]
        if not rows or (patients and len(patients) < len(rows)):
            raise ValueError(
                "`visits` must hold visits, or patients with a list `visits` each; got none, or a mixture."
            )
        if not patients:
            return BatchFeature(self._batch(rows))
        for row in rows:
            _check_fields(row, ["visits"], "A patient")
        lengths = [len(row["visits"]) for row in rows]
        if not max(lengths):
            raise ValueError("`visits` must hold at least one visit, got none.")
        flat = self._batch([visit for row in rows for visit in row["visits"]])
        there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        batch = {}
        for name, values in flat.items():
            padding = self._padding(name)
            batch[name] = values.new_full((*there.shape, values.shape[-1]), padding).masked_scatter(
                there[..., None], values
            )
        return BatchFeature(batch)

    def note_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, special ones included, cut at the tokenizer's `model_max_length`."""
        if not texts:
            return []
        return self.note_tokenizer(list(texts), truncation=True, return_attention_mask=False)["input_ids"]

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

    def _padding(self, name: str) -> int:
        tokenizers = {f"{kind}_ids": tokenizer for kind, tokenizer in self.code_tokenizers.items()}
        tokenizers |= {"note_input_ids": self.note_tokenizer}
        return tokenizers[name].pad_token_id if name in tokenizers else 0

    def _batch(self, visits: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Visits → (visits, codes) and (visits, tokens)."""
        kinds = [kind for tokenizer in self.code_tokenizers.values() for kind in tokenizer.kinds]
        for visit in visits:
            _check_fields(visit, [*kinds, "note"], "A visit")
        batch = {}
        for name, tokenizer in self.code_tokenizers.items():
            rows = [{"visits": [{kind: visit.get(kind) or () for kind in tokenizer.kinds}]} for visit in visits]
            ids = tokenizer.encode_patients(rows, max_length=self.max_codes)["input_ids"]
            batch[f"{name}_ids"] = _padded(ids, tokenizer.pad_token_id)
        texts = [(visit.get("note") or "").strip() for visit in visits]
        if self.note_tokenizer is None:
            if any(texts):
                raise ValueError("`note` must be left out: the processor has no `note_tokenizer`. Make it with one.")
            return batch
        found = iter(self.note_ids([text for text in texts if text]))
        tokens = [next(found) if text else [] for text in texts]
        mask = _padded([[1] * len(each) for each in tokens], 0)
        return batch | {
            "note_input_ids": _padded(tokens, self.note_tokenizer.pad_token_id),
            "note_attention_mask": mask,
        }


def _check_fields(row: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise ValueError(f"{what} must hold the fields {', '.join(known)} only, got {unknown}. Correct the names.")


def _padded(lists: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """(rows, longest) int64, at least one wide."""
    lengths = np.array([len(row) for row in lists])
    rectangle = np.full((len(lists), max(int(lengths.max()), 1)), padding, np.int64)
    flat = np.fromiter((index for row in lists for index in row), np.int64, lengths.sum())
    rectangle[np.arange(rectangle.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(rectangle)


MedMPLMProcessor.register_for_auto_class()

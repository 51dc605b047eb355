"""Raw visits → what MedM-PLM and G-BERT read: sets of diagnoses and of medications, and the notes.

It joins two tokenizers of codes and, where a model reads text, the tokenizer of its text encoder. Visits of a prepared
folder go through :func:`hf_ehr.visit_datasets.build_visit_examples`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature

from .processing_codes import CodesAndNotesProcessor, check_fields
from .tokenization_ehr import EhrCodeTokenizer


class MedMPLMProcessor(CodesAndNotesProcessor):
    """Makes batches for the models of visits; saved in one folder, it opens with `AutoProcessor`.

    Args:
        diagnosis_tokenizer: Codes of the `kinds` it was fitted on, `diagnoses`.
        medication_tokenizer: Likewise, `medications`.
        note_tokenizer: Tokenizer of the text encoder, its `model_max_length` the most tokens of a note; `None` where
            notes are not read.
    """

    max_codes = 60
    """Codes of a set that are read; the authors' 61 places hold `[CLS]` too."""

    def __init__(
        self,
        diagnosis_tokenizer: EhrCodeTokenizer,
        medication_tokenizer: EhrCodeTokenizer,
        note_tokenizer: Any = None,
    ):
        super().__init__(diagnosis_tokenizer, medication_tokenizer, note_tokenizer=note_tokenizer)

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
            check_fields(row, ["visits"], "A patient")
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

    def _padding(self, name: str) -> int:
        tokenizers = {f"{kind}_ids": tokenizer for kind, tokenizer in self.code_tokenizers.items()}
        tokenizers |= {"note_input_ids": self.note_tokenizer}
        return tokenizers[name].pad_token_id if name in tokenizers else 0

    def _batch(self, visits: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Visits → (visits, codes) and (visits, tokens)."""
        for visit in visits:
            check_fields(visit, [*self.code_kinds, "note"], "A visit")
        batch = self.code_ids(visits, max_length=self.max_codes)
        texts = [(visit.get("note") or "").strip() for visit in visits]
        if self.note_tokenizer is not None:
            return batch | self.note_batch(texts)
        if any(texts):
            raise ValueError("`note` must be left out: the processor has no `note_tokenizer`. Make it with one.")
        return batch


MedMPLMProcessor.register_for_auto_class()

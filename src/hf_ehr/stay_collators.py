"""Examples of stays and of admissions → BATCH: hours, codes and notes end to end, nothing dense.

stay rows ─▶ StayCollator          feature_ids, feature_counts, stay_hours, demographics
admission rows ─▶ AdmissionCollator  the same of all their stays, stay_admissions, codes, notes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .collators import Hiding, ObjectiveMasking, rectangle

HOURLY = ("feature_ids", "feature_counts")
CODES = {"diagnosis": "diagnosis_ids", "medication": "medication_ids"}


class _Padding(NamedTuple):
    pad_token_id: int


class CodeHiding(ObjectiveMasking):
    """Which codes of a set are hidden: each by itself, special tokens never (MedHMP, Eq. 8).

    Args:
        tokenizer: Gives the special ids and the size of the vocabulary.
        probability: Share of the codes that are hidden.
        seed: Seed of the choices.

    Raises:
        ValueError: The probability is out of range, or the tokenizer knows no code.
    """

    def __call__(self, ids: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        """(admissions, codes) int64, padded → bool of the same shape, True where hidden; its own draws by default."""
        generator = self.generator(None) if generator is None else generator
        return (generator.random(ids.shape, np.float32) < self.probability) & self.is_code[ids]


def code_hiding(tokenizers: Mapping[str, Any], probability: float, seed: int) -> dict[str, CodeHiding]:
    """One for each kind of code, by the names in :data:`CODES`; each draws its own."""
    return {name: CodeHiding(tokenizers[name], probability, seed + place) for place, name in enumerate(CODES)}


class VariableHiding(Hiding):
    """Which variables of a stay the encoder does not see: each by itself, with all its features and over all hours.

    The paper hides nothing in its first stage. What is hidden must be told from the other variables, not copied.

    Args:
        variables: (features,) number of the variable that each feature is of (`HourlyRecipe.variables`, kept ones).
        probability: Share of the variables that are hidden.
        seed: Seed of the choices.

    Raises:
        ValueError: The probability is out of range.
    """

    def __init__(self, variables: np.ndarray, probability: float, seed: int = 0):
        super().__init__(probability, seed)
        self.variables = variables

    def __call__(self, stays: int) -> np.ndarray:
        """(stays, features) bool, True where hidden."""
        shape = (stays, int(self.variables.max(initial=-1)) + 1)
        return (self.generator(None).random(shape, np.float32) < self.probability)[:, self.variables]


class StayCollator:
    """Rows of stays → input of a model of hourly series.

    A row holds ``stay_hours`` (an int), ``feature_ids`` and ``feature_counts`` (lists), ``demographics`` and, in
    continuous form, ``feature_values``; see :class:`hf_ehr.models.hourly_series.HourlySeries` for their meaning.

    Args:
        hiding: Adds ``hidden_features`` (stays, features) bool, for pre-training; None hides nothing.
    """

    def __init__(self, hiding: VariableHiding | None = None):
        self.hiding = hiding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of lists or numpy arrays to a batch.

        Returns:
            ``labels`` first, where the rows have any (``Trainer`` takes the number of examples from the first tensor):
            (stays,) int64 or (stays, num_labels) float32; ``stay_hours`` (stays,), ``feature_ids`` (entries,),
            ``feature_counts`` (hours of all stays,) int64; ``feature_values`` (entries,) float32 where the rows have
            it; ``demographics`` (stays, size) float32.

        Raises:
            ValueError: A row lacks a column, or its hours and counts do not agree.
        """
        batch = _labels(rows) | _series(rows)
        batch["demographics"] = torch.from_numpy(np.stack(_column(rows, "demographics", np.float32)))
        if self.hiding is not None:
            batch["hidden_features"] = torch.from_numpy(self.hiding(len(rows)))
        return batch


class AdmissionCollator:
    """Rows of admissions → input of a MedHMP model.

    A row holds ``stay_hours`` (a list, one a stay; an admission may have none), ``feature_ids`` and ``feature_counts``
    of all its stays one after the other, ``demographics`` likewise, ``diagnosis_ids``, ``medication_ids``, and for its
    note ``note_input_ids`` or ``note_vector``, both of which may be empty.

    Args:
        diagnosis_tokenizer: Gives the padding id of diagnoses.
        medication_tokenizer: Likewise.
        num_demographics: Numbers in the demographics of a stay.
        note_tokenizer: Likewise; None where notes come as vectors, or not at all.
        probability: Share of the codes that are hidden, for pre-training; None hides none.
        seed: Of the choice.
    """

    def __init__(
        self,
        diagnosis_tokenizer: Any,
        medication_tokenizer: Any,
        num_demographics: int,
        note_tokenizer: Any = None,
        probability: float | None = None,
        seed: int = 0,
    ):
        tokenizers = {"diagnosis": diagnosis_tokenizer, "medication": medication_tokenizer}
        self.padding = {name: tokenizer.pad_token_id for name, tokenizer in tokenizers.items()}
        self.num_demographics = num_demographics
        self.note_padding = None if note_tokenizer is None else note_tokenizer.pad_token_id
        self.hiding = None if probability is None else code_hiding(tokenizers, probability, seed)

    @classmethod
    def for_model(cls, config: Any, columns: Sequence[str]) -> AdmissionCollator:
        """A collator that pads as a model's configuration says, for rows of these columns; no code is hidden."""
        codes = (_Padding(config.diagnosis_pad_token_id), _Padding(config.medication_pad_token_id))
        notes = _Padding(getattr(config.note_config, "pad_token_id", None) or 0)
        return cls(*codes, config.num_demographics, notes if "note_input_ids" in columns else None)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of lists or numpy arrays to a batch.

        Returns:
            ``labels`` where the rows have any; ``diagnosis_ids`` and ``medication_ids`` (admissions, codes) int64,
            padded; under hiding ``diagnosis_mask`` and ``medication_mask`` of the same shape, bool, True where hidden;
            ``stay_admissions`` (stays,) int64; the columns of :class:`StayCollator`; ``note_input_ids`` and
            ``note_attention_mask`` (admissions, tokens), or ``note_vectors`` (admissions, size) and ``note_mask``
            (admissions,) bool.

        Raises:
            ValueError: As in :class:`StayCollator`.
        """
        batch = _labels(rows)
        for name, column in CODES.items():
            batch |= self._codes(name, _column(rows, column))
        stays = np.array([len(hours) for hours in _column(rows, "stay_hours")])
        batch["stay_admissions"] = torch.from_numpy(np.repeat(np.arange(len(rows)), stays))
        batch |= _series(rows)
        flat = np.concatenate(_column(rows, "demographics", np.float32))
        batch["demographics"] = torch.from_numpy(flat.reshape(stays.sum(), self.num_demographics))
        if self.note_padding is not None:
            batch |= padded_notes(_column(rows, "note_input_ids"), self.note_padding)
        elif "note_vector" in rows[0]:
            batch |= _vectors(_column(rows, "note_vector", np.float32))
        return batch

    def _codes(self, name: str, ids: list[np.ndarray]) -> dict[str, torch.Tensor]:
        padded = _padded_rows(ids, self.padding[name])
        batch = {CODES[name]: torch.from_numpy(padded)}
        if self.hiding is not None:
            batch[f"{name}_mask"] = torch.from_numpy(self.hiding[name](padded))
        return batch


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    hours = np.concatenate([np.atleast_1d(each) for each in _column(rows, "stay_hours")])
    ids, counts = (np.concatenate(_column(rows, name)) for name in HOURLY)
    if hours.sum() != len(counts) or counts.sum() != len(ids):
        raise ValueError(
            f"`feature_counts` must hold one number for each of the {hours.sum()} hours and add up to the {len(ids)} "
            f"`feature_ids`, got {len(counts)} that add up to {counts.sum()}. Build the examples again."
        )
    batch = {"stay_hours": hours, "feature_ids": ids, "feature_counts": counts}
    if "feature_values" in rows[0]:
        batch["feature_values"] = np.concatenate(_column(rows, "feature_values", np.float32))
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def _labels(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    if "labels" not in rows[0]:
        return {}
    labels = np.stack([np.asarray(row["labels"]) for row in rows])
    return {"labels": torch.from_numpy(labels.astype(np.int64 if labels.ndim == 1 else np.float32))}


def padded_notes(lists: Sequence[Sequence[int] | np.ndarray], padding: int) -> dict[str, torch.Tensor]:
    """Token ids of notes → ``note_input_ids`` and ``note_attention_mask``, both (notes, longest)."""
    padded = _padded_rows(lists, padding)
    there = np.arange(padded.shape[1]) < np.array([len(row) for row in lists])[:, None]
    mask = torch.from_numpy(there.astype(np.int64))
    return {"note_input_ids": torch.from_numpy(padded), "note_attention_mask": mask}


def _padded_rows(lists: Sequence[Sequence[int] | np.ndarray], padding: int) -> np.ndarray:
    """(rows, longest) int64, at least one wide."""
    lengths = np.array([len(row) for row in lists])
    return rectangle(np.concatenate(lists), lengths, padding, max(int(lengths.max()), 1))


def _vectors(vectors: list[np.ndarray]) -> dict[str, torch.Tensor]:
    size = max(len(vector) for vector in vectors)
    there = np.array([len(vector) > 0 for vector in vectors])
    stacked = np.stack([vector if len(vector) else np.zeros(size, np.float32) for vector in vectors])
    return {"note_vectors": torch.from_numpy(stacked), "note_mask": torch.from_numpy(there)}


def _column(rows: Sequence[Mapping[str, Any]], name: str, dtype: Any = np.int64) -> list[np.ndarray]:
    if any(name not in row for row in rows):
        raise ValueError(f"`{name}` must be in every row, and is not. Keep all columns (remove_unused_columns=False).")
    return [np.asarray(row[name], dtype) for row in rows]

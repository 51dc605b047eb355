"""Rows of visits → BATCH: padded sets of codes and notes, part of the codes masked for pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from .collators import IGNORED, ObjectiveMasking, rectangle

SETS = ("diagnosis", "medication")


class CodeSetMasking(ObjectiveMasking):
    """Masks some codes of each set: 80 % become ``[MASK]``, 10 % a code of the same vocabulary, 10 % stay (MedM-PLM).

    Of n codes ``round(probability × n)`` are chosen, at least one and at most ``most``; the authors draw them once for
    all epochs, here each batch draws anew. Diagnoses and medications have a masking each, so that none is replaced by
    a code of the other kind, as in G-BERT's code.

    Args:
        tokenizer: Of one kind of code; gives the mask, the special ids and the size of the vocabulary.
        probability: Share of the codes that are chosen.
        most: Most codes of a set that are chosen.
        seed: Seed of the choices.

    Raises:
        ValueError: The probability is out of range, ``most`` is below 1, or the tokenizer has no mask or no code.
    """

    mask_share, random_share = 0.8, 0.1

    def __init__(self, tokenizer: Any, probability: float = 0.15, most: int = 20, seed: int = 0):
        super().__init__(tokenizer, probability, seed)
        if most < 1:
            raise ValueError(f"`most` must be at least 1, got {most}. Change it.")
        if tokenizer.mask_token_id is None:
            raise ValueError("`tokenizer` must have a mask token, got None. Use `EhrCodeTokenizer.from_codes`.")
        self.most, self.mask_id = most, tokenizer.mask_token_id

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks a batch.

        Args:
            ids: (…, codes) int64, padded.

        Returns:
            What the model is shown, and the labels: the true id where a code was chosen, -100 elsewhere. Both (…,
            codes) int64. A set without codes has no label.
        """
        generator = self.generator(None)
        eligible = self.is_code[ids]
        number = eligible.sum(axis=-1, keepdims=True)
        wanted = np.minimum(np.rint(self.probability * number).clip(1, self.most), number)
        draw = np.where(eligible, generator.random(ids.shape), 2.0)
        chosen = draw.argsort(axis=-1).argsort(axis=-1) < wanted
        action = generator.random(ids.shape)
        other = self.codes[generator.integers(len(self.codes), size=ids.shape)]
        swapped = chosen & (action >= self.mask_share) & (action < self.mask_share + self.random_share)
        shown = np.where(chosen & (action < self.mask_share), self.mask_id, np.where(swapped, other, ids))
        return shown, np.where(chosen, ids, IGNORED)


class VisitCollator:
    """Rows of :func:`hf_ehr.visit_datasets.build_visit_examples` → input of a model of visits.

    Args:
        pad_token_id: Of both kinds of codes.
        note_pad_token_id: Of notes; they also have a mask.
        masking: The masking of ``diagnosis`` and of ``medication``, for pre-training; hides codes and adds labels.
        num_labels: Labels of a visit, for rows with ``label_ids``.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        note_pad_token_id: int = 0,
        *,
        masking: Mapping[str, CodeSetMasking] | None = None,
        num_labels: int | None = None,
    ):
        self.pad_token_id, self.note_pad_token_id = pad_token_id, note_pad_token_id
        self.masking, self.num_labels = masking or {}, num_labels

    @classmethod
    def of(cls, config: Any, **options: Any) -> VisitCollator:
        """The collator of a model with this configuration; ``options`` as for the class."""
        codes = getattr(config, "code_config", None) or config
        notes = getattr(config, "note_config", None)
        padding = (getattr(codes, "pad_token_id", None) or 0, getattr(notes, "pad_token_id", None) or 0)
        return cls(*padding, **options)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows to a batch.

        Args:
            rows: With lists of lists ``diagnosis_ids``, ``medication_ids`` and ``note_input_ids``, one a visit; any of
                them may be left out in all rows.

        Returns:
            ``labels`` first, where the rows have any (``Trainer`` takes the number of examples from the first tensor);
            ``diagnosis_ids`` and ``medication_ids`` (rows, visits, codes) int64; ``note_input_ids`` and
            ``note_attention_mask`` (rows, visits, tokens); under masking ``diagnosis_labels`` and
            ``medication_labels``, -100 where nothing is hidden. Visits that a row does not have are padding. Where
            every row is one visit that is not recommended to (``labels``, or one visit throughout of which codes are
            asked), there is no dimension of visits. ``labels`` are (rows,) int64, or float32 0 and 1: (rows,
            num_labels), or (rows, visits, num_labels) with -100 for visits that are not asked about.

        Raises:
            ValueError: Rows have ``label_ids`` and ``num_labels`` is not given.
        """
        flat = "labels" in rows[0] or ("label_ids" in rows[0] and "diagnosis_ids" not in rows[0])
        lengths = np.array([len(row["visit_ids"]) for row in rows])
        batch = self._labels(rows, lengths, flat)
        for name in SETS:
            if f"{name}_ids" in rows[0]:
                ids = _sets(rows, f"{name}_ids", lengths, self.pad_token_id)
                if name in self.masking:
                    ids, batch[f"{name}_labels"] = self.masking[name](ids)
                batch[f"{name}_ids"] = ids
        if "note_input_ids" in rows[0]:
            batch["note_input_ids"] = _sets(rows, "note_input_ids", lengths, self.note_pad_token_id)
            counts = np.array([len(note) for row in rows for note in row["note_input_ids"]])
            there = _spread(counts, lengths)[..., None] > np.arange(batch["note_input_ids"].shape[-1])
            batch["note_attention_mask"] = there.astype(np.int64)
        if flat:
            batch = {name: values if name == "labels" else values[:, 0] for name, values in batch.items()}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _labels(self, rows: Sequence[Mapping[str, Any]], lengths: np.ndarray, flat: bool) -> dict[str, np.ndarray]:
        if "labels" in rows[0]:
            return {"labels": np.array([int(row["labels"]) for row in rows])}
        if "label_ids" not in rows[0]:
            return {}
        if self.num_labels is None:
            raise ValueError("`num_labels` must be given for rows with `label_ids`, got None. Take the model's.")
        asked = _spread(np.fromiter(chain.from_iterable(row["asked"] for row in rows), bool), lengths)
        labels = np.where(asked[..., None], 0.0, IGNORED) * np.ones(self.num_labels)
        lists = [ids for row in rows for ids in row["label_ids"]]
        place = _spread(np.arange(len(lists)), lengths, IGNORED)
        where = np.argwhere(place >= 0)
        counts = np.array([len(ids) for ids in lists])
        row, visit = np.repeat(where, counts, axis=0).T
        labels[row, visit, np.fromiter(chain.from_iterable(lists), np.int64, counts.sum())] = 1
        return {"labels": (labels[:, 0] if flat else labels).astype(np.float32)}


def _sets(rows: Sequence[Mapping[str, Any]], name: str, lengths: np.ndarray, padding: int) -> np.ndarray:
    """Lists of lists → (rows, visits, most ids) int64, at least one wide."""
    sets = [ids for row in rows for ids in row[name]]
    counts = np.array([len(ids) for ids in sets])
    flat = np.fromiter(chain.from_iterable(sets), np.int64, counts.sum())
    padded = rectangle(flat, counts, padding, max(int(counts.max(initial=0)), 1))
    return _spread(padded, lengths, padding)


def _spread(values: np.ndarray, lengths: np.ndarray, padding: int = 0) -> np.ndarray:
    """Values of all visits, (visits of all rows, …) → (rows, most visits, …)."""
    there = np.arange(lengths.max()) < lengths[:, None]
    spread = np.full((*there.shape, *values.shape[1:]), padding, values.dtype)
    spread[there] = values
    return spread

"""EXAMPLES → BATCH: codes are hidden, then patients are padded to a rectangle or packed end to end.

    rows or bins ─▶ FlatBatch ─ masking ─▶ PaddedCollator  (batch, sequence), attention_mask
                                        └▶ PackedCollator  (1, total), cu_seqlens

Both collators take example rows (mappings) or one bin that [`FlatExamples`] gathered, and give the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ._histories import total_before
from .samplers import FlatBatch

IGNORED = -100

Masking = Callable[[FlatBatch], tuple[FlatBatch, np.ndarray]]


class Hiding:
    """What the objectives share that hide things at random: with which probability, and a generator of their own."""

    def __init__(self, probability: float, seed: int):
        if not 0 < probability < 1:
            raise ValueError(f"`probability` must lie between 0 and 1, got {probability}.")
        self.probability, self.seed = probability, seed
        self._source: tuple[int, ...] | None = None
        self._generator = np.random.Generator(np.random.PCG64DXSM())

    def generator(self, key: tuple[int, int] | None) -> np.random.Generator:
        """The generator for a batch: made from ``key`` where it has one, else this process's own running one."""
        if key is not None:
            return np.random.Generator(np.random.PCG64DXSM([self.seed, *key]))
        worker = get_worker_info()
        # A worker's seed is drawn anew in each epoch; forked workers would otherwise all repeat their parent's masks.
        source = (self.seed, int(os.environ.get("RANK", 0)), 0 if worker is None else 1 + worker.seed)
        if source != self._source:
            self._source, self._generator = source, np.random.Generator(np.random.PCG64DXSM(source))
        return self._generator


class ObjectiveMasking(Hiding):
    """Hiding of codes: which ids are codes."""

    def __init__(self, tokenizer: Any, probability: float, seed: int):
        super().__init__(probability, seed)
        self.is_code = np.ones(len(tokenizer), bool)
        self.is_code[tokenizer.all_special_ids] = False
        self.codes = np.flatnonzero(self.is_code)
        if not len(self.codes):
            raise ValueError("`tokenizer` must know at least one code, got special tokens only. Fit it on records.")


class CodeMasking(ObjectiveMasking):
    """The masked-code objective: chosen codes become ``[MASK]`` (80 %), a random code (10 %) or stay (10 %).

    Special tokens are never chosen and never put in. Every batch has at least one target as long as it has a code.

    Args:
        tokenizer: Gives the mask, the special ids and the size of the vocabulary.
        probability: Share of codes that are chosen (BERT's 15 %), each by itself.
        max_predictions: 1 chooses exactly one code of each patient instead (Med-BERT, section "Pretraining").
        seed: Seed of the choices.
        mask_share: Share of the chosen codes that become ``[MASK]``.
        random_share: Share of the chosen codes that become a random code.

    Raises:
        ValueError: A share is out of range, or the tokenizer has no mask.
    """

    def __init__(
        self,
        tokenizer: Any,
        probability: float = 0.15,
        max_predictions: int | None = None,
        seed: int = 0,
        mask_share: float = 0.8,
        random_share: float = 0.1,
    ):
        super().__init__(tokenizer, probability, seed)
        if max_predictions not in (None, 1):
            raise ValueError(f"`max_predictions` must be None or 1 (one code per patient), got {max_predictions}.")
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
            raise ValueError(
                f"`mask_share` and `random_share` must be non-negative and add up to at most 1, got {mask_share} and "
                f"{random_share}."
            )
        if tokenizer.mask_token_id is None:
            raise ValueError("`tokenizer` must have a mask token, got None. Use `EhrCodeTokenizer.from_codes`.")
        self.mask_id, self.max_predictions = tokenizer.mask_token_id, max_predictions
        self.mask_share, self.random_share = mask_share, random_share

    def __call__(self, batch: FlatBatch) -> tuple[FlatBatch, np.ndarray]:
        """The batch with codes hidden, and the targets (tokens,) int64: the true code there, -100 elsewhere."""
        generator = self.generator(batch.key)
        ids = batch.streams["input_ids"]
        chosen, action = self._choose(self.is_code[ids], batch.offsets, generator)
        labels = np.full(len(ids), IGNORED, np.int64)
        labels[chosen] = ids[chosen]
        hidden = ids.copy()
        hidden[chosen[action < self.mask_share]] = self.mask_id
        swapped = chosen[(action >= self.mask_share) & (action < self.mask_share + self.random_share)]
        hidden[swapped] = self.codes[generator.integers(len(self.codes), size=len(swapped))]
        return replace(batch, streams=batch.streams | {"input_ids": hidden}), labels

    def _choose(self, eligible, offsets, generator) -> tuple[np.ndarray, np.ndarray]:
        """Places of the targets, (targets,), and for each a number in [0, 1) that decides what happens to it."""
        if self.max_predictions == 1:
            chosen = _one_of_each(eligible, offsets, generator)
            return chosen, generator.random(len(chosen))
        # One draw decides both: given that it lies below the probability, its share of it is uniform again.
        draw = generator.random(len(eligible), dtype=np.float32)
        chosen = np.flatnonzero((draw < self.probability) & eligible)
        if len(chosen):
            return chosen, draw[chosen] / self.probability
        chosen = _one_of_each(eligible, np.array([0, len(eligible)]), generator)
        return chosen, generator.random(len(chosen))


class SetMasking(ObjectiveMasking):
    """The masked-set objective: part of a patient's distinct codes is taken out without a trace, then predicted.

    A code goes with all its occurrences, otherwise the visible ones would tell. A patient of at least two distinct
    codes keeps at least one and loses at least one; special tokens always stay.

    Args:
        tokenizer: Gives the special ids and the size of the vocabulary.
        probability: Share of the distinct codes that are hidden, each by itself.
        seed: Seed of the choices.

    Raises:
        ValueError: The probability is out of range.
    """

    def __init__(self, tokenizer: Any, probability: float = 0.5, seed: int = 0):
        super().__init__(tokenizer, probability, seed)

    def __call__(self, batch: FlatBatch) -> tuple[FlatBatch, np.ndarray]:
        """The batch without the hidden codes, and these, (patients, most hidden) int64, padded with -100."""
        generator = self.generator(batch.key)
        ids, patients = batch.streams["input_ids"], len(batch.offsets) - 1
        places = np.flatnonzero(self.is_code[ids])
        patient = np.repeat(np.arange(patients), batch.lengths)
        pairs, pair_of = np.unique(patient[places] * len(self.is_code) + ids[places], return_inverse=True)
        owner, code = np.divmod(pairs, len(self.is_code))
        hidden = self._hidden(owner, patients, generator)
        keep = np.ones(len(ids), bool)
        keep[places[hidden[pair_of]]] = False
        streams = {name: values[keep] for name, values in batch.streams.items()}
        offsets = total_before(np.bincount(patient[keep], minlength=patients))
        count = np.bincount(owner[hidden], minlength=patients)
        targets = rectangle(code[hidden], count, IGNORED, max(count.max(), 1))
        return replace(batch, streams=streams, offsets=offsets), targets

    def _hidden(self, owner: np.ndarray, patients: int, generator: np.random.Generator) -> np.ndarray:
        """Which (patient, code) pairs are hidden; ``owner`` is the patient of each pair, ascending."""
        hidden = generator.random(len(owner), dtype=np.float32) < self.probability
        distinct = np.bincount(owner, minlength=patients)
        count = np.bincount(owner[hidden], minlength=patients)
        wrong = (distinct >= 2) & ((count == 0) | (count == distinct))
        offsets = total_before(distinct)
        flipped = _one_of_each(wrong[owner], offsets, generator)
        hidden[flipped] ^= True
        hidden[offsets[:-1][distinct == 1]] = False
        return hidden


class PaddedCollator:
    """Patients as rows of a rectangle, padded on the right: what every model of the library understands.

    Args:
        tokenizer: Gives the padding id.
        masking: [`CodeMasking`] or [`SetMasking`] for pre-training; ``None`` for classification.
        pad_to_multiple_of: Round the length of the rows up to a multiple of this (tensor cores like 8).
    """

    def __init__(self, tokenizer: Any, masking: Masking | None = None, pad_to_multiple_of: int | None = None):
        self.pad_id, self.masking, self.pad_to_multiple_of = tokenizer.pad_token_id, masking, pad_to_multiple_of

    def __call__(self, features: Sequence[dict | FlatBatch]) -> dict[str, torch.Tensor]:
        """Example rows, or one bin, to a batch.

        Returns:
            ``input_ids``, ``attention_mask``, ``visit_ids``, ``serial_ids`` (batch, sequence) int64, where the
            examples have them also ``age_ids`` and ``day_ids``; ``labels``: codes (batch, sequence) or hidden sets
            (batch, hidden) under a masking, else classes (batch,) int64 or 0/1 (batch, num_labels) float32;
            ``prolonged_stay_labels`` (batch,) int64 where the examples have it.

        Raises:
            ValueError: The examples have class ``labels`` beside a masking, or there are several bins.
        """
        batch, targets, codes = _prepare(features, self.masking)
        width = int(batch.lengths.max())
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        for name, values in batch.streams.items():
            padding = self.pad_id if name == "input_ids" else 0
            targets[name] = torch.from_numpy(rectangle(values, batch.lengths, padding, width))
        ones = np.ones(len(batch.streams["input_ids"]), np.int64)
        targets["attention_mask"] = torch.from_numpy(rectangle(ones, batch.lengths, 0, width))
        if codes is not None:
            codes = codes if codes.ndim == 2 else rectangle(codes, batch.lengths, IGNORED, width)
            targets["labels"] = torch.from_numpy(codes)
        return targets


class PackedCollator:
    """Patients end to end in one row, without padding; attention keeps to the borders in ``cu_seqlens``.

    Args:
        tokenizer: As in [`PaddedCollator`]; nothing of it is needed without padding.
        masking: As in [`PaddedCollator`].
    """

    def __init__(self, tokenizer: Any, masking: Masking | None = None):
        self.masking = masking

    def __call__(self, features: Sequence[dict | FlatBatch]) -> dict[str, Any]:
        """Example rows, or one bin, to a batch; patients keep their order.

        Returns:
            ``input_ids``, ``visit_ids``, ``serial_ids`` (1, total) int64, where the examples have them also
            ``age_ids`` and ``day_ids``;
            ``cu_seqlens`` (patients + 1,) int32;
            ``max_seqlen``, a Python int; ``labels``: codes (1, total) or hidden sets (patients, hidden) under a
            masking, else per patient as in [`PaddedCollator`]; ``prolonged_stay_labels`` (patients,) int64.

        Raises:
            ValueError: As [`PaddedCollator`].
        """
        batch, packed, codes = _prepare(features, self.masking)
        for name, values in batch.streams.items():
            packed[name] = torch.from_numpy(values.astype(np.int64))[None]
        packed["cu_seqlens"] = torch.from_numpy(batch.offsets.astype(np.int32))
        packed["max_seqlen"] = int(batch.lengths.max())
        if codes is not None:
            packed["labels"] = torch.from_numpy(codes if codes.ndim == 2 else codes[None])
        return packed


def _prepare(features: Sequence[Any], masking: Masking | None) -> tuple[FlatBatch, dict[str, Any], np.ndarray | None]:
    """The masked batch, what the collator's output starts with, and the targets of the masking.

    Trainer takes the number of examples from the first tensor of a batch, so targets of whole patients come first.
    """
    batch = _joined(features)
    if masking is not None and "labels" in batch.targets:
        raise ValueError(
            "`labels` must not be in the examples when codes are masked, got both. Drop the column, or the masking."
        )
    batch, codes = (batch, None) if masking is None else masking(batch)
    targets = {}
    for name, values in batch.targets.items():
        whole = np.issubdtype(values.dtype, np.integer)
        targets[name] = torch.from_numpy(values.astype(np.int64 if whole else np.float32))
    return batch, targets, codes


def _joined(features: Sequence[Any]) -> FlatBatch:
    """One batch of the rows, or the one bin."""
    if not isinstance(features[0], FlatBatch):
        return FlatBatch.from_rows(features)
    if len(features) > 1:
        raise ValueError(f"One bin is one batch, got {len(features)}. Set the batch size per device to 1.")
    return features[0]


def _one_of_each(eligible: np.ndarray, offsets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One eligible place, uniformly, of every patient that has one, (at most patients,)."""
    places = np.flatnonzero(eligible)
    bounds = np.searchsorted(places, offsets)
    counts = np.diff(bounds)
    picks = bounds[:-1] + (generator.random(len(counts)) * counts).astype(np.int64)
    return places[picks[counts > 0]]


def rectangle(values: np.ndarray, lengths: np.ndarray, padding: int, width: int) -> np.ndarray:
    """Ragged (total,) to (rows, width) int64, padded on the right."""
    rows = np.full((len(lengths), width), padding, np.int64)
    rows[np.arange(width) < lengths[:, None]] = values
    return rows

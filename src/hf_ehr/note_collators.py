"""Note examples → BATCH: the windows of all notes packed end to end, or padded to a rectangle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ._histories import total_before
from .collators import CodeMasking
from .samplers import FlatBatch


class NoteCodingCollator:
    """Rows of :func:`hf_ehr.note_datasets.build_coding_examples` → input of a coding model.

    With the stock ``Trainer`` set ``remove_unused_columns=False``: it would drop ``segment_lengths``.

    Args:
        tokenizer: Gives the padding id.
        num_labels: Number of labels of the model.
        packed: All windows end to end, for EhrBert; ``False`` pads, for any encoder.

    Raises:
        ValueError: ``num_labels`` is below 1, or padding is asked of a tokenizer without a padding token.
    """

    def __init__(self, tokenizer: Any, num_labels: int, packed: bool = True):
        if num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {num_labels}.")
        self.num_labels, self.layout = num_labels, _Layout(tokenizer, packed)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows of lists or numpy arrays to a batch.

        Returns:
            ``labels`` (notes, num_labels) float32 of 0 and 1 if the rows have any, first: ``Trainer`` takes the number
            of examples from the first tensor. Packed: ``input_ids`` (1, total), ``cu_seqlens`` (segments + 1,) int32,
            ``max_seqlen``, a Python int; padded: ``input_ids`` and ``attention_mask`` (segments, length) int64. Both:
            ``note_index`` (segments,) int64.

        Raises:
            ValueError: A row lacks a column, or has a label id that the model does not have.
        """
        windows = [np.asarray(column, np.int64) for column in _column(rows, "segment_lengths")]
        batch = {"labels": self._labels(rows)} if "labels" in rows[0] else {}
        batch |= self.layout({"input_ids": _joined(rows, "input_ids")}, np.concatenate(windows))
        index = np.repeat(np.arange(len(rows)), [len(lengths) for lengths in windows])
        return batch | {"note_index": torch.from_numpy(index)}

    def _labels(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        ids = [np.asarray(column, np.int64) for column in _column(rows, "labels")]
        label, note = np.concatenate(ids), np.repeat(np.arange(len(ids)), [len(one) for one in ids])
        if len(label) and not 0 <= label.min() <= label.max() < self.num_labels:
            raise ValueError(
                f"`labels` must be ids in [0, {self.num_labels}), got {label.min()} … {label.max()}. Build the "
                "examples with the codes of `config.id2label`."
            )
        hits = torch.zeros(len(ids), self.num_labels)
        hits[torch.from_numpy(note), torch.from_numpy(label)] = 1
        return hits


class NotePretrainingCollator:
    """Rows of :func:`hf_ehr.note_datasets.build_pretraining_examples` → input of a pre-training model, tokens hidden.

    What is hidden depends on the seed, the rank, the worker process and the epoch, as in
    :class:`hf_ehr.collators.CodeMasking`. With the stock ``Trainer`` set ``remove_unused_columns=False``.

    Args:
        tokenizer: Gives the mask, the padding id, the special ids (never chosen) and the size of the vocabulary.
        mlm_probability: Share of tokens that are chosen, each by itself.
        mask_share: Share of the chosen tokens that become ``[MASK]``.
        random_share: Share of the chosen tokens that become a random token; the others stay.
        packed: As in [`NoteCodingCollator`].
        seed: Seed of the choices.

    Raises:
        ValueError: A share is out of range, or the tokenizer lacks a mask or padding token.
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm_probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        packed: bool = True,
        seed: int = 0,
    ):
        self.masking = CodeMasking(tokenizer, mlm_probability, None, seed, mask_share, random_share)
        self.layout = _Layout(tokenizer, packed)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows of lists or numpy arrays to a batch.

        Returns:
            ``next_sentence_label`` (segments,) int64 if the rows have it, first, as in [`NoteCodingCollator`]. Packed:
            ``input_ids``, ``token_type_ids``, ``labels`` (1, total), ``cu_seqlens`` (segments + 1,) int32,
            ``max_seqlen``, a Python int; padded: the three and ``attention_mask`` (segments, length) int64. ``labels``
            are the true tokens where one was chosen, -100 elsewhere.
        """
        lengths = np.array([len(ids) for ids in _column(rows, "input_ids")])
        flat = {name: _joined(rows, name) for name in ("input_ids", "token_type_ids")}
        hidden, targets = self.masking(FlatBatch(flat, total_before(lengths)))
        batch = {}
        if "next_sentence_label" in rows[0]:
            labels = np.array(_column(rows, "next_sentence_label"), np.int64)
            batch["next_sentence_label"] = torch.from_numpy(labels)
        return batch | self.layout(hidden.streams | {"labels": targets}, lengths)


class _Layout:
    """Flat tokens and the lengths of the windows → packed or padded tensors."""

    def __init__(self, tokenizer: Any, packed: bool):
        if not packed and tokenizer.pad_token_id is None:
            raise ValueError("`tokenizer` must have a padding token to pad, got None. Set `pad_token`, or pack.")
        self.packed = packed
        self.padding = {"input_ids": tokenizer.pad_token_id, "labels": -100, "token_type_ids": 0, "attention_mask": 0}

    def __call__(self, streams: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(values) for name, values in streams.items()}
        if self.packed:
            borders = torch.from_numpy(total_before(lengths).astype(np.int32))
            batch: dict[str, Any] = {name: values[None] for name, values in tensors.items()}
            return batch | {"cu_seqlens": borders, "max_seqlen": int(lengths.max())}
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        sizes = lengths.tolist()
        return {
            name: pad_sequence(values.split(sizes), batch_first=True, padding_value=self.padding[name])
            for name, values in tensors.items()
        }


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    if any(name not in row for row in rows):
        raise ValueError(
            f"Each row must have `{name}`, got {sorted(rows[0])}. Pass the rows of `hf_ehr.note_datasets`, and to a "
            "`Trainer` `remove_unused_columns=False`."
        )
    return [row[name] for row in rows]


def _joined(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A column of lists or arrays as one flat array, (tokens,) int64."""
    return np.concatenate([np.asarray(values, np.int64) for values in _column(rows, name)])

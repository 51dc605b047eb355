"""Supervised word embeddings: words and labels in one space, learnt from which notes carry which labels (StarSpace).

    training notes ─ mean of their words' vectors ──┐
                                                    ├─ cosine, margin ranking ─▶ WordEmbeddings ─▶ a model's table
    their labels ─ one vector each, K false labels ─┘

BERT-XML's recurrent baseline reads such words, frozen. Source: Wu et al. (2018), "StarSpace: Embed All The Things!".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn
from tqdm.auto import tqdm

from ._histories import offsets_of, ragged_indices
from .schema import EhrDataError, atomic_path

DIM = 300
"""Size of a vector by default, that of BERT-XML's baseline."""
MARGIN = 0.05
NEGATIVES = 50
"""StarSpace's defaults; its negatives are drawn per example, these per step and shared by the notes of the step."""
START = 1e-3
"""Standard deviation at the start (StarSpace's): the first steps then decide the direction of a rare word."""

_FILE = "word_embeddings.safetensors"

Ragged: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[Sequence[int]] | tuple[np.ndarray, np.ndarray]
"""Lists of ids: of Arrow, of Python, or flat as (values, offsets)."""


@dataclass
class WordEmbeddings:
    """Vectors of words and of labels; their cosine says how much a word speaks for a label.

    Attributes:
        words: (vocab_size, dim) float32, a row for each token id; zeros for tokens that no training note holds.
        labels: (num_labels, dim) float32; zeros for labels that no training note carries.
        settings: The options they were made with.
    """

    words: np.ndarray
    labels: np.ndarray
    settings: dict[str, Any]

    def __post_init__(self):
        if self.words.ndim != 2 or self.labels.ndim != 2 or self.words.shape[1] != self.labels.shape[1]:
            raise ValueError(
                "`words` and `labels` must be (vocab_size, dim) and (num_labels, dim), got "
                f"{self.words.shape} and {self.labels.shape}."
            )

    def save(self, folder: str | Path) -> None:
        """Writes ``word_embeddings.safetensors``, with the settings in its header."""
        from safetensors.numpy import save_file

        tensors = {name: np.ascontiguousarray(getattr(self, name), dtype=np.float32) for name in ("words", "labels")}
        with atomic_path(Path(folder) / _FILE) as path:
            save_file(tensors, path, metadata={"settings": json.dumps(self.settings)})

    @classmethod
    def load(cls, folder: str | Path) -> WordEmbeddings:
        """Reads what :meth:`save` wrote.

        Raises:
            EhrDataError: The folder holds none.
        """
        from safetensors import safe_open

        path = Path(folder) / _FILE
        if not path.is_file():
            raise EhrDataError(f"{path} is missing: `folder` must be one that `WordEmbeddings.save` wrote.")
        with safe_open(path, framework="numpy") as file:
            settings = json.loads(file.metadata()["settings"])
            return cls(file.get_tensor("words"), file.get_tensor("labels"), settings)

    def put_into(self, model: Any) -> Any:
        """Copies the words into a model's embeddings; those without a vector keep their start. Returns the model.

        One factor makes the vectors as large as the rows they replace: their own scale is that of the learning rate.
        Whether they are trained further is the model's own setting (``freeze_word_embeddings`` of ``EhrTextConfig``).

        Args:
            model: A model with ``get_input_embeddings``, over the vocabulary that the words were learnt with.

        Raises:
            ValueError: The model's table has another shape.
        """
        table = model.get_input_embeddings().weight
        if tuple(table.shape) != self.words.shape:
            raise ValueError(
                f"`model` must have word embeddings of shape {self.words.shape}, got {tuple(table.shape)}. Use the "
                f"same tokenizer for both, and embeddings of size {self.words.shape[1]}."
            )
        known = np.flatnonzero(self.words.any(axis=1))
        rows, vectors = torch.from_numpy(known), torch.from_numpy(self.words[known])
        with torch.no_grad():
            table[rows] = (vectors * (table[rows].norm().cpu() / vectors.norm())).to(table)
        return model


def supervised_word_embeddings(
    token_ids: Ragged,
    label_ids: Ragged,
    *,
    vocab_size: int,
    num_labels: int,
    dim: int = DIM,
    epochs: int = 5,
    margin: float = MARGIN,
    negatives: int = NEGATIVES,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
) -> WordEmbeddings:
    """Words and labels such that a note, the mean of its words, lies nearer to its labels than to others.

    Minimises, over pairs of a note and a label of it, the mean over K false labels of
    max(0, margin − cos(note, label) + cos(note, false label)), false labels drawn by their frequency in training, by
    Adagrad with sparse gradients. Under the cosine it does not matter by which power of its length StarSpace divides.

    Args:
        token_ids: Of the training notes, and of no others.
        label_ids: Of the same notes.
        vocab_size: Rows of ``words``.
        num_labels: Rows of ``labels``.
        dim: Size of a vector.
        epochs: Passes over the notes.
        margin: By how much a label must be nearer.
        negatives: K, labels drawn per step.
        learning_rate: Of Adagrad.
        batch_size: Notes per step.
        seed: Of the start, the order of notes and the false labels; equal seeds give equal vectors.

    Raises:
        ValueError: A setting is out of range, an id is, or there are not as many lists of labels as notes.
        EhrDataError: No note with words has a label.
    """
    options = {"dim": dim, "epochs": epochs, "margin": margin, "negatives": negatives}
    options |= {"learning_rate": learning_rate, "batch_size": batch_size}
    for name, value in options.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
    notes, labels = _Lists.of(token_ids, "token_ids", vocab_size), _Lists.of(label_ids, "label_ids", num_labels)
    if len(notes.offsets) != len(labels.offsets):
        raise ValueError(
            f"`label_ids` must have a list for each of the {len(notes.offsets) - 1} notes, got "
            f"{len(labels.offsets) - 1}. Give an empty list to a note without labels."
        )
    useful = np.flatnonzero((notes.lengths() > 0) & (labels.lengths() > 0))
    if not len(useful):
        raise EhrDataError("No note has both words and labels: there is nothing to learn. Check the label ids.")
    rng = np.random.default_rng(seed)
    model = _StarSpace(notes.take(useful), labels.take(useful), options, rng)
    rounds = [order for _ in range(epochs) for order in _batches(rng.permutation(len(useful)), batch_size)]
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # the gradients are PyTorch's own
        for batch in tqdm(rounds, desc="Learning word embeddings", unit="batch"):
            model.step(batch)
    return WordEmbeddings(*model.tables(), options | {"seed": seed})


@dataclass
class _Lists:
    """Lists of ids, end to end."""

    values: np.ndarray
    offsets: np.ndarray
    size: int

    @classmethod
    def of(cls, lists: Ragged, name: str, size: int) -> _Lists:
        """Checks that all ids lie below ``size``."""
        if isinstance(lists, tuple):
            values, offsets = (np.asarray(part, np.int64) for part in lists)
        else:
            array = lists if isinstance(lists, pa.Array | pa.ChunkedArray) else pa.array(lists, pa.list_(pa.int64()))
            array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
            values, offsets = pc.list_flatten(array).to_numpy().astype(np.int64), offsets_of(array)
        if len(values) and not (values.min() >= 0 and values.max() < size):
            raise ValueError(f"`{name}` must lie in [0, {size}), got [{values.min()}, {values.max()}].")
        return cls(values, offsets, size)

    def lengths(self) -> np.ndarray:
        """(lists,) int64."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> _Lists:
        """Some of the lists, in that order."""
        lengths = self.lengths()[rows]
        values = self.values[ragged_indices(self.offsets[rows], lengths)]
        return _Lists(values, np.append(0, lengths.cumsum()), self.size)

    def seen(self) -> np.ndarray:
        """How often each id occurs, (size,)."""
        return np.bincount(self.values, minlength=self.size)


def _batches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


class _StarSpace:
    """Two tables and the step that fits them."""

    def __init__(self, notes: _Lists, labels: _Lists, options: dict[str, Any], rng: np.random.Generator):
        self.notes, self.labels, self.rng = notes, labels, rng
        self.margin, self.negatives = options["margin"], options["negatives"]
        frequency = np.cumsum(labels.seen(), dtype=np.float64)
        self.cumulative = frequency / frequency[-1]

        def start(size: int) -> torch.Tensor:
            return torch.from_numpy(rng.normal(0, START, (size, options["dim"])).astype(np.float32))

        self.words = nn.EmbeddingBag.from_pretrained(start(notes.size), freeze=False, mode="mean", sparse=True)
        self.targets = nn.Embedding.from_pretrained(start(labels.size), freeze=False, sparse=True)
        parameters = [self.words.weight, self.targets.weight]
        self.optimizer = torch.optim.Adagrad(parameters, lr=options["learning_rate"])

    def step(self, rows: np.ndarray) -> None:
        """One step on the notes ``rows``, (batch,)."""
        notes, labels = self.notes.take(rows), self.labels.take(rows)
        drawn = np.unique(np.searchsorted(self.cumulative, self.rng.random(self.negatives), side="right"))
        own = np.zeros((len(rows), self.labels.size), bool)
        owners = np.repeat(np.arange(len(rows)), labels.lengths())
        own[owners, labels.values] = True
        bags = nn.functional.normalize(
            self.words(torch.from_numpy(notes.values), torch.from_numpy(notes.offsets[:-1]))
        )
        true = nn.functional.normalize(self.targets(torch.from_numpy(labels.values)))
        false = nn.functional.normalize(self.targets(torch.from_numpy(drawn)))
        owner = torch.from_numpy(owners)
        near, far = (bags[owner] * true).sum(dim=1, keepdim=True), (bags @ false.T)[owner]
        allowed = torch.from_numpy(~own[:, drawn])[owner]
        loss = ((self.margin - near + far).clamp(min=0) * allowed).sum() / max(1, int(allowed.sum()))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Words and labels, zeros where training showed none."""
        pairs = ((self.words.weight, self.notes), (self.targets.weight, self.labels))
        words, labels = (
            np.where(lists.seen()[:, None] > 0, weight.detach().numpy(), np.float32(0)) for weight, lists in pairs
        )
        return words, labels


__all__ = ["WordEmbeddings", "supervised_word_embeddings"]

"""EXAMPLES as flat buffers, and batches of a token budget made from them: whole patients, nothing but real tokens.

``datasets`` hands out rows as Python lists, which costs a hundred times more than the numbers in them are worth. Here
the Arrow buffers (values and offsets) are read as they lie in the file, and a batch is one gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, Sampler

from ._histories import ragged_indices, total_before
from .datasets import OPTIONAL_STREAMS, STREAMS

if TYPE_CHECKING:
    import datasets

TARGETS = ("labels", "prolonged_stay_labels")
"""What a model predicts of a whole patient; other columns are not for the model."""


@dataclass
class FlatBatch:
    """Some patients, one after the other; patient ``i`` owns the tokens ``offsets[i]:offsets[i + 1]``.

    Attributes:
        streams: ``input_ids``, ``visit_ids``, ``serial_ids`` and, where examples have them, ``age_ids`` and
            ``day_ids``; (tokens,) int.
        offsets: (patients + 1,) int64.
        targets: ``labels`` and ``prolonged_stay_labels`` where there are any, each (patients,) or (patients, labels).
        key: What makes random choices on this batch repeatable, (epoch, index); ``None`` when nobody counts batches.
    """

    streams: dict[str, np.ndarray]
    offsets: np.ndarray
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    key: tuple[int, int] | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[dict]) -> FlatBatch:
        """Joins example rows (mappings of lists or arrays), e.g. of a ``datasets.Dataset``."""
        lengths = [len(row[STREAMS[0]]) for row in rows]
        streams = {
            name: np.concatenate([np.asarray(row[name], np.int64) for row in rows])
            for name in (*STREAMS, *OPTIONAL_STREAMS)
            if name in rows[0]
        }
        targets = {name: np.asarray([row[name] for row in rows]) for name in TARGETS if name in rows[0]}
        return cls(streams, total_before(np.array(lengths)), targets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each patient, (patients,) int64."""
        return np.diff(self.offsets)


class FlatExamples:
    """The flat buffers of a ``datasets.Dataset`` of EXAMPLES, not copied; row mappings (``select``, ``shuffle``) hold.

    Args:
        dataset: EXAMPLES, from memory or from any number of Arrow files.

    Raises:
        ValueError: A stream is missing, or the streams of a patient are not of equal length.
    """

    def __init__(self, dataset: datasets.Dataset):
        missing = set(STREAMS) - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"`dataset` must have the columns {STREAMS}, {sorted(missing)} are missing. Use `build_examples`."
            )
        self.dataset = dataset
        names = [*STREAMS, *(name for name in (*OPTIONAL_STREAMS, *TARGETS) if name in dataset.column_names)]
        batches = dataset.data.table.select(names).to_batches()
        self._chunks = [_Chunk.of(batch) for batch in batches if batch.num_rows]
        self._first_row = total_before(np.array([len(chunk.lengths) for chunk in self._chunks], np.int64))
        self._stored_lengths = np.concatenate([np.empty(0, np.int32), *(chunk.lengths for chunk in self._chunks)])

    def __len__(self) -> int:
        return len(self.dataset)

    def __reduce__(self):
        # A worker process maps the files again instead of receiving their content.
        return FlatExamples, (self.dataset,)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (examples,) int32."""
        return self._stored_lengths if self._rows is None else self._stored_lengths[self._rows]

    @cached_property
    def _rows(self) -> np.ndarray | None:
        """Stored row of each example; the library keeps this mapping private and offers no view of it."""
        mapping = self.dataset._indices
        return None if mapping is None else mapping.column(0).to_numpy()

    def gather(self, indices: Any, key: tuple[int, int] | None = None) -> FlatBatch:
        """The examples ``indices``, in this order.

        Args:
            indices: (patients,) int.
            key: Kept in the batch, see [`FlatBatch`].
        """
        rows = np.asarray(indices, np.int64)
        if self._rows is not None:
            rows = self._rows[rows].astype(np.int64)  # unsigned in the file
        lengths = self._stored_lengths[rows]
        offsets = total_before(lengths)
        streams = {name: np.empty(offsets[-1], np.int32) for name in self._chunks[0].streams}
        targets = {
            name: np.empty((len(rows), *like.shape[1:]), like.dtype) for name, like in self._chunks[0].targets.items()
        }
        for chunk, part in self._by_chunk(rows):
            local = rows[part] - self._first_row[chunk]
            self._chunks[chunk].copy(local, lengths[part], streams, targets, part, offsets)
        return FlatBatch(streams, offsets, targets, key)

    def _by_chunk(self, rows: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Each chunk that holds some of ``rows``, with the places of those rows."""
        if len(self._chunks) == 1:
            yield 0, slice(None)
            return
        owner = np.searchsorted(self._first_row, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        used, first = np.unique(owner[order], return_index=True)
        yield from zip(used.tolist(), np.split(order, first[1:]), strict=True)


@dataclass
class _Chunk:
    """One record batch of EXAMPLES as numpy views of its buffers; the tokens of its first row start at 0."""

    starts: np.ndarray
    lengths: np.ndarray
    streams: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Chunk:
        names = [name for name in (*STREAMS, *OPTIONAL_STREAMS) if name in batch.schema.names]
        bounds = {name: batch[name].offsets.to_numpy() for name in names}
        starts = bounds[STREAMS[0]] - bounds[STREAMS[0]][0]
        for name in names[1:]:
            if not np.array_equal(bounds[name] - bounds[name][0], starts):
                raise ValueError(f"`{name}` must be as long as `{STREAMS[0]}` in each example. Build them again.")
        streams = {name: batch[name].values.to_numpy()[bounds[name][0] :] for name in names}
        targets = {name: _target(batch[name]) for name in TARGETS if name in batch.schema.names}
        return cls(starts[:-1], np.diff(starts).astype(np.int32), streams, targets)

    def copy(self, rows, lengths, streams, targets, places, offsets) -> None:
        """Writes ``rows`` to their ``places`` in the arrays of a batch."""
        source = ragged_indices(self.starts[rows], lengths)
        goal = places if isinstance(places, slice) else ragged_indices(offsets[:-1][places], lengths)
        for name, values in self.streams.items():
            streams[name][goal] = values[source]
        for name, values in self.targets.items():
            targets[name][places] = values[rows]


def _target(column: pa.Array) -> np.ndarray:
    """(examples,) or, of a multi-label column, (examples, labels)."""
    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return column.to_numpy(zero_copy_only=False)


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of whole patients with nearly equal numbers of tokens, at most ``max_tokens`` each.

    The shuffled patients are laid end to end and cut at every K-th of their total length; a patient belongs to the
    batch in which it starts. With ``K = ceil(total / (max_tokens - longest))`` no batch exceeds the budget, the number
    of batches is the same in every epoch, and two batches differ by less than two patients. Within a batch patients
    are ordered by length, so that kernels meet runs of equal length.

    An epoch is a function of the seed and its number: training resumes at (epoch, index) without replaying anything.

    Args:
        lengths: Tokens of each patient, (patients,) int.
        max_tokens: Budget of a batch; the share that is left unused is at most ``longest / max_tokens`` on average.
        seed: Seed of the permutations (numpy's PCG64DXSM; torch's generator is biased over very many samples).
        shuffle: Whether to permute the patients in every epoch.

    Raises:
        ValueError: There is no patient, or one that does not fit into the budget.

    Example:
        >>> list(TokenBudgetBatchSampler([3, 5, 2, 4], max_tokens=12, shuffle=False))
        [[0, 1], [2, 3]]
    """

    batch_size = None  # for accelerate: the number of patients varies
    drop_last = False

    def __init__(self, lengths: Any, max_tokens: int, *, seed: int = 0, shuffle: bool = True):
        self.lengths = np.asarray(lengths)
        if not len(self.lengths):
            raise ValueError("`lengths` must hold at least one patient, got none. Check the split and the filters.")
        longest, total = int(self.lengths.max()), int(self.lengths.sum(dtype=np.int64))
        if max_tokens <= longest:
            raise ValueError(
                f"`max_tokens` must exceed the longest example, {longest} tokens, got {max_tokens}. Take a "
                "multiple of it, or build the examples with a smaller `max_length`."
            )
        self.max_tokens, self.seed, self.shuffle, self.epoch = max_tokens, seed, shuffle, 0
        self._batches = min(max(math.ceil(total / (max_tokens - longest)), 1), len(self.lengths))
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(len(self)):
            yield self.batch(index).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation."""
        self.epoch = epoch

    def batch(self, index: int) -> np.ndarray:
        """The patients of batch ``index`` of the current epoch, (patients,) int64.

        Raises:
            IndexError: There is no such batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must lie in [0, {len(self)}), got {index}.")
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, *self._epoch_plan())
        _, order, bounds = self._plan
        return order[bounds[index] : bounds[index + 1]]

    def _epoch_plan(self) -> tuple[np.ndarray, np.ndarray]:
        """The order of the patients, and where in it each batch begins and ends."""
        patients, batches = len(self.lengths), len(self)
        order = np.arange(patients)
        if self.shuffle:
            order = np.random.Generator(np.random.PCG64DXSM([self.seed, self.epoch])).permutation(patients)
        ends = np.cumsum(self.lengths[order], dtype=np.int64)
        cuts = np.arange(batches + 1) * (ends[-1] / batches)
        bounds = np.searchsorted(ends - self.lengths[order], cuts)
        # A patient longer than a K-th of the total leaves the next batch empty: that one takes over a single patient.
        steps = np.arange(batches + 1)
        bounds = np.maximum.accumulate(bounds - steps) + steps
        bounds = np.minimum(bounds, patients - batches + steps)
        bounds[0], bounds[-1] = 0, patients
        batch_of = np.repeat(steps[:-1], np.diff(bounds))
        return order[np.lexsort((self.lengths[order], batch_of))], bounds


class PackedDataset(Dataset):
    """Bins of a token budget as a map-style data set for the stock ``Trainer``: item ``i`` is bin ``i`` of the epoch.

    Use it with :class:`~hf_ehr.collators.PackedCollator` and

    - ``per_device_train_batch_size=1``: one bin is one batch;
    - ``train_sampling_strategy="sequential"``: the bins are shuffled here. Under the default the library tells the
      epoch to a sampler of its own instead of to this data set when there are several ranks or a run resumes, and
      those epochs then have the bins of the first.

    ``Trainer`` calls :meth:`set_epoch`; worker processes, persistent ones too, see it through shared memory. Masks
    drawn on a bin depend on the seed, the epoch and the bin alone: on any number of ranks and workers, and after a
    resume, they are the same. For evaluation the epoch stays 0 and so do the masks.

    Args:
        dataset: EXAMPLES.
        max_tokens: Budget of a bin.
        seed: As in [`TokenBudgetBatchSampler`].

    Raises:
        ValueError: As [`FlatExamples`] and [`TokenBudgetBatchSampler`].
    """

    def __init__(self, dataset: datasets.Dataset, max_tokens: int, seed: int = 0):
        self.examples = FlatExamples(dataset)
        self.sampler = TokenBudgetBatchSampler(self.examples.lengths, max_tokens, seed=seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.sampler)

    @property
    def num_examples(self) -> int:
        """Examples in all bins of an epoch."""
        return len(self.examples.lengths)

    def __getitem__(self, index: int) -> FlatBatch:
        epoch = int(self._epoch)
        self.sampler.set_epoch(epoch)
        return self.examples.gather(self.sampler.batch(index), key=(epoch, index))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the bins."""
        self._epoch.fill_(epoch)

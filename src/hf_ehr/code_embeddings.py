"""Static code embeddings: one vector per code, learnt from which codes of a patient occur together.

    RECORDS of training patients ─ together in one patient     ─▶ PPMI ─▶ SVD ─┐
                                 ─ within days of each other   ─▶ skip-gram   ─┴▶ CodeEmbeddings ─▶ a model's table

Both methods read the records shard by shard as flat arrays, without a loop over patients or codes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ._histories import NEVER, History, ragged_indices, record_batches, total_before
from .baselines import positive_pmi, truncated_svd
from .datasets import MICROSECONDS_PER_DAY
from .schema import EhrDataError, atomic_path, shard_paths
from .tasks.audit import fingerprint

if TYPE_CHECKING:
    import scipy.sparse as sp

DIM = 64
"""Size of an embedding by default, the hidden size of the small Med-BERT."""

PAIRS_PER_CHUNK = 1 << 21
"""Pairs expanded at a time, so that patients of many codes do not multiply the memory of a shard."""

LONGEST_WINDOW = 1 << 62
"""Microseconds: longer than any history, and no sum with a time leaves 64 bits."""

NOISE_POWER = 0.75
PAIRS_PER_STEP = 1024
MEETINGS_PER_STEP = 4
NOISE_CODES_PER_STEP = 64

_VECTORS_FILE = "code_embeddings.safetensors"
_CODES_FILE = "code_embeddings.json"


@dataclass
class CodeEmbeddings:
    """One vector per code.

    Attributes:
        codes: ``VOCABULARY/CODE`` strings, distinct.
        vectors: Their vectors, (codes, dim) float32.
        method: ``ppmi_svd`` or ``time_window_skipgram``.
        settings: The options it was made with, and ``fitted_on``, the fingerprint of the patients that
            :func:`hf_ehr.tasks.audit.check_fitted_on` compares.
    """

    codes: list[str]
    vectors: np.ndarray
    method: str
    settings: dict[str, Any]

    def __post_init__(self):
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.codes):
            raise ValueError(
                f"`vectors` must be ({len(self.codes)}, dim), a row for each of `codes`, got {self.vectors.shape}."
            )

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.vectors.shape[1]

    def save(self, folder: str | Path) -> None:
        """Writes ``code_embeddings.safetensors`` and, when that is whole, ``code_embeddings.json``."""
        from safetensors.numpy import save_file

        described = Path(folder) / _CODES_FILE
        described.unlink(missing_ok=True)  # an interrupted rewrite must not pair old codes with new vectors
        with atomic_path(Path(folder) / _VECTORS_FILE) as path:
            save_file({"vectors": np.ascontiguousarray(self.vectors, np.float32)}, path)
        content = {"method": self.method, "settings": self.settings, "codes": self.codes}
        with atomic_path(described) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> CodeEmbeddings:
        """Reads what :meth:`save` wrote.

        Raises:
            EhrDataError: The folder holds no whole table.
        """
        from safetensors.numpy import load_file

        path = Path(folder) / _CODES_FILE
        if not path.is_file():
            raise EhrDataError(f"{path} is missing: `folder` must be one that `CodeEmbeddings.save` wrote to its end.")
        content = json.loads(path.read_text())
        vectors = load_file(path.with_name(_VECTORS_FILE))["vectors"]
        return cls(content["codes"], vectors, content["method"], content["settings"])

    def for_tokenizer(self, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
        """The vectors in the order of a tokenizer's ids.

        Args:
            tokenizer: An ``EhrCodeTokenizer``. A code of it that has no vector takes that of its nearest ancestor.

        Returns:
            ``(len(tokenizer), dim)`` float32 with zeros where nothing is known, and which rows are known,
            ``(len(tokenizer),)`` bool; special tokens never are.
        """
        # A tokenizer of the codes that have vectors knows the rules of back-off already.
        own = type(tokenizer).from_codes(self.codes)
        ids = own.codes_to_ids(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        known = ~np.isin(ids, own.all_special_ids)
        matrix = np.zeros((len(tokenizer), self.dim), np.float32)
        matrix[known] = self.vectors[ids[known] - len(own.all_special_ids)]
        return matrix, known

    def nearest(self, code: str, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` other codes of the highest cosine with ``code``, best first, each with its cosine.

        Raises:
            ValueError: The code has no vector.
        """
        if code not in self.codes:
            raise ValueError(f"`code` must be one of the {len(self.codes)} codes with a vector, got {code!r}.")
        row = self.codes.index(code)
        unit = self.vectors / np.maximum(np.linalg.norm(self.vectors, axis=1, keepdims=True), 1e-12)
        cosine = unit @ unit[row]
        others = [index for index in np.argsort(-cosine, kind="stable") if index != row]
        return [(self.codes[index], float(cosine[index])) for index in others[:k]]


def ppmi_svd(
    records: str | Path | pa.Table, tokenizer: Any, *, subject_ids: Any, dim: int = DIM, seed: int = 0
) -> CodeEmbeddings:
    """Truncated SVD of the PPMI of codes within one patient, the table of :mod:`hf_ehr.baselines` from RECORDS.

    Args:
        records: RECORDS, or a prepared folder that is read shard by shard.
        tokenizer: Its codes get vectors, in the order of their ids; ``tokenizer.kinds`` are the code lists read.
        subject_ids: The training patients, no others.
        dim: Size of a vector.
        seed: Of the SVD's start vector.

    Returns:
        Vectors of the codes that share a patient with another one more often than chance.

    Raises:
        ValueError: ``dim`` is not below the number of tokens.
        EhrDataError: No two codes share a patient.
    """
    size = len(tokenizer)
    together = reduce(
        lambda total, codes: total + codes.shared_patients(size), _flat(records, tokenizer, subject_ids), 0
    )
    vectors = truncated_svd(positive_pmi(together), dim, seed)
    settings = {"dim": dim, "seed": seed} | _provenance(tokenizer, subject_ids)
    return _table(tokenizer, vectors, (vectors != 0).any(axis=1), "ppmi_svd", settings)


def time_window_skipgram(
    records: str | Path | pa.Table,
    tokenizer: Any,
    *,
    subject_ids: Any,
    window_days: float = 30,
    dim: int = DIM,
    epochs: int = 2,
    negatives: int = 5,
    learning_rate: float = 0.025,
    seed: int = 0,
) -> CodeEmbeddings:
    """Skip-gram with negative sampling over time windows (t-W2V: Xiang et al. 2019).

    Maximises Σ log σ(u_i·v_j) + ``negatives`` · E_n log σ(−u_i·v_n) over the pairs of :func:`window_pairs`, n drawn by
    frequency to the power of 3/4, with stochastic gradients whose rate falls linearly to zero (Mikolov et al. 2013).
    The result is u, as in word2vec. The same seed gives the same vectors.

    Args:
        records: RECORDS, or a prepared folder that is read shard by shard, once per epoch.
        tokenizer: Its codes get vectors, in the order of their ids; ``tokenizer.kinds`` are the code lists read.
        subject_ids: The training patients, no others.
        window_days: How far apart two visits may start; 0 keeps to the visit (and others of the very same start).
            30 days are the paper's best for prediction, 0 its best for similarity.
        dim: Size of a vector.
        epochs: Passes over all pairs. Some ten thousand patients need no more than two.
        negatives: Weight of the noise.
        learning_rate: Of the first step.
        seed: Of the start, the order of pairs, and the noise.

    Returns:
        Vectors of the codes that have another one in their window.

    Raises:
        ValueError: A setting is out of range.
        EhrDataError: No two codes share a window.
    """
    for name, value in {"dim": dim, "epochs": epochs, "negatives": negatives, "learning_rate": learning_rate}.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
    counts, expected = _count_windows(records, tokenizer, subject_ids, window_days)
    rng = np.random.default_rng(seed)
    model = _SkipGram(counts, dim, negatives, rng)
    done, total = 0, epochs * expected
    with tqdm(total=total, desc="Learning code embeddings", unit="pair", unit_scale=True) as progress:
        for _ in range(epochs):
            for pairs in window_pairs(records, tokenizer, subject_ids=subject_ids, window_days=window_days, rng=rng):
                for codes, contexts in model.steps(pairs):
                    model.step(codes, contexts, learning_rate * (1 - done / total))
                    done += len(codes)
                    progress.update(len(codes))
    settings = {"window_days": window_days, "dim": dim, "epochs": epochs, "negatives": negatives}
    settings |= {"learning_rate": learning_rate, "seed": seed} | _provenance(tokenizer, subject_ids)
    return _table(tokenizer, model.centre.numpy(), counts > 0, "time_window_skipgram", settings)


def window_pairs(
    records: str | Path | pa.Table,
    tokenizer: Any,
    *,
    subject_ids: Any,
    window_days: float = 30,
    rng: np.random.Generator | None = None,
) -> Iterator[np.ndarray]:
    """All pairs of a code and its context, in chunks.

    Two codes of one patient make a pair, in both directions, if and only if they differ and their visits start at most
    ``window_days`` apart. A code that a visit lists twice (after back-off) counts once there. Unknown codes, and
    visits without a start, make none.

    Args:
        records: RECORDS, or a prepared folder.
        tokenizer: Gives the ids; ``tokenizer.kinds`` are the code lists read.
        subject_ids: The patients to read.
        window_days: How far apart two visits may start.
        rng: Shuffles shards, codes within a shard and pairs within a chunk; ``None`` keeps the order.

    Yields:
        ``(2, pairs)`` int64: codes and their contexts, as ids.

    Raises:
        ValueError: ``window_days`` is negative or not finite.
    """
    if not 0 <= window_days < math.inf:
        raise ValueError(f"`window_days` must be a number of days from 0, got {window_days}.")
    for codes in _flat(records, tokenizer, subject_ids, rng):
        yield from codes.pairs(min(round(window_days * MICROSECONDS_PER_DAY), LONGEST_WINDOW), rng)


@dataclass
class _FlatCodes:
    """Distinct codes of visits as flat arrays, in the order patient, visit.

    Attributes:
        ids: (codes,) int64.
        visit: Visit of each code, (codes,).
        start: Start of each visit in microseconds, ascending within a patient, (visits,).
        patient: Patient of each visit, ascending, (visits,).
    """

    ids: np.ndarray
    visit: np.ndarray
    start: np.ndarray
    patient: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch, tokenizer: Any, kept: np.ndarray) -> _FlatCodes:
        """Known codes of the patients ``kept`` in visits with a start."""
        history = History.of(batch, tokenizer.kinds)
        patient = np.repeat(np.arange(batch.num_rows), np.diff(history.visit_offsets))
        visit = np.repeat(np.arange(len(patient)), np.diff(history.code_offsets))
        usable = np.isin(batch["subject_id"].to_numpy(), kept)[patient] & (history.visit_start != NEVER)
        ids = tokenizer.codes_to_ids(history.codes)
        known = (ids >= 0) & ~np.isin(ids, tokenizer.all_special_ids) & usable[visit]
        # The order within a visit means nothing here, so that sorting removes what a visit lists twice.
        visit, ids = np.divmod(np.unique(visit[known] * len(tokenizer) + ids[known]), len(tokenizer))
        return cls(ids, visit, history.visit_start, patient)

    def contexts(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the window of each code begins in ``ids`` and how long it is, itself included; both (codes,)."""
        times = np.unique(self.start[self.visit])
        # Ranks in place of times: a key of patient and microseconds would not fit into 64 bits.
        key = self.patient * (len(times) + 1)
        rank = key + np.searchsorted(times, self.start)
        first = np.searchsorted(rank, key + np.searchsorted(times, self.start - window))
        last = np.searchsorted(rank, key + np.searchsorted(times, self.start + window, side="right"))
        before = total_before(np.bincount(self.visit, minlength=len(self.start)))
        return before[first][self.visit], (before[last] - before[first])[self.visit]

    def pairs(self, window: int, rng: np.random.Generator | None) -> Iterator[np.ndarray]:
        """Pairs of different codes at most ``window`` microseconds apart, (2, pairs) int64 in chunks."""
        begins, lengths = self.contexts(window)
        code = np.arange(len(self.ids)) if rng is None else rng.permutation(len(self.ids))
        chunk = np.cumsum(lengths[code]) // PAIRS_PER_CHUNK
        for part in np.split(code, np.flatnonzero(np.diff(chunk)) + 1):
            context = self.ids[ragged_indices(begins[part], lengths[part])]
            pairs = np.stack([np.repeat(self.ids[part], lengths[part]), context])
            pairs = pairs[:, pairs[0] != pairs[1]]
            yield pairs if rng is None else rng.permutation(pairs, axis=1)

    def shared_patients(self, vocab_size: int) -> sp.csr_matrix:
        """Number of patients that have both codes, (vocab_size, vocab_size) int32."""
        import scipy.sparse as sp

        owner, ids = np.divmod(np.unique(self.patient[self.visit] * vocab_size + self.ids), vocab_size)
        shape = (len(self.patient) and int(self.patient[-1]) + 1, vocab_size)
        codes = sp.csr_matrix((np.ones(len(ids), np.int32), (owner, ids)), shape=shape)
        return codes.T @ codes


class _SkipGram:
    """Two tables of vectors and the step that fits them.

    gensim's window counts positions. Fed with pairs, as sentences of two words, it is exact, but each pair is a Python
    object then, and it took a quarter more time than this: no reason for a dependency of one function. One draw of
    noise codes serves a whole step, weighted to the same expected gradient, so that the noise is one matrix product.
    """

    def __init__(self, counts: np.ndarray, dim: int, negatives: int, rng: np.random.Generator):
        noise = np.cumsum(counts**NOISE_POWER)
        self.cumulative = noise / noise[-1]
        self.weight = negatives / NOISE_CODES_PER_STEP
        self.rng = rng
        self.centre = torch.from_numpy(((rng.random((len(counts), dim)) - 0.5) / dim).astype(np.float32))
        self.context = torch.zeros(len(counts), dim)
        # A frequent code sums its gradients over a step; beyond some meetings the step would overshoot.
        enough = MEETINGS_PER_STEP * counts.sum() / counts.max()
        self.pairs_per_step = int(min(enough, PAIRS_PER_STEP))

    def steps(self, pairs: np.ndarray) -> Iterator[np.ndarray]:
        """``pairs`` (2, pairs) cut into what one step takes."""
        for start in range(0, pairs.shape[1], self.pairs_per_step):
            yield pairs[:, start : start + self.pairs_per_step]

    def step(self, codes: np.ndarray, contexts: np.ndarray, rate: float) -> None:
        """Ascends the objective of some pairs, both (pairs,)."""
        drawn = np.searchsorted(self.cumulative, self.rng.random(NOISE_CODES_PER_STEP), side="right")
        i, j, n = (torch.from_numpy(np.ascontiguousarray(ids)) for ids in (codes, contexts, drawn))
        u, v, noise = self.centre[i], self.context[j], self.context[n]
        pull = rate * torch.sigmoid(-(u * v).sum(dim=1, keepdim=True))
        push = torch.sigmoid(u @ noise.T) * (-rate * self.weight)
        self.centre.index_add_(0, i, torch.addmm(pull * v, push, noise))
        self.context.index_add_(0, j, pull * u)
        self.context.index_add_(0, n, push.T @ u)


def _flat(
    records: str | Path | pa.Table, tokenizer: Any, subject_ids: Any, rng: np.random.Generator | None = None
) -> Iterator[_FlatCodes]:
    """The codes of some patients, at most a shard at a time."""
    kept = np.unique(np.asarray(subject_ids, np.int64))
    parts = [records] if isinstance(records, pa.Table) else shard_paths(records, "records")
    for index in range(len(parts)) if rng is None else rng.permutation(len(parts)):
        for batch in record_batches(parts[index], tokenizer.kinds):
            yield _FlatCodes.of(batch, tokenizer, kept)


def _count_windows(records, tokenizer, subject_ids, window_days: float) -> tuple[np.ndarray, int]:
    """Occurrences of each code, (vocab,), and the number of pairs.

    Raises:
        EhrDataError: There is no pair.
    """
    counts, pairs = np.zeros(len(tokenizer)), 0
    for chunk in window_pairs(records, tokenizer, subject_ids=subject_ids, window_days=window_days):
        pairs += chunk.shape[1]
        counts += np.bincount(chunk[0], minlength=len(tokenizer))
    if not pairs:
        raise EhrDataError(
            f"No two codes of these patients lie within `window_days`={window_days} of each other. Check that "
            "`subject_ids` belong to these records, or widen the window."
        )
    return counts, pairs


def _provenance(tokenizer: Any, subject_ids: Any) -> dict[str, Any]:
    return {"kinds": list(tokenizer.kinds), "fitted_on": fingerprint(subject_ids)}


def _table(tokenizer: Any, vectors: np.ndarray, known: np.ndarray, method: str, settings: dict) -> CodeEmbeddings:
    """The rows of known tokens.

    Raises:
        EhrDataError: There are none.
    """
    rows = np.flatnonzero(known)
    if not len(rows):
        raise EhrDataError("No two codes share a patient: there is nothing to learn. Check `subject_ids`.")
    return CodeEmbeddings(tokenizer.convert_ids_to_tokens(rows.tolist()), vectors[rows], method, settings)


__all__ = ["CodeEmbeddings", "ppmi_svd", "time_window_skipgram", "window_pairs"]

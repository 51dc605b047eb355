"""Leakage rules as checks that raise: L1 splits, L2 future, L3 availability, L4 windows, L5 fitting, L8 the test set,
L9 index, L11 prevalence, L12 calendar. L2 and L4 change the future of records and compare; they are for samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.schema import TIMESTAMP, DatasetInfo, atomic_path
from hf_ehr.tasks.events import DAY, MISSING, History, Timeline, micros
from hf_ehr.tasks.future import scramble_future, truncate_future
from hf_ehr.tasks.spec import TaskSpec

T = TypeVar("T")

SALT = "hf_ehr"
SPLITS = ("train", "validation", "test")
SHARED_PATIENTS = (
    {"mimic3", "mimic4"},
    {"physionet2012", "mimic3"},
    {"physionet2012", "mimic3_carevue"},
    {"physionet2012", "mimic4"},
)
"""Sources that hold the same people under different ids. MIMIC-III and MIMIC-IV share the admissions of 2008–2012. The
challenge of 2012 was drawn from MIMIC-II (Scott et al. 2013, doi 10.1186/1472-6947-13-9), whose patients are in
MIMIC-III, in its CareVue subset too; those of them who came back after 2008 are in MIMIC-IV."""


class LeakageError(ValueError):
    """A leakage rule is broken: the message names the rule, what was found and the next step.

    Attributes:
        rule: ``L1`` … ``L12``.
    """

    def __init__(self, rule: str, found: str, next_step: str) -> None:
        super().__init__(f"Leakage rule {rule}: {found} {next_step}")
        self.rule = rule


def fingerprint(ids: Iterable[int]) -> str:
    """What names a set of patients without naming one: SHA-256 over their sorted, distinct int64 ids and a fixed salt.

    Whatever is fitted (vocabulary, grid, thresholds) keeps it, and `check_fitted_on` compares.
    """
    distinct = np.unique(_ids(ids)).astype("<i8")
    return hashlib.sha256(SALT.encode() + distinct.tobytes()).hexdigest()


def check_fitted_on(artefact_fingerprint: str, train_ids: Iterable[int]) -> None:
    """L5: an artefact was fitted on the training patients and on nobody else.

    Raises:
        LeakageError: It was fitted on others.
    """
    if artefact_fingerprint != fingerprint(train_ids):
        raise LeakageError("L5", "the artefact was not fitted on these training patients.", "Fit it on them again.")


def check_disjoint(splits: Mapping[str, Iterable[int]]) -> None:
    """L1: no patient is in two splits.

    Raises:
        LeakageError: With the two splits and how many patients they share.
    """
    sets = {name: np.unique(_ids(ids)) for name, ids in splits.items()}
    for (one, first), (other, second) in combinations(sets.items(), 2):
        shared = len(np.intersect1d(first, second))
        if shared:
            raise LeakageError(
                "L1", f"`{one}` and `{other}` share {shared} patients.", "Split by patient, not by row."
            )


@dataclass(frozen=True)
class SplitManifest:
    """Which patients were in which split, as salted hashes: it is saved in a checkpoint and travels with it.

    Ids are small numbers, and whoever knows the salt can hash all of them. With the default salt a manifest tells who
    was in the data; give a secret one (it is not saved) where that matters, and the same one to all that are compared.

    Attributes:
        source: Name of the data source.
        splits: ``train``, ``validation`` and ``test``, each with its hashed ids.
        salt_check: Tells manifests of different salts apart.
    """

    source: str
    splits: Mapping[str, frozenset[str]]
    salt_check: str

    @classmethod
    def of(cls, source: str, splits: Mapping[str, Iterable[int]], *, salt: str = SALT) -> SplitManifest:
        """Hashes the ids of disjoint splits.

        Raises:
            LeakageError: Splits share patients (L1).
            ValueError: A split has another name than train, validation or test.
        """
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise ValueError(f"`splits` must be named {', '.join(SPLITS)}, got {unknown}.")
        sets = {name: np.unique(_ids(ids)) for name, ids in splits.items()}
        check_disjoint(sets)
        hashed = {name: frozenset(_salted(salt, str(number)) for number in ids) for name, ids in sets.items()}
        return cls(source, hashed, _salted(salt, "salt"))

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        plain = {
            "source": self.source,
            "salt_check": self.salt_check,
            "splits": {name: sorted(hashes) for name, hashes in self.splits.items()},
        }
        with atomic_path(Path(path)) as temporary:
            temporary.write_text(json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SplitManifest:
        """Reads JSON that `save` wrote."""
        plain = json.loads(Path(path).read_text())
        splits = {name: frozenset(hashes) for name, hashes in plain["splits"].items()}
        return cls(plain["source"], splits, plain["salt_check"])

    def check(self, earlier: SplitManifest) -> None:
        """L1: nobody held out here was nearer to training in an `earlier` stage (e.g. pre-training).

        Test patients may be in no earlier split but test, validation patients not in the earlier training split.

        Raises:
            LeakageError: Some were, or the two sources share people under different ids, so that nobody can tell.
            ValueError: The manifests were made with different salts.
        """
        for shared in SHARED_PATIENTS:
            if {self.source, earlier.source} == shared:
                raise LeakageError(
                    "L1",
                    f"`{self.source}` and `{earlier.source}` share people under different ids.",
                    "Use one source, or one of other hospitals; MIMIC-III has a CareVue subset without the people of "
                    "MIMIC-IV (source `mimic3_carevue`).",
                )
        if self.salt_check != earlier.salt_check:
            raise ValueError("`salt` must be the same in both manifests: their hashes cannot be compared.")
        for rank, held_out in enumerate(SPLITS):
            for seen in SPLITS[:rank]:
                count = len(self.splits.get(held_out, frozenset()) & earlier.splits.get(seen, frozenset()))
                if count:
                    raise LeakageError(
                        "L1",
                        f"{count} patients of `{held_out}` were in `{seen}` of the earlier stage.",
                        "Use one split for all stages.",
                    )


def check_no_future(
    build: Callable[[pa.Table], T], records: pa.Table, labels: pa.Table, *, seeds: Iterable[int] = (0, 1)
) -> None:
    """L2: `build` sees nothing after the prediction time.

    The future of every labelled patient is deleted once, and replaced by another per seed; the output must stay the
    same to the byte. `build` may return arrays, tables, bytes, plain values, and mappings or lists of them.

    Args:
        build: RECORDS → what a model would get.
        records: RECORDS of a sample of patients.
        labels: LABELS, one per patient; loop over `rounds` where there are more.
        seeds: Of the invented futures.

    Raises:
        LeakageError: An output changed.
    """
    expected = digest(build(truncate_future(records, labels)))
    variants = {"as it was": records} | {f"invented (seed {s})": scramble_future(records, labels, s) for s in seeds}
    for name, variant in variants.items():
        if digest(build(variant)) != expected:
            raise LeakageError(
                "L2",
                f"the output changes between a future that is deleted and one that is {name}.",
                "Use only what was available no later than the prediction time.",
            )


def rounds(labels: pa.Table) -> Iterator[pa.Table]:
    """LABELS in parts of at most one label per patient: the first of each, the second of each, …"""
    subject = labels["subject_id"].to_numpy()
    order = np.argsort(subject, kind="stable")
    new = np.flatnonzero(np.r_[True, subject[order][1:] != subject[order][:-1]]) if len(order) else order
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order)) - np.repeat(new, np.diff(np.r_[new, len(order)]))
    for part in range(number.max(initial=-1) + 1):
        yield labels.filter(pa.array(number == part))


def check_availability(records: pa.Table, kinds: Iterable[str] = ("diagnoses",)) -> None:
    """L3: billing codes of a visit are not available before it ends.

    Args:
        records: RECORDS of a source that codes for billing.
        kinds: Code lists to check.

    Raises:
        LeakageError: With the list and how many codes are too early or of unknown availability.
    """
    history = History(records)
    for kind in kinds:
        lists = history.field(f"{kind}_at")
        visit = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        known, end = micros(pc.list_flatten(lists)), history.end[visit]
        early = int(np.sum((known == MISSING) | (end == MISSING) | (known < end)))
        if early:
            raise LeakageError(
                "L3",
                f"{early} of {len(known)} `{kind}` are available before their visit ends, or nobody knows when.",
                "Set `available_at` to the discharge (plus a lag) for codes that are billed.",
            )


def check_windows_ignore_label(task: TaskSpec, records: pa.Table, *, seeds: Iterable[int] = (0, 1)) -> None:
    """L4: who is asked, and when, does not depend on what happens afterwards.

    For every label, the patient's future (and with it the outcome) is deleted or invented anew: the prediction times
    up to the label's own must stay.

    Raises:
        LeakageError: They change.
    """
    labels, _ = task.label(records)
    for part in rounds(labels):
        asked = pa.array(micros(part["prediction_time"]) + task.asked_after).cast(TIMESTAMP)
        part = part.set_column(1, "prediction_time", asked)
        cut = dict(zip(part["subject_id"].to_pylist(), micros(part["prediction_time"]), strict=True))
        expected = _points_until(task, truncate_future(records, part), cut)
        for variant in (records, *(scramble_future(records, part, seed) for seed in seeds)):
            if _points_until(task, variant, cut) != expected:
                raise LeakageError(
                    "L4",
                    f"the prediction times of `{task.name}` ({task.design}) change with the future.",
                    "Define the index by what is known at it, or report audit.index_leak_features beside the results.",
                )


class OneShotTest(Generic[T]):
    """L8: test labels that can be read once, when everything (thresholds, temperature, stopping) is decided.

    >>> test = OneShotTest([0, 1])
    >>> test.read()
    [0, 1]
    """

    def __init__(self, labels: T) -> None:
        self._labels: T | None = labels

    def __repr__(self) -> str:
        return f"OneShotTest({'not read' if self._labels is not None else 'read'})"

    def read(self) -> T:
        """The labels, the first time.

        Raises:
            LeakageError: They were read before.
        """
        if self._labels is None:
            raise LeakageError("L8", "the test labels were read already.", "Decide on validation, then test once.")
        labels, self._labels = self._labels, None
        return labels


def index_leak_features(records: pa.Table, labels: pa.Table) -> pa.Table:
    """L9: what an index date alone gives away, per label: a baseline on it must be reported for case-control data.

    Returns:
        `subject_id`, `prediction_time`, `visits` (begun by then), `history_days` (since the first visit) and `age` in
        years (null where the birth is unknown), in the order of `labels`.
    """
    history = History(records)
    patient = pc.index_in(labels["subject_id"], value_set=records["subject_id"].combine_chunks())
    if patient.null_count:
        raise ValueError(f"`labels` must be of patients in `records`, {patient.null_count} are not.")
    row, time = patient.to_numpy().astype(np.int64), micros(labels["prediction_time"])
    started = history.start != MISSING
    visits = Timeline(history.patient[started], history.start[started])
    first = visits.next(row, np.full(len(row), MISSING + 1))
    birth = history.birth[row]
    features = {
        "visits": visits.count(row, np.full(len(row), MISSING + 1), time),
        "history_days": np.where(first == MISSING, 0, np.maximum(0, time - first)) / DAY,
        "age": pa.array((time - np.where(birth == MISSING, time, birth)) / (365.25 * DAY), mask=birth == MISSING),
    }
    return pa.table({"subject_id": labels["subject_id"], "prediction_time": labels["prediction_time"], **features})


def check_prevalence(test: Any, population: Any, *, flagged: bool = False) -> None:
    """L11: a test set that was matched or subsampled says so.

    Args:
        test: (labels,) bool, of the test set.
        population: (labels,) bool, of everyone eligible.
        flagged: Whether the test set is declared as matched or subsampled.

    Raises:
        LeakageError: The prevalences differ by more than four standard errors, and nobody said so.
    """
    share, expected = float(np.mean(np.asarray(test))), float(np.mean(np.asarray(population)))
    error = np.sqrt(expected * (1 - expected) / len(test))
    if abs(share - expected) > 4 * error and not flagged:
        raise LeakageError(
            "L11",
            f"the prevalence is {share:.4f} in the test set, {expected:.4f} in the population.",
            "Subsample in training only, or flag the test set (and report no calibration).",
        )


def check_calendar_split(info: DatasetInfo) -> None:
    """L12: a split by calendar time needs true dates.

    Raises:
        LeakageError: The dates are shifted per patient, or only the order of visits is known.
    """
    if info.time_axis != "calendar":
        raise LeakageError(
            "L12",
            f"the dates of `{info.source}` are not comparable between patients (time_axis: {info.time_axis}).",
            "Split by patient.",
        )


def digest(value: Any) -> str:
    """SHA-256 of arrays, tables, plain values, and mappings or lists of them.

    Raises:
        TypeError: A value of another type, whose bytes nobody knows.
    """
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            state.update(f"{{{key!r}:".encode())
            _feed(state, value[key])
    elif isinstance(value, pa.Table | pa.RecordBatch | pa.Array | pa.ChunkedArray):
        state.update(repr(value.to_pylist()).encode())
    elif isinstance(value, list | tuple):
        state.update(f"[{len(value)}".encode())
        for item in value:
            _feed(state, item)
    elif hasattr(value, "__array__"):
        array = np.ascontiguousarray(np.asarray(value))
        state.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        state.update(f"{type(value).__name__}{value!r};".encode())
    else:
        raise TypeError(f"`build` must return arrays, tables or plain values, got {type(value).__name__}.")


def _points_until(task: TaskSpec, records: pa.Table, cut: Mapping[int, int]) -> list[tuple[int, int]]:
    points = task.prediction_points(records)
    pairs = zip(points["subject_id"].to_pylist(), micros(points["prediction_time"]).tolist(), strict=True)
    return sorted((subject, time) for subject, time in pairs if subject in cut and time <= cut[subject])


def _ids(ids: Iterable[int]) -> np.ndarray:
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        return ids.to_numpy().astype(np.int64)
    return np.fromiter(ids, dtype=np.int64)


def _salted(salt: str, text: str) -> str:
    return hashlib.sha256(f"{salt}:{text}".encode()).hexdigest()

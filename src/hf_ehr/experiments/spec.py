"""What a report compares: a YAML file with data sets, tasks, rows, sizes and the comparisons that it will claim.

    columns = data set × task        rows = model × initialisation × head
    draws   = labelled subset, pre-training seed and fine-tuning seed, the same for all rows

Everything is fixed before the first cell runs: the comparisons are the family that p-values are adjusted over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hf_ehr.baselines import BASELINES
from hf_ehr.schema import EhrDataError

SPECS = Path(__file__).parent / "specs"
MODELS = ("medbert", "rnn")
PPMI_LR = "PPMI-SVD + LR"
INITS = ("random", "pretrained", "t-w2v", "ppmi-svd", "medhmp")
HEADS = ("ffn", "gru", "bigru", "retain", "lstm", "dipole", "adacare", "hitanet")
ALL = "all"


@dataclass(frozen=True)
class DataSpec:
    """One cohort: a source with its options, or a folder that is prepared already.

    Attributes:
        name: As it appears in the table.
        source: A source of ``hf-ehr prepare``.
        input: Folder of the raw tables, below the current folder or absolute; ``${VARIABLES}`` are filled in.
        options: The source's own options.
        folder: A prepared folder, instead of the three above.
        tasks: Tasks of this data set instead of the report's; an empty list where it is only pre-trained on.
        min_patients: Codes of fewer training patients back off.
        max_length: Most codes of a patient.
        days: Whether the time of each code is read, as ``hitanet`` needs it.
    """

    name: str
    source: str | None = None
    input: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    tasks: tuple[str, ...] | None = None
    min_patients: int = 11
    max_length: int = 512
    days: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.folder is None):
            raise EhrDataError(
                f"`datasets` {self.name!r} must name either a `source` or a prepared `folder`. Set one of the two."
            )


@dataclass(frozen=True)
class RowSpec:
    """One row of the table.

    Attributes:
        name: As it appears in the table.
        model: ``medbert``, ``rnn``, a name out of ``baselines.BASELINES``, or ``PPMI-SVD + LR``.
        head: Of ``medbert`` and ``rnn``.
        init: ``random``, ``pretrained`` (Med-BERT), ``t-w2v`` or ``ppmi-svd`` (code embeddings of a code RNN), or
            ``medhmp`` (MedHMP's encoder of diagnoses in an RNN whose ``visit_encoder`` is ``mlp``).
        pretrained_on: Data set that a Med-BERT was pre-trained on; the checkpoint is moved to the column's vocabulary.
        level: What a code RNN steps over, ``token`` or ``visit``.
        freeze: Whether static embeddings stay as they are.
        linear_probe: Whether the head ``ffn`` starts from a regression on frozen patient vectors.
        learning_rates: Candidates; the best by validation AUROC on a draw that is not reported is used.
    """

    name: str
    model: str
    head: str = "ffn"
    init: str = "random"
    pretrained_on: str | None = None
    level: str = "token"
    freeze: bool = False
    linear_probe: bool = False
    learning_rates: tuple[float, ...] = (1e-3,)

    def __post_init__(self) -> None:
        one_of("model", self.model, (*MODELS, *BASELINES, PPMI_LR), self.name)
        one_of("head", self.head, HEADS, self.name)
        one_of("init", self.init, INITS, self.name)
        if self.model == "rnn" and (self.head == "ffn" or self.init == "pretrained"):
            raise EhrDataError(
                f"Row {self.name!r}: an `rnn` takes a recurrent `head` and no `pretrained` init. Change it."
            )
        if self.model == "medbert" and self.init not in ("random", "pretrained"):
            raise EhrDataError(
                f"Row {self.name!r}: `medbert` starts `random` or `pretrained`, got {self.init!r}. Change it."
            )
        if self.init == "medhmp" and self.level != "visit":
            raise EhrDataError(f"Row {self.name!r}: `level` must be `visit` with `init: medhmp`. Change it.")

    @property
    def neural(self) -> bool:
        """Whether the row is trained by gradient descent."""
        return self.model in MODELS


@dataclass(frozen=True)
class PretrainSpec:
    """How Med-BERT is pre-trained, once a seed.

    Attributes:
        seeds: Number of seeds; draw ``d`` uses seed ``d % seeds``.
        options: Fields of ``PretrainArguments``; ``model_options`` as a mapping.
        training: Fields of ``TrainingArguments``.
    """

    seeds: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportSpec:
    """A whole report.

    Attributes:
        name: Stem of the files.
        title: Above the table.
        datasets: Cohorts.
        tasks: Named tasks, YAML definitions, or label files of the prepared folder.
        rows: Rows in their order.
        comparisons: Pairs (row, reference): the claims, adjusted together (Holm).
        sizes: Labelled training patients; ``all`` is every one.
        draws: Draws at each size, or one number for all.
        validation_patients: At most this many choose epochs, learning rates and penalties.
        test_patients: At most this many are scored.
        pretraining: Of the rows with ``init: pretrained``.
        finetuning: Fields of ``TrainingArguments``, and ``patience``.
        finetuning_at: Size → fields that differ there, e.g. larger batches for more patients.
        rnn: Fields of ``EhrRnnConfig``.
        medhmp: Of the rows with ``init: medhmp``: ``features``, arguments of ``fit_hourly_features``, and both stages
            as in a report of stays, ``stays`` and ``admissions``.
        notes: Printed below the table.
    """

    name: str
    title: str
    datasets: tuple[DataSpec, ...]
    rows: tuple[RowSpec, ...]
    tasks: tuple[str, ...] = ()
    comparisons: tuple[tuple[str, str], ...] = ()
    sizes: tuple[int | str, ...] = (ALL,)
    draws: int | dict[int | str, int] = 5
    validation_patients: int = 1_000
    test_patients: int = 10_000
    pretraining: PretrainSpec = field(default_factory=PretrainSpec)
    finetuning: dict[str, Any] = field(default_factory=dict)
    finetuning_at: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    rnn: dict[str, Any] = field(default_factory=dict)
    medhmp: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_rows(self)
        unknown = set(self.medhmp) - {"features", "stays", "admissions"}
        if unknown:
            raise EhrDataError(f"`medhmp` must hold features, stays and admissions, got {sorted(unknown)}. Change it.")
        for row in self.rows:
            if row.pretrained_on is not None:
                one_of("pretrained_on", row.pretrained_on, [data.name for data in self.datasets], row.name)
        for size in self.sizes:
            if size != ALL and (not isinstance(size, int) or size < 1):
                raise EhrDataError(f"`sizes` must hold positive numbers or {ALL!r}, got {size!r}. Change it.")
        check_draws(self)

    @classmethod
    def from_yaml(cls, path: str | Path) -> ReportSpec:
        """Reads a file, or a specification of the package by its name (``medbert_table4``).

        Raises:
            EhrDataError: There is no such file, or a field is unknown, absent or out of range.
        """
        return from_content(cls, read_yaml(path), DataSpec, RowSpec)

    def draws_at(self, size: int | str) -> int:
        """Number of draws of a size."""
        return self.draws if isinstance(self.draws, int) else self.draws[size]

    def finetuning_of(self, size: int | str) -> dict[str, Any]:
        """The settings of fine-tuning at a size."""
        return self.finetuning | self.finetuning_at.get(size, {})

    def columns(self) -> list[tuple[DataSpec, str]]:
        """(data set, task) of every column that is scored."""
        return [(data, task) for data in self.datasets for task in self.tasks_of(data)]

    def tasks_of(self, data: DataSpec) -> tuple[str, ...]:
        """Tasks that are scored on a data set; none on one that is only pre-trained on."""
        return self.tasks if data.tasks is None else data.tasks

    def data(self, name: str) -> DataSpec:
        """A data set by its name."""
        return next(data for data in self.datasets if data.name == name)


def digest(*parts: Any) -> str:
    """A short name for everything that determines a result."""
    text = json.dumps([asdict(p) if hasattr(p, "__dataclass_fields__") else p for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a file, or of a specification of the package by its name; ``name`` is the file's own by default.

    Raises:
        EhrDataError: There is no such file.
    """
    file = Path(path)
    if not file.is_file():
        file = SPECS / f"{file.name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        shipped = ", ".join(sorted(p.stem for p in SPECS.glob("*.yaml")))
        raise EhrDataError(f"{path} is no file and no specification of the package ({shipped}).")
    content = yaml.safe_load(file.read_text())
    return {"name": file.stem} | (content if isinstance(content, dict) else {})


def from_content(
    kind: Any, content: dict[str, Any], data: Any, row: Any, parts: Mapping[str, Any] | None = None
) -> Any:
    """A report of class ``kind`` from the content of its file, its data sets and rows of the classes given.

    ``parts`` maps other fields to their classes; ``pretraining`` is a ``PretrainSpec`` unless it says otherwise.

    Raises:
        EhrDataError: A field is unknown, absent or out of range.
    """
    nested: dict[str, Callable[[Any], Any]] = {
        "datasets": lambda items: tuple(build(data, item, "datasets") for item in items),
        "rows": lambda items: tuple(build(row, item, "rows") for item in items),
        "comparisons": lambda pairs: tuple(tuple(pair) for pair in pairs),
    }
    for name, part in ({"pretraining": PretrainSpec} | dict(parts or {})).items():
        nested[name] = partial(build, part, where=name)
    fields_of = {name: nested[name](value) if name in nested else value for name, value in content.items()}
    return build(kind, fields_of, str(content["name"]))


def check_rows(report: Any) -> None:
    """Rows have distinct names and comparisons name them.

    Raises:
        EhrDataError: They do not.
    """
    names = [row.name for row in report.rows]
    if len(set(names)) < len(names) or not names:
        raise EhrDataError(f"`rows` must have distinct names, got {names}. Rename or add rows.")
    for pair in report.comparisons:
        for name in pair:
            one_of("comparisons", name, names, report.name)


def check_size(size: Any) -> None:
    """Raises EhrDataError where ``size`` is no number of patients, no share of them and not ``all``."""
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", size) if isinstance(size, str) else None
    valid = size == ALL or (share and 0 < float(share[1]) <= 100) or (isinstance(size, int) and size > 0)
    if not valid:
        raise EhrDataError(f"`sizes` must hold positive numbers, shares as '10%' or {ALL!r}, got {size!r}. Change it.")


def patients_at(size: int | str, patients: int) -> int:
    """Number of labelled patients of a size, of so many; a share is rounded up."""
    if size == ALL:
        return patients
    wanted = math.ceil(patients * float(size[:-1]) / 100) if isinstance(size, str) else size
    return min(wanted, patients)


def check_draws(report: Any) -> None:
    """There are draws at every size.

    Raises:
        EhrDataError: There are not.
    """
    for size in report.sizes:
        draws = report.draws if isinstance(report.draws, int) else report.draws.get(size)
        if not isinstance(draws, int) or draws < 1:
            raise EhrDataError(
                f"`draws` must be a positive number for each of `sizes`, got {draws!r} for {size!r}. Add it."
            )


def expanded(path: str, name: str, field_name: str = "input") -> str:
    """A path with its ``${VARIABLES}`` filled in.

    Raises:
        EhrDataError: One is not set.
    """
    found = os.path.expandvars(path)
    if "$" in found:
        raise EhrDataError(f"`{field_name}` of {name!r} is {path!r}, and that variable is not set. Set it.")
    return found


def build(kind: Any, content: Any, where: str) -> Any:
    """An object of ``kind`` from a mapping of its fields; lists become tuples.

    Raises:
        EhrDataError: A field is unknown or absent.
    """
    known = {item.name for item in fields(kind)}
    if not isinstance(content, dict) or set(content) - known:
        unknown = sorted(set(content) - known) if isinstance(content, dict) else content
        raise EhrDataError(f"`{where}` has unknown fields {unknown}. Known: {', '.join(sorted(known))}.")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
    except TypeError as error:
        raise EhrDataError(f"`{where}` is incomplete: {error}.") from error


def one_of(name: str, value: Any, allowed: Any, where: str) -> None:
    """Raises EhrDataError where ``value`` is not ``allowed``."""
    if value not in allowed:
        raise EhrDataError(f"`{name}` of {where!r} must be one of {', '.join(map(str, allowed))}, got {value!r}.")

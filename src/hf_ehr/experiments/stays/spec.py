"""What a report of stays compares: a YAML file with data sets, tasks, rows, sizes and the comparisons it claims."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ehr.experiments.spec import (
    ALL,
    check_draws,
    check_rows,
    check_size,
    from_content,
    one_of,
    read_yaml,
)
from hf_ehr.schema import EhrDataError

KIND = "stays"
STAY, ADMISSION = LEVELS = ("stay", "admission")
MEDHMP = "medhmp"
SERIES = ("lstm", "cnn", "raim", "dcmn", "unimodal_lstm", "transformer")
GATES = ("BertLstm", "LstmBert", "BertCnn", "CnnBert", "BertStar", "StarBert", "BertEncoder", "EncoderBert")
NOTE = "note"
PREVALENCE = "Prevalence"
CLASSICAL = (PREVALENCE, "L2 LR on summaries", "LightGBM on summaries")
MODELS = (MEDHMP, *SERIES, *GATES, NOTE, *CLASSICAL)
INITS = ("none", "s", "a", "a+s")
OBJECTIVES = ("mcp", "cl")


@dataclass(frozen=True)
class StayData:
    """Patients with intensive care stays: a source with its options, or a prepared folder.

    Attributes:
        name: As it appears in the table.
        source: A source of ``hf-ehr prepare``.
        input: Folder of the raw tables; ``${VARIABLES}`` are filled in.
        options: The source's own options.
        folder: A prepared folder, instead of the three above.
        test: Where test patients come from, if not from here: ``source``, ``input`` and ``options``, or ``folder``.
            The internal test patients then train as well.
        tasks: Tasks of this data set instead of the report's; an empty list where it is only pre-trained on.
        features: Arguments of ``fit_hourly_features``.
    """

    name: str
    source: str | None = None
    input: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    test: dict[str, Any] | None = None
    tasks: tuple[str, ...] | None = None
    features: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.source is None) == (self.folder is None):
            raise EhrDataError(
                f"`datasets` {self.name!r} must name either a `source` or a prepared `folder`. Set one of the two."
            )
        if self.test is not None:
            StayData(f"{self.name}, test", **self.test)


@dataclass(frozen=True)
class StayRow:
    """One row of the table.

    Attributes:
        name: As it appears in the table.
        model: ``medhmp``; a series model (``SERIES``); at the level of admissions a gate between note and hours
            (``GATES``) or the ``note`` alone; or one of ``CLASSICAL``.
        init: What MedHMP's weights start from: ``a+s``, both stages; ``a``, the admission stage without the other;
            ``s``, the stay stage alone; ``none``. A series model takes the encoder of hours of these with
            ``medhmp_encoder``.
        objectives: Losses of the admission stage: ``mcp`` (masked codes), ``cl`` (contrastive).
        pretrained_on: Data set whose checkpoint is moved to the features of the column's (stay level only).
        probe: Whether the model stays frozen under a logistic regression.
        linear_probe: Whether a pre-trained MedHMP's head starts from that regression.
        ensemble: Models whose probabilities are averaged, each of another seed of pre-training and fine-tuning.
        medhmp_encoder: Whether a series model reads the states of MedHMP's encoder of hours.
        second_channel: Variables of the second channel of ``raim`` and ``dcmn``.
        features: Arguments of ``fit_hourly_features`` that differ from the data set's.
        model_options: Further fields of the configuration.
        training: Fields of ``TrainingArguments`` that differ in this row.
        learning_rates: Candidates; the best by validation AUROC on a draw that is not reported is used.
    """

    name: str
    model: str
    init: str = "none"
    objectives: tuple[str, ...] = OBJECTIVES
    pretrained_on: str | None = None
    probe: bool = False
    linear_probe: bool = True
    ensemble: int = 1
    medhmp_encoder: bool = False
    second_channel: tuple[str, ...] = ()
    features: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-3,)

    def __post_init__(self) -> None:
        one_of("model", self.model, MODELS, self.name)
        one_of("init", self.init, INITS, self.name)
        for name in self.objectives:
            one_of("objectives", name, OBJECTIVES, self.name)
        reads_encoder = self.model in ("unimodal_lstm", "transformer")
        rules = (
            ("objectives", bool(self.objectives), "at least one"),
            ("ensemble", isinstance(self.ensemble, int) and self.ensemble > 0, "a positive number"),
            ("medhmp_encoder", reads_encoder or not self.medhmp_encoder, "of `unimodal_lstm` or `transformer`"),
            ("init", self.model == MEDHMP or self.medhmp_encoder or self.init == "none", "`none` for this model"),
            ("probe", not self.probe or self.model == MEDHMP, "of `medhmp`"),
            ("second_channel", self.model in ("raim", "dcmn") or not self.second_channel, "of `raim` or `dcmn`"),
            ("pretrained_on", self.init != "none" or self.pretrained_on is None, "with an `init`"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise EhrDataError(f"Row {self.name!r}: `{name}` must be {rule}, got {getattr(self, name)!r}.")

    @property
    def neural(self) -> bool:
        """Whether the row is a network, and seeds make it differ."""
        return self.model not in CLASSICAL

    @property
    def needs_shape(self) -> bool:
        """Whether its shape is that of MedHMP's encoder."""
        return self.model == MEDHMP or self.medhmp_encoder

    @property
    def needs_admissions(self) -> bool:
        """Whether it needs the admission stage."""
        return self.init in ("a", "a+s")

    @property
    def reads_notes(self) -> bool:
        """Whether it is one of the models that need notes."""
        return self.model in (*GATES, NOTE)


@dataclass(frozen=True)
class StagesSpec:
    """How MedHMP is pre-trained, once a seed.

    Attributes:
        seeds: Number of seeds; draw ``d`` uses seed ``d % seeds``.
        stays: Stage 1: ``options``, fields of ``StayPretrainArguments`` with ``model_options`` as a mapping, and
            ``training``, fields of ``TrainingArguments``. Its preset and model options are the shape of all rows.
        admissions: Stage 2: likewise, of ``AdmissionPretrainArguments``.
        notes: A small text encoder, trained on the notes of the training patients: ``options`` of
            ``NotePretrainArguments`` and ``training``; without, notes are not read.
    """

    seeds: int = 3
    stays: dict[str, Any] = field(default_factory=dict)
    admissions: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("stays", "admissions", "notes"):
            unknown = set(getattr(self, name) or ()) - {"options", "training"}
            if unknown:
                raise EhrDataError(f"`pretraining.{name}` must hold `options` and `training`, got {sorted(unknown)}.")

    def part(self, stage: str, name: str) -> dict[str, Any]:
        """``options`` or ``training`` of a stage."""
        return (getattr(self, stage) or {}).get(name, {})


@dataclass(frozen=True)
class CurveSpec:
    """Validation figures by epoch, of some rows (MedHMP, Fig. 6).

    Attributes:
        rows: Their names.
        size: Labelled training patients.
        epochs: Epochs of training, all of them.
        draws: Draws that are averaged.
    """

    rows: tuple[str, ...]
    size: int | str = ALL
    epochs: int = 10
    draws: int = 1


@dataclass(frozen=True)
class StaySpec:
    """A whole report of stays.

    Attributes:
        name: Stem of the files.
        title: Above the table.
        datasets: Patients.
        rows: Rows in their order.
        tasks: Named tasks, YAML definitions, or label files of the prepared folder.
        level: ``stay``: models read the stay that is asked about. ``admission``: they read its admission, with codes
            and note as far as they are known at the prediction time.
        comparisons: Pairs (row, reference): the claims, adjusted together (Holm).
        sizes: Labelled training patients: numbers, shares as ``10%``, or ``all``.
        draws: Draws at each size, or one number for all.
        validation_patients: At most this many choose epochs, learning rates and penalties.
        test_patients: At most this many are scored.
        pretraining: Of MedHMP, and of the text encoder.
        finetuning: Fields of ``TrainingArguments``, and ``patience``.
        finetuning_at: Size → fields that differ there.
        series: Fields of ``EhrSeriesConfig`` and ``EhrFusionConfig`` of all rows that have them.
        convergence: Curves by epoch, if any.
        notes: Printed below the table.
        kind: Says that this is a report of stays.
    """

    name: str
    title: str
    datasets: tuple[StayData, ...]
    rows: tuple[StayRow, ...]
    tasks: tuple[str, ...] = ()
    level: str = STAY
    comparisons: tuple[tuple[str, str], ...] = ()
    sizes: tuple[int | str, ...] = (ALL,)
    draws: int | dict[int | str, int] = 5
    validation_patients: int = 1_000
    test_patients: int = 10_000
    pretraining: StagesSpec = field(default_factory=StagesSpec)
    finetuning: dict[str, Any] = field(default_factory=dict)
    finetuning_at: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    convergence: CurveSpec | None = None
    notes: tuple[str, ...] = ()
    kind: str = KIND

    def __post_init__(self) -> None:
        check_rows(self)
        one_of("level", self.level, LEVELS, self.name)
        for size in (*self.sizes, *((self.convergence.size,) if self.convergence else ())):
            check_size(size)
        check_draws(self)
        names = [data.name for data in self.datasets]
        if len(set(names)) < len(names):
            raise EhrDataError(f"`datasets` must have distinct names, got {names}. Rename them.")
        for row in self.rows:
            self._check_row(row, names)
        for name in self.convergence.rows if self.convergence else ():
            one_of("convergence", name, [row.name for row in self.rows if row.neural], self.name)

    def _check_row(self, row: StayRow, datasets: list[str]) -> None:
        if row.pretrained_on is not None:
            one_of("pretrained_on", row.pretrained_on, datasets, row.name)
            if self.level == ADMISSION:
                raise EhrDataError(f"Row {row.name!r}: `pretrained_on` must be absent at the level of admissions.")
        foreign = SERIES if self.level == ADMISSION else (*GATES, NOTE)
        if row.model in foreign:
            raise EhrDataError(f"Row {row.name!r}: `model` {row.model!r} does not fit `level: {self.level}`.")
        if row.reads_notes and self.pretraining.notes is None:
            raise EhrDataError(f"Row {row.name!r} reads notes: `pretraining.notes` must say how they are encoded.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> StaySpec:
        """Reads a file, or a specification of the package by its name (``medhmp_table1``).

        Raises:
            EhrDataError: There is no such file, or a field is unknown, absent or out of range.
        """
        nested = {"pretraining": StagesSpec, "convergence": CurveSpec}
        return from_content(cls, read_yaml(path), StayData, StayRow, nested)

    @property
    def key(self) -> str:
        """What an example is of: ``stay_id`` or ``visit_id``."""
        return "visit_id" if self.level == ADMISSION else "stay_id"

    def draws_at(self, size: int | str) -> int:
        """Number of draws of a size."""
        return self.draws if isinstance(self.draws, int) else self.draws[size]

    def finetuning_of(self, size: int | str) -> dict[str, Any]:
        """The settings of fine-tuning at a size."""
        return self.finetuning | self.finetuning_at.get(size, {})

    def columns(self) -> list[tuple[StayData, str]]:
        """(data set, task) of every column that is scored."""
        return [(data, task) for data in self.datasets for task in self.tasks_of(data)]

    def tasks_of(self, data: StayData) -> tuple[str, ...]:
        """Tasks that are scored on a data set; none on one that is only pre-trained on."""
        return self.tasks if data.tasks is None else data.tasks

    def data(self, name: str) -> StayData:
        """A data set by its name."""
        return next(data for data in self.datasets if data.name == name)

    def row(self, name: str) -> StayRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

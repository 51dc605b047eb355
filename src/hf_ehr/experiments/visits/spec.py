"""What a report of visits compares: a YAML file with data sets, tasks, rows, sizes and the comparisons it claims."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ehr.experiments.spec import ALL, check_draws, check_rows, check_size, from_content, one_of, read_yaml
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.recommendation import ICD_CODING, MEDICATION_RECOMMENDATION

KIND = "visits"
RECOMMENDATION, ADMISSION, CODING, ENTITIES = SETTINGS = ("recommendation", "admission", "coding", "entities")
NAMED_ENTITIES = "named_entities"
VISITS = (RECOMMENDATION, ADMISSION, CODING)

MEDMPLM, GBERT, RNN, CNN, TAGGER = "medmplm", "gbert", "rnn", "cnn", "tagger"
CONCATS = ("medbert", "note", "note+gbert", "note+medbert")
ORACLE = "oracle"
CLASSICAL: dict[str, tuple[str, ...]] = {
    ORACLE: (RECOMMENDATION, ADMISSION),
    "repeat_last_visit": (RECOMMENDATION,),
    "popularity": VISITS,
    "lr": (RECOMMENDATION, ADMISSION),
    "lightgbm": (RECOMMENDATION, ADMISSION),
    "tfidf_lr": (ADMISSION, CODING),
    "dictionary": (ENTITIES,),
}
"""Rows without a network, and what they can be asked."""
NEURAL: dict[str, tuple[str, ...]] = {
    MEDMPLM: VISITS, GBERT: VISITS, RNN: (RECOMMENDATION,), CNN: (ADMISSION, CODING), TAGGER: (ENTITIES,),
    **dict.fromkeys(CONCATS, VISITS),
}  # fmt: skip
INITS = {
    "none": (*NEURAL, *CLASSICAL),
    "pretrained": (MEDMPLM, GBERT, "medbert", "note+gbert", "note+medbert"),
    "text": (TAGGER,),
    "medmplm": (GBERT, "note+gbert", TAGGER),
}
"""What rows can start from."""
PRIMARY = {
    RECOMMENDATION: "average_precision_samples", ADMISSION: "auroc", CODING: "map", ENTITIES: "f1",
}  # fmt: skip
"""The figure of each setting that rows are compared by, and learning rates chosen by."""


def setting_of(task: str) -> str:
    """What kind of question a task is."""
    if task == NAMED_ENTITIES:
        return ENTITIES
    if task == MEDICATION_RECOMMENDATION:
        return RECOMMENDATION
    return CODING if re.fullmatch(rf"{ICD_CODING}_top[1-9]\d*", task) else ADMISSION


@dataclass(frozen=True)
class VisitData:
    """Visits of codes and notes: a source with its options, a prepared folder, or a corpus of annotated notes.

    Attributes:
        name: As it appears in the table.
        source: A source of ``hf-ehr prepare``.
        input: Its file or folder, or that of the corpus; ``${VARIABLES}`` are filled in.
        options: The source's or the corpus' own options.
        folder: A prepared folder, instead of a source.
        corpus: A source of ``hf-ehr prepare-notes`` that has spans: each note becomes a visit with its codes
            (:func:`hf_ehr.experiments.visits.corpora.make_corpus`). Instead of a source.
        tasks: Tasks of this data set instead of the report's.
        split_seed: Of the split by patient.
        min_patients: Codes of fewer training patients back off.
        notes: Whether there are notes; without, rows that cannot do without are left out.
        note_category: As ``VisitArguments`` has it.
        notes_of_the_day: As ``VisitArguments`` has it.
    """

    name: str
    source: str | None = None
    input: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    corpus: str | None = None
    tasks: tuple[str, ...] | None = None
    split_seed: int = 0
    min_patients: int = 11
    notes: bool = True
    note_category: str | None = None
    notes_of_the_day: bool = False

    def __post_init__(self) -> None:
        if sum(place is not None for place in (self.source, self.folder, self.corpus)) != 1:
            raise EhrDataError(
                f"`datasets` {self.name!r} must name one of `source`, `folder` and `corpus`. Set one of the three."
            )


@dataclass(frozen=True)
class VisitRow:
    """One row of the table. It stands in the columns of the tasks that its model can be asked.

    Attributes:
        name: As it appears in the table.
        model: A network of ``NEURAL``: MedM-PLM, G-BERT, the RNN over visits, Med-BERT, a ``note`` alone or end to end
            with either, the CNN over words, the BiLSTM-CRF ``tagger``; or one of ``CLASSICAL``. ``oracle`` is the
            generator's own probabilities.
        init: ``pretrained``: the code encoder, or all of MedM-PLM, on the visits of the training patients.
            ``medmplm``: G-BERT and the tagger take their encoder from MedM-PLM. ``text``: the tagger reads the text
            encoder as the notes left it. ``none``: nothing of these. Every row that reads notes has the same text
            encoder, ``pretraining.notes``; the CNN and a tagger without ``init`` read words.
        tasks: Tasks of the row; all that its model can be asked by default.
        pretrain_options: Further fields of the model's configuration, from pre-training on.
        model_options: Fields of the tagger's, RNN's or CNN's configuration, or of ``VisitFinetuneArguments``.
        linear_probe: Whether a yes-or-no head starts from a regression on frozen features.
        training: Fields of ``TrainingArguments`` that differ in this row.
        learning_rates: Candidates; the best on validation, with a draw that is not reported, is used.
    """

    name: str
    model: str
    init: str = "none"
    tasks: tuple[str, ...] | None = None
    pretrain_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    linear_probe: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-3,)

    def __post_init__(self) -> None:
        one_of("model", self.model, (*NEURAL, *CLASSICAL), self.name)
        one_of("init", self.init, INITS, self.name)
        if self.model not in INITS[self.init]:
            raise EhrDataError(
                f"Row {self.name!r}: `init` {self.init!r} is not for `model` {self.model!r}. Change it."
            )
        for task in self.tasks or ():
            if setting_of(task) not in self.settings:
                raise EhrDataError(f"Row {self.name!r}: `tasks` names {task!r}, which `{self.model}` cannot be asked.")

    @property
    def settings(self) -> tuple[str, ...]:
        """What its model can be asked."""
        return (NEURAL | CLASSICAL)[self.model]

    @property
    def neural(self) -> bool:
        """Whether the row is a network, and seeds make it differ."""
        return self.model in NEURAL

    @property
    def reads_notes(self) -> bool:
        """Whether it cannot do without notes."""
        return self.model in (CNN, TAGGER, "tfidf_lr") or self.model.startswith("note")

    @property
    def checkpoint(self) -> str | None:
        """The family whose checkpoint of visits it starts from: ``medmplm``, ``gbert``, ``medbert`` or None."""
        if self.model == TAGGER:
            return MEDMPLM if self.init == "medmplm" else None
        family = self.model.removeprefix("note+")
        if family not in (MEDMPLM, GBERT, "medbert"):
            return None
        return MEDMPLM if self.init == "medmplm" else family

    @property
    def trains_checkpoint(self) -> bool:
        """Whether that checkpoint is pre-trained, not blank."""
        return self.init in ("pretrained", "medmplm")


@dataclass(frozen=True)
class VisitStages:
    """How encoders are pre-trained on the training patients, once a seed.

    Attributes:
        seeds: Number of seeds; draw ``d`` uses seed ``d % seeds``.
        notes: The text encoder: ``options`` of ``NotePretrainArguments`` and ``training``, fields of
            ``TrainingArguments``; None where no row reads notes.
        medmplm: ``options`` of ``VisitPretrainArguments``, ``model_options`` as a mapping, and ``training``.
        gbert: The same of G-BERT.
        medbert: The same of Med-BERT: ``options`` of ``PretrainArguments``.
    """

    seeds: int = 1
    notes: dict[str, Any] | None = None
    medmplm: dict[str, Any] = field(default_factory=dict)
    gbert: dict[str, Any] = field(default_factory=dict)
    medbert: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("notes", "medmplm", "gbert", "medbert"):
            unknown = set(getattr(self, name) or ()) - {"options", "training"}
            if unknown:
                raise EhrDataError(f"`pretraining.{name}` must hold `options` and `training`, got {sorted(unknown)}.")

    def part(self, stage: str, name: str) -> dict[str, Any]:
        """``options`` or ``training`` of a stage."""
        return (getattr(self, stage) or {}).get(name, {})


@dataclass(frozen=True)
class VisitSpec:
    """A whole report of visits.

    Attributes:
        name: Stem of the files.
        title: Above the tables.
        datasets: Patients.
        rows: Rows in their order.
        tasks: ``medication_recommendation``, ``icd_coding_topN``, a yes-or-no task asked within visits, or
            ``named_entities`` on a corpus.
        comparisons: Pairs (row, reference): the claims, adjusted together (Holm).
        sizes: Labelled training patients: numbers, shares as ``"10%"``, or ``all``.
        draws: Draws at each size, or one number for all. A draw is a subset, and a seed of both trainings.
        validation_patients: At most this many choose epochs, learning rates, penalties and thresholds.
        test_patients: At most this many are scored.
        note_max_length: Tokens of a note.
        pretraining: Of the encoders.
        finetuning: Fields of ``TrainingArguments``, and ``patience``.
        finetuning_of_task: Task → fields that differ there.
        notes: Printed below the tables.
        kind: Says that this is a report of visits.
    """

    name: str
    title: str
    datasets: tuple[VisitData, ...]
    rows: tuple[VisitRow, ...]
    tasks: tuple[str, ...] = ()
    comparisons: tuple[tuple[str, str], ...] = ()
    sizes: tuple[int | str, ...] = (ALL,)
    draws: int | dict[int | str, int] = 3
    validation_patients: int = 1_000
    test_patients: int = 10_000
    note_max_length: int = 128
    pretraining: VisitStages = field(default_factory=VisitStages)
    finetuning: dict[str, Any] = field(default_factory=dict)
    finetuning_of_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kind: str = KIND

    def __post_init__(self) -> None:
        check_rows(self)
        for size in self.sizes:
            check_size(size)
        check_draws(self)
        reads = [row.name for row in self.rows if row.reads_notes or row.model == MEDMPLM]
        if reads and self.pretraining.notes is None and any(data.notes for data in self.datasets):
            raise EhrDataError(f"Row {reads[0]!r} reads notes: `pretraining.notes` must say how they are encoded.")
        for data in self.datasets:
            for task in self.tasks_of(data):
                if (setting_of(task) == ENTITIES) != (data.corpus is not None):
                    raise EhrDataError(
                        f"`tasks` of {data.name!r} must be {NAMED_ENTITIES!r} of a `corpus`, and nothing else of one, "
                        f"got {task!r}. Change it."
                    )

        idle = {row.name for row in self.rows} - {r.name for column in self.columns() for r in self.rows_of(*column)}
        if idle:
            raise EhrDataError(f"`rows` must stand in a column each, {sorted(idle)} do in none. Leave them out.")
        for task in self.finetuning_of_task:
            one_of("finetuning_of_task", task, {task for _, task in self.columns()}, self.name)

    @classmethod
    def from_yaml(cls, path: str | Path) -> VisitSpec:
        """Reads a file, or a specification of the package by its name (``medmplm_table3``).

        Raises:
            EhrDataError: There is no such file, or a field is unknown, absent or out of range.
        """
        return from_content(cls, read_yaml(path), VisitData, VisitRow, {"pretraining": VisitStages})

    def draws_of(self, row: VisitRow, size: int | str) -> int:
        """Number of draws of a row at a size: one where neither subset nor seed makes it differ."""
        if row.neural or size != ALL:
            return self.draws if isinstance(self.draws, int) else self.draws[size]
        return 1

    def columns(self) -> list[tuple[VisitData, str]]:
        """(data set, task) of every column that is scored."""
        return [(data, task) for data in self.datasets for task in self.tasks_of(data)]

    def tasks_of(self, data: VisitData) -> tuple[str, ...]:
        """Tasks that are scored on a data set."""
        return self.tasks if data.tasks is None else data.tasks

    def rows_of(self, data: VisitData, task: str) -> list[VisitRow]:
        """Rows that stand in a column."""
        fitting = [row for row in self.rows if setting_of(task) in row.settings and task in (row.tasks or [task])]
        return [row for row in fitting if data.notes or not row.reads_notes]

    def data(self, name: str) -> VisitData:
        """A data set by its name."""
        return next(data for data in self.datasets if data.name == name)

    def row(self, name: str) -> VisitRow:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

"""What a coding report compares: a YAML file with data sets of notes, rows, seeds, and the comparisons it claims."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ehr.code_groups import BAND_EDGES
from hf_ehr.experiments.spec import PretrainSpec, check_rows, from_content, one_of, read_yaml
from hf_ehr.schema import EhrDataError

KIND = "coding"
CLASSICAL = ("bow_lr", "tfidf_lr", "string_match", "frequency")
TEXT = ("cnn", "caml", "laat", "multi_head")
EHRBERT = "ehrbert"
MODELS = (*CLASSICAL, *TEXT, EHRBERT)
LEVELS = ("full", "category")
INITS = (None, "random", "pretrained")


@dataclass(frozen=True)
class CodingData:
    """Notes with codes.

    Attributes:
        name: As it appears in the table.
        source: A source of ``hf-ehr prepare-notes``.
        input: Its file or folder; ``${VARIABLES}`` are filled in.
        options: The source's own options.
        folder: A prepared folder, instead of the three above.
        level: ``full`` codes, or their three-character ``category``; a code that has none keeps its name.
        more_than: Codes of more than so many training notes are labels.
        min_patients: Codes of fewer training patients are no labels.
        band_edges: Upper ends of the bands of training notes.
    """

    name: str
    source: str | None = None
    input: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    level: str = "full"
    more_than: int = 0
    min_patients: int = 11
    band_edges: tuple[int, ...] = BAND_EDGES

    def __post_init__(self) -> None:
        one_of("level", self.level, LEVELS, self.name)
        if (self.source is None) == (self.folder is None):
            raise EhrDataError(
                f"`datasets` {self.name!r} must name either a `source` or a prepared `folder`. Set one of the two."
            )


@dataclass(frozen=True)
class CodingRow:
    """One row of the table.

    Attributes:
        name: As it appears in the table.
        model: One of ``MODELS``: baselines of ``note_baselines``, presets of ``EhrTextConfig``, or ``ehrbert``.
        datasets: Data sets of the row; all by default.
        head: ``cls`` or ``xml``, of ``ehrbert``.
        init: ``pretrained`` on the notes or ``random``; None keeps what an ``encoder`` brings, and an ``ehrbert``
            without one must say which.
        size: An entry of the report's ``encoders``.
        encoder: Folder or Hub id of an off-the-shelf encoder; where it names a ``${VARIABLE}`` that is not set, the
            row is listed as not run.
        max_length: Tokens of a window.
        max_segments: Windows of a note that are read; all by default.
        label_init: Start of the label vectors, of ``ehrbert`` with ``xml``.
        model_options: Further fields of the configuration, or keyword arguments of the baseline.
        training: Fields of ``TrainingArguments`` that differ in this row.
        learning_rates: Candidates; the best by ``metric_for_best_model`` (micro-AUROC unless set) on validation, with
            a seed that is not reported, is used.
    """

    name: str
    model: str
    datasets: tuple[str, ...] | None = None
    head: str = "xml"
    init: str | None = None
    size: str | None = None
    encoder: str | None = None
    max_length: int = 512
    max_segments: int | None = None
    label_init: str = "final_layer"
    model_options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-3,)

    def __post_init__(self) -> None:
        one_of("model", self.model, MODELS, self.name)
        one_of("head", self.head, ("cls", "xml"), self.name)
        one_of("init", self.init, INITS, self.name)
        if self.model != EHRBERT:
            return
        if (self.encoder is None) == (self.size is None):
            raise EhrDataError(f"Row {self.name!r}: `ehrbert` takes a `size` or an `encoder`. Set one of the two.")
        if self.encoder is None and self.init is None:
            raise EhrDataError(f"Row {self.name!r}: `init` must be `random` or `pretrained`. Set it.")

    @property
    def neural(self) -> bool:
        """Whether the row is trained by gradient descent, and seeds make it differ."""
        return self.model not in CLASSICAL

    @property
    def needs_checkpoint(self) -> bool:
        """Whether it starts from an encoder that is pre-trained here; a random one has its shape."""
        return self.model == EHRBERT and (self.init == "pretrained" or self.encoder is None)

    def unset(self) -> str | None:
        """Why the row cannot run on this machine, or None."""
        names = re.findall(r"\$\{?(\w+)", os.path.expandvars(self.encoder or ""))
        return f"set {names[0]} to a folder or Hub id of that encoder" if names else None


@dataclass(frozen=True)
class CodingSpec:
    """A whole coding report.

    Attributes:
        name: Stem of the files.
        title: Above the tables.
        datasets: Notes.
        rows: Rows in their order.
        comparisons: Pairs (row, reference): the claims.
        compared: Metrics of the comparisons; all are adjusted together (Holm). ``auroc_macro (group)`` names a group.
        draws: Seeds of the rows that are trained; a baseline without one has a single fit.
        tokenizer: ``vocabulary``, ``vocab_size`` and ``min_patients``, as ``hf-ehr pretrain-notes`` takes them.
        encoders: Size → fields of ``EhrBertConfig``, and ``preset``.
        pretraining: Seeds, fields of ``NotePretrainArguments`` and of ``TrainingArguments``.
        finetuning: Fields of ``TrainingArguments``, and ``patience``.
        detailed: Row of the table of frequent codes and of the histogram; the last that ran by default.
        notes: Printed below the tables.
        kind: Says that this is a coding report.
    """

    name: str
    title: str
    datasets: tuple[CodingData, ...]
    rows: tuple[CodingRow, ...]
    comparisons: tuple[tuple[str, str], ...] = ()
    compared: tuple[str, ...] = ("auroc_micro", "auroc_macro")
    draws: int = 3
    tokenizer: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretraining: PretrainSpec = field(default_factory=PretrainSpec)
    finetuning: dict[str, Any] = field(default_factory=dict)
    detailed: str | None = None
    notes: tuple[str, ...] = ()
    kind: str = KIND

    def __post_init__(self) -> None:
        check_rows(self)
        if not isinstance(self.draws, int) or self.draws < 1:
            raise EhrDataError(f"`draws` must be a positive number, got {self.draws!r}. Change it.")
        for row in self.rows:
            if row.size is not None:
                one_of("size", row.size, list(self.encoders), row.name)
            for name in row.datasets or ():
                one_of("datasets", name, [data.name for data in self.datasets], row.name)
        if self.detailed is not None:
            one_of("detailed", self.detailed, [row.name for row in self.rows], self.name)

    @classmethod
    def from_yaml(cls, path: str | Path) -> CodingSpec:
        """Reads a file, or a specification of the package by its name (``bertxml_table2``).

        Raises:
            EhrDataError: There is no such file, or a field is unknown, absent or out of range.
        """
        return from_content(cls, read_yaml(path), CodingData, CodingRow)

    def draws_of(self, row: CodingRow) -> int:
        """Number of seeds of a row."""
        return self.draws if row.neural else 1

    def rows_of(self, data: CodingData) -> list[CodingRow]:
        """Rows of a data set that can run on this machine."""
        return [row for row in self.rows if data.name in (row.datasets or [data.name]) and row.unset() is None]

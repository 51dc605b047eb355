"""A classifier of visits beside its rivals on the test patients: tables, calibration, subgroups, model card.

test visits ─ codes, words ─▶ repeat last visit, popularity, LR, LightGBM ─┐
            ─ examples ─▶ MedM-PLM, G-BERT or a baseline, untrained twin ──┴─▶ figures with intervals over patients
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoModelForSequenceClassification, TrainingArguments

from . import training
from ._visit_rivals import admission_rivals, coding_rivals, demographics, groups_of, recommendation_rivals
from ._visit_tables import SetComparison, write_set_table
from .cards import evaluation_card, figures_of, figures_of_rows
from .code_thresholds import tune_thresholds
from .evaluation import EvaluateArguments, written_by_finetune
from .metrics import best_f1_threshold
from .models.processing_medmplm import MedMPLMProcessor
from .multilabel_predictions import MultilabelPredictions
from .recommendation import ddi_matrix
from .reports import evaluate_rows, write_table
from .schema import DatasetInfo, EhrDataError, atomic_path
from .subgroups import subgroup_lines, subgroups, write_subgroups
from .tasks.audit import OneShotTest, SplitManifest
from .training import SPLITS_FILE
from .training._runs import arguments_from
from .training.visit_baselines import VisitBaselineArguments
from .training.visits import (
    VisitArguments,
    VisitFinetuneArguments,
    architecture_of,
    asked_visits,
    finetune_visits,
    labelled_visits,
    predict_visits,
    without_answers,
)
from .visualization import calibration_plot

if TYPE_CHECKING:
    import datasets

NAMES = {
    "medmplm": "MedM-PLM", "gbert": "G-BERT", "rnn": "RNN", "medbert": "Med-BERT", "note": "Note alone",
    "note+gbert": "Note + G-BERT", "note+medbert": "Note + Med-BERT", "cnn": "CNN",
}  # fmt: skip
DRAWN = ("L2 LR", "LightGBM", "Bag-of-codes LR", "LightGBM on counts")
"""Rows in the figures, beside the model."""
PAPERS = {
    "medmplm": "MedM-PLM (Liu et al., JBHI 2022) in an independent implementation; not the authors' weights.",
    "gbert": "G-BERT (Shang et al., IJCAI 2019) in an independent implementation; not the authors' weights.",
}
BASELINE = "A baseline of MedM-PLM (Liu et al., JBHI 2022, Table III)."
READS = {
    "recommendation": "a patient's earlier visits and the diagnoses of the visit in question, the output the "
    "probability of each drug of `config.id2label`. Diagnoses are coded after a visit: this is a retrospective task",
    "admission": "a visit as it was known when asked, the output the probability of `{task}`",
    "coding": "the notes and drugs of a visit, the output the probability of each code of `config.id2label`",
}
CARD = """---
{meta}
---

# {name} for `{task}`

> Research software, **not a medical device**: no decision about a patient may rest on it.

{paper} The input is {reads}.

```python
import hf_ehr
from transformers import AutoModelForSequenceClassification, AutoProcessor

model = AutoModelForSequenceClassification.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
batch = processor({example})
```

The thresholds in `config.thresholds` were tuned on validation patients. Splits are by patient. Codes that too few
training patients have back off to their classes.

## Figures

{table}

{notes}
"""
EXAMPLES = {
    "recommendation": '{"visits": [{"diagnoses": ["ICD10CM/E11.9"], "medications": ["ATC/A10B"]}, '
    '{"diagnoses": ["ICD10CM/I10"]}]}',
    "admission": '{"diagnoses": ["ICD10CM/E11.9"], "medications": ["ATC/A10B"]}',
    "coding": '{"medications": ["ATC/A10B"]}',
}


@dataclass
class VisitEvaluateArguments(EvaluateArguments):
    """Arguments of `hf-ehr evaluate` for all models."""

    ddi: str | None = field(
        default=None,
        metadata={"help": "Recommendation: CSV or Parquet whose first two columns are drugs that interact."},
    )


@dataclass
class _Made:
    """A classifier and how it was made.

    Attributes:
        kind: ``medmplm``, ``gbert`` or a baseline.
        twin: Whether there is a model to be trained from scratch beside it.
    """

    folder: str
    kind: str
    data: VisitArguments
    options: Any
    settings: dict[str, Any]
    twin: bool

    @property
    def name(self) -> str:
        """The model's row."""
        return f"Untrained {NAMES[self.kind]}" if getattr(self.options, "untrained", False) else NAMES[self.kind]

    @classmethod
    def of(cls, arguments: EvaluateArguments) -> _Made:
        """What `hf-ehr finetune` wrote; `data` may have moved since."""
        made = written_by_finetune(arguments.model)
        data = arguments_from(VisitArguments, made["data"])
        data = data if arguments.data is None else replace(data, data=arguments.data)
        if "baseline" in made["options"]:
            options = arguments_from(VisitBaselineArguments, made["options"])
            return cls(arguments.model, options.baseline, data, options, made["training"], False)
        fine = arguments_from(VisitFinetuneArguments, made["options"])
        kind = architecture_of(replace(fine, model=arguments.model))
        return cls(arguments.model, kind, data, fine, made["training"], not fine.untrained)


def evaluate(arguments: VisitEvaluateArguments) -> Path:
    """Compares a classifier of visits with its rivals; writes tables, figures, a card and `evaluation.json`.

    The test patients are read once. A MedM-PLM or G-BERT has a twin beside it that was fine-tuned without
    pre-training, for which the pre-trained folder must still be there.

    Returns:
        Path of the Markdown table.

    Raises:
        EhrDataError: The folder was not written by `hf-ehr finetune`, `data` is another preparation, or there are no
            two answers to fit on.
        LeakageError: A test patient was in an earlier training stage.
        ValueError: `ddi` is given for a task that recommends no drugs.
    """
    made, output = _Made.of(arguments), Path(arguments.output)
    if arguments.ddi is not None and made.options.setting != "recommendation":
        raise ValueError(f"`ddi` must be left out for `{made.options.task}`, which recommends no drugs.")
    splits = made.data.splits()
    manifest = made.data.manifest(splits)
    if manifest.salt_check != SplitManifest.load(Path(made.folder) / SPLITS_FILE).salt_check:
        raise EhrDataError(
            "`data` must be the folder of fine-tuning, perhaps moved, got another preparation. Classifiers of visits "
            "are evaluated on the test split of their own data."
        )
    training.check_earlier_stage(made.folder, manifest)
    if made.options.setting == "admission":
        return _admissions(made, splits, output)
    return _sets(made, splits, output, arguments.ddi)


def _admissions(made: _Made, splits: dict[str, np.ndarray], output: Path) -> Path:
    """Tables and card of a yes-or-no task."""
    task = training.task_name(made.options.task)
    model, processor, parts = _opened(made, splits, ["no", task])
    rows: dict[str, Any] = dict(admission_rivals(parts, made.data.data, processor, made.settings["seed"]))
    rows |= _scored(made, model, parts, output)
    held, truth = (np.asarray(parts[name]["labels"]) for name in ("validation", "test"))
    thresholds = {name: best_f1_threshold(held, p[0]) for name, p in rows.items()}
    thresholds[made.name] = model.config.thresholds[task]
    truth = OneShotTest(truth).read()
    patients = np.asarray(parts["test"]["subject_id"])
    visits = np.array([row[-1] for row in parts["test"]["visit_ids"]])
    test = {name: p[1] for name, p in rows.items()}
    results = evaluate_rows(
        test, truth, patients, reference=made.name, thresholds=thresholds, n_train=len(parts["train"])
    )
    notes = _notes(made, len(parts["train"]))
    if processor.note_tokenizer is not None:
        notes.append("Bag-of-codes LR and LightGBM read the words of the note as well.")
    table = next(path for path in write_table(results, output / "table", f"{task}: test visits", notes)
                 if path.suffix == ".md")  # fmt: skip
    groups = groups_of(*demographics(made.data.data, patients, visits))
    found = subgroups(truth, test[made.name], patients, groups, thresholds[made.name])
    write_subgroups(found, output / "subgroups.csv")
    with atomic_path(table) as temporary:
        section = ["", f"## Subgroups ({made.name})", "", *subgroup_lines(found)]
        temporary.write_text("\n".join([table.read_text(encoding="utf-8"), *section]) + "\n", encoding="utf-8")
    _calibration({name: (truth, p) for name, p in test.items()}, made.name, output)
    _write_card(made, task, table, notes, figures_of_rows(table, made.name))
    return table


def _sets(made: _Made, splits: dict[str, np.ndarray], output: Path, ddi: str | None) -> Path:
    """Tables and card of a task that proposes a set of drugs or codes."""
    config_names = AutoModelForSequenceClassification.from_pretrained(made.folder).config.id2label
    names = [config_names[place] for place in range(len(config_names))]
    model, processor, parts = _opened(made, splits, names)
    special = len(processor.medication_tokenizer.all_special_ids)
    asked = {name: asked_visits(part, len(names), special) for name, part in parts.items()}
    seed = made.settings["seed"]
    if made.options.setting == "recommendation":
        rows: dict[str, Any] = dict(recommendation_rivals(parts, processor, seed))
    else:
        rows = dict(coding_rivals(parts, {name: one.truth for name, one in asked.items()}, processor, seed))
    rows |= _scored(made, model, parts, output)
    common = made.options.setting == "recommendation"
    tuned = {name: tune_thresholds(MultilabelPredictions.of(p[0], asked["validation"].truth)) for name, p in
             rows.items()}  # fmt: skip
    thresholds: dict[str, Any] = {name: one.common if common else one.per_label for name, one in tuned.items()}
    thresholds |= {name: 0.5 for name in thresholds if name == "Repeat last visit"}  # it is what it is: 0 and 1
    thresholds[made.name] = np.array([model.config.thresholds[name] for name in names])
    test = asked["test"]
    comparison = SetComparison(
        made.options.setting,
        {name: p[1] for name, p in rows.items()},
        thresholds,
        OneShotTest(test.truth).read(),
        test.previous,
        test.subject_ids,
        len(asked["train"].truth),
        groups_of(*demographics(made.data.data, test.subject_ids, test.visit_ids)),
        None if ddi is None else ddi_matrix(ddi, names),
    )
    notes = _notes(made, comparison.train_size) + (drug_notes(names) if common else [])
    title = f"{made.options.task}: test visits"
    table, results = write_set_table(comparison, made.name, output, title, notes)
    cells = {name: (comparison.truth.ravel(), p.ravel()) for name, p in comparison.test.items()}
    _calibration(cells, made.name, output)
    own = next(row for row in results if row.model == made.name)
    counts = {"test_rows": len(test.truth), "test_patients": len(np.unique(test.subject_ids))}
    figures = figures_of(own.metrics, comparison.headings(), **counts, train_rows=comparison.train_size)
    _write_card(made, made.options.task, table, notes, figures)
    return table


def _opened(
    made: _Made, splits: dict[str, np.ndarray], names: list[str]
) -> tuple[Any, MedMPLMProcessor, dict[str, datasets.Dataset]]:
    """The classifier, its processor, and the examples of each split."""
    processor = MedMPLMProcessor.from_pretrained(made.folder)
    parts = {
        name: labelled_visits(made.data, made.options, processor, names, splits, name)
        for name in ("train", "validation", "test")
    }
    return AutoModelForSequenceClassification.from_pretrained(made.folder), processor, parts


def _scored(
    made: _Made, model: Any, parts: Mapping[str, datasets.Dataset], output: Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Row → validation and test probabilities of the twin, if there is one, and of the model itself."""
    models = {made.name: model}
    if made.twin:
        settings = TrainingArguments(output_dir=str(output / "untrained"), **made.settings)
        twin = finetune_visits(made.data, replace(made.options, untrained=True, linear_probe=False), settings)
        models = {f"Untrained {made.name}": AutoModelForSequenceClassification.from_pretrained(twin)} | models
    blind = {"validation": parts["validation"], "test": without_answers(parts["test"])}
    return {
        name: (predict_visits(one, blind["validation"]), predict_visits(one, blind["test"]))
        for name, one in models.items()
    }


def _notes(made: _Made, train_size: int) -> list[str]:
    source = DatasetInfo.load(made.data.data).source
    notes = [f"Task `{made.options.task}`, {train_size:,} training visits of {source}."]
    if made.options.target_text != "none":
        notes.append(
            f"`target_text` is {made.options.target_text}: the note of the visit in question, which may list its "
            "drugs, was seen. The figures are optimistic."
        )
    return notes


def drug_notes(names: Sequence[str]) -> list[str]:
    """A warning where labels are no ATC classes."""
    others = sum(not name.startswith("ATC/") for name in names)
    if not others:
        return []
    return [
        f"{others:,} of the {len(names):,} drugs are not in ATC: the source's own codes tell strengths and packages "
        "apart. `hf-ehr map-drugs` maps them with a table of yours."
    ]


def _calibration(rows: Mapping[str, tuple[np.ndarray, np.ndarray]], reference: str, output: Path) -> None:
    drawn = {name: one for name, one in rows.items() if name == reference or name in DRAWN}
    calibration_plot(drawn, output / "calibration.png")


def _write_card(made: _Made, task: str, table: Path, notes: list[str], figures: dict[str, Any]) -> None:
    setting = made.options.setting
    evaluation_card(
        Path(made.folder), task, table.read_text(encoding="utf-8"), notes, template=CARD, model=made.name,
        figures=figures, plots=table.parent, name=made.name, paper=PAPERS.get(made.kind, BASELINE),
        reads=READS[setting].format(task=task), example=EXAMPLES[setting],
    )  # fmt: skip


__all__ = ["VisitEvaluateArguments", "evaluate"]

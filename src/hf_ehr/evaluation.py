"""A classifier beside its rivals on the test split: one table with intervals, a calibration plot, a model card.

Every table carries prevalence, age+sex, bag-of-codes and LightGBM, static code embeddings, the same network untrained,
and the model itself: without them a weak architecture looks like a strong pre-training effect.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from . import baselines, training
from .cards import evaluation_card, figures_of_rows
from .datasets import SEXES, build_examples
from .metrics import best_f1_threshold
from .models.modeling_medbert import MedBertForSequenceClassification
from .models.tokenization_ehr import EhrCodeTokenizer
from .reports import evaluate_rows, write_table
from .schema import DatasetInfo, EhrDataError, atomic_path
from .subgroups import age_bands, subgroup_lines, subgroups, write_subgroups
from .tasks.audit import OneShotTest
from .training import FINETUNE_FILE, DataArguments, FinetuneArguments
from .training._runs import arguments_from
from .visualization import calibration_plot

REFERENCE = "Med-BERT"
UNTRAINED = "Untrained Med-BERT"
PPMI = "PPMI-SVD + LR"
RIVALS = ("Prevalence", "Age + sex LR", "Index-leak LR", "Bag-of-codes LR", "LightGBM on counts")


CARD = """---
{meta}
---

# Med-BERT for `{task}`

> Research software, **not a medical device**: no decision about a patient may rest on it.

Med-BERT (Rasmy et al., npj Digital Medicine 2021) in an independent implementation; not the authors' weights.
The input is a patient's diagnosis codes up to the prediction time, the output the probability of `{task}`.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer.encode_patient([["ICD10CM/E11.9", "ICD10CM/I10"], ["ICD10CM/I50.9"]])  # a list of visits
```

The decision threshold in `config.thresholds` was tuned on validation patients. Codes that are not in the vocabulary
back off to their nearest ancestor.

## Figures

{table}

{notes}
"""


@dataclass
class EvaluateArguments:
    """Arguments of `hf-ehr evaluate`."""

    model: str = field(metadata={"help": "Folder that `hf-ehr finetune` wrote."})
    output: str = field(metadata={"help": "Folder for the table, the figures and the card."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Prepared folder; that of fine-tuning if left out. Another is an external test of a MedHMP."
        },
    )


@dataclass
class Comparison:
    """Probabilities of every row of a table, with what is needed to judge them.

    Attributes:
        test: Row → probability per test example, (examples,).
        thresholds: Row → decision threshold, tuned on validation.
        truth: Labels of the test examples, (examples,).
        patients: Patient of each test example, (examples,).
        train_size: Number of training examples.
        groups: Name → group of each test example, None where unknown.
    """

    test: dict[str, np.ndarray]
    thresholds: dict[str, float]
    truth: np.ndarray
    patients: np.ndarray
    train_size: int
    groups: dict[str, Any] = field(default_factory=dict)


def evaluate(arguments: EvaluateArguments) -> Path:
    """Compares a fine-tuned folder with its rivals; writes `table.{md,csv,json}`, `subgroups.csv`, a plot and a card.

    Returns:
        Path of the Markdown table.

    Raises:
        EhrDataError: The folder was not written by `hf-ehr finetune`.
        LeakageError: A test patient was in an earlier training stage.
    """
    made = written_by_finetune(arguments.model)
    data = arguments_from(DataArguments, made["data"])
    data = data if arguments.data is None else replace(data, data=arguments.data)
    options = arguments_from(FinetuneArguments, made["options"])
    output = Path(arguments.output)
    settings = TrainingArguments(output_dir=str(output / "untrained"), **made["training"])
    comparison = compare(data, options, settings, arguments.model)
    task, source = training.task_name(options.task), DatasetInfo.load(data.data).source
    notes = [f"Task `{task}`, {comparison.train_size:,} training examples of {source}."]
    table = write_results(comparison, output, f"{task}: test patients", notes)
    _append_subgroups(comparison, table)
    calibration_plot(
        {name: (comparison.truth, p) for name, p in comparison.test.items() if name in (REFERENCE, PPMI)},
        output / "calibration.png",
    )
    write_card(Path(arguments.model), task, table, notes)
    return table


def written_by_finetune(folder: str | Path) -> dict[str, Any]:
    """What `hf-ehr finetune` wrote of how a classifier was made: its `data`, `options` and `training`.

    Raises:
        EhrDataError: The folder was not written by it.
    """
    path = Path(folder) / FINETUNE_FILE
    if not path.is_file():
        raise EhrDataError(f"{path} is missing. `model` must be a folder that `hf-ehr finetune` wrote.")
    return json.loads(path.read_text())


def compare(
    data: DataArguments, options: FinetuneArguments, training_arguments: TrainingArguments, classifier: str | Path
) -> Comparison:
    """Fits the rivals on the classifier's training examples, trains its untrained twin, and scores the test split.

    Args:
        data: The prepared folder and its split.
        options: How the classifier was fine-tuned.
        training_arguments: The same settings, with an output folder for the untrained twin.
        classifier: The fine-tuned folder.
    """
    splits = data.splits()
    training.check_earlier_stage(str(classifier), data.manifest(splits))
    tokenizer = EhrCodeTokenizer.from_pretrained(classifier)
    parts = {name: training.examples_of(data, options, tokenizer, splits, name) for name in splits}
    predictions = _rivals(data, parts, splits, tokenizer, training_arguments.seed)
    untrained = replace(options, model=str(classifier), untrained=True, linear_probe=False)
    twin = training.finetune(data, untrained, training_arguments)
    for name, folder in ((UNTRAINED, twin), (REFERENCE, classifier)):
        model = MedBertForSequenceClassification.from_pretrained(folder)
        scores = [training.predict(model, parts[split], tokenizer) for split in ("validation", "test")]
        predictions[name] = baselines.Predictions(*scores)
    held = np.asarray(parts["validation"]["labels"])
    thresholds = {name: best_f1_threshold(held, p.validation) for name, p in predictions.items()}
    truth = OneShotTest(np.asarray(parts["test"]["labels"])).read()
    patients = np.asarray(parts["test"]["subject_id"])
    test = {name: p.test for name, p in predictions.items()}
    sexes = [None if not place else SEXES[place - 1] for place in parts["test"]["sex"]]
    groups = {"sex": sexes, "age": age_bands(np.asarray(parts["test"]["age"], np.float64))}
    return Comparison(test, thresholds, truth, patients, len(parts["train"]), groups)


def write_results(comparison: Comparison, output: Path, title: str, notes: list[str]) -> Path:
    """Writes `table.csv`, `table.json` and `table.md` into `output`; returns the last."""
    rows = evaluate_rows(
        comparison.test, comparison.truth, comparison.patients,
        reference=REFERENCE, thresholds=comparison.thresholds, n_train=comparison.train_size,
    )  # fmt: skip
    paths = write_table(rows, output / "table", title, notes)
    return next(path for path in paths if path.suffix == ".md")


def _append_subgroups(comparison: Comparison, table: Path) -> None:
    """Adds the model's figures by subgroup to the Markdown, and writes them as CSV beside it."""
    own, cut = comparison.test[REFERENCE], comparison.thresholds[REFERENCE]
    groups = subgroups(comparison.truth, own, comparison.patients, comparison.groups, cut)
    write_subgroups(groups, table.with_name("subgroups.csv"))
    lines = ["", f"## Subgroups ({REFERENCE})", "", *subgroup_lines(groups), ""]
    with atomic_path(table) as temporary:
        temporary.write_text(table.read_text(encoding="utf-8") + "\n".join(lines), encoding="utf-8")


def write_card(
    folder: Path,
    task: str,
    table: Path,
    notes: list[str],
    *,
    template: str = CARD,
    model: str = REFERENCE,
    **fields: str,
) -> None:
    """Writes the model card `README.md` of a classifier: what it is for, what it is not, and its figures.

    Args:
        folder: Of the classifier.
        task: What it predicts.
        table: Markdown with its figures, its JSON and the plots beside it.
        notes: What a reader must know to read them.
        template: Of the card, with places for `meta`, `task`, `table`, `notes` and the `fields`.
        model: Name of the architecture.
        **fields: Further places of the template.
    """
    evaluation_card(
        folder, task, table.read_text(), notes, template=template, model=model, plots=table.parent,
        figures=figures_of_rows(table, model), **fields,
    )  # fmt: skip


def _rivals(data, parts, splits, tokenizer, seed: int) -> dict[str, Any]:
    """Row → validation and test probabilities of the baselines."""
    examples = [parts[name] for name in ("train", "validation", "test")]
    size = len(tokenizer)
    rows = {name: baselines.BASELINES[name](*examples, vocab_size=size, seed=seed) for name in RIVALS}
    unlabelled = build_examples(
        data.data, tokenizer, subject_ids=splits["train"], max_length=data.max_length, kinds=tuple(tokenizer.kinds)
    )
    table = baselines.ppmi_svd_embeddings(unlabelled, size, dim=min(60, size - 1), seed=seed)
    rows[PPMI] = baselines.ppmi_svd_lr(*examples, vocab_size=size, seed=seed, embeddings=table)
    return rows

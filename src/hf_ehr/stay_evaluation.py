"""A MedHMP classifier of stays or admissions beside its rivals: table, calibration, decisions, subgroups, model card.

test split of the data it was trained on, or ─ summaries ─▶ LR, LightGBM ─┐
all labelled stays of another prepared folder ─ examples ─▶ MedHMP ───────┴─▶ figures with intervals over patients
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments

from . import baselines, training
from .evaluation import Comparison, EvaluateArguments, write_card, written_by_finetune
from .intervals import Interval, holm, patient_bootstrap
from .metrics import best_f1_threshold, event1
from .models.feature_extraction_hourly import HourlyFeatureExtractor
from .models.processing_medhmp import MedHMPProcessor
from .reports import FEW_POSITIVES, Result, csv_text, evaluate_rows, finite, flat_record, markdown_table
from .schema import DatasetInfo, atomic_path, shard_paths
from .stay_baselines import STAY_BASELINES, UNIT_TYPES, StaySummaries, admission_summaries, stay_summaries
from .subgroups import age_bands, subgroup_lines, subgroups, write_subgroups
from .tasks.audit import OneShotTest, SplitManifest
from .training import SPLITS_FILE, stays
from .training._runs import arguments_from
from .training.stays import StayArguments, StayFinetuneArguments
from .visualization import calibration_plot, decision_curve, subgroup_plot
from .vocabulary import MIN_PATIENTS

if TYPE_CHECKING:
    import datasets

REFERENCE = "MedHMP"
UNTRAINED = "Untrained MedHMP"
DRAWN = (REFERENCE, *STAY_BASELINES)
"""Rows in the figures."""

CARD = """---
{meta}
---

# MedHMP for `{task}`

> Research software, **not a medical device**: no decision about a patient may rest on it.

MedHMP (Wang et al., EMNLP 2023) in an independent implementation; not the authors' weights.
The input is {reads} up to the prediction time, the output the probability of `{task}`.

```python
import hf_ehr
from transformers import AutoModelForSequenceClassification, {loader}

model = AutoModelForSequenceClassification.from_pretrained(folder)
processor = {loader}.from_pretrained(folder)
```

The decision threshold in `config.thresholds` was tuned on validation patients. Variables and categories of few
training patients are not read.

## Figures

{table}

{notes}
"""
READS = {
    "stays": "the hours of an intensive care stay",
    "admissions": "what an admission has left behind (hours of its intensive care, codes, notes)",
}


class Level(NamedTuple):
    """What the evaluation of stays and that of admissions do each in their own way."""

    name: str
    key: str
    """Column of the examples that says which stay or admission a row is."""
    options: type[StayFinetuneArguments]
    open_processor: Callable[[str], Any]
    labelled: Callable[..., datasets.Dataset]
    """(model, data, options, processor, splits, name) → examples of a split."""
    predict: Callable[..., np.ndarray]
    finetune: Callable[..., Path]
    summaries: Callable[..., StaySummaries]


def level_of(folder: str | Path) -> Level:
    """Stays or admissions, as the architecture in the configuration of a classifier says."""
    architecture = (AutoConfig.from_pretrained(folder).architectures or [""])[0]
    if "Admission" not in architecture:
        return Level(
            "stays", "stay_id", StayFinetuneArguments, HourlyFeatureExtractor.from_pretrained,
            lambda model, *arguments: stays.labelled_stays(*arguments), stays.predict_stays, stays.finetune_stays,
            stay_summaries,
        )  # fmt: skip
    from .training import admissions

    def labelled(model: Any, data: Any, options: Any, processor: Any, splits: Any, name: str) -> datasets.Dataset:
        notes = admissions.frozen_notes(model, processor)
        return admissions.labelled_admissions(data, options, processor, splits, name, note_vectors=notes)

    return Level(
        "admissions", "visit_id", admissions.AdmissionFinetuneArguments, MedHMPProcessor.from_pretrained,
        labelled, admissions.predict_admissions, admissions.finetune_admissions, admission_summaries,
    )  # fmt: skip


@dataclass
class StayComparison(Comparison):
    """As :class:`hf_ehr.evaluation.Comparison`, and what the subgroups of the test rows are.

    Attributes:
        groups: Name → group of each test row, None where unknown.
    """

    groups: dict[str, Any]


def evaluate(arguments: EvaluateArguments) -> Path:
    """Compares a fine-tuned MedHMP with its rivals; writes `table.{md,csv,json}`, `subgroups.csv`, figures and a card.

    ``data`` may be another prepared folder: an external test set. All of its labelled stays are then the test rows,
    while everything is fitted, and every threshold tuned, on the data of fine-tuning.

    Returns:
        Path of the Markdown table.

    Raises:
        EhrDataError: The folder was not written by `hf-ehr finetune`, or no label is asked within a stay.
        LeakageError: A test patient was in an earlier training stage, or in the training data.
    """
    made = written_by_finetune(arguments.model)
    level = level_of(arguments.model)
    data, options = arguments_from(StayArguments, made["data"]), arguments_from(level.options, made["options"])
    external = None
    if arguments.data is not None:
        other = replace(data, data=arguments.data)
        data, external = (other, None) if _same_preparation(other, arguments.model) else (data, other)
    output, task = Path(arguments.output), training.task_name(options.task)
    settings = TrainingArguments(output_dir=str(output / "untrained"), **made["training"])
    comparison = compare(level, data, options, settings, arguments.model, external)
    tested = f"all labelled {level.name} of another {_source(external)}" if external else f"test {level.name}"
    notes = [f"Task `{task}`, {comparison.train_size:,} training {level.name} of {_source(data)}."]
    table = write_results(comparison, output, f"{task}: {tested}", notes)
    loader = "AutoFeatureExtractor" if level.name == "stays" else "AutoProcessor"
    write_card(
        Path(arguments.model), task, table, notes, template=CARD, model=REFERENCE, loader=loader,
        reads=READS[level.name],
    )  # fmt: skip
    return table


def compare(
    level: Level,
    data: StayArguments,
    options: Any,
    training_arguments: TrainingArguments,
    classifier: str | Path,
    external: StayArguments | None = None,
) -> StayComparison:
    """Fits the rivals on the classifier's training rows, trains its untrained twin, and scores the test rows.

    Args:
        level: Of :func:`level_of`.
        data: The prepared folder of fine-tuning and its split.
        options: How the classifier was fine-tuned.
        training_arguments: The same settings, with an output folder for the untrained twin.
        classifier: The fine-tuned folder.
        external: Another folder, all of whose labelled rows are the test; None is the test split of ``data``.
    """
    splits = data.splits()
    training.check_earlier_stage(str(classifier), data.manifest(splits))
    where = {"train": data, "validation": data, "test": external or data}
    if external is not None:
        splits["test"] = _strangers(data, external)
    processor, model = level.open_processor(str(classifier)), _opened(classifier)
    parts = {name: level.labelled(model, where[name], options, processor, splits, name) for name in where}
    summaries = _summaries(level, where, options.task, parts)
    seed = training_arguments.seed
    predictions = _rivals([summaries[name] for name in where], seed)
    twin = level.finetune(
        data, replace(options, model=str(classifier), untrained=True, linear_probe=False), training_arguments
    )
    for name, scored in ((UNTRAINED, _opened(twin)), (REFERENCE, model)):
        scores = [level.predict(scored, parts[split].remove_columns("labels")) for split in ("validation", "test")]
        predictions[name] = baselines.Predictions(*scores)
    held = np.asarray(parts["validation"]["labels"])
    thresholds = {name: best_f1_threshold(held, p.validation) for name, p in predictions.items()}
    thresholds[REFERENCE] = model.config.thresholds[training.task_name(options.task)]
    truth = OneShotTest(np.asarray(parts["test"]["labels"])).read()
    test = {name: p.test for name, p in predictions.items()}
    patients = np.asarray(parts["test"]["subject_id"])
    groups = _groups(level, where["test"].data, summaries["test"])
    return StayComparison(test, thresholds, truth, patients, len(parts["train"]), groups)


def write_results(comparison: StayComparison, output: Path, title: str, notes: list[str]) -> Path:
    """Writes `table.{md,csv,json}`, `subgroups.csv` and the figures into `output`; returns `table.md`."""
    truth, patients = comparison.truth, comparison.patients
    rows = evaluate_rows(
        comparison.test, truth, patients,
        reference=REFERENCE, thresholds=comparison.thresholds, n_train=comparison.train_size,
    )  # fmt: skip
    scores = event1_scores(comparison)
    own, cut = comparison.test[REFERENCE], comparison.thresholds[REFERENCE]
    groups = subgroups(truth, own, patients, comparison.groups, cut)
    drawn = {name: (truth, comparison.test[name]) for name in DRAWN}
    calibration_plot(drawn, output / "calibration.png")
    decision_curve(drawn, output / "decisions.png", patients=patients)
    if groups[0].figures:
        subgroup_plot(groups, output / "subgroups.png", title=f"{REFERENCE} by subgroup")
    write_subgroups(groups, output / "subgroups.csv")
    sections = [
        "## Event 1",
        "",
        "min(sensitivity, positive predictivity) of the PhysioNet/CinC Challenge 2012, at the threshold tuned on "
        "validation for F1.",
        "",
        "| Model | Event 1 |",
        "|---|---|",
        *(f"| {name} | {score} |" for name, score in scores.items()),
        "",
        f"## Subgroups ({REFERENCE})",
        "",
        *subgroup_lines(groups),
    ]
    return _write_table(rows, output / "table", title, notes, sections, scores)


def event1_scores(comparison: Comparison) -> dict[str, Interval]:
    """Event 1 of every row with a threshold, patients resampled."""
    return {
        name: patient_bootstrap(
            lambda y, p, weight, cut=cut: event1(y, p, cut, weight),  # type: ignore[misc]
            comparison.truth, comparison.test[name], comparison.patients,
        )
        for name, cut in comparison.thresholds.items()
    }  # fmt: skip


def _write_table(
    rows: list[Result], stem: Path, title: str, notes: list[str], sections: list[str], scores: dict[str, Interval]
) -> Path:
    """As ``reports.write_table``, whose mandatory rows are those of codes, with further sections."""
    adjusted = holm([row.difference.p_value if row.difference else None for row in rows])
    records = [flat_record(row, p) for row, p in zip(rows, adjusted, strict=True)]
    if min(row.positives for row in rows) < FEW_POSITIVES:
        notes.append(f"Fewer than {FEW_POSITIVES} positive test rows: these figures prove nothing about any model.")
    content: dict[str, Any] = {"title": title, "notes": notes, "rows": [asdict(row) for row in rows]}
    content["event1"] = {name: asdict(score) for name, score in scores.items()}
    contents = {
        "csv": csv_text(records),
        "json": json.dumps(finite(content), indent=2, allow_nan=False),
        "md": "\n".join([markdown_table(rows, records, title, notes), "", *sections]),
    }
    for suffix, text in contents.items():
        with atomic_path(stem.with_suffix(f".{suffix}")) as temporary:
            temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return stem.with_suffix(".md")


def _opened(folder: str | Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def _source(data: StayArguments) -> str:
    return DatasetInfo.load(data.data).source


def _same_preparation(data: StayArguments, classifier: str) -> bool:
    """Whether a folder is the one that the classifier was trained on, perhaps moved: they then share a salt."""
    return data.manifest(data.splits()).salt_check == SplitManifest.load(Path(classifier) / SPLITS_FILE).salt_check


def _strangers(data: StayArguments, external: StayArguments) -> np.ndarray:
    """All patients of another folder: none of them may be a training or validation patient (L1)."""
    ids = np.concatenate(list(external.splits().values()))
    # Ids of different sources say nothing of each other; sources that share people are refused.
    known = data.splits() if _source(data) == _source(external) else {}
    SplitManifest.of(_source(external), {"test": ids}).check(SplitManifest.of(_source(data), known))
    return ids


def _summaries(
    level: Level, where: Mapping[str, StayArguments], task: str, parts: Mapping[str, datasets.Dataset]
) -> dict[str, StaySummaries]:
    """Summaries of the rows of each split, in their order; the columns are those of the training rows."""
    found: dict[str, StaySummaries] = {}
    for name, part in parts.items():
        labels = training.task_labels(where[name], task)  # type: ignore[arg-type]
        names = found["train"].names if found else None
        subjects = np.unique(np.asarray(part["subject_id"]))
        made = level.summaries(where[name].data, labels=labels, subject_ids=subjects, names=names)
        found[name] = made.in_order(np.asarray(part[level.key]), np.asarray(part["labels"]))
    return found


def _rivals(splits: list[StaySummaries], seed: int) -> dict[str, baselines.Predictions]:
    """Row → validation and test probabilities of the baselines."""
    tables = [_age_sex(part) for part in splits]
    plain = ("Prevalence", "Age + sex LR")
    rows = {name: baselines.BASELINES[name](*tables, vocab_size=0, seed=seed) for name in plain}
    return rows | {name: fit_predict(*splits, seed=seed) for name, fit_predict in STAY_BASELINES.items()}


def _age_sex(part: StaySummaries) -> pa.Table:
    """What ``baselines.age_sex_lr`` reads."""
    sex = [{"F": 1, "M": 2}.get(value, 0) for value in part.fields["sex"]]
    return pa.table({"labels": part.labels, "age": part.fields["age"], "sex": sex})


def _groups(level: Level, data: str, test: StaySummaries) -> dict[str, Any]:
    """Sex, age band and, where it is known, the type of the unit: a variable, or the wording of a stay's admission."""
    fields = test.fields
    units = [fields[name] for name in UNIT_TYPES if name in fields]
    if not units and level.name == "stays":
        units = [stay_units(data, test.subject_id, test.stay_id)]
    known = any(unit is not None for values in units for unit in values)
    return {"sex": fields["sex"], "age": age_bands(fields["age"]), **({"unit": units[0]} if known else {})}


def stay_units(data: str | Path, subject_ids: np.ndarray, stay_ids: np.ndarray) -> np.ndarray:
    """The unit that each stay begins in, as EVENTS word its admission, a shard at a time.

    Args:
        data: Prepared folder.
        subject_ids: Patient of each row, (rows,).
        stay_ids: Its stay, (rows,).

    Returns:
        (rows,) of text; None where there is no wording, ``other`` for a unit of fewer than ``MIN_PATIENTS`` of these
        patients.
    """
    rows = pl.DataFrame({"subject_id": subject_ids, "stay_id": stay_ids})
    found = [
        pl.DataFrame(pq.ParquetFile(path).read(columns=["stay_id", "time", "kind", "text_value"]))
        .filter(pl.col("kind") == "admission", pl.col("stay_id").is_in(rows["stay_id"].unique().implode()))
        .sort("time")
        .unique("stay_id", keep="first", maintain_order=True)
        for path in tqdm(shard_paths(data, "events"), desc="Reading units", unit="shard")
    ]
    units = rows.join(pl.concat(found), on="stay_id", how="left", maintain_order="left").with_columns(
        patients=pl.col("subject_id").n_unique().over("text_value")
    )
    rare = pl.col("text_value").is_not_null() & (pl.col("patients") < MIN_PATIENTS)
    return units.select(pl.when(rare).then(pl.lit("other")).otherwise("text_value")).to_series().to_numpy()

"""The main job in one call: patients → records → tokenizer → pre-trained Med-BERT → classifier → honest figures.

On synthetic patients of world C the truth is known and pre-training has something to gain; on real tables the same
steps run and the report says what so few patients can show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
from transformers.utils import logging as hf_logging

from . import training
from .evaluation import Comparison, compare, write_card, write_results
from .intervals import patient_bootstrap
from .metrics import auroc
from .prepare import SourceName, format_summary, prepare
from .schema import EhrDataError, shard_paths
from .training import DataArguments, FinetuneArguments, PretrainArguments
from .visualization import calibration_plot, label_efficiency_curve

SIZES = (300, 1000)
RECIPE = {"norm_position": "pre", "serialization": "none", "attention_gain": 5.0, "hidden_dropout_prob": 0.0}
"""A small model learns fastest as a set encoder whose masked codes see their patient from the first step."""
PRETRAINING = {
    "learning_rate": 3e-3, "weight_decay": 0.05, "adam_beta2": 0.98, "warmup_steps": 0.05,
    "lr_scheduler_type": "cosine", "num_train_epochs": 5.0, "save_steps": 500, "save_total_limit": 1,
}  # fmt: skip
FINETUNING = {
    "learning_rate": 3e-4, "weight_decay": 0.01, "num_train_epochs": 4.0, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 1024,
}  # fmt: skip


@dataclass
class QuickstartArguments:
    """Arguments of `hf-ehr quickstart`."""

    output: str = field(default="quickstart-output", metadata={"help": "Folder for everything that is made."})
    source: str = field(
        default="synthetic",
        metadata={"help": f"One of {', '.join(get_args(SourceName))}; one with codes, which the challenges lack."},
    )
    input: str | None = field(default=None, metadata={"help": "Folder of the raw tables; not for `synthetic`."})
    options: str = field(default="{}", metadata={"help": "The source's own options as JSON."})
    task: str | None = field(default=None, metadata={"help": "Task; synthetic_outcome or readmission_30d by default."})
    patients: int = field(default=40_000, metadata={"help": "Synthetic patients."})
    epochs: float = field(default=5.0, metadata={"help": "Pre-training epochs."})
    min_patients: int = field(default=11, metadata={"help": "Codes of fewer training patients back off to ancestors."})
    sizes: list[int] = field(default_factory=lambda: list(SIZES), metadata={"help": "Labelled training patients."})


def quickstart(arguments: QuickstartArguments) -> Path:
    """Runs the whole road and prints what it finds.

    Returns:
        The model folder, which `AutoModelForSequenceClassification.from_pretrained` loads.

    Raises:
        EhrDataError: The source cannot be read, or gives no task with both outcomes.
    """
    torch.set_num_threads(1)  # so small a model gains nothing from more, and they stall beside any other work
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # of loading and saving; training keeps its own
    started, output = time.monotonic(), Path(arguments.output)
    data = _prepared(arguments, output / "data")
    task = arguments.task or ("synthetic_outcome" if arguments.source == "synthetic" else "readmission_30d")
    _say(f"2/5  Pre-training a small Med-BERT (masked codes + prolonged stay) → {output / 'pretrained'}")
    figures = _pretrained(arguments, data, output / "pretrained")
    _say(
        f"     hidden codes of validation patients: {figures['code_loss']:.2f} nats, guessing by frequency "
        f"{figures['unigram_loss']:.2f}; prolonged stay: AUROC {figures['stay_auroc']:.3f}"
    )
    _say("3/5  Fine-tuning beside baselines")
    comparisons = {size: _compared(data, task, size, output) for size in _sizes(arguments, data, task)}
    _say("4/5  Tables and figures")
    report = _report(comparisons, output, task, arguments.source)
    model = output / f"model-{max(comparisons)}"
    _say("5/5  Loading the model back and scoring one patient")
    _score_one(model, data)
    _say("\n" + report.read_text())
    _say(_next_steps(model, output, time.monotonic() - started))
    return model


def _prepared(arguments: QuickstartArguments, folder: Path) -> DataArguments:
    import json

    _say(f"1/5  Preparing patients ({arguments.source}) → {folder}")
    options = json.loads(arguments.options)
    if arguments.source == "synthetic":
        options = {"world": "C", "patients": arguments.patients} | options
    elif arguments.input is None:
        raise EhrDataError(f"`input` must name the folder of the {arguments.source} tables. Add --input DIR.")
    _say(format_summary(prepare(cast(SourceName, arguments.source), arguments.input, folder, options=options)))
    return DataArguments(data=str(folder), min_patients=arguments.min_patients)


def _pretrained(arguments: QuickstartArguments, data: DataArguments, folder: Path) -> dict[str, float]:
    import json

    done = folder / "pretraining.json"
    if done.is_file():
        return json.loads(done.read_text())["held_out"]
    options = PretrainArguments(preset="tiny", model_options=json.dumps(RECIPE), mlm_probability=0.3, max_tokens=2048)
    settings = PRETRAINING | {"num_train_epochs": arguments.epochs}
    return training.pretrain(data, options, _settings(folder, settings, logging_strategy="steps", logging_steps=250))


def _sizes(arguments: QuickstartArguments, data: DataArguments, task: str) -> list[int]:
    """The wanted numbers of labelled patients that the training split has, or all of them."""
    labelled = np.unique(training.task_labels(data, task)["subject_id"].to_numpy())
    available = len(np.intersect1d(labelled, data.splits()["train"]))
    return [size for size in sorted(arguments.sizes) if size <= available] or [available]


def _compared(data: DataArguments, task: str, size: int, output: Path) -> Comparison:
    folder = output / f"model-{size}"
    options = FinetuneArguments(task=task, model=str(output / "pretrained"), train_patients=size)
    if not (folder / training.FINETUNE_FILE).is_file():
        training.finetune(data, options, _settings(folder, FINETUNING))
    comparison = compare(data, options, _settings(output / f"untrained-{size}", FINETUNING), folder)
    figure = {name: float(auroc(comparison.truth, p)) for name, p in comparison.test.items()}
    _say(f"     {size} labelled patients, test AUROC: " + ", ".join(f"{n} {v:.3f}" for n, v in figure.items()))
    return comparison


def _report(comparisons: dict[int, Comparison], output: Path, task: str, source: str) -> Path:
    curves: dict[str, dict] = {}
    for size, comparison in comparisons.items():
        notes = _honesty(comparison, source)
        title = f"{training.task_name(task)}, {size} labelled patients"
        report = write_results(comparison, output / f"results-{size}", title, notes)
        write_card(output / f"model-{size}", training.task_name(task), report, notes)
        for name, p in comparison.test.items():
            interval = patient_bootstrap(auroc, comparison.truth, p, comparison.patients, n_resamples=300)
            curves.setdefault(name, {})[size] = interval
    last = comparisons[max(comparisons)]
    rows = ("Bag-of-codes LR", "PPMI-SVD + LR", "Med-BERT")
    calibration_plot({name: (last.truth, last.test[name]) for name in rows}, output / "calibration.png")
    label_efficiency_curve(curves, output / "label_efficiency.png")
    return report


def _honesty(comparison: Comparison, source: str) -> list[str]:
    """What the reader must know before quoting the table."""
    positives = int(comparison.truth.sum())
    notes = [
        f"{len(comparison.truth)} test rows, {positives} positive, {len(np.unique(comparison.patients))} patients."
    ]
    if source == "synthetic":
        notes.append("Synthetic patients with planted structure: the software works, nothing clinical follows.")
    return notes


def _score_one(model: Path, data: DataArguments) -> None:
    """Through the public door: Auto classes, one patient, one probability."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    records = pq.read_table(shard_paths(data.data, "records")[0])
    record = records.filter(pc.greater(pc.list_value_length(records["visits"]), 1)).slice(0, 1).to_pylist()[0]
    inputs = {name: [ids] for name, ids in tokenizer.encode_patient(record).items()}
    with torch.no_grad():
        logits = classifier(**{name: torch.tensor(ids) for name, ids in inputs.items()}).logits
    name, threshold = next(iter(classifier.config.thresholds.items()))
    probability = logits.softmax(-1)[0, 1].item()
    decision = "above" if probability >= threshold else "below"
    risk = f"P({name}) = {probability:.3f}, {decision} the threshold {threshold:.3f}"
    _say(f"     a patient with {len(record['visits'])} visits: {risk}")


def _next_steps(model: Path, output: Path, seconds: float) -> str:
    return "\n".join(
        [
            f"Done in {seconds / 60:.1f} minutes. Look at {output / 'label_efficiency.png'}, "
            f"{output / 'calibration.png'} and {model / 'README.md'}.",
            "Next, on your own tables:",
            "  hf-ehr prepare mimic4 --input mimic-iv/ --output data/",
            "  hf-ehr pretrain medbert --data data/ --output_dir model/",
            "  hf-ehr finetune medbert --data data/ --model model/ --task readmission_30d --output_dir classifier/",
            "  hf-ehr evaluate --model classifier/ --output classifier/evaluation",
        ]
    )


def _settings(folder: Path, settings: dict, **more) -> TrainingArguments:
    settings = {"logging_strategy": "no", "report_to": "none"} | settings | more
    return TrainingArguments(output_dir=str(folder), **settings)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the command line's own voice

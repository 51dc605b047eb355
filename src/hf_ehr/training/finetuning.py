"""Fine-tuning a classifier with the stock ``Trainer``, and reading its predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from scipy.special import expit
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments

from hf_ehr.collators import PackedCollator
from hf_ehr.datasets import build_examples
from hf_ehr.metrics import auroc, best_f1_threshold
from hf_ehr.models.configuration_medbert import MedBertConfig
from hf_ehr.models.modeling_medbert import MedBertForSequenceClassification
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.tasks import SplitManifest, TaskSpec, label_dataset, read_labels
from hf_ehr.training._runs import (
    SPLITS_FILE,
    DataArguments,
    Run,
    batches,
    output_of,
    run_arguments,
    train_from_last_checkpoint,
)

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

FINETUNE_FILE = "finetune.json"
LEAST_SPREAD = 0.1
"""Share of the features' root mean variance below which a feature's own spread does not set its scale in a probe."""
FINETUNE_SETTINGS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "weight_decay", "seed")


@dataclass
class FinetuneArguments:
    """What is predicted, from which checkpoint, with how many patients."""

    task: str = field(metadata={"help": "Named task, a YAML definition, or the name of a file in labels/."})
    model: str = field(metadata={"help": "Folder or Hub id of a pre-trained Med-BERT."})
    train_patients: int | None = field(
        default=None, metadata={"help": "Use this many training patients only (nested subsets for one `draw`)."}
    )
    draw: int = field(default=0, metadata={"help": "Which random order the subset is taken from."})
    untrained: bool = field(default=False, metadata={"help": "Keep the architecture, forget the weights."})
    linear_probe: bool = field(
        default=True,
        metadata={"help": "Start the head `ffn` from a regression on frozen patient vectors."},
    )
    head: str = field(
        default="ffn",
        metadata={"help": "ffn (Med-BERT only), gru, bigru, retain, lstm, dipole, adacare or hitanet."},
    )


def finetune(data: DataArguments, options: FinetuneArguments, training: TrainingArguments) -> Path:
    """Fine-tunes a classifier; the folder holds model, tokenizer, decision threshold, splits and how it was made.

    The best epoch by validation AUROC is kept, the linear probe itself included; the F1 threshold is tuned on
    validation and stored in `config.thresholds`.

    Raises:
        LeakageError: A patient held out here was seen in pre-training, or the tokenizer saw other patients.
        EhrDataError: `output_dir` holds another run.
    """
    splits = data.splits()
    check_earlier_stage(options.model, data.manifest(splits))
    output, run = output_of(training), Run(training, FINETUNE_FILE, data, options)
    if run.finished:
        return output
    tokenizer = EhrCodeTokenizer.from_pretrained(options.model)
    names = ("train", "validation")
    examples = {name: examples_of(data, options, tokenizer, splits, name, output / "examples") for name in names}
    model = new_classifier(options, training.seed)
    if options.linear_probe and model.config.head == "ffn":
        start_from_probe(model, examples["train"], examples["validation"], tokenizer)
    fit_classifier(model, examples["train"], examples["validation"], tokenizer, training)
    held = np.asarray(examples["validation"]["labels"])
    threshold = best_f1_threshold(held, predict(model, examples["validation"], tokenizer))
    model.config.thresholds = {task_name(options.task): float(threshold)}
    if training.process_index == 0:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        data.manifest(splits).save(output / SPLITS_FILE)
        settings = {name: getattr(training, name) for name in FINETUNE_SETTINGS}
        run.finish({"data": asdict(data), "options": asdict(options), "training": settings})
    return output


def fit_classifier(
    model: PreTrainedModel,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    tokenizer: EhrCodeTokenizer,
    training: TrainingArguments,
    patience: int | None = None,
) -> None:
    """Trains a classifier of packed histories; see :func:`fit_best_epoch`."""

    def score(model: Any) -> np.ndarray:
        return predict(model, validation, tokenizer)

    fit_best_epoch(model, train, validation, PackedCollator(tokenizer), score, training, tokenizer, patience)


def fit_best_epoch(
    model: PreTrainedModel,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    collate: Any,
    score: Callable[[Any], np.ndarray],
    training: TrainingArguments,
    processor: Any = None,
    patience: int | None = None,
) -> None:
    """Trains a classifier in place and keeps the epoch that ranks validation patients best by AUROC.

    The state it came with is a candidate too. A run that was stopped goes on from its last checkpoint.

    Args:
        model: Any classifier of two classes that takes the batches of `collate`.
        train: EXAMPLES with 0/1 ``labels``.
        validation: EXAMPLES that epochs are compared on.
        collate: Makes batches of rows.
        score: Model → probability of each validation example.
        training: Settings of the run; checkpoints go to its ``output_dir``.
        processor: What encoded the examples, kept beside checkpoints.
        patience: Epochs without a better one after which to stop; None runs all.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model,
        run_arguments(
            training, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="auroc", greater_is_better=True, save_total_limit=1, remove_unused_columns=False,
        ),
        collate,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=lambda prediction: {"auroc": auroc(prediction.label_ids, positive(prediction.predictions))},
        processing_class=processor,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )  # fmt: skip
    train_from_last_checkpoint(trainer)
    _keep_better(model, before, np.asarray(validation["labels"]), score)


def examples_of(data, options, tokenizer, splits, name: str, cache: Path | None = None) -> datasets.Dataset:
    """EXAMPLES of one split for a task; the training split is cut to `train_patients` (nested within a `draw`)."""
    ids = splits[name]
    if name == "train" and options.train_patients is not None:
        labelled = np.unique(task_labels(data, options.task)["subject_id"].to_numpy())
        ids = np.random.default_rng(options.draw).permutation(np.intersect1d(ids, labelled))[: options.train_patients]
    labels = task_labels(data, options.task)
    folder = None if cache is None else cache / name
    kinds = tuple(tokenizer.kinds)
    return build_examples(
        data.data, tokenizer, labels, subject_ids=ids, max_length=data.max_length, kinds=kinds, cache_dir=folder
    )


def task_labels(data: DataArguments, task: str) -> pa.Table:
    """LABELS of a task: the file in the prepared folder, written now if it is a named task or a YAML definition."""
    path = Path(data.data) / "labels" / f"{task_name(task)}.parquet"
    if path.is_file():
        return read_labels(path)
    return read_labels(label_dataset(task if task_name(task) == task else TaskSpec.from_yaml(task), data.data))


def task_name(task: str) -> str:
    """The name of a task that is given by name or as a YAML file."""
    return TaskSpec.from_yaml(task).name if task.endswith((".yaml", ".yml")) else task


def check_earlier_stage(model: str, manifest: SplitManifest) -> None:
    """L1 and L6: who is held out now was held out when `model` was trained. Models of other data are let pass."""
    path = Path(model) / SPLITS_FILE
    if not path.is_file():
        return
    earlier = SplitManifest.load(path)
    if earlier.salt_check == manifest.salt_check:
        manifest.check(earlier)
    elif earlier.source == manifest.source:
        logger.warning(
            "%s was trained on another preparation of %s: nobody can tell whether its patients are held out here.",
            model, manifest.source,
        )  # fmt: skip


def start_from_probe(model, train: datasets.Dataset, validation: datasets.Dataset, tokenizer) -> None:
    """Sets the classifier to a logistic regression on the frozen patient vectors, its penalty chosen on validation.

    Fine-tuning then starts from features that already separate, instead of distorting them (Kumar et al., ICLR 2022).
    """
    states, held = (embed(model, part, tokenizer) for part in (train, validation))
    set_probe(model.classifier, states, np.asarray(train["labels"]), held, np.asarray(validation["labels"]))


def set_probe(classifier: torch.nn.Linear, states, labels, held_states, held_labels) -> None:
    """Sets a layer of two scores to a regression on (examples, features) states, its penalty chosen on held ones.

    A feature that hardly varies is not scaled up as far as the others: its weight would be so large that the first
    steps of fine-tuning, which move all features, threw every probability to 0 or 1.
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = states.mean(axis=0), states.std(axis=0)
    scale = np.maximum(spread, LEAST_SPREAD * np.sqrt(np.square(spread).mean())) + 1e-6
    fits = [
        LogisticRegression(C=strength, max_iter=1000).fit((states - mean) / scale, labels)
        for strength in (0.001, 0.01, 0.1, 1.0)
    ]
    held = (held_states - mean) / scale
    best = max(fits, key=lambda fit: auroc(held_labels, fit.predict_proba(held)[:, 1]))
    weight = best.coef_[0] / scale
    bias = best.intercept_[0] - weight @ mean
    with torch.no_grad():  # two softmax scores that differ by the regression's score
        classifier.weight.copy_(torch.from_numpy(np.stack([-weight / 2, weight / 2])))
        classifier.bias.copy_(torch.tensor([-bias / 2, bias / 2]))


def predict(model, examples: datasets.Dataset, tokenizer) -> np.ndarray:
    """Probability of the positive class, (examples,), in the order of `examples`."""
    return positive(_forward(model, examples, tokenizer, lambda outputs: outputs.logits))


def embed(model, examples: datasets.Dataset, tokenizer) -> np.ndarray:
    """Pooled patient vectors of the encoder, (examples, hidden)."""
    return _forward(model.base_model, examples, tokenizer, lambda outputs: outputs.pooler_output)


def _forward(model, examples, tokenizer, read) -> np.ndarray:
    order, values = [], []
    model.eval()
    for rows, batch in batches(examples, PackedCollator(tokenizer)):
        with torch.no_grad():
            inputs = {name: value for name, value in batch.to(model.device).items() if "labels" not in name}
            order.append(rows)
            values.append(read(model(**inputs)).float().cpu().numpy())
    return np.concatenate(values)[np.argsort(np.concatenate(order))]


def positive(logits) -> np.ndarray:
    """Scores of two classes, (examples, 2) → probability of the second."""
    logits = np.asarray(logits, np.float64)
    return expit(logits[:, 1] - logits[:, 0])


def _keep_better(model, before: dict, labels: np.ndarray, score: Callable[[Any], np.ndarray]) -> None:
    """Goes back to the weights fine-tuning started from where these rank validation patients better."""
    after = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = auroc(labels, score(model))
    model.load_state_dict(before)
    if auroc(labels, score(model)) <= tuned:
        model.load_state_dict(after)


def new_classifier(options: FinetuneArguments, seed: int) -> MedBertForSequenceClassification:
    """A classifier on the weights of `options.model`, or on fresh ones under `untrained`; its head is random."""
    torch.manual_seed(seed)
    task = task_name(options.task)
    names: dict[str, Any] = {"id2label": {0: "no", 1: task}, "label2id": {"no": 0, task: 1}, "head": options.head}
    if options.untrained:
        config = MedBertConfig.from_pretrained(options.model, **names)
        return MedBertForSequenceClassification(config)
    return MedBertForSequenceClassification.from_pretrained(options.model, **names)

"""Pre-training and fine-tuning of Med-BERT with the stock ``Trainer``, for the command line and the quickstart.

    prepared folder ─ splits, tokenizer ─▶ pretrain ─▶ checkpoint ─▶ finetune ─▶ classifier folder ─▶ predict

Every run resumes from the last checkpoint in its output folder; only training patients are fitted on, thresholds and
early stopping see validation patients, and nothing here opens the test split but :func:`examples_of`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .collators import CodeMasking, PackedCollator, SetMasking
from .datasets import build_examples, split_patients
from .metrics import auroc, best_f1_threshold
from .models.configuration_medbert import MedBertConfig
from .models.modeling_medbert import MedBertForPreTraining, MedBertForSequenceClassification
from .models.tokenization_ehr import EhrCodeTokenizer
from .samplers import FlatExamples, PackedDataset
from .schema import DatasetInfo, atomic_path, shard_paths
from .tasks import SplitManifest, TaskSpec, label_dataset, read_labels
from .tasks.audit import check_fitted_on
from .vocabulary import fit_tokenizer

if TYPE_CHECKING:
    import datasets

SPLITS_FILE = "splits.json"
FINETUNE_FILE = "finetune.json"
FINETUNE_SETTINGS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "weight_decay", "seed")
PREDICT_TOKENS = 65_536
"""Codes scored at a time by :func:`predict` and :func:`embed`."""


@dataclass
class DataArguments:
    """Which patients a run reads."""

    data: str = field(metadata={"help": "Prepared folder (output of `hf-ehr prepare`)."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient (7:1:2)."})
    max_length: int = field(default=512, metadata={"help": "Most codes of a patient; older visits go first."})
    min_patients: int = field(default=11, metadata={"help": "Codes of fewer training patients back off to ancestors."})

    def splits(self) -> dict[str, np.ndarray]:
        """Patients of `train`, `validation` and `test`."""
        ids = [pq.read_table(path, columns=["subject_id"])["subject_id"] for path in shard_paths(self.data, "records")]
        return split_patients(pa.chunked_array([c for i in ids for c in i.chunks]).to_numpy(), seed=self.split_seed)

    def manifest(self, splits: Mapping[str, np.ndarray]) -> SplitManifest:
        """The splits as hashes, salted with a secret that stays in the prepared folder."""
        salt = Path(self.data) / "split_salt"
        if not salt.is_file():
            mine = salt.with_name(f".split_salt.{os.getpid()}")
            mine.write_text(secrets.token_hex(16))
            with suppress(FileExistsError):  # another rank was first: all take its salt
                os.link(mine, salt)
            mine.unlink()
        return SplitManifest.of(DatasetInfo.load(self.data).source, splits, salt=salt.read_text())


@dataclass
class PretrainArguments:
    """What is pre-trained, and on which objective."""

    preset: str = field(default="base", metadata={"help": "`base` (the paper's 6 × 192) or `tiny` (2 × 64)."})
    model_options: str = field(
        default="{}", metadata={"help": 'Further MedBertConfig fields as JSON, e.g. \'{"objective": "masked_set"}\'.'}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder of a tokenizer (`hf-ehr fit-tokenizer`); fitted here when left out."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of codes that are masked."})
    max_predictions: int | None = field(
        default=None, metadata={"help": "1 masks exactly one code per patient, as the paper does, instead of a share."}
    )
    mask_share: float = field(default=0.8, metadata={"help": "Share of chosen codes that become [MASK]."})
    random_share: float = field(default=0.1, metadata={"help": "Share of chosen codes that become a random code."})
    min_unique_codes: int = field(default=3, metadata={"help": "Patients with fewer distinct codes are left out."})
    max_tokens: int = field(default=8192, metadata={"help": "Codes of one packed batch (per device)."})


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
        metadata={"help": "Start the classifier from a regression on frozen patient vectors."},
    )


def pretrain(data: DataArguments, options: PretrainArguments, training: TrainingArguments) -> dict[str, float]:
    """Pre-trains Med-BERT and writes model, tokenizer, split manifest and `pretraining.json` to `output_dir`.

    Returns:
        Held-out figures of the validation patients (:func:`held_out`).

    Raises:
        LeakageError: The tokenizer was not fitted on the training patients of this split.
        EhrDataError: The folder is not prepared, or holds no usable patient.
    """
    splits = data.splits()
    tokenizer = _tokenizer(data, options, splits["train"])
    examples = {
        name: build_examples(
            data.data, tokenizer, subject_ids=splits[name], max_length=data.max_length,
            min_unique_codes=options.min_unique_codes, cache_dir=_output(training) / "examples" / name,
        )
        for name in ("train", "validation")
    }  # fmt: skip
    torch.manual_seed(training.seed)
    model = MedBertForPreTraining(_config(data, options, tokenizer))
    start_from_unigram(model, examples["train"])
    masking = _masking(model.config.objective, options, tokenizer, training.seed)
    trainer = Trainer(
        model,
        # The bins are drawn anew each epoch by the data set itself.
        _arguments(training, per_device_train_batch_size=1, train_sampling_strategy="sequential"),
        PackedCollator(tokenizer, masking),
        train_dataset=PackedDataset(examples["train"], options.max_tokens, training.seed),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=_checkpoint(training))
    figures = held_out(model, examples["validation"], examples["train"], tokenizer)
    if trainer.is_world_process_zero():
        trainer.save_model(training.output_dir)
        data.manifest(splits).save(_output(training) / SPLITS_FILE)
        _write_json(_output(training) / "pretraining.json", {"held_out": figures, **asdict(options)})
        _leave_no_patients(_output(training))
    return figures


def start_from_unigram(model: MedBertForPreTraining, examples: datasets.Dataset) -> None:
    """Sets the decoder's bias to the log frequency of each code, so that learning starts where guessing ends."""
    with torch.no_grad():
        model.head.decoder.bias.copy_(torch.from_numpy(_log_unigram(examples, model.config.vocab_size)))


def held_out(
    model: MedBertForPreTraining, validation: datasets.Dataset, train: datasets.Dataset, tokenizer: EhrCodeTokenizer
) -> dict[str, float]:
    """Loss on codes that are truly hidden ([MASK] only), beside the unigram's: training loss also counts kept codes.

    Returns:
        `code_loss` and `unigram_loss` (nats per hidden code), and `stay_auroc` of the prolonged-stay head.
    """
    objective = model.config.objective
    masking = SetMasking(tokenizer) if objective == "masked_set" else CodeMasking(tokenizer, 0.15, None, 0, 1.0, 0.0)
    collate = PackedCollator(tokenizer, masking)
    unigram = _log_unigram(train, model.config.vocab_size)
    loss, guess, targets, scores, stays = 0.0, 0.0, 0, [], []
    for batch in _batches(validation, collate, masked=True):
        with torch.no_grad():
            outputs = model.eval()(**batch.to(model.device))
        hidden = batch["labels"][batch["labels"] >= 0].cpu().numpy()
        loss, guess = loss + outputs.mlm_loss.item() * len(hidden), guess - unigram[hidden].sum()
        targets += len(hidden)
        scores.append(outputs.stay_logits.softmax(-1)[:, 1].float().cpu().numpy())
        stays.append(batch["prolonged_stay_labels"].cpu().numpy())
    stay_auroc = auroc(np.concatenate(stays), np.concatenate(scores))
    return {"code_loss": loss / targets, "unigram_loss": float(guess / targets), "stay_auroc": float(stay_auroc)}


def finetune(data: DataArguments, options: FinetuneArguments, training: TrainingArguments) -> Path:
    """Fine-tunes a classifier; the folder holds model, tokenizer, decision threshold, splits and how it was made.

    The best epoch by validation AUROC is kept, the linear probe itself included; the F1 threshold is tuned on
    validation and stored in `config.thresholds`.

    Raises:
        LeakageError: A patient held out here was seen in pre-training, or the tokenizer saw other patients.
    """
    splits = data.splits()
    output = _output(training)
    tokenizer = EhrCodeTokenizer.from_pretrained(options.model)
    check_earlier_stage(options.model, data.manifest(splits))
    names = ("train", "validation")
    examples = {name: examples_of(data, options, tokenizer, splits, name, output / "examples") for name in names}
    model = new_classifier(options, training.seed)
    if options.linear_probe:
        start_from_probe(model, examples["train"], examples["validation"], tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model,
        _arguments(training, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
                          metric_for_best_model="auroc", greater_is_better=True, save_total_limit=1),
        PackedCollator(tokenizer),
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        compute_metrics=lambda prediction: {"auroc": auroc(prediction.label_ids, _positive(prediction.predictions))},
        processing_class=tokenizer,
    )  # fmt: skip
    _quiet(trainer).train(resume_from_checkpoint=_checkpoint(training))
    _keep_better(model, before, examples["validation"], tokenizer)
    labels, scores = (
        np.asarray(examples["validation"]["labels"]),
        predict(trainer.model, examples["validation"], tokenizer),
    )
    model.config.thresholds = {task_name(options.task): float(best_f1_threshold(labels, scores))}
    if trainer.is_world_process_zero():
        trainer.save_model(str(output))
        data.manifest(splits).save(output / SPLITS_FILE)
        settings = {name: getattr(training, name) for name in FINETUNE_SETTINGS}
        _write_json(output / FINETUNE_FILE, {"data": asdict(data), "options": asdict(options), "training": settings})
        _leave_no_patients(output)
    return output


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
    if path.is_file():
        earlier = SplitManifest.load(path)
        if earlier.salt_check == manifest.salt_check:
            manifest.check(earlier)


def start_from_probe(model, train: datasets.Dataset, validation: datasets.Dataset, tokenizer) -> None:
    """Sets the classifier to a logistic regression on the frozen patient vectors, its penalty chosen on validation.

    Fine-tuning then starts from features that already separate, instead of distorting them (Kumar et al., ICLR 2022).
    """
    from sklearn.linear_model import LogisticRegression

    states = embed(model, train, tokenizer)
    mean, scale = states.mean(axis=0), states.std(axis=0) + 1e-6
    held, labels = (embed(model, validation, tokenizer) - mean) / scale, np.asarray(validation["labels"])
    fits = [
        LogisticRegression(C=strength, max_iter=1000).fit((states - mean) / scale, train["labels"])
        for strength in (0.001, 0.01, 0.1, 1.0)
    ]
    best = max(fits, key=lambda fit: auroc(labels, fit.predict_proba(held)[:, 1]))
    weight = best.coef_[0] / scale
    bias = best.intercept_[0] - weight @ mean
    with torch.no_grad():  # two softmax scores that differ by the regression's score
        model.classifier.weight.copy_(torch.from_numpy(np.stack([-weight / 2, weight / 2])))
        model.classifier.bias.copy_(torch.tensor([-bias / 2, bias / 2]))


def predict(model, examples: datasets.Dataset, tokenizer) -> np.ndarray:
    """Probability of the positive class, (examples,), in the order of `examples`."""
    return _positive(_forward(model, examples, tokenizer, lambda outputs: outputs.logits))


def embed(model, examples: datasets.Dataset, tokenizer) -> np.ndarray:
    """Pooled patient vectors of the encoder, (examples, hidden)."""
    return _forward(model.base_model, examples, tokenizer, lambda outputs: outputs.pooler_output)


def _arguments(training: TrainingArguments, **changes: Any) -> TrainingArguments:
    """A copy with what a run of ours needs; pinned memory only where there is a device to copy to."""
    return replace(training, dataloader_pin_memory=torch.cuda.is_available(), **changes)


def _quiet(trainer: Trainer) -> Trainer:
    """Under `logging_strategy="no"` the loop prints nothing at all."""
    if trainer.args.logging_strategy == "no":
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    return trainer


def _forward(model, examples, tokenizer, read) -> np.ndarray:
    rows = []
    model.eval()
    for batch in _batches(examples, PackedCollator(tokenizer)):
        with torch.no_grad():
            inputs = {name: value for name, value in batch.to(model.device).items() if "labels" not in name}
            rows.append(read(model(**inputs)).float().cpu().numpy())
    return np.concatenate(rows)


class _Batch(dict):
    def to(self, device) -> _Batch:
        return _Batch({name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in self.items()})


def _batches(examples: datasets.Dataset, collate, masked: bool = False):
    """Packed batches in the order of `examples`; the same masks at every call."""
    flat = FlatExamples(examples)
    bins = np.cumsum(flat.lengths) // PREDICT_TOKENS
    for index, rows in enumerate(np.split(np.arange(len(flat)), np.flatnonzero(np.diff(bins)) + 1)):
        yield _Batch(collate([flat.gather(rows, key=(0, index) if masked else None)]))


def _positive(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


def _keep_better(model, before: dict, validation, tokenizer) -> None:
    """Goes back to the weights fine-tuning started from where these rank validation patients better."""
    labels, after = np.asarray(validation["labels"]), {k: v.clone() for k, v in model.state_dict().items()}
    tuned = auroc(labels, predict(model, validation, tokenizer))
    model.load_state_dict(before)
    if auroc(labels, predict(model, validation, tokenizer)) <= tuned:
        model.load_state_dict(after)


def new_classifier(options: FinetuneArguments, seed: int) -> MedBertForSequenceClassification:
    """A classifier on the weights of `options.model`, or on fresh ones under `untrained`; its head is random."""
    torch.manual_seed(seed)
    task = task_name(options.task)
    names: dict[str, Any] = {"id2label": {0: "no", 1: task}, "label2id": {"no": 0, task: 1}}
    if options.untrained:
        config = MedBertConfig.from_pretrained(options.model, **names)
        return MedBertForSequenceClassification(config)
    return MedBertForSequenceClassification.from_pretrained(options.model, **names)


def _tokenizer(data: DataArguments, options: PretrainArguments, train: np.ndarray) -> EhrCodeTokenizer:
    if options.tokenizer is None:
        return fit_tokenizer(data.data, subject_ids=train, min_patients=data.min_patients)
    tokenizer = EhrCodeTokenizer.from_pretrained(options.tokenizer)
    check_fitted_on(tokenizer.init_kwargs.get("fitted_on", ""), train)
    return tokenizer


def _config(data: DataArguments, options: PretrainArguments, tokenizer: EhrCodeTokenizer) -> MedBertConfig:
    presets = {"base": MedBertConfig.base, "tiny": MedBertConfig.tiny}
    if options.preset not in presets:
        raise ValueError(f"`preset` must be one of {', '.join(presets)}, got {options.preset!r}.")
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": data.max_length}
    fields |= {"pad_token_id": tokenizer.pad_token_id, "mask_token_id": tokenizer.mask_token_id}
    try:
        return presets[options.preset](**(fields | json.loads(options.model_options)))
    except json.JSONDecodeError as error:
        raise ValueError(f"`model_options` must be a JSON object, got {options.model_options!r}: {error}.") from error


def _masking(objective: str, options: PretrainArguments, tokenizer: EhrCodeTokenizer, seed: int):
    if objective == "masked_set":
        return SetMasking(tokenizer, seed=seed)
    shares = (options.mask_share, options.random_share)
    return CodeMasking(tokenizer, options.mlm_probability, options.max_predictions, seed, *shares)


def _log_unigram(examples: datasets.Dataset, vocab_size: int) -> np.ndarray:
    """Smoothed log frequency of each code, (vocab,) float32."""
    flat = FlatExamples(examples)
    codes = flat.gather(np.arange(len(flat))).streams["input_ids"]
    counts = np.bincount(codes, minlength=vocab_size) + 0.5
    return np.log(counts / counts.sum()).astype(np.float32)


def _checkpoint(training: TrainingArguments) -> str | None:
    """The last checkpoint of an interrupted run in the output folder."""
    return get_last_checkpoint(training.output_dir) if _output(training).is_dir() else None


def _output(training: TrainingArguments) -> Path:
    return Path(str(training.output_dir))


def _leave_no_patients(folder: Path) -> None:
    """A model folder holds no examples, and not the pickle of arguments with its local paths."""
    shutil.rmtree(folder / "examples", ignore_errors=True)
    (folder / "training_args.bin").unlink(missing_ok=True)


def _write_json(path: Path, content: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


__all__ = [
    "DataArguments", "FinetuneArguments", "PretrainArguments", "check_earlier_stage", "embed",
    "examples_of", "finetune", "held_out", "new_classifier", "predict", "pretrain", "start_from_probe",
    "start_from_unigram", "task_labels", "task_name",
]  # fmt: skip

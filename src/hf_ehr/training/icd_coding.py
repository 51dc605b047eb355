"""Fine-tuning a coder of notes with the stock ``Trainer``: codes in scope, label vectors, thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from hf_ehr.code_thresholds import tune_auto_code, tune_thresholds
from hf_ehr.label_embeddings import LabelInit, LabelInitReport, init_label_embeddings
from hf_ehr.models.configuration_ehrbert import EhrBertConfig
from hf_ehr.models.modeling_ehrbert import EhrBertForICDCoding
from hf_ehr.multilabel import trainer_code_metrics
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.note_collators import NoteCodingCollator
from hf_ehr.note_datasets import build_coding_examples
from hf_ehr.notes import frequent_codes
from hf_ehr.schema import EhrDataError
from hf_ehr.training._notes import NoteArguments, flat_column
from hf_ehr.training._runs import (
    PREDICT_TOKENS,
    SPLITS_FILE,
    Run,
    config_options,
    output_of,
    run_arguments,
    train_from_last_checkpoint,
)
from hf_ehr.training.finetuning import check_earlier_stage
from hf_ehr.training.note_pretraining import extend_if_needed

if TYPE_CHECKING:
    import datasets

CODER_FILE = "coder.json"
CODER_RECIPE = {
    "learning_rate": 2e-5, "weight_decay": 0.01, "warmup_steps": 0.1, "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 16, "logging_steps": 50,
}  # fmt: skip
"""BERT-XML, section 3.4: AdamW, 2e-5, linear warm-up over a tenth of the steps and linear decay, batches of 32."""
HEADS = ("xml", "cls")
LOGGED = ("auroc_micro", "auroc_macro", "average_precision_micro", "f1_micro", "map")
"""Figures of each epoch; F1 is that at 0.5, thresholds are tuned at the end."""
SELECTION = "auroc_micro"
"""What epochs are compared by unless `metric_for_best_model` says otherwise; the paper selects on AUC."""


@dataclass
class CoderArguments:
    """Which codes are predicted, from which encoder, with which head."""

    model: str = field(metadata={"help": "Folder or Hub id of a text encoder, with its tokenizer."})
    head: str = field(default="xml", metadata={"help": "`xml` (label attention) or `cls` (one layer on [CLS])."})
    model_options: str = field(default="{}", metadata={"help": "Further EhrBertConfig fields as JSON."})
    more_than: int = field(
        default=0, metadata={"help": "Codes of more than so many training notes are predicted (the paper: 1000)."}
    )
    min_patients: int = field(default=11, metadata={"help": "Codes of fewer training patients are not predicted."})
    label_init: str = field(
        default="final_layer",
        metadata={"help": "Start of label vectors: final_layer, word_embeddings, parent_sum or random."},
    )
    max_segments: int | None = field(default=None, metadata={"help": "Windows of a note that are read; all if None."})
    train_notes: int | None = field(default=None, metadata={"help": "Use this many training notes only."})
    draw: int = field(default=0, metadata={"help": "Which random order they are taken from."})
    untrained: bool = field(default=False, metadata={"help": "Keep the architecture, forget the weights."})
    auto_code_precision: float | None = field(
        default=None, metadata={"help": "Also store the thresholds that reach this precision on validation notes."}
    )

    def __post_init__(self) -> None:
        for name, value, known in (("head", self.head, HEADS), ("label_init", self.label_init, get_args(LabelInit))):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        for name, least in (("more_than", 0), ("min_patients", 1), ("max_segments", 1), ("train_notes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.auto_code_precision is not None and not 0 < self.auto_code_precision <= 1:
            raise ValueError(f"`auto_code_precision` must lie in (0, 1], got {self.auto_code_precision}.")


def train_coder(data: NoteArguments, options: CoderArguments, training: TrainingArguments) -> Path:
    """Fine-tunes a coder; the folder holds model, tokenizer, thresholds, splits and how it was made.

    The best epoch on validation notes is kept. Thresholds are tuned on them and stored in the configuration: one a
    label where it has enough positives, else the one with the best micro-F1.

    Raises:
        EhrDataError: No code is in scope, the folder holds no prepared notes, or `output_dir` holds another run.
        LeakageError: A patient held out here was seen when the encoder was trained.
        ValueError: An option is not known.
    """
    check_earlier_stage(options.model, data.manifest())
    output, run = output_of(training), Run(training, CODER_FILE, data, options)
    if run.finished:
        return output
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    tokenizer.model_max_length = data.max_length  # is saved, and whoever opens the coder reads the same windows
    codes = codes_in_scope(data, options.more_than, options.min_patients)
    parts = {"train": training_notes(data, options), "validation": data.splits["validation"]}
    examples = {
        name: build_coding_examples(
            data.folder, tokenizer, codes, note_ids=ids, max_length=data.max_length,
            max_segments=options.max_segments, cache_dir=output / "examples" / name,
        )
        for name, ids in parts.items()
    }  # fmt: skip
    if not any(examples["validation"]["labels"]):
        raise EhrDataError(
            "`validation` notes must hold a code in scope, to tune thresholds on, got none. Prepare more notes."
        )
    model, report = new_coder(options, codes, tokenizer, data.max_length, training.seed)
    model.config.max_segments = options.max_segments
    fit_coder(model, examples["train"], examples["validation"], tokenizer, training)
    store_thresholds(model, predict_codes(model, examples["validation"], tokenizer), options.auto_code_precision)
    if training.process_index == 0:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        data.manifest().save(output / SPLITS_FILE)
        made = {"labels": len(codes), "label_init": None if report is None else asdict(report)}
        run.finish({"data": asdict(data), "options": asdict(options), **made})
    return output


def codes_in_scope(data: NoteArguments, more_than: int, min_patients: int) -> list[str]:
    """The codes of more than `more_than` training notes and at least `min_patients` training patients.

    Raises:
        EhrDataError: There is none.
    """
    train = data.splits["train"]
    patients = data.patients_of_codes(train)
    codes = [
        code for code in frequent_codes(data.folder.labels(), note_ids=train, more_than=more_than)
        if patients[code] >= min_patients
    ]  # fmt: skip
    if not codes:
        raise EhrDataError(
            f"`min_patients` must be at most {max(patients.values())}, the training patients of the most frequent "
            f"code; got {min_patients}. Lower it, or prepare more notes."
        )
    return codes


def training_notes(data: NoteArguments, options: CoderArguments) -> pa.Array:
    """The training notes, or the first `train_notes` of a random order (nested within a `draw`)."""
    ids = data.splits["train"]
    if options.train_notes is None:
        return ids
    return ids.take(pa.array(np.random.default_rng(options.draw).permutation(len(ids))[: options.train_notes]))


def new_coder(
    options: CoderArguments, codes: Sequence[str], tokenizer: Any, max_length: int, seed: int
) -> tuple[EhrBertForICDCoding, LabelInitReport | None]:
    """A coder on the encoder of `options.model`, or on fresh weights under `untrained`; its label vectors started."""
    torch.manual_seed(seed)
    encoder: Any = AutoModel.from_pretrained(options.model, dtype=torch.float32)
    if options.untrained:
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(options.model))
    encoder = extend_if_needed(encoder, max_length)
    fields = config_options(options.model_options, EhrBertConfig)
    id2label = dict(enumerate(codes))
    model = EhrBertForICDCoding.from_encoder(encoder, id2label, head=options.head, **fields)
    if options.head != "xml":
        return model, None
    return model, init_label_embeddings(model, tokenizer, options.label_init)  # type: ignore[arg-type]


def fit_coder(
    model: Any,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    tokenizer: Any,
    training: TrainingArguments,
    patience: int | None = None,
) -> None:
    """Trains a coder in place and keeps the epoch with the best validation figure (`metric_for_best_model`).

    A run that was stopped goes on from its last checkpoint. Notes are scored, and checkpoints written, once an epoch.

    A head with a bias of its own for each label starts at the labels' shares of the training notes
    (:func:`start_at_shares`).

    Args:
        model: :class:`EhrBertForICDCoding`, or another that takes its batches.
        train: Of :func:`hf_ehr.note_datasets.build_coding_examples`.
        validation: As `train`; epochs are compared on it.
        tokenizer: The one that encoded them.
        training: Settings of the run; checkpoints go to its ``output_dir``.
        patience: Epochs without a better one after which to stop; None runs all.
    """
    start_at_shares(model, train)
    packed, selection = takes_packed(model), (training.metric_for_best_model or SELECTION).removeprefix("eval_")
    changes: dict[str, Any] = {} if packed else {"train_sampling_strategy": "group_by_length"}
    trainer = Trainer(
        model,
        run_arguments(
            training, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model=selection, greater_is_better=True,
            save_total_limit=1, remove_unused_columns=False, batch_eval_metrics=True, **changes,
        ),
        NoteCodingCollator(tokenizer, model.num_labels, packed=packed),
        train_dataset=train.with_format("numpy"),
        eval_dataset=validation.with_format("numpy"),
        compute_metrics=trainer_code_metrics(model.num_labels, figures=tuple(dict.fromkeys((selection, *LOGGED)))),
        processing_class=tokenizer,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )  # fmt: skip
    train_from_last_checkpoint(trainer)


@torch.no_grad()
def start_at_shares(model: Any, train: datasets.Dataset) -> bool:
    """Starts the bias of each label at the log odds of its share of the notes, so that no epoch goes into counting.

    Label attention with one network for all labels (the paper's) has no such bias, and learns how frequent a code is
    from its label vector.

    Args:
        model: A coder whose `head` is a linear layer, or has one as `output`.
        train: Its training notes, with `labels`.

    Returns:
        Whether the head has a bias a label.
    """
    layer = model.head if isinstance(model.head, torch.nn.Linear) else model.head.output
    if layer is None:
        return False
    labels = flat_column(train, "labels")
    # Half a note more of either kind: a label that all notes have, or none has, starts at a finite bias.
    shares = (np.bincount(labels, minlength=model.num_labels) + 0.5) / (len(train) + 1)
    layer.bias.copy_(torch.from_numpy(np.log(shares / (1 - shares))))
    return True


def predict_codes(model: Any, examples: datasets.Dataset, tokenizer: Any) -> MultilabelPredictions:
    """Probabilities of all codes for each note, in the order of `examples`, with the notes' codes.

    Examples without the column `labels`, as those of test notes should be, count as notes without codes: take
    :meth:`~hf_ehr.multilabel_predictions.MultilabelPredictions.dense` alone.
    """
    collate = NoteCodingCollator(tokenizer, model.num_labels, packed=takes_packed(model))
    predictions = MultilabelPredictions(model.num_labels)
    model.eval()
    loader = DataLoader(examples.with_format("numpy"), batch_sampler=list(_token_bins(examples)), collate_fn=collate)
    for batch in tqdm(loader, desc="Coding", unit="batch", disable=len(loader) < 8):
        labels = batch.pop("labels", None)
        inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.no_grad():
            scores = model(**inputs).logits.float().sigmoid()
        found = scores.cpu().numpy()
        predictions.add(found, np.zeros_like(found) if labels is None else labels.numpy())
    return predictions


def store_thresholds(model: Any, validation: MultilabelPredictions, auto_code_precision: float | None = None) -> None:
    """Tunes thresholds on validation notes and writes them into the configuration: by label name, and a common one.

    Args:
        model: The coder.
        validation: Its predictions of the validation notes.
        auto_code_precision: Also stores from where on a code needs no review
            (:func:`hf_ehr.code_thresholds.tune_auto_code`).
    """
    names = [model.config.id2label[index] for index in range(model.num_labels)]
    tuned = tune_thresholds(validation)
    model.config.thresholds = dict(zip(names, map(float, tuned.per_label), strict=True))
    model.config.common_threshold = float(tuned.common)
    if auto_code_precision is not None:
        auto = tune_auto_code(validation, tuned.per_label, precision=auto_code_precision)
        model.config.auto_code_thresholds = dict(zip(names, map(float, auto), strict=True))


def takes_packed(model: Any) -> bool:
    """Whether windows may lie end to end: encoders of other families take padded ones only."""
    return getattr(model.config, "text_config", None) is None


def _token_bins(examples: datasets.Dataset) -> Iterator[list[int]]:
    """Consecutive notes of about `PREDICT_TOKENS` tokens together."""
    lengths = [sum(row) for row in examples["segment_lengths"]]
    bins = np.cumsum(lengths) // PREDICT_TOKENS
    for rows in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(bins)) + 1):
        yield rows.tolist()

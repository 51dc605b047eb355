"""Pre-training of a text encoder on notes (BERT-XML, §3.3) with the stock ``Trainer``."""

from __future__ import annotations

import inspect
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, Trainer, TrainingArguments

from hf_ehr.models.any_encoder import table_positions
from hf_ehr.models.configuration_ehrbert import EhrBertConfig
from hf_ehr.models.modeling_ehrbert import EhrBertForMaskedLM, EhrBertForPreTraining, EhrBertPreTrainedModel
from hf_ehr.models.modeling_ehrbert_embeddings import extend_position_embeddings
from hf_ehr.note_collators import NotePretrainingCollator
from hf_ehr.note_datasets import build_pretraining_examples
from hf_ehr.notes import fit_word_tokenizer, fit_wordpiece_tokenizer
from hf_ehr.schema import shard_paths
from hf_ehr.tasks.audit import check_fitted_on
from hf_ehr.training._notes import NoteArguments, flat_column
from hf_ehr.training._runs import (
    PRETRAIN_FILE,
    SPLITS_FILE,
    Run,
    check_config_fields,
    json_options,
    log_frequency,
    output_of,
    run_arguments,
    train_from_last_checkpoint,
)
from hf_ehr.training.finetuning import check_earlier_stage

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

PRESETS = {"small": EhrBertConfig.small, "big": EhrBertConfig.big, "tiny": EhrBertConfig.tiny}
VOCABULARIES = {"wordpiece": fit_wordpiece_tokenizer, "word": fit_word_tokenizer}
NOTE_RECIPE = {
    "learning_rate": 1e-4, "weight_decay": 0.01, "warmup_steps": 0.1, "num_train_epochs": 2.0,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 32, "logging_steps": 50, "save_total_limit": 2,
}  # fmt: skip
"""BERT's; the BERT-XML paper (section 3.3) gives two epochs and batches of 32, and no learning rate."""
TRAIN = ("train", "unlabelled")
"""Splits that are read: notes that nobody coded teach the language too."""


@dataclass
class NotePretrainArguments:
    """Which encoder is pre-trained, and on what."""

    preset: str = field(default="small", metadata={"help": "`small` (8 × 512), `big` (12 × 768) or `tiny` (2 × 64)."})
    model_options: str = field(default="{}", metadata={"help": "Further EhrBertConfig fields as JSON."})
    encoder: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of an encoder to go on from, with its own tokenizer."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder of a tokenizer; fitted here if left out."})
    vocabulary: str = field(default="wordpiece", metadata={"help": "`wordpiece`, or `word` (BERT-XML's)."})
    vocab_size: int = field(default=20_000, metadata={"help": "Size of a vocabulary that is fitted here."})
    min_patients: int = field(
        default=11, metadata={"help": "Fewest training patients who have a word: a rare one may be a name."}
    )
    next_sentence: bool = field(default=True, metadata={"help": "Also tell true second halves from another note's."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens that are chosen."})
    mask_share: float = field(default=0.8, metadata={"help": "Share of chosen tokens that become [MASK]."})
    random_share: float = field(default=0.1, metadata={"help": "Share of chosen tokens that become a random one."})


def pretrain_notes(data: NoteArguments, options: NotePretrainArguments, training: TrainingArguments) -> dict:
    """Pre-trains an encoder; writes model, tokenizer, split manifest and `pretraining.json` to `output_dir`.

    Training notes and uncoded notes are read, validation notes are scored, test notes are not opened.

    Returns:
        Figures of the validation notes (:func:`held_out_notes`).

    Raises:
        ValueError: An option is not known, or the encoder cannot do what is asked of it.
        LeakageError: The tokenizer was not fitted on the training patients of this split, or the encoder that is
            trained further saw a patient who is held out here.
        EhrDataError: The folder holds no prepared notes, or `output_dir` holds another run.
    """
    for name, value, known in (
        ("preset", options.preset, PRESETS),
        ("vocabulary", options.vocabulary, VOCABULARIES),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    if options.encoder is not None:
        check_earlier_stage(options.encoder, data.manifest())
    parts: Any = {"train": [data.splits[name] for name in TRAIN if name in data.splits]}
    parts["validation"] = [data.splits["validation"]]
    run = Run(training, PRETRAIN_FILE, data, options)
    if run.finished:
        return run.record()["held_out"]
    tokenizer = _tokenizer(data, options)
    torch.manual_seed(training.seed)
    model = _model(data, options, tokenizer)
    output = output_of(training)
    examples = {
        name: build_pretraining_examples(
            data.folder, tokenizer, note_ids=[one for ids in part for one in ids.to_pylist()],
            max_length=data.max_length, next_sentence=options.next_sentence, seed=training.seed,
            cache_dir=output / "examples" / name,
        )
        for name, part in parts.items()
    }  # fmt: skip
    frequency = log_frequency(flat_column(examples["train"], "input_ids"), tokenizer)
    packed = isinstance(model, EhrBertPreTrainedModel)
    if packed and options.encoder is None:  # learning starts where guessing by frequency ends
        with torch.no_grad():
            model.head.decoder.bias.copy_(torch.from_numpy(frequency))
    shares = (options.mlm_probability, options.mask_share, options.random_share)
    trainer = Trainer(
        model,
        run_arguments(training, remove_unused_columns=False),
        NotePretrainingCollator(tokenizer, *shares, packed=packed, seed=training.seed),
        train_dataset=examples["train"].with_format("numpy"),
        eval_dataset=examples["validation"].with_format("numpy"),  # for `--eval_strategy` and the best epoch
        processing_class=tokenizer,
    )
    train_from_last_checkpoint(trainer)
    collate = NotePretrainingCollator(tokenizer, 0.15, 1.0, 0.0, packed=packed)
    figures = held_out_notes(model, examples["validation"], collate, frequency, training.per_device_eval_batch_size)
    if trainer.is_world_process_zero():
        trainer.save_model(training.output_dir)
        data.manifest().save(output / SPLITS_FILE)
        run.finish({"held_out": figures, **asdict(options)})
    return figures


def held_out_notes(
    model: Any, examples: datasets.Dataset, collate: Any, log_frequencies: np.ndarray, batch_size: int = 8
) -> dict[str, float]:
    """Loss on hidden tokens of unseen notes beside guessing by frequency, and how well pairs are told apart.

    Args:
        model: A masked-token model, with next-sentence prediction or not.
        examples: Of :func:`hf_ehr.note_datasets.build_pretraining_examples`.
        collate: Hides tokens; with `mask_share=1` all of them are truly hidden.
        log_frequencies: (vocab,), what guessing by frequency says.
        batch_size: Examples at a time.

    Returns:
        `token_loss` and `unigram_loss` (nats per hidden token), and `pair_accuracy` where there are pairs.
    """
    loss = guess = targets = right = pairs = 0.0
    model.eval()
    for batch in DataLoader(examples.with_format("numpy"), batch_size, collate_fn=collate):
        labels, label = batch["labels"], batch.pop("next_sentence_label", None)
        inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.no_grad():
            outputs = model(**inputs)
        hidden = labels[labels >= 0].numpy()
        loss, targets = loss + _token_loss(outputs, labels) * len(hidden), targets + len(hidden)
        guess -= float(log_frequencies[hidden].sum())
        if label is not None:
            right += (outputs.seq_relationship_logits.argmax(-1).cpu() == label).sum().item()
            pairs += len(label)
    figures = {"token_loss": loss / targets, "unigram_loss": guess / targets}
    return figures | ({"pair_accuracy": right / pairs} if pairs else {})


def _token_loss(outputs: Any, labels: torch.Tensor) -> float:
    """Mean over the hidden tokens; BERT's own class gives a loss only together with that of the pairs."""
    if outputs.loss is not None:
        return outputs.loss.item()
    scores = outputs.prediction_logits.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(scores, labels.flatten().to(scores.device)).item()


def _tokenizer(data: NoteArguments, options: NotePretrainArguments) -> Any:
    train = data.subjects(*TRAIN)
    if options.encoder is not None:
        return AutoTokenizer.from_pretrained(options.encoder)
    if options.tokenizer is None:
        return VOCABULARIES[options.vocabulary](
            shard_paths(data.folder.path, "notes"), subject_ids=train, vocab_size=options.vocab_size,
            min_patients=options.min_patients, max_length=data.max_length,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    check_fitted_on(tokenizer.init_kwargs.get("fitted_on", ""), train)
    return tokenizer


def _model(data: NoteArguments, options: NotePretrainArguments, tokenizer: Any) -> Any:
    fields: dict[str, Any] = json_options(options.model_options, "model_options")
    if options.encoder is None:
        check_config_fields(fields, EhrBertConfig, "model_options")
        fields |= {"vocab_size": len(tokenizer), "max_position_embeddings": data.max_length}
        fields |= {"pad_token_id": tokenizer.pad_token_id, "mask_token_id": tokenizer.mask_token_id}
        family = EhrBertForPreTraining if options.next_sentence else EhrBertForMaskedLM
        return family(PRESETS[options.preset](**fields))
    auto = AutoModelForPreTraining if options.next_sentence else AutoModelForMaskedLM
    model: Any = auto.from_pretrained(options.encoder, dtype=torch.float32, **fields)
    if options.next_sentence and "next_sentence_label" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"`next_sentence` must be False for {type(model).__name__}, which has no such head. Set it to False."
        )
    # Its loss is a mean whatever the number of masked tokens, so the Trainer has to divide by the accumulated steps.
    model.accepts_loss_kwargs = isinstance(model, EhrBertPreTrainedModel)
    return extend_if_needed(model, data.max_length)


def extend_if_needed(model: Any, length: int) -> Any:
    """Gives a model with a shorter table of positions one for windows of `length` tokens (BERT-XML, §3.1)."""
    positions = table_positions(model)
    if positions is None or positions >= length:
        return model
    logger.warning(
        "The encoder reads %d tokens: %d positions are added, which nothing has trained yet.",
        positions,
        length - positions,
    )
    return extend_position_embeddings(model, length)

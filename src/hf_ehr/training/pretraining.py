"""Pre-training of Med-BERT with the stock ``Trainer``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from hf_ehr.collators import CodeMasking, PackedCollator, SetMasking
from hf_ehr.datasets import build_examples
from hf_ehr.metrics import auroc
from hf_ehr.models.configuration_medbert import MedBertConfig
from hf_ehr.models.modeling_medbert import MedBertForPreTraining
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.samplers import FlatExamples, PackedDataset
from hf_ehr.tasks.audit import check_fitted_on
from hf_ehr.training._runs import (
    PRETRAIN_FILE,
    SPLITS_FILE,
    DataArguments,
    Run,
    batches,
    config_options,
    log_frequency,
    output_of,
    run_arguments,
    train_from_last_checkpoint,
)
from hf_ehr.vocabulary import fit_tokenizer

if TYPE_CHECKING:
    import datasets


@dataclass
class PretrainArguments:
    """What is pre-trained, and on which objective."""

    preset: str = field(default="base", metadata={"help": "`base` (the paper's 6 × 192), `tiny` (2 × 64) or `behrt`."})
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


def pretrain(data: DataArguments, options: PretrainArguments, training: TrainingArguments) -> dict[str, float]:
    """Pre-trains Med-BERT and writes model, tokenizer, split manifest and `pretraining.json` to `output_dir`.

    Returns:
        Held-out figures of the validation patients (:func:`held_out`).

    Raises:
        LeakageError: The tokenizer was not fitted on the training patients of this split.
        EhrDataError: The folder is not prepared, or holds no usable patient; or `output_dir` holds another run.
    """
    splits = data.splits()
    run = Run(training, PRETRAIN_FILE, data, options)
    if run.finished:
        return run.record()["held_out"]
    tokenizer = _tokenizer(data, options, splits["train"])
    examples = {
        name: build_examples(
            data.data, tokenizer, subject_ids=splits[name], max_length=data.max_length,
            min_unique_codes=options.min_unique_codes, cache_dir=output_of(training) / "examples" / name,
        )
        for name in ("train", "validation")
    }  # fmt: skip
    torch.manual_seed(training.seed)
    model = MedBertForPreTraining(model_config(data, options, tokenizer))
    start_from_unigram(model, examples["train"], tokenizer)
    masking = _masking(model.config.objective, options, tokenizer, training.seed)
    trainer = Trainer(
        model,
        # The bins are drawn anew each epoch by the data set itself.
        run_arguments(training, per_device_train_batch_size=1, train_sampling_strategy="sequential"),
        PackedCollator(tokenizer, masking),
        train_dataset=PackedDataset(examples["train"], options.max_tokens, training.seed),
        processing_class=tokenizer,
    )
    train_from_last_checkpoint(trainer)
    figures = held_out(model, examples["validation"], examples["train"], tokenizer)
    if trainer.is_world_process_zero():
        trainer.save_model(training.output_dir)
        data.manifest(splits).save(output_of(training) / SPLITS_FILE)
        run.finish({"held_out": figures, **asdict(options)})
    return figures


def start_from_unigram(model: MedBertForPreTraining, examples: datasets.Dataset, tokenizer: EhrCodeTokenizer) -> None:
    """Sets the decoder's bias to the log frequency of each code, so that learning starts where guessing ends."""
    with torch.no_grad():
        model.head.decoder.bias.copy_(torch.from_numpy(_log_unigram(examples, tokenizer)))


def held_out(
    model: MedBertForPreTraining, validation: datasets.Dataset, train: datasets.Dataset, tokenizer: EhrCodeTokenizer
) -> dict[str, float]:
    """Loss on codes that are truly hidden ([MASK] only), beside the unigram's: training loss also counts kept codes.

    Returns:
        `code_loss` and `unigram_loss` (nats per hidden code), and `stay_auroc` of the prolonged-stay head if it was
        trained.
    """
    objective = model.config.objective
    masking = SetMasking(tokenizer) if objective == "masked_set" else CodeMasking(tokenizer, 0.15, None, 0, 1.0, 0.0)
    collate = PackedCollator(tokenizer, masking)
    unigram = _log_unigram(train, tokenizer)
    loss, guess, targets, scores, stays = 0.0, 0.0, 0, [], []
    for _, batch in batches(validation, collate, masked=True):
        with torch.no_grad():
            outputs = model.eval()(**batch.to(model.device))
        hidden = batch["labels"][batch["labels"] >= 0].cpu().numpy()
        loss, guess = loss + outputs.mlm_loss.item() * len(hidden), guess - unigram[hidden].sum()
        targets += len(hidden)
        scores.append(outputs.stay_logits.softmax(-1)[:, 1].float().cpu().numpy())
        stays.append(batch["prolonged_stay_labels"].cpu().numpy())
    figures = {"code_loss": loss / targets, "unigram_loss": float(guess / targets)}
    if model.config.stay_loss_weight:
        figures["stay_auroc"] = float(auroc(np.concatenate(stays), np.concatenate(scores)))
    return figures


def _tokenizer(data: DataArguments, options: PretrainArguments, train: np.ndarray) -> EhrCodeTokenizer:
    if options.tokenizer is None:
        return fit_tokenizer(data.data, subject_ids=train, min_patients=data.min_patients)
    tokenizer = EhrCodeTokenizer.from_pretrained(options.tokenizer)
    check_fitted_on(tokenizer.init_kwargs.get("fitted_on", ""), train)
    return tokenizer


def model_config(data: DataArguments, options: PretrainArguments, tokenizer: EhrCodeTokenizer) -> MedBertConfig:
    """The configuration that is pre-trained: preset, options and the sizes of the data."""
    presets = {"base": MedBertConfig.base, "tiny": MedBertConfig.tiny, "behrt": MedBertConfig.behrt}
    if options.preset not in presets:
        raise ValueError(f"`preset` must be one of {', '.join(presets)}, got {options.preset!r}.")
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": data.max_length}
    fields |= {"pad_token_id": tokenizer.pad_token_id, "mask_token_id": tokenizer.mask_token_id}
    return presets[options.preset](**(fields | config_options(options.model_options, MedBertConfig)))


def _masking(objective: str, options: PretrainArguments, tokenizer: EhrCodeTokenizer, seed: int):
    if objective == "masked_set":
        return SetMasking(tokenizer, seed=seed)
    shares = (options.mask_share, options.random_share)
    return CodeMasking(tokenizer, options.mlm_probability, options.max_predictions, seed, *shares)


def _log_unigram(examples: datasets.Dataset, tokenizer: EhrCodeTokenizer) -> np.ndarray:
    """Smoothed log frequency of each code, (vocab,) float32."""
    flat = FlatExamples(examples)
    return log_frequency(flat.gather(np.arange(len(flat))).streams["input_ids"], tokenizer)

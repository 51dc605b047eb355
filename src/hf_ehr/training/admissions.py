"""MedHMP on admissions with the stock ``Trainer``: stage 2, and classifiers of what comes after an admission.

records ─ features, codes, fitted on the training patients ─▶ admissions ─ the stay encoder of stage 1 ─▶ stage 2
        ─ a task's labels ─▶ admissions up to the prediction time ─▶ classifier
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hf_ehr.admission_datasets import NoteVectors, build_admission_examples
from hf_ehr.gradient_caching import cached_step
from hf_ehr.models.any_encoder import evaluating, table_positions
from hf_ehr.models.configuration_medhmp import MedHMPConfig
from hf_ehr.models.modeling_medhmp import MedHMPForAdmissionClassification, MedHMPForAdmissionPreTraining
from hf_ehr.models.modeling_medhmp_transfer import load_stage, with_note_encoder
from hf_ehr.models.processing_medhmp import MedHMPProcessor
from hf_ehr.stay_collators import CODES, AdmissionCollator, CodeHiding, code_hiding, padded_notes
from hf_ehr.training._admission_figures import HIDDEN_SHARE, held_out_admissions
from hf_ehr.training._runs import (
    PRETRAIN_FILE,
    SPLITS_FILE,
    Run,
    output_of,
    run_arguments,
    train_from_last_checkpoint,
)
from hf_ehr.training.finetuning import check_earlier_stage, positive
from hf_ehr.training.stays import (
    Level,
    StayArguments,
    StayFinetuneArguments,
    StayPretrainArguments,
    asked_of,
    features_of,
    fine_tuned,
    fit_probed,
    label_names,
    outputs_of,
    stay_config,
)
from hf_ehr.vocabulary import fit_tokenizer

if TYPE_CHECKING:
    import datasets

STAGE2_RECIPE = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 4096,
    "num_train_epochs": 300.0,
    "weight_decay": 1e-8,
}
"""MedHMP, stage 2 (Section 4.1 and Appendix B): AdamW. Its λ of 0.1 and τ of 0.1 are defaults of `MedHMPConfig`."""
NOTES_AT_A_TIME = 32
SAME_STAYS = ("num_attention_heads", "use_ffn", "layer_norm_eps")
"""Fields that change what a stay encoder computes, but not the shape of a tensor."""


@dataclass
class AdmissionPretrainArguments(StayPretrainArguments):
    """What is pre-trained on admissions, on which features and codes, from which stay encoder."""

    stays: str | None = field(
        default=None, metadata={"help": "Folder of stage 1: its stay encoder and features; both are new if left out."}
    )
    min_patients: int = field(default=11, metadata={"help": "Codes of fewer training patients back off to ancestors."})
    note_encoder: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a text encoder for the notes; left out, none are read."}
    )
    note_max_length: int = field(default=512, metadata={"help": "Most tokens of the note of an admission."})
    chunk_size: int = field(default=128, metadata={"help": "Admissions of a batch that are in memory at a time."})


@dataclass
class AdmissionFinetuneArguments(StayFinetuneArguments):
    """What is predicted of an admission, from which checkpoint, with how many patients."""

    task: str = field(metadata={"help": "Named task that is asked in admissions, e.g. readmission_30d, or a YAML."})
    model: str = field(metadata={"help": "Folder or Hub id of a MedHMP pre-trained on admissions."})
    untrained: bool = field(default=False, metadata={"help": "Keep architecture and text encoder, forget the rest."})


class AdmissionPretrainer(Trainer):
    """The stock Trainer, whose step compares all admissions of a batch and has a chunk of them in memory.

    Args:
        *args: As `Trainer`; the collator is :class:`Chunks`.
        hiding: Which codes of a batch are hidden: drawn from the seed and the number of the step, so that every epoch
            has others and a run that goes on has those that it would have had.
        **kwargs: As `Trainer`.
    """

    def __init__(self, *args: Any, hiding: Mapping[str, CodeHiding], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.hiding = hiding

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Adds the gradients of a batch, over all its chunks and ranks, and returns its loss."""
        model.train()
        chunks: Any = self._prepare_inputs(inputs)["chunks"]
        key = (self.state.global_step, self.args.process_index)
        for name, hide in self.hiding.items():
            generator = hide.generator(key)
            for chunk in chunks:
                ids = chunk[CODES[name]]
                chunk[f"{name}_mask"] = torch.from_numpy(hide(ids.cpu().numpy(), generator)).to(ids.device)
        with self.accelerator.autocast():
            return cached_step(model, chunks).loss


@dataclass
class Chunks:
    """Rows of a batch → `chunks`, batches of at most `size` of them."""

    collate: AdmissionCollator
    size: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, torch.Tensor]]]:
        """All rows of a batch, in order."""
        return {"chunks": [self.collate(rows[first : first + self.size]) for first in range(0, len(rows), self.size)]}


def pretrain_admissions(
    data: StayArguments, options: AdmissionPretrainArguments, training: TrainingArguments
) -> dict[str, float]:
    """Stage 2: hidden codes, and each modality beside the others, of the training patients' admissions (Eq 8 to 11).

    A batch is `per_device_train_batch_size` admissions of every rank, all compared with each other; memory is that of
    `chunk_size`. On several ranks the last batch of an epoch is filled with admissions of its first one, as Accelerate
    does; `dataloader_drop_last` leaves it out. A text encoder that is frozen reads each note once, before training.
    Writes model, processor, split manifest and `pretraining.json` to `output_dir`.

    Returns:
        Figures of validation admissions (:func:`held_out_admissions`).

    Raises:
        LeakageError: Stage 1, or the features, saw other patients than the training patients of this split.
        EhrDataError: The folder holds no admission or no code, or `output_dir` holds another run.
        ValueError: An option is not known, or the stay encoder of stage 1 is not the model's.
    """
    _check(options, training)
    splits = data.splits()
    if options.stays is not None:
        check_earlier_stage(options.stays, data.manifest(splits))
    run = Run(training, PRETRAIN_FILE, data, options)
    if run.finished:
        return run.record()["held_out"]
    processor = admission_processor(data, options, splits["train"])
    model: Any = new_admission_model(options, processor, training.seed)
    notes = frozen_notes(model.to(training.device), processor)
    examples = {
        name: build_admission_examples(
            data.data, processor, subject_ids=splits[name], note_vectors=notes,
            cache_dir=output_of(training) / "examples" / name,
        )
        for name in ("train", "validation")
    }  # fmt: skip
    collate = AdmissionCollator.for_model(model.config, examples["train"].column_names)
    trainer = AdmissionPretrainer(
        model, run_arguments(training, remove_unused_columns=False), Chunks(collate, options.chunk_size),
        train_dataset=examples["train"].with_format("numpy"),
        hiding=code_hiding(processor.code_tokenizers, HIDDEN_SHARE, training.seed),
    )  # fmt: skip
    train_from_last_checkpoint(trainer)
    figures = held_out_admissions(model, examples["validation"], examples["train"], processor)
    if trainer.is_world_process_zero():
        trainer.save_model(str(training.output_dir))
        processor.save_pretrained(training.output_dir)
        data.manifest(splits).save(output_of(training) / SPLITS_FILE)
        run.finish({"held_out": figures, **asdict(options)})
    return figures


def _check(options: AdmissionPretrainArguments, training: TrainingArguments) -> None:
    if options.chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {options.chunk_size}.")
    if options.stays is not None and options.features is not None:
        raise ValueError("`features` must be left out with `stays`: the stay encoder reads the features beside it.")
    if options.hidden_variables:
        raise ValueError(
            f"`hidden_variables` must be 0 in stage 2, which hides codes, got {options.hidden_variables}. Give it to "
            "stage 1."
        )
    if training.gradient_accumulation_steps != 1:
        raise ValueError(
            "`gradient_accumulation_steps` must be 1: admissions of two steps are not compared. Set "
            "`per_device_train_batch_size` to the whole batch; `chunk_size` bounds the memory."
        )
    if training.fp16:
        raise ValueError("`fp16` must be off: its loss scaling knows no chunks. Use `bf16`.")


def admission_processor(
    data: StayArguments, options: AdmissionPretrainArguments, train: np.ndarray
) -> MedHMPProcessor:
    """The features of stage 1, or others, codes fitted on the training patients, and the text encoder's tokenizer."""
    diagnoses, medications = (
        fit_tokenizer(data.data, subject_ids=train, kinds=[kind], min_patients=options.min_patients)
        for kind in ("diagnoses", "medications")
    )
    words = None
    if options.note_encoder is not None:
        words = AutoTokenizer.from_pretrained(options.note_encoder, model_max_length=options.note_max_length)
    where = options if options.stays is None else StayPretrainArguments(features=options.stays)
    return MedHMPProcessor(features_of(data, where, train), diagnoses, medications, words)


def new_admission_model(
    options: AdmissionPretrainArguments, processor: MedHMPProcessor, seed: int
) -> MedHMPForAdmissionPreTraining:
    """A model on the stay encoder of `options.stays`, every tensor of it, and on the text encoder; the rest is new.

    Raises:
        ValueError: The stay encoder of stage 1 is of another shape or kind than the preset and the options make, or
            the text encoder reads fewer tokens than `note_max_length`.
    """
    torch.manual_seed(seed)
    sizes = {f"{name}_vocab_size": len(tokenizer) for name, tokenizer in processor.code_tokenizers.items()}
    pads = {f"{name}_pad_token_id": codes.pad_token_id for name, codes in processor.code_tokenizers.items()}
    model: Any = MedHMPForAdmissionPreTraining(stay_config(options, processor.feature_extractor, **sizes, **pads))
    if options.note_encoder is not None:
        model = with_note_encoder(model, options.note_encoder, seed)
        room = table_positions(model.base_model.note_encoder)
        if room is not None and room < options.note_max_length:
            raise ValueError(
                f"`note_max_length` must be at most the text encoder's {room}, got {options.note_max_length}."
            )
    if options.stays is not None:
        earlier = MedHMPConfig.from_pretrained(options.stays)
        unlike = [name for name in SAME_STAYS if getattr(earlier, name) != getattr(model.config, name)]
        if unlike:
            raise ValueError(
                f"The stay encoder of `stays` must be of this model's kind, and is not in {', '.join(unlike)}. Give "
                "the `preset` and `model_options` of stage 1."
            )
        load_stage(model, options.stays)
    return model


def frozen_notes(model: Any, processor: MedHMPProcessor) -> NoteVectors | None:
    """Makes vectors of texts with the text encoder of a model; None where it has none, or trains it."""
    encoder = model.base_model
    if encoder.note_encoder is None or not model.config.freeze_note_encoder:
        return None

    def vectors(texts: list[str]) -> np.ndarray:
        order = np.argsort([len(text) for text in texts], kind="stable")  # notes of one length pad each other least
        made = np.empty((len(texts), model.config.note_size), np.float32)
        starts = range(0, len(texts), NOTES_AT_A_TIME)
        for first in tqdm(starts, desc="Reading notes", unit="batch", disable=len(starts) < 8):
            rows = order[first : first + NOTES_AT_A_TIME]
            ids = processor.note_ids([texts[row] for row in rows])
            batch = padded_notes(ids, processor.note_tokenizer.pad_token_id).values()
            with torch.no_grad(), evaluating(encoder):
                found, _ = encoder.note_vectors(*(part.to(encoder.device) for part in batch))
            made[rows] = found.float().cpu().numpy()
        return made

    return vectors


def finetune_admissions(data: StayArguments, options: AdmissionFinetuneArguments, training: TrainingArguments) -> Path:
    """Fine-tunes a classifier of admissions, as :func:`hf_ehr.training.finetune_stays` does one of stays.

    The folder holds model, processor, threshold, splits and how it was made. A text encoder stays frozen unless the
    configuration says otherwise, and then reads each note once.

    Raises:
        LeakageError: A patient held out here was seen in pre-training, or features or codes saw other patients.
        EhrDataError: No label is asked within an inpatient visit, or `output_dir` holds another run.
    """
    admissions = Level(
        MedHMPProcessor.from_pretrained, _fitted_on, new_admission_classifier,
        lambda model, *arguments: labelled_admissions(*arguments, frozen_notes(model, arguments[2])),  # type: ignore
        fit_admission_classifier, predict_admissions,
    )  # fmt: skip
    return fine_tuned(data, options, training, admissions)


def _fitted_on(processor: MedHMPProcessor) -> list[str | None]:
    codes = [tokenizer.init_kwargs.get("fitted_on") for tokenizer in processor.code_tokenizers.values()]
    return [processor.feature_extractor.fitted_on, *codes]


def labelled_admissions(
    data: StayArguments,
    options: StayFinetuneArguments,
    processor: MedHMPProcessor,
    splits: dict[str, np.ndarray],
    name: str,
    cache: Path | None = None,
    note_vectors: NoteVectors | None = None,
) -> datasets.Dataset:
    """Examples of one split for a task; the training split is cut to `train_patients` (nested within a `draw`)."""
    labels, ids = asked_of(data, options, splits, name)
    return build_admission_examples(
        data.data, processor, labels=labels, subject_ids=ids, note_vectors=note_vectors, cache_dir=cache
    )


def new_admission_classifier(options: StayFinetuneArguments, seed: int) -> MedHMPForAdmissionClassification:
    """A classifier on the weights of `options.model`; under `untrained` on its text encoder alone."""
    torch.manual_seed(seed)
    model: Any = MedHMPForAdmissionClassification.from_pretrained(options.model, **label_names(options))
    if options.untrained:
        fresh: Any = MedHMPForAdmissionClassification(model.config)
        fresh.base_model.note_encoder = model.base_model.note_encoder
        fresh.tie_weights()
        return fresh
    return model


def fit_admission_classifier(
    model: Any,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    training: TrainingArguments,
    linear_probe: bool = True,
    patience: int | None = None,
) -> None:
    """As :func:`hf_ehr.training.fit_stay_classifier`, on examples of admissions."""
    collate = AdmissionCollator.for_model(model.config, train.column_names)
    fit_probed(model, train, validation, collate, training, linear_probe, patience)


def predict_admissions(model: Any, examples: datasets.Dataset) -> np.ndarray:
    """Probability of the outcome, (examples,), in the order of `examples`."""
    collate = AdmissionCollator.for_model(model.config, examples.column_names)
    return positive(outputs_of(model, examples, collate, "logits"))

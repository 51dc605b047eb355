"""Pre-training and fine-tuning with the stock ``Trainer``, for the command line, the quickstart and the reports.

    records ─ splits, tokenizer ─▶ pretrain ───────▶ checkpoint ─▶ finetune ────▶ classifier folder ─▶ predict
    notes ─── splits, tokenizer ─▶ pretrain_notes ─▶ encoder ────▶ train_coder ─▶ coder folder ──────▶ predict_codes

Every run resumes from the last checkpoint in its output folder; only training patients are fitted on, thresholds and
early stopping see validation patients, and nothing here opens the test split but :func:`examples_of`.
"""

from hf_ehr.training._notes import NoteArguments
from hf_ehr.training._runs import SPLITS_FILE, DataArguments
from hf_ehr.training.finetuning import (
    FINETUNE_FILE,
    FinetuneArguments,
    check_earlier_stage,
    embed,
    examples_of,
    finetune,
    fit_classifier,
    new_classifier,
    predict,
    start_from_probe,
    task_labels,
    task_name,
)
from hf_ehr.training.icd_coding import (
    CODER_FILE,
    CODER_RECIPE,
    CoderArguments,
    codes_in_scope,
    fit_coder,
    new_coder,
    predict_codes,
    start_at_shares,
    store_thresholds,
    train_coder,
    training_notes,
)
from hf_ehr.training.note_pretraining import (
    NOTE_RECIPE,
    VOCABULARIES,
    NotePretrainArguments,
    held_out_notes,
    pretrain_notes,
)
from hf_ehr.training.pretraining import PretrainArguments, held_out, model_config, pretrain, start_from_unigram

__all__ = [
    "CODER_FILE", "CODER_RECIPE", "FINETUNE_FILE", "NOTE_RECIPE", "SPLITS_FILE", "VOCABULARIES", "CoderArguments",
    "DataArguments", "FinetuneArguments", "NoteArguments", "NotePretrainArguments", "PretrainArguments",
    "check_earlier_stage", "codes_in_scope", "embed", "examples_of", "finetune", "fit_classifier", "fit_coder",
    "held_out", "held_out_notes", "model_config", "new_classifier", "new_coder", "predict", "predict_codes",
    "pretrain", "pretrain_notes", "start_at_shares", "start_from_probe", "start_from_unigram", "store_thresholds",
    "task_labels", "task_name", "train_coder", "training_notes",
]  # fmt: skip

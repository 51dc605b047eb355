"""Pre-training and fine-tuning with the stock ``Trainer``, for the command line, the quickstart and the reports.

    records ─ splits, tokenizer ─▶ pretrain ───────▶ checkpoint ─▶ finetune ────▶ classifier folder ─▶ predict
    notes ─── splits, tokenizer ─▶ pretrain_notes ─▶ encoder ────▶ train_coder ─▶ coder folder ──────▶ predict_codes
    stays ─── splits, features ──▶ pretrain_stays ─▶ stage 1 ────▶ finetune_stays ─▶ classifier folder ▶ predict_stays
    admissions ─ stage 1, codes ─▶ pretrain_admissions ─▶ stage 2 ▶ finetune_admissions ─────▶ predict_admissions

Every run resumes from the last checkpoint in its output folder; only training patients are fitted on, thresholds and
early stopping see validation patients, and nothing here opens the test split but :func:`examples_of`.
"""

from hf_ehr.training._dry_runs import TrainingPlan, dry_run
from hf_ehr.training._notes import NoteArguments
from hf_ehr.training._runs import SPLITS_FILE, DataArguments
from hf_ehr.training.admissions import (
    HIDDEN_SHARE,
    STAGE2_RECIPE,
    AdmissionFinetuneArguments,
    AdmissionPretrainArguments,
    AdmissionPretrainer,
    finetune_admissions,
    fit_admission_classifier,
    frozen_notes,
    held_out_admissions,
    labelled_admissions,
    new_admission_classifier,
    predict_admissions,
    pretrain_admissions,
)
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
from hf_ehr.training.stays import (
    STAY_RECIPE,
    StayArguments,
    StayFinetuneArguments,
    StayPretrainArguments,
    finetune_stays,
    fit_stay_classifier,
    held_out_stays,
    labelled_stays,
    new_stay_classifier,
    predict_stays,
    pretrain_stays,
    stay_outputs,
)

__all__ = [
    "CODER_FILE", "CODER_RECIPE", "FINETUNE_FILE", "HIDDEN_SHARE", "NOTE_RECIPE", "SPLITS_FILE", "STAGE2_RECIPE",
    "STAY_RECIPE", "VOCABULARIES", "AdmissionFinetuneArguments", "AdmissionPretrainArguments",
    "AdmissionPretrainer", "CoderArguments", "DataArguments", "FinetuneArguments", "NoteArguments",
    "NotePretrainArguments", "PretrainArguments", "StayArguments", "StayFinetuneArguments", "StayPretrainArguments",
    "TrainingPlan", "check_earlier_stage", "codes_in_scope", "dry_run", "embed", "examples_of", "finetune",
    "finetune_admissions",
    "finetune_stays", "fit_admission_classifier", "fit_classifier", "fit_coder", "fit_stay_classifier",
    "frozen_notes", "held_out", "held_out_admissions", "held_out_notes", "held_out_stays", "labelled_admissions",
    "labelled_stays", "model_config", "new_admission_classifier", "new_classifier", "new_coder",
    "new_stay_classifier", "predict", "predict_admissions", "predict_codes", "predict_stays", "pretrain",
    "pretrain_admissions", "pretrain_notes", "pretrain_stays", "start_at_shares", "start_from_probe",
    "start_from_unigram", "stay_outputs", "store_thresholds", "task_labels", "task_name", "train_coder",
    "training_notes",
]  # fmt: skip

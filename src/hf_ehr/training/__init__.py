"""Pre-training and fine-tuning of Med-BERT with the stock ``Trainer``, for the command line and the quickstart.

    prepared folder ─ splits, tokenizer ─▶ pretrain ─▶ checkpoint ─▶ finetune ─▶ classifier folder ─▶ predict

Every run resumes from the last checkpoint in its output folder; only training patients are fitted on, thresholds and
early stopping see validation patients, and nothing here opens the test split but :func:`examples_of`.
"""

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
from hf_ehr.training.pretraining import PretrainArguments, held_out, model_config, pretrain, start_from_unigram

__all__ = [
    "FINETUNE_FILE", "SPLITS_FILE", "DataArguments", "FinetuneArguments", "PretrainArguments", "check_earlier_stage",
    "embed", "examples_of", "finetune", "fit_classifier", "held_out", "model_config", "new_classifier", "predict",
    "pretrain", "start_from_probe", "start_from_unigram", "task_labels", "task_name",
]  # fmt: skip

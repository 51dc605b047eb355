"""Med-BERT with the stock ``Trainer``: pre-trained on codes, fine-tuned for an outcome, asked about one patient.

    python examples/train_medbert.py --output medbert/
    torchrun --nproc_per_node 2 examples/train_medbert.py --output medbert/
    accelerate launch --config_file examples/fsdp.yaml examples/train_medbert.py --output medbert/

The patients are synthetic; put ``prepare("mimic4", DIR, ...)`` in their place for your own.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import Trainer, TrainingArguments, pipeline

from hf_ehr import MedBertConfig, MedBertForPreTraining, MedBertForSequenceClassification
from hf_ehr.collators import CodeMasking, PaddedCollator
from hf_ehr.datasets import build_examples, split_patients
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths
from hf_ehr.tasks import read_labels
from hf_ehr.vocabulary import fit_tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Prepares, pre-trains, fine-tunes, saves, and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("medbert"), help="folder of data and models")
    parser.add_argument("--patients", type=int, default=2000, help="synthetic patients")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop early, e.g. to try the script")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    options = parser.parse_args(arguments)

    training = TrainingArguments(
        str(options.output / "runs"), learning_rate=1e-3, num_train_epochs=3, max_steps=options.max_steps,
        per_device_train_batch_size=32, save_strategy="no", report_to="none", use_cpu=options.cpu,
    )  # fmt: skip
    data, pretrained = options.output / "data", options.output / "pretrained"
    with training.main_process_first():  # of several ranks the first writes, the others find it written
        prepare("synthetic", None, data, workers=1, options={"world": "C", "patients": options.patients})
    ids = [
        pq.read_table(path, columns=["subject_id"])["subject_id"].to_numpy() for path in shard_paths(data, "records")
    ]
    splits = split_patients([one for shard in ids for one in shard])
    tokenizer = fit_tokenizer(data, subject_ids=splits["train"])

    model = MedBertForPreTraining(MedBertConfig.tiny(vocab_size=len(tokenizer)))
    codes = build_examples(data, tokenizer, subject_ids=splits["train"])
    collator = PaddedCollator(tokenizer, CodeMasking(tokenizer, 0.15))
    trainer = Trainer(model, training, collator, train_dataset=codes, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(pretrained))
    trainer.accelerator.wait_for_everyone()

    labels = read_labels(data / "labels" / "synthetic_outcome.parquet")
    examples = {
        name: build_examples(data, tokenizer, labels, subject_ids=splits[name]) for name in ("train", "validation")
    }
    classifier = MedBertForSequenceClassification.from_pretrained(pretrained)
    trainer = Trainer(
        classifier, training, PaddedCollator(tokenizer), train_dataset=examples["train"],
        eval_dataset=examples["validation"], processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(str(options.output / "classifier"))
    if trainer.is_world_process_zero():
        risk = pipeline("risk-prediction", model=str(options.output / "classifier"), device="cpu")
        print(risk(pq.read_table(shard_paths(data, "records")[0]).slice(0, 1).to_pylist()[0]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

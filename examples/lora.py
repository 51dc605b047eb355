"""LoRA (PEFT) on Med-BERT: a few thousand trained weights in an adapter of their own, merged for use.

    python examples/lora.py --output lora/ --model pretrained/

Without ``--model`` a small Med-BERT with random weights takes its place: it shows the road, and nothing else.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline

from hf_ehr import MedBertConfig, MedBertForSequenceClassification
from hf_ehr.collators import PaddedCollator
from hf_ehr.datasets import build_examples, split_patients
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths
from hf_ehr.tasks import read_labels
from hf_ehr.vocabulary import fit_tokenizer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], modules_to_save=["classifier"])


def main(arguments: list[str] | None = None) -> None:
    """Prepares, trains the adapter, saves it, merges it, and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("lora"), help="folder of data, adapter and merged model")
    parser.add_argument("--model", help="folder of a pre-trained Med-BERT with its tokenizer")
    parser.add_argument("--patients", type=int, default=2000, help="synthetic patients")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop early, e.g. to try the script")
    options = parser.parse_args(arguments)

    data, base = options.output / "data", options.model or str(options.output / "base")
    prepare("synthetic", None, data, workers=1, options={"world": "C", "patients": options.patients})
    records = pq.read_table(shard_paths(data, "records")[0])
    train = split_patients(records["subject_id"].to_numpy())["train"]
    if not options.model:
        tokenizer = fit_tokenizer(data, subject_ids=train)
        MedBertForSequenceClassification(MedBertConfig.tiny(vocab_size=len(tokenizer))).save_pretrained(base)
        tokenizer.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = build_examples(
        data, tokenizer, read_labels(data / "labels" / "synthetic_outcome.parquet"), subject_ids=train
    )
    model = get_peft_model(MedBertForSequenceClassification.from_pretrained(base), LORA)
    model.print_trainable_parameters()
    training = TrainingArguments(
        str(options.output / "runs"), learning_rate=1e-3, num_train_epochs=3, max_steps=options.max_steps,
        per_device_train_batch_size=32, save_strategy="no", report_to="none", label_names=["labels"],
        remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model, training, PaddedCollator(tokenizer), train_dataset=examples).train()
    model.save_pretrained(options.output / "adapter")

    fresh = MedBertForSequenceClassification.from_pretrained(base)
    merged = PeftModel.from_pretrained(fresh, options.output / "adapter").merge_and_unload()
    merged.save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")
    print(pipeline("risk-prediction", model=str(options.output / "merged"))(records.slice(0, 1).to_pylist()[0]))


if __name__ == "__main__":
    main()

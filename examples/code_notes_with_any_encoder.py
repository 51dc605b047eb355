"""A coder of clinical notes on any encoder of the library, trained by the stock ``Trainer``.

    python examples/code_notes_with_any_encoder.py --output coder/ --encoder answerdotai/ModernBERT-base

Without ``--encoder`` a small BERT with random weights and a vocabulary of these notes takes its place: it shows the
road, and nothing else. The notes are synthetic; put ``prepare_notes("table", ...)`` in their place for your own.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, BertConfig, BertModel, Trainer, TrainingArguments

from hf_ehr import EhrBertForICDCoding
from hf_ehr.label_embeddings import init_label_embeddings
from hf_ehr.multilabel import trainer_code_metrics
from hf_ehr.note_collators import NoteCodingCollator
from hf_ehr.note_datasets import build_coding_examples, split_notes
from hf_ehr.notes import NoteFolder, fit_wordpiece_tokenizer, frequent_codes, prepare_notes
from hf_ehr.pipelines import highlight_note
from hf_ehr.training import predict_codes, store_thresholds

WORLD = {"patients": 120, "codes": 24, "missed": 0.02, "seed": 0}


def small_bert(folder: NoteFolder, train_ids) -> tuple[BertModel, AutoTokenizer]:
    """An encoder that has learned nothing, with a vocabulary of the training notes."""
    train = list(folder.notes(train_ids))
    subjects = {subject for table in train for subject in table["subject_id"].to_pylist()}
    tokenizer = fit_wordpiece_tokenizer(train[0], subject_ids=sorted(subjects), vocab_size=1000, max_length=128)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)), tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Trains, stores thresholds, saves, and shows one note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("coder"), help="folder of the coder")
    parser.add_argument("--encoder", help="folder or Hub id of an encoder with a fast tokenizer")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop early, e.g. to try the script")
    options = parser.parse_args(arguments)

    folder = prepare_notes("synthetic", None, options.output.with_name(f"{options.output.name}-notes"), options=WORLD)
    splits = split_notes(folder)
    codes = frequent_codes(folder.labels(), note_ids=splits["train"], more_than=5)
    if options.encoder:
        encoder, tokenizer = options.encoder, AutoTokenizer.from_pretrained(options.encoder)
    else:
        encoder, tokenizer = small_bert(folder, splits["train"])
    tokenizer.model_max_length = 128  # is saved with the tokenizer: the pipeline reads windows of this length, too
    examples = {
        name: build_coding_examples(folder, tokenizer, codes, note_ids=splits[name], max_length=128).with_format(
            "numpy"
        )
        for name in ("train", "validation")
    }
    model = EhrBertForICDCoding.from_encoder(encoder, id2label=dict(enumerate(codes)))
    print(init_label_embeddings(model, tokenizer))
    training = TrainingArguments(
        str(options.output), learning_rate=2e-5, warmup_steps=0.1, num_train_epochs=3, max_steps=options.max_steps,
        per_device_train_batch_size=4, eval_strategy="epoch", save_strategy="no", report_to="none",
        remove_unused_columns=False, batch_eval_metrics=True,
    )  # fmt: skip
    trainer = Trainer(
        model,
        training,
        NoteCodingCollator(tokenizer, model.num_labels, packed=False),  # other encoders than EhrBert are padded
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        compute_metrics=trainer_code_metrics(model.num_labels),
    )
    trainer.train()
    store_thresholds(model, predict_codes(model, examples["validation"], tokenizer))
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    note = next(folder.notes(splits["test"]))["text"][0].as_py()
    highlight_note(str(options.output), note, options.output / "note.html")
    print(f"Open {options.output / 'note.html'} in a browser.")


if __name__ == "__main__":
    main()

"""MedM-PLM with the stock ``Trainer``: medications of a visit from its diagnoses, earlier visits and their notes.

    python examples/train_medmplm.py --output medmplm/ --note_encoder medicalai/ClinicalBERT

Without ``--note_encoder`` a small BERT with random weights reads the notes: it shows the road, and nothing else. The
visits are synthetic; ``hf-ehr map-drugs`` brings your own drugs to ATC.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from transformers import Trainer, TrainingArguments, pipeline

from hf_ehr import GBertConfig, MedMPLMConfig, MedMPLMForMedicationRecommendation
from hf_ehr.datasets import split_patients
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths
from hf_ehr.tasks import read_labels
from hf_ehr.tasks.recommendation import MEDICATION_RECOMMENDATION, label_codes
from hf_ehr.training.visits import fit_visit_processor
from hf_ehr.visit_collators import VisitCollator
from hf_ehr.visit_datasets import build_visit_examples

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def new_model(processor, note_encoder: str | None) -> MedMPLMForMedicationRecommendation:
    """A recommender of the medications that the processor knows."""
    names = [
        tokenizer.convert_ids_to_tokens(range(len(tokenizer))) for tokenizer in processor.code_tokenizers.values()
    ]
    drugs = names[1][len(processor.medication_tokenizer.all_special_ids) :]
    codes = GBertConfig.from_vocabularies(*names, hidden_size=32, intermediate_size=32)
    fields = {"id2label": dict(enumerate(drugs)), "label2id": {drug: place for place, drug in enumerate(drugs)}}
    if note_encoder:
        return MedMPLMForMedicationRecommendation.from_note_encoder(note_encoder, code_config=codes, **fields)
    notes = {"model_type": "bert", "vocab_size": len(processor.note_tokenizer), **SMALL}
    config = MedMPLMConfig(code_config=codes, note_config=notes, freeze_note_layers=None, **fields)
    return MedMPLMForMedicationRecommendation(config)


def main(arguments: list[str] | None = None) -> None:
    """Prepares, trains, saves, and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("medmplm"), help="folder of data and model")
    parser.add_argument("--patients", type=int, default=500, help="synthetic patients")
    parser.add_argument("--note_encoder", help="folder or Hub id of a text encoder with a fast tokenizer")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop early, e.g. to try the script")
    options = parser.parse_args(arguments)

    data, folder = options.output / "data", options.output / "recommender"
    prepare("synthetic_text_codes", None, data, workers=1, options={"patients": options.patients})
    labels = read_labels(label_codes(MEDICATION_RECOMMENDATION, data))
    ids = [
        pq.read_table(path, columns=["subject_id"])["subject_id"].to_numpy() for path in shard_paths(data, "records")
    ]
    train = split_patients([one for shard in ids for one in shard])["train"]
    processor = fit_visit_processor(
        str(data), train, min_patients=2, note_encoder=options.note_encoder, note_max_length=64, note_vocab_size=500
    )
    examples = build_visit_examples(data, processor, labels=labels, subject_ids=train)
    model = new_model(processor, options.note_encoder)
    training = TrainingArguments(
        str(options.output / "runs"), learning_rate=1e-3, num_train_epochs=3, max_steps=options.max_steps,
        per_device_train_batch_size=8, save_strategy="no", report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    collator = VisitCollator.of(model.config, num_labels=model.num_labels)
    Trainer(model, training, collator, train_dataset=examples).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    drugs = pipeline("medication-recommendation", model=str(folder))
    history = {"diagnoses": processor.diagnosis_tokenizer.convert_ids_to_tokens([5, 6]), "note": "Seen in the ward."}
    visits = [history, {"diagnoses": processor.diagnosis_tokenizer.convert_ids_to_tokens([6, 7])}]
    print(drugs({"visits": visits}, top_k=3))


if __name__ == "__main__":
    main()

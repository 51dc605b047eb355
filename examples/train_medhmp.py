"""MedHMP with the stock ``Trainer``: hours of intensive care stays, reconstructed first, then asked about death.

    python examples/train_medhmp.py --output medhmp/

The stays are synthetic; put ``prepare("physionet2012", DIR, ...)`` in their place for real ones. Admissions with codes
and notes are the second stage: ``hf-ehr pretrain medhmp --stage 2 --help``.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from transformers import Trainer, TrainingArguments, pipeline

from hf_ehr import MedHMPConfig, MedHMPForStayClassification, MedHMPForStayPreTraining
from hf_ehr.datasets import split_patients
from hf_ehr.hourly import fit_hourly_features
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths
from hf_ehr.stay_collators import StayCollator
from hf_ehr.stay_datasets import build_stay_examples
from hf_ehr.tasks import label_dataset, read_labels

TASK = "icu_mortality_t48"
STAY = {
    "hours": 12,
    "measurements": [
        {"hour": 1.0, "name": "CINC2012/HR", "value": 118.0},
        {"hour": 1.0, "name": "CINC2012/NISysABP", "value": 86.0},
        {"hour": 9.5, "name": "CINC2012/HR", "value": 131.0},
    ],
    "demographics": {"age": 71.0, "sex": "F"},
}
"""An invented patient in the codes of the synthetic source."""


def main(arguments: list[str] | None = None) -> None:
    """Prepares, fits features, pre-trains, fine-tunes, saves, and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("medhmp"), help="folder of data and models")
    parser.add_argument("--patients", type=int, default=500, help="synthetic patients")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop early, e.g. to try the script")
    options = parser.parse_args(arguments)

    data, pretrained, folder = (options.output / name for name in ("data", "pretrained", "classifier"))
    prepare("synthetic_icu", None, data, workers=1, options={"patients": options.patients})
    ids = [
        pq.read_table(path, columns=["subject_id"])["subject_id"].to_numpy() for path in shard_paths(data, "records")
    ]
    train = split_patients([one for shard in ids for one in shard])["train"]
    extractor = fit_hourly_features(data, subject_ids=train, form="continuous", demographics=("age", "sex"))
    training = TrainingArguments(
        str(options.output / "runs"), learning_rate=5e-4, num_train_epochs=5, max_steps=options.max_steps,
        per_device_train_batch_size=32, save_strategy="no", report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    sizes = {"num_hourly_features": extractor.num_hourly_features, "num_demographics": extractor.num_demographics}
    model = MedHMPForStayPreTraining(MedHMPConfig.tiny(**sizes))
    Trainer(
        model, training, StayCollator(), train_dataset=build_stay_examples(data, extractor, subject_ids=train)
    ).train()
    model.save_pretrained(pretrained)

    labels = read_labels(label_dataset(TASK, data))
    classifier = MedHMPForStayClassification.from_pretrained(pretrained)
    labelled = build_stay_examples(data, extractor, labels=labels, subject_ids=train)
    Trainer(classifier, training, StayCollator(), train_dataset=labelled).train()
    classifier.save_pretrained(folder)
    extractor.save_pretrained(folder)
    risk = pipeline("risk-prediction", model=str(folder))
    print(risk(STAY))


if __name__ == "__main__":
    main()

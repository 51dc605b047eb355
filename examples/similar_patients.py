"""Patients like one patient: vectors of a pre-trained model, nearest by cosine, and the codes they share.

    python examples/similar_patients.py --data data/ --model pretrained/ --row 0 --output similar.csv

Without ``--data`` and ``--model`` synthetic patients and a small model with random weights take their place. The file
holds ids and codes of patients: keep it as you keep the records.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from transformers import pipeline

from hf_ehr import MedBertConfig, MedBertModel
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths
from hf_ehr.vocabulary import fit_tokenizer


def random_model(data: Path, folder: Path) -> Path:
    """A small model that has learned nothing, with a vocabulary of these patients."""
    ids = [
        pq.read_table(path, columns=["subject_id"])["subject_id"].to_numpy() for path in shard_paths(data, "records")
    ]
    tokenizer = fit_tokenizer(data, subject_ids=np.concatenate(ids))
    torch.manual_seed(0)
    MedBertModel(MedBertConfig.tiny(vocab_size=len(tokenizer), initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def codes_of(record: dict) -> set[str]:
    """The diagnoses of a patient."""
    return {code for visit in record["visits"] for code in visit["diagnoses"]}


def main(arguments: list[str] | None = None) -> None:
    """Embeds, searches, writes the nearest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("similar.csv"), help="CSV file to write")
    parser.add_argument("--data", type=Path, help="prepared folder")
    parser.add_argument("--model", help="folder of a pre-trained model with its tokenizer")
    parser.add_argument("--row", type=int, default=0, help="which patient, among those that have diagnoses")
    parser.add_argument("--patients", type=int, default=500, help="synthetic patients")
    options = parser.parse_args(arguments)

    data = options.data or options.output.with_name("similar-data")
    if options.data is None:
        prepare("synthetic", None, data, workers=1, options={"world": "C", "patients": options.patients})
    model = options.model or str(random_model(data, options.output.with_name("similar-model")))
    embed = pipeline("patient-feature-extraction", model=model)
    shards = [
        pq.read_table(path, columns=["subject_id", "visits"]).to_pylist() for path in shard_paths(data, "records")
    ]
    patients = [record for shard in shards for record in shard if codes_of(record)]
    vectors = torch.stack(embed(patients, batch_size=64, return_tensors=True))
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(dim=0), dim=1)
    similarity = vectors @ vectors[options.row]
    similarity[options.row] = -torch.inf
    nearest = similarity.topk(5).indices.tolist()
    own = codes_of(patients[options.row])
    rows = [
        {
            "subject_id": patients[place]["subject_id"],
            "cosine": similarity[place].item(),
            "shared_codes": " ".join(sorted(own & codes_of(patients[place]))),
        }
        for place in nearest
    ]
    pl.DataFrame(rows).write_csv(options.output)
    print(f"{len(patients)} patients searched; the {len(rows)} nearest are in {options.output}.")


if __name__ == "__main__":
    main()

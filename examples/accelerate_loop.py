"""A plain PyTorch loop with Accelerate in place of the ``Trainer``: an RNN over histories, an outcome, its AUROC.

python examples/accelerate_loop.py --output rnn/
torchrun --nproc_per_node 2 examples/accelerate_loop.py --output rnn/
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_ehr import EhrRnnConfig, EhrRnnForSequenceClassification
from hf_ehr.collators import PaddedCollator
from hf_ehr.datasets import build_examples, split_patients
from hf_ehr.metrics import auroc
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths
from hf_ehr.tasks import read_labels
from hf_ehr.vocabulary import fit_tokenizer


def score(model, batches, accelerator: Accelerator) -> float:
    """AUROC over all ranks' examples, each counted once."""
    labels, scores = [], []
    model.eval()
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
        truth, p = accelerator.gather_for_metrics((batch["labels"], logits.softmax(-1)[:, 1]))
        labels.append(truth.cpu())
        scores.append(p.float().cpu())
    return float(auroc(torch.cat(labels).numpy(), torch.cat(scores).numpy()))


def main(arguments: list[str] | None = None) -> None:
    """Prepares, trains, scores, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("rnn"), help="folder of data and model")
    parser.add_argument("--patients", type=int, default=2000, help="synthetic patients")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    options = parser.parse_args(arguments)

    accelerator, data = Accelerator(cpu=options.cpu), options.output / "data"
    torch.manual_seed(0)
    with accelerator.main_process_first():
        prepare("synthetic", None, data, workers=1, options={"world": "C", "patients": options.patients})
    ids = [
        pq.read_table(path, columns=["subject_id"])["subject_id"].to_numpy() for path in shard_paths(data, "records")
    ]
    splits = split_patients([one for shard in ids for one in shard])
    tokenizer = fit_tokenizer(data, subject_ids=splits["train"])
    labels = read_labels(data / "labels" / "synthetic_outcome.parquet")
    loaders = {
        name: DataLoader(
            build_examples(data, tokenizer, labels, subject_ids=splits[name]), batch_size=32,
            shuffle=name == "train", collate_fn=PaddedCollator(tokenizer),
        )
        for name in ("train", "test")
    }  # fmt: skip
    model = EhrRnnForSequenceClassification(EhrRnnConfig(vocab_size=len(tokenizer), head="gru"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, loaders["train"], loaders["test"])
    for epoch in range(options.epochs):
        model.train()
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, test AUROC {score(model, test, accelerator):.3f}"
        )
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output / "classifier")
        tokenizer.save_pretrained(options.output / "classifier")
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""Med-BERT training step against Hugging Face BERT, tokens per CPU second (goals G1-G4 of the design).

Rivals, same weights and loss:
    naive    `BertForMaskedLM`, every patient padded to 512, scores of every code at every position
    grouped  `BertModel`, batches of like length padded to their longest, scores of masked positions only
Run: python benchmarks/training_step.py [--patients 48] [--rounds 3] [--memory]
"""

import argparse
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from _memory import peak_above
from transformers import BertConfig, BertForMaskedLM

from hf_ehr import MedBertConfig, MedBertForMaskedLM

VOCAB, LONGEST = 82_603, 512


def patients(count: int, seed: int = 0) -> list[np.ndarray]:
    """Histories with log-normal lengths (median 45, σ 1, at most 512), codes 5 … VOCAB."""
    random = np.random.default_rng(seed)
    lengths = np.clip(np.exp(random.normal(np.log(45), 1.0, count)).astype(int), 3, LONGEST)
    return [random.integers(5, VOCAB, length) for length in lengths]


def masked(codes: list[np.ndarray], one: bool, seed: int = 1) -> list[np.ndarray]:
    """Labels: the code at masked positions (15 %, or one per patient), -100 elsewhere."""
    random, labels = np.random.default_rng(seed), []
    for history in codes:
        chosen = random.random(len(history)) < 0.15 if not one else np.zeros(len(history), bool)
        chosen[random.integers(len(history))] = True
        labels.append(np.where(chosen, history, -100))
    return labels


def padded(codes, labels, width: int) -> dict[str, torch.Tensor]:
    fill = lambda rows, value: np.stack([np.pad(r, (0, width - len(r)), constant_values=value) for r in rows])  # noqa: E731
    mask = fill([np.ones(len(c), int) for c in codes], 0)
    batch = {"input_ids": fill(codes, 0), "attention_mask": mask, "labels": fill(labels, -100)}
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def packed(codes, labels) -> dict:
    borders = np.append(0, np.cumsum([len(c) for c in codes]))
    return {
        "input_ids": torch.from_numpy(np.concatenate(codes))[None],
        "labels": torch.from_numpy(np.concatenate(labels))[None],
        "cu_seqlens": torch.from_numpy(borders).int(),
        "max_seqlen": max(len(c) for c in codes),
    }


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=64,
            hidden_act="gelu_pytorch_tanh",
            type_vocab_size=1000,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).train()


def medbert() -> MedBertForMaskedLM:
    torch.manual_seed(0)
    return MedBertForMaskedLM(MedBertConfig.base(hidden_dropout_prob=0.0)).train()


def naive_step(model, codes, labels):
    return model(**padded(codes, labels, LONGEST)).loss


def grouped_step(model, codes, labels):
    """The honest rival: `codes` come sorted by length; the head sees masked rows only."""
    batch = padded(codes, labels, max(len(c) for c in codes))
    states = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    rows = batch["labels"] != -100
    return torch.nn.functional.cross_entropy(model.cls(states[rows]), batch["labels"][rows])


def ours_step(model, codes, labels):
    return model(**packed(codes, labels)).loss


def cpu_seconds(step, model, optimizer, batches) -> float:
    started = time.process_time()
    for codes, labels in batches:
        step(model, codes, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - started


def grouped_batches(codes, labels, size: int):
    order = sorted(range(len(codes)), key=lambda i: len(codes[i]))
    return [
        ([codes[i] for i in part], [labels[i] for i in part]) for part in np.array_split(order, len(order) // size)
    ]


def batches_of(codes, labels, size: int):
    return [(codes[i : i + size], labels[i : i + size]) for i in range(0, len(codes), size)]


def compare(count: int, rounds: int, one: bool) -> None:
    codes = patients(count)
    labels, tokens = masked(codes, one), sum(map(len, codes))
    eight = (codes[:8], labels[:8])
    rivals = {
        "naive": (naive_step, bert(), [eight], sum(map(len, eight[0]))),
        "grouped": (grouped_step, bert(), grouped_batches(codes, labels, 48), tokens),
        "packed": (ours_step, medbert(), batches_of(codes, labels, 48), tokens),
    }
    optimizers = {name: torch.optim.AdamW(r[1].parameters(), fused=True) for name, r in rivals.items()}
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds + 1):
        for name, (step, model, batches, real) in rivals.items():
            rates[name].append(real / cpu_seconds(step, model, optimizers[name], batches))
    label = "one code a patient" if one else "15 % of codes"
    for rival in ("naive", "grouped"):
        ratios = [ours / theirs for ours, theirs in zip(rates["packed"][1:], rates[rival][1:], strict=True)]
        print(
            f"{label}: packed {statistics.median(rates['packed'][1:]):,.0f} tokens/s, {rival} "
            f"{statistics.median(rates[rival][1:]):,.0f}; ratio median {statistics.median(ratios):.1f} "
            f"[{min(ratios):.1f}, {max(ratios):.1f}]"
        )
    slots = sum(batch["input_ids"].numel() for batch in (packed(c, t) for c, t in batches_of(codes, labels, 48)))
    print(
        f"{label}: real tokens over processed slots {tokens / slots:.1%} (padded to 512: {tokens / count / 512:.1%})"
    )


def memory(variant: str, size: int) -> None:
    """Peak resident memory of one step above weights and optimizer state, in a process of its own."""
    step, model = (ours_step, medbert()) if variant == "packed" else (naive_step, bert())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    codes = patients(size)
    labels = masked(codes, one=False)
    peak = peak_above(lambda: step(model, codes, labels).backward())
    print(f"{variant}, {size} patients, memory of a step: {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "PATIENTS"), help="one step of `naive` or `packed`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        memory(arguments.memory[0], int(arguments.memory[1]))
        return
    for one in (False, True):
        compare(arguments.patients, arguments.rounds, one)
    for variant, size in (("naive", 8), ("packed", 8), ("packed", 48)):
        subprocess.run([sys.executable, __file__, "--memory", variant, str(size)], check=True)


if __name__ == "__main__":
    main()

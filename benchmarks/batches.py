"""Batches per second (G10) and packing (G3), against rows of `datasets` with transformers' own MLM collator.

    python benchmarks/batches.py [--patients 20000] [--rounds 3]

One process, one thread, CPU seconds, rounds interleaved in random order; the median and the ratio to the rival are
printed. Histories have log-normal lengths (median 45, sigma 1, at most 512) over 82,598 codes (Med-BERT's shape).
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import torch
from transformers import DataCollatorForLanguageModeling

from hf_ehr.collators import CodeMasking, PackedCollator, PaddedCollator
from hf_ehr.datasets import build_examples
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.samplers import FlatExamples, PackedDataset, TokenBudgetBatchSampler

CODES = 82_598
ROWS = 64  # patients in a batch of the rival, as in the figures of the design
BUDGET = 131_072  # tokens in a bin


def make_records(patients: int, rng: np.random.Generator) -> pa.Table:
    """As much of RECORDS as examples need: one visit per eight codes."""
    lengths = np.clip(rng.lognormal(np.log(45), 1.0, patients).astype(np.int64), 1, 512)
    visits = -(-lengths // 8)
    per_visit = np.full(visits.sum(), 8)
    per_visit[np.cumsum(visits) - 1] = lengths - 8 * (visits - 1)
    bounds = pa.array(np.append(0, np.cumsum(per_visit)).astype(np.int32))
    names = pa.array([f"V/{number}" for number in range(CODES)])
    codes = names.take(pa.array(rng.integers(CODES, size=lengths.sum())))
    start = pa.array(np.arange(len(per_visit)) * 86_400_000_000).cast(pa.timestamp("us"))
    at = start.take(pa.array(np.repeat(np.arange(len(per_visit)), per_visit)))
    fields = {
        "start": start,
        "end": start,
        "diagnoses": pa.ListArray.from_arrays(bounds, codes),
        "diagnoses_at": pa.ListArray.from_arrays(bounds, at),
    }
    structs = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
    return pa.table(
        {
            "subject_id": pa.array(np.arange(patients)),
            "birth_time": pa.nulls(patients, pa.timestamp("us")),
            "sex": pa.nulls(patients, pa.string()),
            "visits": pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(visits)).astype(np.int32)), structs),
        }
    )


def ways(dataset, tokenizer, order) -> dict[str, Callable[[], Iterator]]:
    """Every way to make the batches of an epoch (the rival: of the first patients of it)."""
    hf_rows = dataset.select_columns(["input_ids"])
    hf = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    masking = CodeMasking(tokenizer)
    padded, packed = PaddedCollator(tokenizer, masking), PackedCollator(tokenizer, masking)
    few = np.array_split(order[: 40 * ROWS], 40)
    many = np.array_split(order, len(order) // ROWS)
    flat, bins = FlatExamples(dataset), PackedDataset(dataset, BUDGET)
    return {
        "HF rows + MLM collator (rival)": lambda: (hf([hf_rows[int(i)] for i in batch]) for batch in few),
        "HF __getitems__ + MLM collator": lambda: (hf(hf_rows.__getitems__(batch.tolist())) for batch in few),
        "HF rows + our packed collator": lambda: (packed([dataset[int(i)] for i in batch]) for batch in few),
        f"flat, padded, {ROWS} patients": lambda: (padded([flat.gather(batch)]) for batch in many),
        f"flat, packed, {ROWS} patients": lambda: (packed([flat.gather(batch)]) for batch in many),
        f"flat, packed, bins of {BUDGET // 1024}k tokens": lambda: (packed([bins[i]]) for i in range(len(bins))),
    }


def tokens_and_slots(batches: Iterator) -> tuple[int, int]:
    """Real tokens and processed slots of some batches."""
    tokens = slots = 0
    for batch in batches:
        tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else int(batch["cu_seqlens"][-1])
        slots += batch["input_ids"].numel()
    return tokens, slots


def measure(make: Callable[[], Iterator]) -> float:
    """CPU seconds to make and drop the batches."""
    start = time.process_time()
    for _ in make():
        pass
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    tokenizer = EhrCodeTokenizer.from_codes([f"V/{number}" for number in range(CODES)])
    records = make_records(options.patients, rng)
    with tempfile.TemporaryDirectory() as directory:
        start = time.process_time()
        dataset = build_examples(records, tokenizer, cache_dir=directory).remove_columns("prolonged_stay_labels")
        seconds = time.process_time() - start
        total = int(FlatExamples(dataset).lengths.sum())
        print(f"{len(dataset)} patients, {total} codes; examples built: {total / seconds / 1e6:.1f} M codes / CPU-s\n")
        makers = ways(dataset, tokenizer, rng.permutation(len(dataset)))
        times: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(options.rounds):
            for name in random.sample(list(makers), len(makers)):
                times[name].append(measure(makers[name]))
        rival = None
        print(f"{'way':38s} {'M tokens/CPU-s':>15s} {'x rival':>9s} {'slots a token':>14s}")
        for name, make in makers.items():
            tokens, slots = tokens_and_slots(make())
            speed = tokens / statistics.median(times[name]) / 1e6
            rival = rival or speed
            print(f"{name:38s} {speed:15.2f} {speed / rival:9.1f} {slots / tokens:14.2f}")
        sampler = TokenBudgetBatchSampler(FlatExamples(dataset).lengths, BUDGET)
        start = time.process_time()
        loads = [int(sampler.lengths[sampler.batch(index)].sum()) for index in range(len(sampler))]
        seconds = time.process_time() - start
        print(
            f"\nG3: bins hold {min(loads)}-{max(loads)} tokens ({100 * np.mean(loads) / BUDGET:.1f} % of the budget), "
            f"all of them real; planning an epoch takes {1e9 * seconds / len(dataset):.0f} CPU-ns a patient"
        )


if __name__ == "__main__":
    main()

"""A step of MedHMP's stage 2 over a contrastive batch of any size, against one graph over it (goal G11 of the design).

Rival, same weights, batch and loss:
    one graph    the model's own forward over all admissions, then backward
Run: python benchmarks/contrastive_batch.py [--rounds 3] [--admissions 4096] [--memory FORM ADMISSIONS]
"""

import argparse
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from _memory import peak_above

from hf_ehr.gradient_caching import cached_step
from hf_ehr.models.configuration_medhmp import MedHMPConfig
from hf_ehr.models.modeling_medhmp import MedHMPForAdmissionPreTraining

CHUNK = 128
ENTRIES = 80
"""Features of an hour that are not 0, of 1,318."""
CODES = {"diagnosis": 11, "medication": 9}
"""Codes of an admission."""


def new_model() -> MedHMPForAdmissionPreTraining:
    """The authors' sizes without dropout, so that two forms of a step can be compared to the last digits."""
    torch.manual_seed(0)
    return MedHMPForAdmissionPreTraining(MedHMPConfig(hidden_dropout_prob=0.0)).train()


def batch(admissions: int) -> list[dict[str, torch.Tensor]]:
    """Chunks of admissions with one stay of 48 hours, codes and the vector of a note each."""
    rng, config = np.random.default_rng(1), MedHMPConfig()
    chunks = []
    for start in range(0, admissions, CHUNK):
        rows = min(CHUNK, admissions - start)
        hours = rows * config.n_hours
        shape = (hours, config.num_hourly_features // ENTRIES)  # one feature of each group: none stands twice
        ids = rng.integers(0, shape[1], (hours, ENTRIES)) + np.arange(ENTRIES) * shape[1]
        chunk = {
            "stay_hours": np.full(rows, config.n_hours), "feature_ids": ids.ravel(),
            "feature_counts": np.full(hours, ENTRIES), "stay_admissions": np.arange(rows),
            "demographics": rng.standard_normal((rows, config.num_demographics)).astype(np.float32),
            "note_vectors": rng.standard_normal((rows, config.note_size)).astype(np.float32),
        }  # fmt: skip
        for name, number in CODES.items():
            size = getattr(config, f"{name}_vocab_size")
            chunk[f"{name}_ids"] = rng.integers(1, size, (rows, number))
            chunk[f"{name}_mask"] = rng.random((rows, number)) < 0.15
        chunks.append({name: torch.from_numpy(values) for name, values in chunk.items()})
    return chunks


def one_graph(model: MedHMPForAdmissionPreTraining, chunks: list[dict[str, torch.Tensor]]) -> float:
    """All admissions in one forward and backward."""
    whole = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    owners = [chunk["stay_admissions"] + place * CHUNK for place, chunk in enumerate(chunks)]
    loss = model(**(whole | {"stay_admissions": torch.cat(owners)})).loss
    loss.backward()
    return float(loss.detach())


def ours(model: MedHMPForAdmissionPreTraining, chunks: list[dict[str, torch.Tensor]]) -> float:
    """The cached step."""
    return float(cached_step(model, chunks).loss)


FORMS = {"one graph": one_graph, "ours": ours}


def compare(admissions: int, rounds: int) -> None:
    """Prints paired ratios of CPU seconds, and how far losses and gradients lie apart."""
    model, chunks = new_model(), batch(admissions)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    losses, gradients = {}, {}
    for _ in range(rounds):
        for name, form in FORMS.items():
            model.zero_grad()
            started = time.process_time()
            losses[name] = form(model, chunks)
            seconds[name].append(time.process_time() - started)
            gradients[name] = torch.cat(
                [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
            )
    apart = abs(losses["ours"] / losses["one graph"] - 1)
    off = float((gradients["ours"] - gradients["one graph"]).norm() / gradients["one graph"].norm())
    ratios = [mine / theirs for mine, theirs in zip(*(seconds[name] for name in ("ours", "one graph")), strict=True)]
    print(
        f"{admissions:,} admissions: ours {statistics.median(seconds['ours']):.1f} s, one graph "
        f"{statistics.median(seconds['one graph']):.1f} s; ratio median {statistics.median(ratios):.2f} "
        f"[{min(ratios):.2f}, {max(ratios):.2f}]; loss {apart:.1e}, gradient {off:.1e} apart"
    )


def memory(name: str, admissions: int) -> None:
    """Peak resident memory of one step above weights, gradients and the batch, in a process of its own."""
    model, chunks = new_model(), batch(admissions)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = peak_above(lambda: FORMS[name](model, chunks))
    print(f"{name}, {admissions:,} admissions: {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--admissions", type=int, default=4096)
    parser.add_argument("--memory", nargs=2, metavar=("FORM", "ADMISSIONS"), help="one step of `one graph` or `ours`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        return memory(arguments.memory[0], int(arguments.memory[1]))
    compare(arguments.admissions, arguments.rounds)
    for name in FORMS:
        words = ["--memory", name, str(arguments.admissions)]
        subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()

"""Label attention, forward and backward, against the formula as it stands (goal G7 of the design).

Rival, same weights and loss:
    naive    softmax map (notes, labels, tokens) and contexts (notes, labels, hidden) in memory, then the network
Run: python benchmarks/label_attention.py [--rounds 3] [--memory]
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from _memory import peak_above
from torch.nn import functional as F

from hf_ehr import EhrBertConfig
from hf_ehr.models.modeling_label_attention import LabelAttentionHead, UnitTokens

TOKENS, HIDDEN = 1024, 768
SHAPES = ((2292, 2), (8921, 1))
"""Labels and notes of a timed step: BERT-XML's and MIMIC-III's label sets."""


def head(labels: int) -> LabelAttentionHead:
    torch.manual_seed(0)
    module = LabelAttentionHead(EhrBertConfig.big(), HIDDEN, labels)
    module.init_weights()
    return module


def batch(labels: int, notes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States (notes, tokens + [CLS], hidden) and 0/1 targets (notes, labels)."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(notes, TOKENS + 1, HIDDEN, generator=generator)
    return states, (torch.rand(notes, labels, generator=generator) < 0.002).float()


def naive(module: LabelAttentionHead, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    tokens = module.norm(states[:, 1:])
    weights = (module.label_vectors * module.scale @ tokens.transpose(1, 2)).softmax(-1)
    first, last = module.layers
    scores = last(F.relu(first(weights @ tokens))).squeeze(-1)
    return F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")


def ours(module: LabelAttentionHead, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    notes = torch.arange(len(states))
    tokens = UnitTokens.of(states, None, None, notes, len(states))
    return module(tokens, targets, torch.ones(len(states)))[1]


FORMS = {"naive": naive, "ours": ours}


def cpu_seconds(form, module, states, targets) -> tuple[float, torch.Tensor]:
    module.zero_grad()
    started = time.process_time()
    form(module, states, targets).backward()
    return time.process_time() - started, module.label_vectors.grad


def compare(labels: int, notes: int, rounds: int) -> None:
    module, (states, targets) = head(labels), batch(labels, notes)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(rounds + 1):
        gradients = []
        for name, form in FORMS.items():
            taken, gradient = cpu_seconds(form, module, states, targets)
            seconds[name].append(taken)
            gradients.append(gradient.clone())
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"][1:], seconds["naive"][1:], strict=True)]
    middle = {name: statistics.median(rounds[1:]) for name, rounds in seconds.items()}
    print(
        f"{labels:,} labels, {notes} × {TOKENS} tokens: ours {middle['ours']:.2f} s, naive {middle['naive']:.2f} s; "
        f"ratio median {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    )


def memory(name: str, labels: int, notes: int) -> None:
    """Peak resident memory of one step above weights, gradients and states, in a process of its own."""
    module, (states, targets) = head(labels), batch(labels, notes)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    states.requires_grad_()
    states.grad = torch.zeros_like(states)
    peak = peak_above(lambda: FORMS[name](module, states, targets).backward())
    print(f"{name}, {labels:,} labels, {notes} notes: {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", nargs=3, metavar=("FORM", "LABELS", "NOTES"), help="one step of `naive` or `ours`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        name, labels, notes = arguments.memory
        memory(name, int(labels), int(notes))
        return
    for labels, notes in SHAPES:
        compare(labels, notes, arguments.rounds)
    for name, labels, notes in (("naive", 8921, 16), ("ours", 8921, 16), ("ours", 70000, 16)):
        subprocess.run([sys.executable, __file__, "--memory", name, str(labels), str(notes)], check=True)


if __name__ == "__main__":
    main()

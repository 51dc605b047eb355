"""Cached steps of MedHMP over four chunks, of which two ranks have three and one: `cached_step.py OUTPUT`.

To be run under `torchrun --nproc_per_node 2`; each rank writes its gradients to `OUTPUT/<rank>.pt`.
"""

import sys
from pathlib import Path

import torch

from hf_ehr import MedHMPForAdmissionPreTraining
from hf_ehr.gradient_caching import cached_step
from tests.models.test_medhmp import MASKS, admissions, config

CHUNKS = [admissions(seed) | MASKS for seed in range(4)]
OF_RANK = (slice(0, 3), slice(3, 4))


def two_steps(chunks) -> dict[str, torch.Tensor]:
    """Gradients and loss after two steps, of which the second adds to the first."""
    torch.manual_seed(0)
    model = MedHMPForAdmissionPreTraining(config(hidden_dropout_prob=0.0)).train()
    for _ in range(2):
        losses = cached_step(model, chunks)
    return {name: weight.grad for name, weight in model.named_parameters()} | {"loss": losses.loss}


def main(output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(two_steps(CHUNKS[OF_RANK[rank]]), output / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

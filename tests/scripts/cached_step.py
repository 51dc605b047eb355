"""One cached step of MedHMP over four chunks: `cached_step.py OUTPUT`.

In one process all chunks are its own; under `torchrun --nproc_per_node 2` the ranks have three and one.
"""

import os
import sys
from pathlib import Path

import torch

from hf_ehr import MedHMPForAdmissionPreTraining
from hf_ehr.gradient_caching import cached_step
from tests.models.test_medhmp import MASKS, admissions, config

CHUNKS = [admissions(seed) | MASKS for seed in range(4)]
OF_RANK = {0: slice(0, 3), 1: slice(3, 4)}


def main(output: Path) -> None:
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = MedHMPForAdmissionPreTraining(config(hidden_dropout_prob=0.0)).train()
    mine = CHUNKS[OF_RANK[rank]] if ranks > 1 else CHUNKS
    for _ in range(2):  # the second adds to the first
        losses = cached_step(model, mine)
    found = {name: weight.grad for name, weight in model.named_parameters()}
    torch.save(found | {"loss": losses.loss}, output / f"{ranks}-{rank}.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

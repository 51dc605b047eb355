"""Two steps of stage 2 on two ranks with half a batch each, under `torchrun`: `stage2.py DATA OUTPUT`."""

import sys

import torch

from hf_ehr.training.admissions import pretrain_admissions
from hf_ehr.training.stays import StayArguments
from tests.test_admission_training import ALONE, settings


def main(data: str, output: str) -> None:
    training = settings(output, max_steps=2, optim="sgd", per_device_train_batch_size=32)
    pretrain_admissions(StayArguments(data), ALONE, training)
    torch.distributed.destroy_process_group()  # without it a rank may abort while it exits


if __name__ == "__main__":
    main(*sys.argv[1:])

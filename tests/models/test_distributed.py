"""Two ranks, and gradient accumulation, take the step that one rank takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_ehr import MedBertConfig, MedBertForMaskedLM, MedBertForPreTraining, MedBertForSequenceClassification
from tests.scripts.one_step import TwoBins

SCRIPT = Path(__file__).parents[1] / "scripts" / "one_step.py"
HEADS = [
    (MedBertForMaskedLM, True, False),
    (MedBertForPreTraining, True, True),
    (MedBertForSequenceClassification, False, False),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for launcher in ([], torchrun):
        command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("model_class", "per_code", "stays"), HEADS, ids=lambda v: getattr(v, "__name__", ""))
def test_two_ranks_take_the_step_of_one(steps, model_class, per_code, stays):
    one, two = (torch.load(steps / f"{model_class.__name__}-{n}.pt", weights_only=True) for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("model_class", "per_code", "stays"), HEADS, ids=lambda v: getattr(v, "__name__", ""))
def test_accumulated_bins_take_the_step_of_their_mean(steps, model_class, per_code, stays):
    """By hand: the gradient of the mean loss of the two (equally large) bins, times the learning rate."""
    torch.manual_seed(0)
    config = MedBertConfig.tiny(vocab_size=50, hidden_size=16, num_attention_heads=2, hidden_dropout_prob=0.0)
    model, bins = model_class(config).train(), TwoBins(per_code, stays)
    loss = sum(model(**bins[index]).loss for index in range(2)) / 2
    loss.backward()
    stepped = torch.load(steps / f"{model_class.__name__}-1.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(stepped[name], expected, atol=1e-6, rtol=1e-5, msg=name)

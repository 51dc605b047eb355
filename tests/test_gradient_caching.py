"""A step over chunks is the step of one graph over all of them (acceptance row 85)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_ehr import MedHMPForAdmissionPreTraining
from hf_ehr.gradient_caching import cached_step
from hf_ehr.models.modeling_contrastive import ContrastiveViews
from tests.models.test_medhmp import MASKS, admissions, config
from tests.scripts.cached_step import CHUNKS as FOUR_CHUNKS
from tests.scripts.cached_step import two_steps

SCRIPT = Path(__file__).parent / "scripts" / "cached_step.py"
CHUNKS = [admissions(seed) | MASKS for seed in range(3)]


def model_of(**overrides) -> MedHMPForAdmissionPreTraining:
    torch.manual_seed(0)
    return MedHMPForAdmissionPreTraining(config(**({"hidden_dropout_prob": 0.3} | overrides))).train()


def one_graph(model: MedHMPForAdmissionPreTraining) -> torch.Tensor:
    """The loss over all chunks with one graph; each chunk has the dropout that its cached passes have."""
    found, parts = [], []
    for seed in torch.randint(2**62, (len(CHUNKS),)).tolist():
        torch.manual_seed(seed)
        chunk = CHUNKS[len(found)]
        encoded = model.medhmp.encode(**chunk)
        found.append(model.contrastive_views(encoded))
        parts.append(model.masked_codes(encoded, chunk["diagnosis_mask"], chunk["medication_mask"]))
    views = ContrastiveViews(*(torch.cat(columns) for columns in zip(*found, strict=True)))
    rows = sum(part.rows for part in parts)
    masked = model.masked_code_loss(sum(part.sums for part in parts), rows)
    return model.config.masked_code_weight * masked + model.config.contrastive_weight * model.contrastive_loss(views)


@pytest.mark.parametrize("fields", [
    {}, {"contrastive_loss": "decoupled", "masked_code_mode": "separate"},
    {"masked_code_loss": "mse_indicator", "masked_code_reduction": "sum", "contrastive_weight": 3.0},
], ids=["default", "decoupled", "sums"])  # fmt: skip
def test_a_cached_step_has_the_loss_and_the_gradients_of_one_graph_with_dropout(fields):
    whole, cached = model_of(**fields), model_of(**fields)
    torch.manual_seed(7)
    loss = one_graph(whole)
    loss.backward()
    torch.manual_seed(7)
    step = cached_step(cached, CHUNKS)
    torch.testing.assert_close(step.loss, loss.detach(), atol=1e-6, rtol=1e-6)
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(cached.get_parameter(name).grad, weight.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_one_chunk_is_the_models_own_loss():
    model = model_of(hidden_dropout_prob=0.0)
    outputs = model(**CHUNKS[0])
    outputs.loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    step = cached_step(model, CHUNKS[:1])
    torch.testing.assert_close(step, type(step)(*(outputs[name].detach() for name in step._fields)))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("off", "field"), [("contrastive_weight", "contrastive_loss"), ("masked_code_weight", "masked_code_loss")]
)
def test_a_loss_of_weight_0_is_not_computed(off, field):
    step = cached_step(model_of(**{off: 0.0}), CHUNKS)
    assert getattr(step, field) is None
    assert step.loss.isfinite()


def test_a_step_with_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="at least one chunk"):
        cached_step(model_of(), [])
    with pytest.raises(ValueError, match="contrastive_weight"):
        cached_step(model_of(contrastive_weight=0.0, masked_code_weight=0.0), CHUNKS)


def test_two_ranks_with_unequal_chunks_hold_the_gradients_of_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT)]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    one = two_steps(FOUR_CHUNKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["diagnosis_head.weight"].abs().sum() > 0
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(first[name], second[name]), name

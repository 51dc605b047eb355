"""The one suite every model family passes (ARCHITECTURE.md, "Adding a model").

A family is one configuration with its heads. A test class names them and inherits everything:

    class TestMedBert(FamilySuite):
        heads = [Head(MedBertModel, AutoModel, ...), ...]
        def config(self, **overrides): ...
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig

FIXTURES = Path(__file__).parent / "fixtures"
LENGTHS = (10, 6, 3)


@dataclass(frozen=True)
class Head:
    """One model class of a family.

    Attributes:
        model_class: The class.
        auto_class: The Auto class that must resolve to it.
        labels: Padded batch → label entries; empty for the base model.
        output: Field that the tests compare.
        per_code: Whether that field has one row per code, (batch, sequence, …), or one per patient.
        hand_loss: (outputs with logits, batch) → the loss, computed the long way; `None` without a loss.
        overrides: Configuration fields of this head.
        name: What tells it from other heads of the same class.
    """

    model_class: type
    auto_class: type
    output: str
    per_code: bool
    labels: Callable[[dict], dict] = lambda batch: {}
    hand_loss: Callable | None = None
    overrides: dict = field(default_factory=dict)
    logits_on_request: bool = False
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.model_class.__name__

    def needs_attention(self) -> None:
        """Skips a test that means nothing to a model without attention layers."""
        if not self.model_class._supports_sdpa:
            pytest.skip("the model has no attention layers")


def padded_batch(vocab_size: int, *, lengths=LENGTHS, seed=0) -> dict[str, torch.Tensor]:
    """Random patients of the given lengths, right-padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    codes = torch.randint(5, vocab_size, mask.shape, generator=generator)
    visits = torch.randint(1, 4, mask.shape, generator=generator).sort(dim=1).values
    visits = visits - visits[:, :1] + 1
    return {"input_ids": codes * mask, "attention_mask": mask, "visit_ids": visits * mask}


def pack(batch: dict) -> dict:
    """The same patients in one row; entries of the shape of `input_ids` are packed with it."""
    keep = batch["attention_mask"].bool()
    lengths = keep.sum(dim=1)
    borders = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    packed = {
        name: value[keep][None] if value.shape == keep.shape else value
        for name, value in batch.items()
        if name != "attention_mask"
    }
    return packed | {"cu_seqlens": borders, "max_seqlen": int(lengths.max())}


class FamilySuite:
    """Quality bars of design.md, for every head of a family."""

    heads: list[Head]
    fixture: str  # folder of the committed tiny checkpoint
    lora_targets: list[str]
    vocab_size = 50
    no_dropout: ClassVar[dict] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    frozen: ClassVar[dict] = {"initializer_range": 0.2, "hidden_size": 8, "intermediate_size": 8}
    """Configuration fields of the committed tiny checkpoint."""

    def config(self, **overrides):
        raise NotImplementedError

    def model(self, head: Head, **overrides):
        torch.manual_seed(0)
        return head.model_class(self.config(**(self.no_dropout | head.overrides | overrides))).eval()

    def padded(self, **kwargs) -> dict:
        """Random input of three rows in the streams that the family reads."""
        return padded_batch(self.vocab_size, **kwargs)

    def batch(self, head: Head, **kwargs) -> dict:
        batch = self.padded(**kwargs)
        return batch | head.labels(batch)

    def inputs(self, head: Head, **kwargs) -> dict:
        return self.padded(**kwargs)

    def output(self, head: Head, model, batch: dict) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch)[head.output]

    # --- what a batch looks like must not matter -------------------------------------------------------------

    def test_extra_padding_changes_nothing(self, head):
        model, batch = self.model(head), self.inputs(head)
        wide = {name: torch.nn.functional.pad(value, (0, 7)) for name, value in batch.items()}
        narrow_out, wide_out = self.output(head, model, batch), self.output(head, model, wide)
        keep = batch["attention_mask"].bool()
        if head.per_code:
            narrow_out, wide_out = narrow_out[keep], wide_out[:, : keep.shape[1]][keep]
        torch.testing.assert_close(wide_out, narrow_out, atol=1e-6, rtol=0)

    def test_a_batch_equals_its_patients_one_by_one(self, head):
        model, batch = self.model(head), self.inputs(head)
        together = self.output(head, model, batch)
        for row, length in enumerate(LENGTHS):
            alone = self.output(head, model, {name: value[row : row + 1, :length] for name, value in batch.items()})
            expected = together[row : row + 1, :length] if head.per_code else together[row : row + 1]
            torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_packed_equals_padded(self, head, implementation):
        model, batch = self.model(head), self.inputs(head)
        if implementation == "eager":
            head.needs_attention()
        if head.model_class._supports_sdpa:
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
        padded, packed = self.output(head, model, batch), self.output(head, model, pack(batch))
        if head.per_code:
            padded, packed = padded[batch["attention_mask"].bool()], packed[0]
        torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-5)

    def test_packed_and_padded_training_give_one_loss_and_one_gradient(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        batch, gradients = self.batch(head), []
        for inputs in (batch, pack(batch)):
            model = self.model(head).train()
            loss = model(**inputs).loss
            loss.backward()
            gradients.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
        torch.testing.assert_close(gradients[0][0], gradients[1][0], atol=1e-6, rtol=0)
        for name, gradient in gradients[0][1].items():
            torch.testing.assert_close(gradients[1][1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)

    def test_changing_one_packed_patient_leaves_the_others_bit_equal(self, head):
        model, batch = self.model(head), self.inputs(head)
        changed = copy.deepcopy(batch)
        changed["input_ids"][1, :6] = batch["input_ids"][1, :6].flip(0) % (self.vocab_size - 6) + 5
        before, after = self.output(head, model, pack(batch)), self.output(head, model, pack(changed))
        before, after = (before[0], after[0]) if head.per_code else (before, after)
        patient = torch.tensor([0] * 10 + [1] * 6 + [2] * 3) if head.per_code else torch.arange(3)
        assert torch.equal(before[patient != 1], after[patient != 1])
        assert not torch.equal(before[patient == 1], after[patient == 1])

    def test_the_batch_is_not_mutated(self, head):
        batch = self.batch(head)
        kept = copy.deepcopy(batch)
        self.model(head).train()(**batch)
        assert all(torch.equal(batch[name], kept[name]) for name in kept)

    def test_eager_equals_sdpa(self, head):
        head.needs_attention()
        model, batch = self.model(head), self.inputs(head)
        sdpa = self.output(head, model, batch)
        model.set_attn_implementation("eager")
        eager = self.output(head, model, batch)
        if head.per_code:
            keep = batch["attention_mask"].bool()
            sdpa, eager = sdpa[keep], eager[keep]
        torch.testing.assert_close(eager, sdpa, atol=1e-6, rtol=1e-5)

    def test_hidden_states_and_attentions_are_there_on_request(self, head):
        head.needs_attention()
        model, batch = self.model(head), self.inputs(head)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs = model(**batch, output_attentions=True, output_hidden_states=True)
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        assert len(outputs.hidden_states) == layers + 1
        assert [tuple(a.shape) for a in outputs.attentions] == [(3, heads, 10, 10)] * layers
        rows = outputs.attentions[0].sum(dim=-1)[:, 0][batch["attention_mask"].bool()]
        torch.testing.assert_close(rows, torch.ones_like(rows))
        assert outputs.attentions[0][2, :, 0, 3:].abs().max() == 0  # nobody attends to padding

    # --- training --------------------------------------------------------------------------------------------

    def test_the_loss_equals_one_computed_by_hand(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head), self.batch(head)
        request = {"return_logits": True} if head.logits_on_request else {}
        outputs = model(**batch, **request)
        torch.testing.assert_close(outputs.loss, head.hand_loss(outputs, batch), atol=1e-6, rtol=0)

    def test_every_parameter_receives_a_gradient(self, head):
        model, batch = self.model(head).train(), self.batch(head)
        outputs = model(**batch)
        (outputs.loss if head.hand_loss else outputs[head.output].square().sum()).backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not silent
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "qkv.bias" not in n), "zero gradient"

    def test_gradient_checkpointing_gives_the_same_gradients(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        if not head.model_class.supports_gradient_checkpointing:
            pytest.skip("the model has no layers to checkpoint")
        gradients = []
        for checkpointing in (False, True):
            model = self.model(head).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(**pack(self.batch(head))).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-6)

    def test_bf16_stays_finite_and_near_fp32(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head).train(), self.batch(head)
        expected = model(**batch).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**pack(batch)).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)

    def test_it_overfits_a_few_patients(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head).train(), pack(self.batch(head))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
        for _ in range(60):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < 0.1

    def test_lora_wraps_and_trains(self, head):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(self.model(head), peft.LoraConfig(r=2, target_modules=self.lora_targets))
        outputs = model.train()(**self.batch(head))
        (outputs.loss if head.hand_loss else outputs[head.output].square().sum()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert gradients
        assert all("lora" in name for name in gradients)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients.values())

    # --- files -----------------------------------------------------------------------------------------------

    def test_save_and_load_are_equal(self, head, tmp_path):
        model, batch = self.model(head), self.inputs(head)
        model.save_pretrained(tmp_path)
        loaded, info = head.auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is head.model_class
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        # Weights that lie otherwise in memory may flip the last bit of a product; the weights themselves are equal.
        torch.testing.assert_close(
            self.output(head, loaded, batch), self.output(head, model, batch), atol=1e-6, rtol=0
        )
        buffers = dict(loaded.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert torch.equal(parameter, loaded.get_parameter(name)), name

    def test_untied_weights_survive_a_round_trip(self, head, tmp_path):
        model = self.model(head, tie_word_embeddings=False)
        decoder = model.get_output_embeddings()
        if decoder is None:
            pytest.skip("no decoder to tie")
        assert decoder.weight is not model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = head.model_class.from_pretrained(tmp_path)
        assert torch.equal(loaded.get_output_embeddings().weight, decoder.weight)
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)

    def test_a_base_checkpoint_fills_the_head_but_for_its_own_parameters(self, head, tmp_path):
        base = self.model(replace(self.heads[0], overrides=head.overrides))
        base.save_pretrained(tmp_path)
        loaded, info = head.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not [key for key in info["missing_keys"] if key.startswith(loaded.base_model_prefix + ".")]
        assert torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)
        assert all(p.isfinite().all() for p in loaded.parameters())

    def test_the_config_round_trips_and_rejects_wrong_types(self, head, tmp_path):
        config = self.config(**head.overrides)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        with pytest.raises(Exception, match="hidden_size"):
            self.config(hidden_size="wide")

    def test_label_names_survive(self, head, tmp_path):
        config = self.config(id2label={0: "no", 1: "heart failure"}, label2id={"no": 0, "heart failure": 1})
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "no", 1: "heart failure"}

    def test_token_embeddings_can_be_resized(self, head):
        model = self.model(head)
        model.resize_token_embeddings(self.vocab_size + 7)
        assert model.get_input_embeddings().weight.shape[0] == self.vocab_size + 7
        decoder = model.get_output_embeddings()
        if decoder is not None:
            assert decoder.weight is model.get_input_embeddings().weight
            assert decoder.bias.shape == (self.vocab_size + 7,)

    def test_frozen_outputs_of_the_committed_checkpoint(self, head):
        """Guards saved checkpoints against silent changes of the maths.

        If a change of the numbers is meant: say why in CHANGELOG.md, run `python -m tests.models.freeze`, look at
        the difference in `expected.json`, and commit both.
        """
        expected = json.loads((FIXTURES / self.fixture / "expected.json").read_text())[str(head)]
        torch.testing.assert_close(
            self.frozen_output(head), torch.tensor(expected), atol=1e-5, rtol=1e-4, msg=f"{head} changed"
        )

    def frozen_output(self, head: Head) -> torch.Tensor:
        """The output of `head` on the committed weights and a fixed batch, (patients, at most 8 numbers)."""
        torch.manual_seed(0)
        model = head.model_class.from_pretrained(FIXTURES / self.fixture / str(head)).eval()
        return self.output(head, model, self.inputs(head, seed=3)).flatten(1)[:, :8]

    def test_it_loads_without_the_package(self, tmp_path):
        """Every head at once: a process that cannot import `hf_ehr` loads the folder and gets equal numbers."""
        batch = self.padded()
        torch.save(batch, tmp_path / "batch.pt")
        for head in self.heads:
            model = self.model(head)
            model.save_pretrained(tmp_path / str(head))
            torch.save(self.output(head, model, batch), tmp_path / f"{head}.pt")
        plan = [[str(head), head.auto_class.__name__, head.output] for head in self.heads]
        code = REMOTE_CHECK.format(root=str(tmp_path), plan=json.dumps(plan))
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600
        )
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.strip().endswith("loaded " + str(len(self.heads)))


REMOTE_CHECK = """
import sys, json
sys.modules["hf_ehr"] = None
from pathlib import Path
import torch, transformers
root, plan = Path(r"{root}"), json.loads(r'''{plan}''')
batch = torch.load(root / "batch.pt", weights_only=True)
for name, auto, output in plan:
    for source in (root / name, root / (name + "-again")):
        model = getattr(transformers, auto).from_pretrained(source, trust_remote_code=True).eval()
        assert "transformers_modules" in type(model).__module__
        with torch.no_grad():
            expected = torch.load(root / (name + ".pt"), weights_only=True)
            torch.testing.assert_close(model(**batch)[output], expected, atol=1e-6, rtol=0, msg=name)
        if source.name == name:
            model.save_pretrained(root / (name + "-again"))
base = transformers.AutoModel.from_pretrained(root / plan[-1][0], trust_remote_code=True)
print("loaded", len(plan))
"""

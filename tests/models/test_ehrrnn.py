"""The sequence baselines: the common suite, and what is their own (papers.md §1.5, §4.5, rows 13, 14, 88, 96-100)."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hf_ehr import EhrCodeTokenizer, EhrRnnConfig, EhrRnnForSequenceClassification, EhrRnnModel
from hf_ehr.collators import PackedCollator, PaddedCollator
from hf_ehr.metrics import auroc
from hf_ehr.models.modeling_steps import Steps
from tests.models.common import FamilySuite, Head, pack, padded_batch

LABELS = torch.tensor([0, 1, 0])
KINDS = [
    *((head, level) for head in ("gru", "bigru", "retain") for level in ("token", "visit")),
    *((head, "visit") for head in ("lstm", "dipole", "adacare", "hitanet")),
    ("hitanet", "token"),
]


def classifier(head: str, level: str, name: str = "", **fields) -> Head:
    return Head(
        EhrRnnForSequenceClassification, AutoModelForSequenceClassification, "logits", False,
        lambda batch: {"labels": LABELS},
        lambda out, batch: -out.logits.log_softmax(-1)[torch.arange(3), LABELS].mean(),
        overrides={"head": head, "level": level} | fields, name=name or f"{head}-{level}",
    )  # fmt: skip


def timed_batch(vocab_size: int = 50, **kwargs) -> dict:
    """Patients with the days of their visits, which all but one of the heads leave unread."""
    batch = padded_batch(vocab_size, **kwargs)
    return batch | {"day_ids": (batch["visit_ids"] * 200 - 199) * batch["attention_mask"]}


class TestEhrRnn(FamilySuite):
    heads = [  # noqa: RUF012
        Head(EhrRnnModel, AutoModel, "pooler_output", per_code=False),
        *(classifier(head, level) for head, level in KINDS),
        classifier(
            "dipole", "visit", "dipole-mlp", visit_encoder="mlp", dipole_attention="concat", dipole_bidirectional=False
        ),
    ]
    fixture = "ehrrnn"
    lora_targets = ["code_embeddings"]  # noqa: RUF012
    no_dropout = {"hidden_dropout_prob": 0.0}  # noqa: RUF012
    frozen = {"embedding_size": 8, "hidden_size": 8}  # noqa: RUF012

    def config(self, **overrides):
        sizes = {"embedding_size": 16, "hidden_size": 12, "max_visits": 20}
        return EhrRnnConfig.tiny(**({"vocab_size": self.vocab_size} | sizes | overrides))

    def padded(self, **kwargs) -> dict:
        return timed_batch(self.vocab_size, **kwargs)


def model_of(head: str, level: str, **overrides) -> EhrRnnForSequenceClassification:
    torch.manual_seed(0)
    return EhrRnnForSequenceClassification(TestEhrRnn().config(head=head, level=level, **overrides)).eval()


# The steps


@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
def test_token_steps_are_code_plus_visit_and_visit_steps_are_the_sums_of_their_codes(packing):
    batch = {
        "input_ids": torch.tensor([[7, 8, 9, 8], [6, 7, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "visit_ids": torch.tensor([[1, 1, 2, 4], [4, 4, 0, 0]]),
    }
    token, visit = model_of("gru", "token").model, model_of("gru", "visit").model
    code, when = token.embeddings.code_embeddings.weight, token.embeddings.visit_embeddings.weight
    expected = code[[7, 8, 9, 8, 6, 7]] + when[[1, 1, 2, 4, 4, 4]]
    torch.testing.assert_close(steps_of(token, packing(batch)).states, expected)
    code = visit.embeddings.code_embeddings.weight
    # The last visit of the first patient and the only one of the second have the same id, and stay apart.
    steps = steps_of(visit, packing(batch))
    torch.testing.assert_close(steps.states, torch.stack([code[7] + code[8], code[9], code[8], code[6] + code[7]]))
    assert steps.packed.cu_seqlens.tolist() == [0, 3, 4]


def steps_of(model: EhrRnnModel, batch: dict) -> Steps:
    seen = []
    hook = model.embeddings.register_forward_hook(lambda module, inputs, steps: seen.append(steps))
    model(**batch)
    hook.remove()
    return seen[0]


def test_the_order_of_codes_in_a_visit_does_not_matter_to_visit_steps():
    model, batch = model_of("retain", "visit"), padded_batch(50, lengths=(6,))
    batch["visit_ids"] = torch.tensor([[1, 1, 1, 2, 2, 3]])
    shuffled = batch | {"input_ids": batch["input_ids"][:, [2, 0, 1, 4, 3, 5]]}
    with torch.no_grad():
        torch.testing.assert_close(model(**shuffled).logits, model(**batch).logits, atol=1e-6, rtol=0)


def test_without_visit_ids_all_codes_are_of_the_first_visit():
    batch = padded_batch(50)
    codes, mask = batch["input_ids"], batch["attention_mask"]
    for level in ("token", "visit"):
        model = model_of("gru", level)
        torch.testing.assert_close(model(codes, mask).logits, model(codes, mask, visit_ids=mask).logits)


@pytest.mark.parametrize("level", ["token", "visit"])
def test_dropout_falls_on_the_steps_in_training_only(level):
    model, batch = model_of("gru", level, hidden_dropout_prob=0.5).model, padded_batch(50)
    kept, dropped = steps_of(model, batch).states, steps_of(model.train(), batch).states
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])


@pytest.mark.parametrize(("head", "level"), KINDS)
def test_embeddings_can_stand_in_for_codes(head, level):
    model, batch = model_of(head, level), timed_batch()
    embedded = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: batch[name] for name in ("attention_mask", "visit_ids", "day_ids")}
    torch.testing.assert_close(model(inputs_embeds=embedded, **rest).logits, model(**batch).logits)


# The MLP of visits (row 88)


def test_the_mlp_of_visits_is_a_linear_layer_over_rows_of_zero_and_one_and_what_follows_it():
    """MedHMP's code encoder Linear(V, d)·LN·ReLU·Linear(d, d)·LN·ReLU takes its weights over tensor by tensor."""
    torch.manual_seed(3)
    first, second = torch.nn.Linear(50, 16), torch.nn.Linear(16, 16)
    norms = [torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    model = model_of("lstm", "visit", visit_encoder="mlp").model
    mine = model.embeddings.visit_encoder
    with torch.no_grad():
        model.embeddings.code_embeddings.weight.copy_(first.weight.T)
        mine.bias.copy_(first.bias)
        for target, source in ((mine.norm, norms[0]), (mine.dense, second), (mine.dense_norm, norms[1])):
            target.load_state_dict(source.state_dict())
    batch = timed_batch()
    batch["input_ids"][0] = torch.arange(5, 15)  # no code twice in a visit, as the tokenizer sees to
    visits = torch.zeros(int(batch["visit_ids"][0].max()), 50)
    visits[batch["visit_ids"][0] - 1, batch["input_ids"][0]] = 1
    expected = norms[1](second(norms[0](first(visits)).relu())).relu()
    steps = steps_of(model, batch)
    torch.testing.assert_close(steps.states[: len(visits)], expected, atol=1e-5, rtol=1e-5)


def test_an_mlp_of_codes_is_refused_at_the_level_of_codes():
    with pytest.raises(Exception, match="`visit_encoder` must be 'sum' at level 'token'"):
        EhrRnnConfig(visit_encoder="mlp")


# RETAIN alone


@pytest.mark.parametrize("level", ["token", "visit"])
def test_reversing_the_history_changes_what_retain_says(level):
    model = model_of("retain", level)
    codes, visits = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 2, 3, 4]])
    straight, reversed_ = model(codes, visit_ids=visits), model(codes.flip(1), visit_ids=visits)
    assert (straight.logits - reversed_.logits).abs().max() > 1e-4
    assert (straight.head_alpha - reversed_.head_alpha.flip(1)).abs().max() > 1e-4


def test_retain_looks_at_a_visit_in_the_light_of_later_ones_only():
    """Reverse time: the gate of the last visit knows no other; that of the first knows them all."""
    model = model_of("retain", "visit")
    visits = torch.tensor([[1, 2, 3, 4]])
    plain = model(torch.tensor([[5, 6, 7, 8]]), visit_ids=visits).head_beta[0]
    other_first = model(torch.tensor([[20, 6, 7, 8]]), visit_ids=visits).head_beta[0]
    other_last = model(torch.tensor([[5, 6, 7, 20]]), visit_ids=visits).head_beta[0]
    torch.testing.assert_close(other_first[1:], plain[1:])
    assert ((other_last - plain).abs().amax(dim=1) > 1e-6).all()


def test_the_shapes_of_alpha_beta_and_contributions():
    batch = padded_batch(50)
    visits = int(batch["visit_ids"].max())
    for level, steps in (("token", 10), ("visit", visits)):
        model = model_of("retain", level, num_labels=4)
        for inputs in (batch, pack(batch)):
            outputs = model(**inputs)
            assert outputs.head_alpha.shape == (3, steps)
            assert outputs.head_beta.shape == (3, steps, 16)
            assert outputs.contributions.shape == (3, steps, 4)


def test_a_visit_has_the_day_of_its_codes_and_hitanet_hears_of_it():
    model, batch = model_of("hitanet", "visit"), timed_batch()
    days = steps_of(model.model, batch).day_ids
    for inputs in (batch, pack(batch)):
        steps = steps_of(model.model, inputs)
        assert torch.equal(steps.day_ids, days)
    patient = steps.packed.segment_ids == 0
    assert days[patient].tolist() == [200 * n - 199 for n in batch["visit_ids"][0].unique().tolist()]
    later = batch | {"day_ids": torch.where(batch["visit_ids"] > 1, batch["day_ids"] + 300, batch["day_ids"])}
    changed = (model(**later).logits - model(**batch).logits).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [len(row.unique()) > 1 + int(0 in row) for row in batch["visit_ids"]]


@pytest.mark.parametrize("level", ["token", "visit"])
def test_no_state_of_hitanet_knows_a_later_visit(level):
    model, visits = model_of("hitanet", level).model, torch.tensor([[1, 2, 3, 4]])
    days = torch.tensor([[1, 50, 90, 400]])
    plain = model(torch.tensor([[5, 6, 7, 8]]), visit_ids=visits, day_ids=days).last_hidden_state[0]
    other = model(torch.tensor([[5, 6, 7, 20]]), visit_ids=visits, day_ids=days).last_hidden_state[0]
    torch.testing.assert_close(other[:3], plain[:3], atol=1e-6, rtol=0)
    assert (other[3] - plain[3]).abs().max() > 1e-3


def test_the_base_model_returns_what_each_step_adds_to_the_patients_vector():
    model, batch = model_of("retain", "token").model, padded_batch(50)
    for inputs in (batch, pack(batch)):
        outputs = model(**inputs)
        torch.testing.assert_close(outputs.last_hidden_state.sum(dim=1), outputs.pooler_output, atol=1e-6, rtol=0)
        assert outputs.last_hidden_state[2, 3:].abs().max() == 0


# Learning


def before_or_after(patients: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Histories of 8 codes with one A (5) and one B (6) each; the label is whether A comes first."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(7, 30, (patients, 8), generator=generator)
    places = torch.rand(patients, 8, generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    labels = torch.randint(0, 2, (patients,), generator=generator)
    rows = torch.arange(patients)
    codes[rows, places[:, 0]] = torch.where(labels == 1, 5, 6)
    codes[rows, places[:, 1]] = torch.where(labels == 1, 6, 5)
    return codes, labels


def bag_of_codes(codes: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.one_hot(codes, 30).sum(dim=1).clamp(max=1).numpy()


@pytest.mark.parametrize(("head", "level"), KINDS)
def test_it_learns_an_order_of_codes_that_a_bag_of_codes_cannot_hold(head, level):
    train, labels = before_or_after(1000, seed=1)
    test, truth = before_or_after(500, seed=2)
    visits = torch.arange(1, 9)[None]
    days = 30 * visits - 29
    torch.manual_seed(0)
    model = EhrRnnForSequenceClassification(EhrRnnConfig.tiny(vocab_size=30, head=head, level=level))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        rows = slice(step % 5 * 200, step % 5 * 200 + 200)
        times = {"visit_ids": visits.expand(200, -1), "day_ids": days.expand(200, -1)}
        model(train[rows], **times, labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        scores = model.eval()(test, visit_ids=visits.expand(500, -1), day_ids=days.expand(500, -1)).logits
    assert auroc(truth.numpy(), (scores[:, 1] - scores[:, 0]).numpy()) > 0.9
    bag = LogisticRegression(max_iter=1000).fit(bag_of_codes(train), labels)
    assert abs(auroc(truth.numpy(), bag.predict_proba(bag_of_codes(test))[:, 1]) - 0.5) < 0.1


# Its place in the package


@pytest.mark.parametrize("collator", [PaddedCollator, PackedCollator])
def test_it_takes_the_batches_of_the_collators_and_predicts_plain_logits(collator, tmp_path):
    tokenizer = EhrCodeTokenizer.from_codes([f"ICD10CM/A{n:02}" for n in range(20)])
    codes = list(range(len(tokenizer) - 20, len(tokenizer)))
    rows = [
        {"input_ids": codes[n : n + 4], "visit_ids": [1, 1, 2, 3], "serial_ids": [0, 1, 0, 0], "labels": n % 2}
        for n in range(6)
    ]
    model = EhrRnnForSequenceClassification(EhrRnnConfig.tiny(vocab_size=len(tokenizer), head="retain"))
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to="none", use_cpu=True)
    prediction = Trainer(model, arguments, collator(tokenizer)).predict(rows)
    assert isinstance(prediction.predictions, np.ndarray)
    assert prediction.predictions.shape == (6, 2)
    with torch.no_grad():
        expected = model(**PaddedCollator(tokenizer)(rows)).logits
    np.testing.assert_allclose(prediction.predictions, expected.numpy(), atol=1e-6)


def test_the_tokenizer_beside_it_is_found(tmp_path):
    EhrCodeTokenizer.from_codes(["ICD10CM/I10"]).save_pretrained(tmp_path)
    model_of("gru", "token").save_pretrained(tmp_path)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), EhrCodeTokenizer)


def test_new_heads_on_saved_embeddings_start_from_random_weights_not_from_bare_memory(tmp_path):
    saved = model_of("gru", "visit", hidden_size=64)
    saved.save_pretrained(tmp_path)
    model = EhrRnnModel.from_pretrained(tmp_path, head="retain")
    assert torch.equal(model.get_input_embeddings().weight, saved.get_input_embeddings().weight)
    for name, weight in model.head.named_parameters():
        bound = 1 / 8 if "gru" in name else 0.1
        assert weight.abs().max() <= bound
        if "weight" in name:
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2), name


def test_visits_start_quiet_beside_their_codes():
    torch.manual_seed(0)
    embeddings = EhrRnnModel(EhrRnnConfig(vocab_size=500, embedding_size=64, max_visits=200)).embeddings
    assert embeddings.code_embeddings.weight.std().item() == pytest.approx(1, rel=0.05)
    assert embeddings.visit_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_inputs_that_it_does_not_read_change_nothing():
    model, batch = model_of("gru", "token"), padded_batch(50)
    more = {"serial_ids": batch["visit_ids"], "age_ids": batch["visit_ids"], "output_attentions": True}
    assert torch.equal(model(**batch, **more).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m(**b, inputs_embeds=torch.zeros(3, 10, 16)), "Exactly one of"),
        (lambda m, b: m(visit_ids=b["visit_ids"]), "Exactly one of"),
        (lambda m, b: m(**b, cu_seqlens=torch.tensor([0, 30], dtype=torch.int32)), "packed input"),
        (lambda m, b: m(b["input_ids"][:1], cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32)), "must run from 0"),
    ],
)
def test_bad_input_is_refused_with_the_next_step(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of("gru", "token"), padded_batch(50))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 3, "pad_token_id": 3}, "pad_token_id"),
        ({"head": "ffn"}, "head"),
        ({"level": "day"}, "level"),
        ({"head": "hitanet", "hidden_size": 30}, "`hidden_size` must be a multiple of 4"),
        ({"head": "dipole", "dipole_attention": "dot"}, "dipole_attention"),
    ],
)
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        EhrRnnConfig(**fields)

"""ICD coding: label attention, segments of long notes, foreign encoders (papers.md §3.2, acceptance rows 60-62)."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LongformerConfig,
    LongformerModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
)

import hf_ehr.models.modeling_label_attention as label_attention
from hf_ehr import EhrBertConfig, EhrBertForICDCoding, EhrBertForMaskedLM, EhrBertModel
from tests.models.common import pack
from tests.models.test_ehrbert import text_batch

NAMES = {index: f"code {index}" for index in range(7)}
# Two notes: the first has two segments, the second one.
NOTES = torch.tensor([0, 0, 1])
TARGETS = torch.tensor([[1.0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0]])
FORMS = {
    "xml": {},
    "paper": {"label_attention_scale": False, "label_attention_norm": False},
    "two-layers": {"xml_hidden_sizes": (12, 5)},
    "linear": {"xml_hidden_sizes": ()},
    "per-label": {"label_output": "per_label"},
    "laat": {"label_output": "per_label", "label_key_size": 6},
}
every_form = pytest.mark.parametrize("form", FORMS)


def coder(**fields) -> EhrBertForICDCoding:
    torch.manual_seed(0)
    labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "initializer_range": 0.3, "hidden_dropout_prob": 0.0}
    return EhrBertForICDCoding(EhrBertConfig.tiny(**({"vocab_size": 50} | labels | sizes | fields))).eval()


def score_by_hand(model: EhrBertForICDCoding, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq 2-4 token by token for the states of one unit (tokens, hidden): scores and weights of all labels."""
    head, scores, rows = model.head, [], []
    states = head.norm(tokens)
    keys = states if head.key is None else torch.tanh(head.key(states))
    for label, vector in enumerate(head.label_vectors):
        products = torch.stack([(key * vector).sum() for key in keys]) * head.scale
        weights = products.exp() / products.exp().sum()
        context = sum(weight * state for weight, state in zip(weights, states, strict=True))
        if head.output is not None:
            score = (head.output.weight[label] * context).sum() + head.output.bias[label]
        else:
            for layer in head.layers[:-1]:
                context = layer(context).relu()
            score = head.layers[-1](context).squeeze()
        scores.append(score)
        rows.append(weights)
    return torch.stack(scores), torch.stack(rows)


def note_tokens(model, batch) -> list[torch.Tensor]:
    """The states of each note without padding and without the first token of a segment."""
    states = model.model(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(1).tolist()
    segments = [row[1:length] for row, length in zip(states, lengths, strict=True)]
    return [torch.cat(segments[:2]), segments[2]]


def bce(logits, targets):
    p = logits.double().sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log())


@pytest.fixture
def small_chunks(monkeypatch):
    """One note and two labels a chunk, and the last chunk has one label."""
    monkeypatch.setattr(label_attention, "SCORE_BUDGET", 2 * 14)


@every_form
@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
def test_one_attention_over_all_segments_equals_a_loop_over_tokens(form, packing):
    model, batch = coder(**FORMS[form]), text_batch()
    outputs = model(**packing(batch), note_index=NOTES, labels=TARGETS)
    expected = torch.stack([score_by_hand(model, tokens)[0] for tokens in note_tokens(model, batch)])
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, bce(expected, TARGETS).mean().float())


@every_form
def test_chunks_made_in_the_forward_pass_equal_plain_autograd_in_loss_and_gradients(form, small_chunks):
    batch, results = text_batch(), []
    for way in ("chunked", "plain"):
        model = coder(**FORMS[form]).train()
        if way == "chunked":
            loss = model(**batch, note_index=NOTES, labels=TARGETS).loss
        else:
            logits = torch.stack([score_by_hand(model, tokens)[0] for tokens in note_tokens(model, batch)])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, TARGETS)
        (3 * loss).backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@every_form
def test_evaluation_with_labels_has_the_same_loss_and_makes_no_gradient(form, small_chunks, monkeypatch):
    model, batch = coder(**FORMS[form]), text_batch() | {"note_index": NOTES, "labels": TARGETS}
    expected = model(**batch)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            outputs = model(**batch)
        torch.testing.assert_close(outputs.loss, expected.loss.detach())
        torch.testing.assert_close(outputs.logits, expected.logits)
    assert not calls
    model(**batch)
    assert calls  # what is counted is what training calls


@every_form
def test_the_number_of_labels_in_a_chunk_changes_nothing(form, monkeypatch):
    model, batch = coder(**FORMS[form]), text_batch() | {"note_index": NOTES}
    expected = []
    for budget in (1, 2**22):
        monkeypatch.setattr(label_attention, "SCORE_BUDGET", budget)
        model.zero_grad()
        scores = model(**batch).logits
        scores.square().sum().backward()
        expected.append([scores.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, all_at_once in zip(*expected, strict=True):
        torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-4)


def test_no_chunk_holds_more_weights_than_the_budget(monkeypatch):
    monkeypatch.setattr(label_attention, "SCORE_BUDGET", 14 * 3)  # the longer note has 14 tokens
    seen, plain = [], label_attention._weights

    def spy(keys, mask, vectors):
        seen.append((len(keys), len(vectors)))
        return plain(keys, mask, vectors)

    monkeypatch.setattr(label_attention, "_weights", spy)
    coder().train()(**text_batch(), note_index=NOTES, labels=TARGETS).loss.backward()
    assert seen == [(1, 3), (1, 3), (1, 1)] * 2


# What the labels look at


@every_form
@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
def test_requested_weights_are_those_of_the_loop_and_lie_where_their_tokens_are(form, packing):
    model, batch = coder(**FORMS[form]), text_batch()
    weights = model(**packing(batch), note_index=NOTES, output_label_attentions=[5, 0]).label_attentions
    mask = batch["attention_mask"].bool()
    if packing is pack:
        assert weights.shape == (1, 2, 19)
        spread = torch.zeros(3, 10, 2).index_put((mask,), weights[0].t()).transpose(1, 2)
    else:
        spread = weights
    rows = [score_by_hand(model, tokens)[1][[5, 0]] for tokens in note_tokens(model, batch)]
    torch.testing.assert_close(torch.cat([spread[0, :, 1:10], spread[1, :, 1:6]], dim=1), rows[0])
    torch.testing.assert_close(spread[2, :, 1:3], rows[1])
    assert spread[:, :, 0].abs().max() == 0  # [CLS]
    assert spread.transpose(1, 2)[~mask].abs().max() == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_cls_never_get_weight_whatever_they_hold(side):
    model = coder()
    tokens, mask = torch.tensor([[2, 7, 8, 9]]), torch.ones(1, 4, dtype=torch.long)
    pads = (0, 3) if side == "right" else (3, 0)
    wide = nn.functional.pad(tokens, pads, value=33)
    wide_mask = nn.functional.pad(mask, pads)
    plain = model(tokens, mask, output_label_attentions=[3])
    padded = model(wide, wide_mask, output_label_attentions=[3])
    torch.testing.assert_close(padded.logits, plain.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.label_attentions.sum(), torch.tensor(1.0))
    first = 0 if side == "right" else 3
    assert (padded.label_attentions[0, 0] > 0).nonzero().flatten().tolist() == [first + 1, first + 2, first + 3]


def test_a_note_of_cls_alone_is_scored_by_the_biases_and_has_no_evidence():
    model, batch = coder().train(), {"input_ids": torch.tensor([[2, 0, 0], [2, 8, 9]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    outputs = model(**batch, labels=TARGETS, output_label_attentions=[0])
    first, last = model.head.layers
    empty = last(first.bias.relu()).expand(7)
    torch.testing.assert_close(outputs.logits[0], empty)
    assert outputs.label_attentions[0].abs().max() == 0
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    alone = model(torch.tensor([[2]]), output_label_attentions=[0])
    torch.testing.assert_close(alone.logits[0], empty)


# Maximum over segments


@pytest.mark.parametrize("fields", [{"segment_pooling": "max"}, {"head": "cls"}], ids=["xml", "cls"])
@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
def test_max_takes_the_greatest_score_of_any_segment_and_trains_each_on_the_notes_labels(fields, packing):
    model, batch = coder(**fields), text_batch()
    each = model(**batch).logits  # every segment its own note
    outputs = model(**packing(batch), note_index=NOTES, labels=TARGETS)
    torch.testing.assert_close(
        outputs.logits, torch.stack([torch.maximum(each[0], each[1]), each[2]]), atol=1e-5, rtol=0
    )
    losses = bce(each, TARGETS[NOTES]).mean(dim=1)
    torch.testing.assert_close(outputs.loss, ((losses[0] + losses[1]) / 2 + losses[2]).float() / 2)


def test_the_paper_trains_segments_as_notes_of_their_own():
    model, batch = coder(segment_pooling="max"), text_batch()
    loss = model(**batch, labels=TARGETS[NOTES]).loss
    torch.testing.assert_close(loss, bce(model(**batch).logits, TARGETS[NOTES]).mean().float())


def test_evidence_of_a_maximum_is_that_of_the_segment_which_decided():
    model, batch = coder(segment_pooling="max", label_output="per_label"), text_batch()
    ids = list(range(7))
    each = model(**batch, output_label_attentions=ids)
    weights = model(**batch, note_index=NOTES, output_label_attentions=ids).label_attentions
    winner = each.logits[:2].argmax(dim=0)
    assert 0 < winner.sum() < 7  # both segments decide some labels
    for label in ids:
        torch.testing.assert_close(weights[winner[label], label], each.label_attentions[winner[label], label])
        assert weights[1 - winner[label], label].abs().max() == 0
    torch.testing.assert_close(weights[2], each.label_attentions[2])


def test_equal_segments_have_one_evidence_between_them():
    model = coder(segment_pooling="max")
    tokens = torch.tensor([[2, 7, 8, 9], [2, 7, 8, 9]])
    weights = model(tokens, note_index=torch.tensor([0, 0]), output_label_attentions=[4]).label_attentions
    assert weights.sum().item() == pytest.approx(1)


def test_the_cls_head_is_one_layer_on_the_first_state():
    model, batch = coder(head="cls"), text_batch()
    first = model.model(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(model(**batch).logits, first @ model.head.weight.t() + model.head.bias)


# Training


@pytest.mark.parametrize("fields", [{}, {"head": "cls"}], ids=["xml", "cls"])
def test_the_head_learns_which_token_means_which_code(fields):
    """40 notes of two segments; code j is there where token 10 + j is, in either segment."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(40, 7, generator=generator) < 0.3).float()
    tokens = torch.randint(20, 50, (80, 9), generator=generator)
    tokens[:, 0] = 2
    for note, label in targets.nonzero().tolist():
        tokens[2 * note + (note + label) % 2, 1 + label] = 10 + label
    model = coder(**fields, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = {"input_ids": tokens, "note_index": torch.arange(40).repeat_interleave(2)}
    for _ in range(80):
        loss = model(**batch, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model.eval()(**batch).logits
    if fields:  # each segment was also taught the codes of the other, so only their order is right
        assert loss < 0.6
        return
    assert ((logits > 0) == targets.bool()).float().mean() > 0.95


def test_gradient_accumulation_gives_the_mean_over_all_notes():
    model, batch = coder(), text_batch()
    labels = TARGETS[[0, 1, 0]]
    whole = model(**batch, labels=labels).loss
    parts = [
        model(**{name: value[rows] for name, value in batch.items()}, labels=labels[rows], num_items_in_batch=21).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_stock_trainer_trains_and_reports_an_evaluation_loss(tmp_path):
    model = coder()
    rows = [{"input_ids": torch.tensor([2, 10 + i % 7, 30]), "labels": torch.eye(7)[i % 7]} for i in range(10)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, logging_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        inputs = torch.stack([row["input_ids"] for row in rows])
        expected = model(inputs, labels=torch.stack([row["labels"] for row in rows])).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_one_label_and_notes_without_any_train():
    model = coder(id2label={0: "I10"}, label2id={"I10": 0}).train()
    loss = model(**text_batch(), note_index=NOTES, labels=torch.zeros(2, 1)).loss
    loss.backward()
    assert loss.isfinite()


# Label vectors, stability (rows 61 and 62)


def test_label_vectors_can_start_from_descriptions():
    model = coder()
    matrix = torch.arange(7 * 16.0).view(7, 16)
    model.set_label_embeddings(matrix)
    assert torch.equal(model.head.label_vectors, matrix)
    assert model.label_embeddings is model.head.label_vectors
    assert model.head.label_vectors.requires_grad


@pytest.mark.parametrize("matrix", [torch.zeros(6, 16), torch.zeros(7, 15), torch.full((7, 16), math.nan)])
def test_label_vectors_of_another_shape_or_not_finite_are_refused(matrix):
    with pytest.raises(ValueError, match="`matrix`"):
        coder().set_label_embeddings(matrix)
    with pytest.raises(ValueError, match="cls"):
        coder(head="cls").set_label_embeddings(matrix)


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Of each label's weights, as a share of the greatest possible."""
    tokens = weights[:, :, 1:]
    return -(tokens * (tokens + 1e-30).log()).sum(-1) / math.log(tokens.shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["random", "descriptions"])
def test_attention_does_not_collapse_at_the_start(dtype, start):
    """At the width of the big model; descriptions are states of the encoder like those of the notes."""
    torch.manual_seed(0)
    labels = {"id2label": {i: str(i) for i in range(60)}, "label2id": {str(i): i for i in range(60)}}
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 64, "num_hidden_layers": 1}
    config = EhrBertConfig.tiny(vocab_size=50, **sizes, **labels)
    model, tokens = EhrBertForICDCoding(config).eval(), torch.randint(5, 50, (2, 65))
    if start == "descriptions":
        states = model.model(torch.randint(5, 50, (60, 4))).last_hidden_state
        model.set_label_embeddings(states.mean(1))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        outputs = model(tokens, labels=torch.ones(2, 60), output_label_attentions=list(range(60)))
    outputs.loss.backward()
    assert outputs.label_attentions.dtype == torch.float32
    assert entropy(outputs.label_attentions).min() > 0.3
    assert outputs.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.head.label_vectors.grad.norm(dim=1).min() > 1e-6


def test_without_the_scale_descriptions_start_at_one_token():
    """The reason for the default: papers.md §3.8, 10."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 64, "num_hidden_layers": 1}
    config = EhrBertConfig.tiny(
        vocab_size=50, **sizes, id2label=NAMES, label2id={n: i for i, n in NAMES.items()}, label_attention_scale=False
    )
    model, tokens = EhrBertForICDCoding(config).eval(), torch.randint(5, 50, (2, 65))
    model.set_label_embeddings(model.model(torch.randint(5, 50, (7, 4))).last_hidden_state.mean(1))
    weights = model(tokens, output_label_attentions=list(range(7))).label_attentions
    assert entropy(weights).max() < 0.3


def test_scores_beyond_the_range_of_half_precision_stay_finite():
    model = coder(**FORMS["paper"])
    with torch.no_grad():
        model.head.label_vectors.mul_(1e4)
    for dtype in (torch.float16, torch.bfloat16):
        halved = model.to(dtype)
        assert halved(**text_batch(), labels=TARGETS[NOTES]).loss.isfinite()


# Any encoder


def small_encoders() -> dict:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    return {
        "bert": lambda: BertModel(BertConfig(**sizes, vocab_size=50)),
        "bert-mlm": lambda: BertForMaskedLM(BertConfig(**sizes, vocab_size=50)),
        "roberta": lambda: RobertaModel(RobertaConfig(**sizes, vocab_size=50, pad_token_id=0)),
        "modernbert": lambda: ModernBertModel(ModernBertConfig(**sizes, **ids, vocab_size=50)),
        "longformer": lambda: LongformerModel(
            LongformerConfig(**sizes, vocab_size=50, attention_window=4, max_position_embeddings=64, pad_token_id=0)
        ),
        "ehrbert": lambda: EhrBertModel(EhrBertConfig.tiny(vocab_size=50)),
        "ehrbert-mlm": lambda: EhrBertForMaskedLM(EhrBertConfig.tiny(vocab_size=50)),
    }


every_encoder = pytest.mark.parametrize("kind", list(small_encoders()))


@every_encoder
@pytest.mark.parametrize("head", ["xml", "cls"])
def test_an_encoder_of_the_library_trains_and_round_trips(kind, head, tmp_path):
    torch.manual_seed(0)
    encoder = small_encoders()[kind]()
    kept = {name: p.clone() for name, p in encoder.base_model.named_parameters() if not name.startswith("pooler")}
    model = EhrBertForICDCoding.from_encoder(encoder, NAMES, head=head)
    assert {name: p.shape for name, p in model.model.named_parameters()} == {n: p.shape for n, p in kept.items()}
    assert all(torch.equal(p, kept[name]) for name, p in model.model.named_parameters())
    batch = text_batch()
    model.train()(**batch, note_index=NOTES, labels=TARGETS).loss.backward()
    unused = ("global", "token_type", "type_embeddings") if kind == "longformer" else ()
    silent = [n for n, p in model.named_parameters() if p.grad is None and not any(part in n for part in unused)]
    assert not silent
    model.eval().save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is EhrBertForICDCoding
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.id2label == NAMES
    expected = model(**batch, note_index=NOTES).logits
    torch.testing.assert_close(loaded(**batch, note_index=NOTES).logits, expected, atol=1e-6, rtol=0)


@every_encoder
def test_a_checkpoint_folder_is_opened_as_an_encoder(kind, tmp_path):
    torch.manual_seed(0)
    encoder = small_encoders()[kind]()
    encoder.save_pretrained(tmp_path)
    model = EhrBertForICDCoding.from_encoder(str(tmp_path), NAMES)
    expected = dict(encoder.base_model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.model.named_parameters())
    own = kind.startswith("ehrbert")
    assert (model.config.text_config is None) == own
    assert model.config.hidden_size == (64 if own else 16)
    assert model.config.problem_type == "multi_label_classification"


@every_encoder
def test_padding_changes_nothing_under_any_encoder(kind):
    torch.manual_seed(0)
    model = EhrBertForICDCoding.from_encoder(small_encoders()[kind](), NAMES).eval()
    batch = text_batch()
    wide = {name: nn.functional.pad(value, (0, 6)) for name, value in batch.items()}
    with torch.no_grad():
        narrow, padded = model(**batch, note_index=NOTES).logits, model(**wide, note_index=NOTES).logits
    torch.testing.assert_close(padded, narrow, atol=1e-5, rtol=0)


def test_tokens_can_be_added_under_another_encoder(tmp_path):
    model = EhrBertForICDCoding.from_encoder(small_encoders()["bert"](), NAMES)
    model.resize_token_embeddings(57)
    model.save_pretrained(tmp_path)
    assert EhrBertForICDCoding.from_pretrained(tmp_path).get_input_embeddings().weight.shape == (57, 16)


def test_the_attention_of_another_encoder_can_be_chosen():
    model = EhrBertForICDCoding.from_encoder(small_encoders()["bert"](), NAMES).eval()
    model.set_attn_implementation("eager")
    outputs = model(**text_batch(), output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 2, 10, 10)] * 2
    assert len(outputs.hidden_states) == 3


# What is refused


@pytest.mark.parametrize(("inputs", "message"), [
    ({"note_index": torch.tensor([0, 1])}, "note_index"),
    ({"note_index": torch.tensor([0, 1, 0])}, "note_index"),
    ({"note_index": torch.tensor([0, 2, 2])}, "note_index"),
    ({"note_index": torch.tensor([1, 1, 2])}, "note_index"),
    ({"labels": torch.zeros(2, 7)}, "`labels` must have shape"),
    ({"labels": torch.zeros(2, 6), "note_index": NOTES}, "`labels` must have shape"),
    ({"output_label_attentions": [7]}, "output_label_attentions"),
])  # fmt: skip
def test_what_does_not_fit_the_batch_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        coder()(**text_batch(), **inputs)


def test_the_cls_head_has_no_label_attention_to_return():
    with pytest.raises(ValueError, match="head='xml'"):
        coder(head="cls")(**text_batch(), output_label_attentions=[0])


def test_packed_input_and_no_labels_are_refused_for_another_encoder():
    with pytest.raises(ValueError, match="id2label"):
        EhrBertForICDCoding.from_encoder(small_encoders()["bert"](), {})
    model = EhrBertForICDCoding.from_encoder(small_encoders()["bert"](), NAMES)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(**pack(text_batch()))


# Size


@pytest.mark.slow
def test_70000_labels_train_on_1024_tokens():
    names = {index: str(index) for index in range(70_000)}
    config = EhrBertConfig.tiny(
        vocab_size=50, hidden_size=768, num_attention_heads=12, id2label=names,
        label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    model = EhrBertForICDCoding(config).train()
    loss = model(torch.randint(5, 50, (1, 1024)), labels=torch.zeros(1, 70_000)).loss
    loss.backward()
    assert model.head.label_vectors.grad.norm(dim=1).min() > 0

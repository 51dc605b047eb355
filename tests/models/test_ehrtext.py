"""EhrText: the common suite, and what is its own (papers.md §3.5, acceptance row 65)."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_ehr import EhrTextConfig, EhrTextForICDCoding, EhrTextModel
from tests.models.common import FamilySuite, Head, pack, padded_batch

CODES = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
NAMES = {0: "I10", 1: "E11.9", 2: "N18.3", 3: "Z23"}
ENCODERS = ("cnn", "lstm", "gru")
HEADS = ("max", "label_attention", "multi_head")


def code_loss(logits, labels):
    p = logits.double().sigmoid()
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean().float()


def coding_head(name: str, **fields) -> Head:
    labels = {"id2label": NAMES, "label2id": {code: index for index, code in NAMES.items()}}
    return Head(
        EhrTextForICDCoding, AutoModelForSequenceClassification, "logits", False,
        lambda batch: {"labels": CODES}, lambda out, batch: code_loss(out.logits, CODES),
        overrides=labels | fields, name=name,
    )  # fmt: skip


def words(vocab_size: int = 50, **kwargs) -> dict:
    batch = padded_batch(vocab_size, **kwargs)
    del batch["visit_ids"]
    return batch


class TestEhrText(FamilySuite):
    heads = [  # noqa: RUF012
        Head(EhrTextModel, AutoModel, "last_hidden_state", per_code=True),
        coding_head("cnn-max", encoder="cnn", head="max", kernel_size=4),
        coding_head("caml", label_attention_scale=False, label_attention_norm=False),
        coding_head("laat", encoder="lstm", label_key_size=6),
        coding_head("attention-xml", encoder="lstm", label_output="shared"),
        coding_head("lstm-multi-head", encoder="lstm", head="multi_head"),
        coding_head("gru-multi-head", encoder="gru", head="multi_head"),
        coding_head("gru-max", encoder="gru", head="max"),
    ]
    fixture = "ehrtext"
    lora_targets = ["word_embeddings"]  # noqa: RUF012
    no_dropout = {"hidden_dropout_prob": 0.0}  # noqa: RUF012
    frozen = {"embedding_size": 8, "hidden_size": 8}  # noqa: RUF012

    def config(self, **overrides):
        sizes = {"embedding_size": 16, "hidden_size": 12}
        return EhrTextConfig.tiny(**({"vocab_size": self.vocab_size} | sizes | overrides))

    def padded(self, **kwargs):
        return words(self.vocab_size, **kwargs)


def model_of(encoder: str = "cnn", head: str = "label_attention", **fields) -> EhrTextForICDCoding:
    return TestEhrText().model(coding_head("", encoder=encoder, head=head, **fields))


every_model = pytest.mark.parametrize(("encoder", "head"), [(e, h) for e in ENCODERS for h in HEADS])
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


# The whole note in one read


@every_model
@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
def test_the_segments_of_a_note_are_read_as_one_note(encoder, head, packing):
    model, batch = model_of(encoder, head), words(lengths=(6, 4, 5))
    ids = [row[: int(mask.sum())] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    with torch.no_grad():
        logits = model(**packing(batch), note_index=torch.tensor([0, 0, 1])).logits
        first = model(torch.cat(ids[:2])[None]).logits
        second = model(ids[2][None]).logits
    torch.testing.assert_close(logits, torch.cat([first, second]), atol=1e-6, rtol=1e-5)


@every_encoder
def test_states_lie_where_their_words_are_and_know_the_neighbouring_segment(encoder):
    model, batch = model_of(encoder).model, words(lengths=(6, 4, 5))
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        joined = model(**batch, note_index=torch.tensor([0, 0, 1])).last_hidden_state
        alone = model(torch.cat([batch["input_ids"][0, :6], batch["input_ids"][1, :4]])[None]).last_hidden_state[0]
        apart = model(**batch).last_hidden_state
    torch.testing.assert_close(joined[:2][keep[:2]], alone, atol=1e-6, rtol=1e-5)
    assert joined[~keep].abs().max() == 0
    assert (joined[0, 5] - apart[0, 5]).abs().max() > 1e-4  # the last word before the seam
    torch.testing.assert_close(joined[2], apart[2], atol=1e-6, rtol=1e-5)


@every_model
def test_padding_on_the_left_changes_nothing(encoder, head):
    model, batch = model_of(encoder, head), words()
    left = {name: torch.nn.functional.pad(value, (4, 0)) for name, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**left).logits, model(**batch).logits, atol=1e-6, rtol=0)


@every_model
def test_what_lies_on_padding_changes_nothing(encoder, head):
    model, batch = model_of(encoder, head), words()
    dirty = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    with torch.no_grad():
        torch.testing.assert_close(model(**dirty).logits, model(**batch).logits, atol=0, rtol=0)


@every_encoder
@pytest.mark.parametrize("head", HEADS)
def test_a_note_without_words_is_scored_like_any_other_empty_one(encoder, head):
    model, batch = model_of(encoder, head), words()
    batch["attention_mask"][1] = 0
    outputs = model.train()(**batch, labels=CODES)
    outputs.loss.backward()
    biases = model.head.output.bias
    torch.testing.assert_close(outputs.logits[1], biases, atol=1e-6, rtol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# The encoders against loops


@pytest.mark.parametrize("kernel_size", [1, 3, 4, 10])
def test_the_convolution_equals_a_loop_over_windows(kernel_size):
    model, batch = model_of("cnn", kernel_size=kernel_size).model, words(lengths=(7, 2))
    layer = model.encoder.convolution
    left = (kernel_size - 1) // 2
    with torch.no_grad():
        states = model(**batch).last_hidden_state
        for row, length in enumerate((7, 2)):
            embedded = model.word_embeddings(batch["input_ids"][row, :length])
            for i in range(length):
                total = layer.bias.clone()
                for j in range(kernel_size):
                    if 0 <= i + j - left < length:
                        total += layer.weight[:, :, j] @ embedded[i + j - left]
                torch.testing.assert_close(states[row, i], total.tanh(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", ["lstm", "gru"])
def test_the_recurrence_equals_pytorchs_bidirectional_one_on_each_note(encoder):
    model, batch = model_of(encoder).model, words()
    ours = model.encoder
    reference = (nn.LSTM if encoder == "lstm" else nn.GRU)(16, 12, bidirectional=True, batch_first=True)
    forward, reverse = ours.rnn.state_dict(), ours.reverse_rnn.state_dict()
    reference.load_state_dict(forward | {f"{name}_reverse": weight for name, weight in reverse.items()})
    with torch.no_grad():
        states = model(**batch).last_hidden_state
        for row, length in enumerate((10, 6, 3)):
            expected, _ = reference(model.word_embeddings(batch["input_ids"][row : row + 1, :length]))
            torch.testing.assert_close(states[row, :length], expected[0], atol=1e-6, rtol=1e-5)


# The heads against loops (row 65)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
def test_multi_head_attention_equals_equations_5_to_8_in_loops(queries, packing):
    model, batch = model_of("lstm", "multi_head", num_attention_queries=queries), words()
    head = model.head
    with torch.no_grad():
        head.queries.normal_(std=2.0)
        states = model.model(**batch).last_hidden_state
        for row, length in enumerate((10, 6, 3)):
            contexts = []
            for query in head.queries:
                scores = [math.exp(float(states[row, i] @ query)) for i in range(length)]
                weighted = sum(s / sum(scores) * states[row, i] for i, s in enumerate(scores))
                contexts.append(weighted / math.sqrt(24))
            expected = head.output.weight @ torch.cat(contexts) + head.output.bias
            torch.testing.assert_close(model(**packing(batch)).logits[row], expected, atol=1e-5, rtol=1e-5)


def test_max_pooling_takes_the_greatest_value_of_each_feature():
    model, batch = model_of("cnn", "max"), words()
    states = model.model(**batch).last_hidden_state
    greatest = torch.stack([states[row, :length].amax(0) for row, length in enumerate((10, 6, 3))])
    torch.testing.assert_close(model(**batch).logits, model.head.output(greatest), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("packing", [dict, pack], ids=["padded", "packed"])
def test_camls_label_attention_equals_a_loop_and_its_weights_lie_where_the_words_are(packing):
    fields = {"label_attention_scale": False, "label_attention_norm": False}
    model, batch = model_of("cnn", **fields), words(lengths=(6, 4, 5))
    inputs = packing(batch) | {"note_index": torch.tensor([0, 0, 1])}
    with torch.no_grad():
        model.head.label_vectors.normal_(std=2.0)
        outputs = model(**inputs, output_label_attentions=[3, 1])
        states = model.model(**batch, note_index=inputs["note_index"]).last_hidden_state
        notes = [torch.cat([states[0, :6], states[1, :4]]), states[2, :5]]
        weights = [(note @ model.head.label_vectors.t()).softmax(dim=0) for note in notes]
        for row, (note, alpha) in enumerate(zip(notes, weights, strict=True)):
            expected = ((alpha.t() @ note) * model.head.output.weight).sum(1) + model.head.output.bias
            torch.testing.assert_close(outputs.logits[row], expected, atol=1e-5, rtol=1e-5)
    evidence = outputs.label_attentions
    if packing is pack:
        torch.testing.assert_close(evidence[0], torch.cat(weights)[:, [3, 1]].t())
    else:
        torch.testing.assert_close(evidence[1, 0, :4], weights[0][6:, 3])
        torch.testing.assert_close(evidence[2, 1, :5], weights[1][:, 1])
        assert evidence[batch["attention_mask"][:, None].expand(-1, 2, -1) == 0].abs().max() == 0


# Word embeddings


def test_frozen_words_stay_frozen_through_files_replacement_and_resizing(tmp_path):
    model = model_of("lstm", "multi_head", freeze_word_embeddings=True)
    assert not model.get_input_embeddings().weight.requires_grad
    model.save_pretrained(tmp_path)
    loaded = EhrTextForICDCoding.from_pretrained(tmp_path)
    assert not loaded.get_input_embeddings().weight.requires_grad
    loaded.set_input_embeddings(nn.Embedding(50, 16))
    assert not loaded.get_input_embeddings().weight.requires_grad
    loaded.resize_token_embeddings(60)
    assert not loaded.get_input_embeddings().weight.requires_grad
    before = loaded.get_input_embeddings().weight.clone()
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=1.0)
    loaded.train()(**words(), labels=CODES).loss.backward()
    optimizer.step()
    assert torch.equal(loaded.get_input_embeddings().weight, before)
    assert all(p.grad is not None for n, p in loaded.named_parameters() if "word_embeddings" not in n)


def test_words_train_unless_they_are_frozen():
    model = model_of("cnn")
    model.set_input_embeddings(nn.Embedding.from_pretrained(torch.randn(50, 16)))  # PyTorch freezes these
    model.train()(**words(), labels=CODES).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@every_encoder
def test_embeddings_can_stand_in_for_words(encoder):
    model, batch = model_of(encoder), words()
    embedded = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    torch.testing.assert_close(model(inputs_embeds=embedded, attention_mask=mask).logits, model(**batch).logits)


# Learning


@every_model
def test_it_learns_which_pair_of_words_means_which_code(encoder, head):
    """The code is there where word 5 stands right before word 6: a bag of words cannot tell."""
    generator = torch.Generator().manual_seed(0)
    notes = torch.randint(7, 30, (200, 20), generator=generator)
    wanted = torch.arange(200) % 2
    place = torch.randint(0, 19, (200,), generator=generator)
    rows = torch.arange(200)
    notes[rows, place] = torch.where(wanted == 1, 5, 6)
    notes[rows, place + 1] = torch.where(wanted == 1, 6, 5)
    labels = wanted.float()[:, None]
    torch.manual_seed(0)
    config = EhrTextConfig.tiny(
        vocab_size=30, encoder=encoder, head=head, id2label={0: "I10"}, label2id={"I10": 0}, hidden_dropout_prob=0.0
    )
    model = EhrTextForICDCoding(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        half = slice(0, 75) if step % 2 else slice(75, 150)
        model(notes[half], labels=labels[half]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model.eval()(notes[150:]).logits[:, 0]
    assert ((logits > 0).float() == labels[150:, 0]).float().mean() > 0.9


def test_gradient_accumulation_gives_the_mean_over_all_notes():
    batch, model = words(), model_of("gru", "max")
    whole = model(**batch, labels=CODES).loss
    parts = [
        model(**{k: v[rows] for k, v in batch.items()}, labels=CODES[rows], num_items_in_batch=12).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_stock_trainer_trains_and_reports_an_evaluation_loss(tmp_path):
    rows = [{"input_ids": torch.randint(5, 50, (6,)), "labels": CODES[n % 3]} for n in range(6)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model_of("lstm", "multi_head"), arguments, train_dataset=rows, eval_dataset=rows)
    assert math.isfinite(trainer.train().training_loss)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(rows).predictions.shape == (6, 4)


# Presets and refusals


@pytest.mark.parametrize(("preset", "parameters"), [
    # words + filters × (kernel × embedding + 1) + …, by hand for 20,000 words and 10 labels
    ("cnn", 20_000 * 100 + 500 * (4 * 100 + 1) + 10 * 501),
    ("caml", 20_000 * 100 + 50 * (10 * 100 + 1) + 10 * (50 + 51)),
    ("laat", 20_000 * 100 + 2 * 4 * 512 * (100 + 512 + 2) + 512 * 1025 + 10 * (512 + 1025)),
    ("multi_head_attention", 20_000 * 300 + 2 * 4 * 512 * (300 + 512 + 2) + 200 * 1024 + 10 * (200 * 1024 + 1)),
])  # fmt: skip
def test_presets_have_the_sizes_of_their_papers(preset, parameters):
    names = {n: str(n) for n in range(10)}
    config = getattr(EhrTextConfig, preset)(id2label=names, label2id={v: k for k, v in names.items()})
    with torch.device("meta"):
        model = EhrTextForICDCoding(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_recurrences_and_queries_start_from_random_weights_not_from_bare_memory(tmp_path):
    model_of("cnn", hidden_size=64).model.save_pretrained(tmp_path)
    model = EhrTextForICDCoding.from_pretrained(tmp_path, encoder="lstm", head="multi_head")
    for name, weight in model.model.encoder.named_parameters():
        assert weight.abs().max() <= 1 / 8, name
        assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.2), name
    bound = math.sqrt(6 / (4 + 128))
    assert model.head.queries.abs().max() <= bound
    assert model.head.queries.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m(**b, inputs_embeds=torch.zeros(3, 10, 16)), "Exactly one of"),
        (lambda m, b: m(attention_mask=b["attention_mask"]), "Exactly one of"),
        (lambda m, b: m(**b, cu_seqlens=torch.tensor([0, 30], dtype=torch.int32)), "packed input"),
        (lambda m, b: m(**b, note_index=torch.tensor([0, 2, 2])), "note_index"),
        (lambda m, b: m(**b, labels=CODES[:2]), "labels"),
        (lambda m, b: m(**b, output_label_attentions=[4]), "must be ids"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of(), words())


def test_only_label_attention_can_show_its_evidence():
    with pytest.raises(ValueError, match="label_attention"):
        model_of("cnn", "max")(**words(), output_label_attentions=[0])


@pytest.mark.parametrize(("fields", "message"), [
    ({"encoder": "rnn"}, "encoder"), ({"head": "cls"}, "head"), ({"kernel_size": 0}, "kernel_size"),
    ({"num_attention_queries": 0}, "num_attention_queries"), ({"label_key_size": 0}, "label_key_size"),
    ({"vocab_size": 3, "pad_token_id": 3}, "pad_token_id"),
])  # fmt: skip
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        EhrTextConfig(**fields)

"""EhrBert: the common suite, and what is its own (papers.md §3, acceptance rows 57-60)."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from hf_ehr import (
    EhrBertConfig,
    EhrBertForICDCoding,
    EhrBertForMaskedLM,
    EhrBertForPreTraining,
    EhrBertForSequenceClassification,
    EhrBertModel,
    extend_position_embeddings,
)
from hf_ehr.models.modeling_ehrbert_embeddings import extended_positions
from tests.models.common import FamilySuite, Head, pack, padded_batch

LABELS = torch.tensor([0, 1, 0])
CODES = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
NAMES = {0: "I10", 1: "E11.9", 2: "N18.3", 3: "Z23"}


def masked_labels(batch: dict) -> dict:
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2], labels[0, 7], labels[1, 3], labels[2, 0] = 7, 9, 30, 5
    return {"labels": labels}


def token_loss(logits, labels):
    chosen = labels != -100
    return -logits[chosen].log_softmax(-1).gather(1, labels[chosen][:, None]).mean()


def class_loss(logits, labels):
    return -logits.log_softmax(-1)[torch.arange(3), labels].mean()


def code_loss(logits, labels):
    p = logits.double().sigmoid()
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean().float()


def coding_head(name: str, **fields) -> Head:
    labels = {"id2label": NAMES, "label2id": {code: index for index, code in NAMES.items()}}
    return Head(
        EhrBertForICDCoding, AutoModelForSequenceClassification, "logits", False,
        lambda batch: {"labels": CODES}, lambda out, batch: code_loss(out.logits, CODES),
        overrides=labels | fields, name=name,
    )  # fmt: skip


def text_batch(vocab_size: int = 50, **kwargs) -> dict:
    """Random segments; the second half of each is of token type 1."""
    batch = padded_batch(vocab_size, **kwargs)
    lengths = batch["attention_mask"].sum(1, keepdim=True)
    second = torch.arange(batch["input_ids"].shape[1])[None] >= lengths // 2
    del batch["visit_ids"]
    return batch | {"token_type_ids": second.long() * batch["attention_mask"]}


class TestEhrBert(FamilySuite):
    heads = [  # noqa: RUF012
        Head(EhrBertModel, AutoModel, "pooler_output", per_code=False),
        Head(
            EhrBertForMaskedLM, AutoModelForMaskedLM, "logits", True, masked_labels,
            lambda out, batch: token_loss(out.logits, batch["labels"]), logits_on_request=True,
        ),
        Head(
            EhrBertForPreTraining, AutoModelForPreTraining, "prediction_logits", True,
            lambda batch: masked_labels(batch) | {"next_sentence_label": LABELS},
            lambda out, batch: (
                token_loss(out.prediction_logits, batch["labels"]) + class_loss(out.seq_relationship_logits, LABELS)
            ),
            logits_on_request=True,
        ),
        Head(
            EhrBertForSequenceClassification, AutoModelForSequenceClassification, "logits", False,
            lambda batch: {"labels": LABELS}, lambda out, batch: class_loss(out.logits, LABELS),
        ),
        coding_head("icd-xml"),
        coding_head("icd-xml-max", segment_pooling="max", label_attention_scale=False, label_attention_norm=False),
        coding_head("icd-laat", label_output="per_label", label_key_size=6),
        coding_head("icd-linear", xml_hidden_sizes=()),
        coding_head("icd-cls", head="cls"),
    ]  # fmt: skip
    fixture = "ehrbert"
    lora_targets = ["qkv"]  # noqa: RUF012
    frozen = FamilySuite.frozen | {"xml_hidden_sizes": (6, 4), "max_position_embeddings": 16}

    def config(self, **overrides):
        return EhrBertConfig.tiny(**({"vocab_size": self.vocab_size} | overrides))

    def padded(self, **kwargs):
        return text_batch(self.vocab_size, **kwargs)


# The encoder (row 57)


@pytest.mark.parametrize(("preset", "parameters"), [("small", 36_248_064), ("big", 101_794_560)])
def test_parameter_counts_are_the_papers(preset, parameters):
    with torch.device("meta"):
        model = EhrBertModel(getattr(EhrBertConfig, preset)())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.max_position_embeddings == 1024


def test_it_equals_bert_with_the_same_weights():
    torch.manual_seed(0)
    ours = EhrBertModel(EhrBertConfig.tiny(vocab_size=50, initializer_range=0.2)).eval()
    sizes = {name: getattr(ours.config, name) for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings",
    )}  # fmt: skip
    bert = BertModel(BertConfig(**sizes)).eval()
    copy_to_bert(ours, bert)
    batch = text_batch(50)
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        mine, theirs = ours(**batch), bert(**batch)
    torch.testing.assert_close(mine.last_hidden_state[keep], theirs.last_hidden_state[keep], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(mine.pooler_output, theirs.pooler_output, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def copy_to_bert(ours: EhrBertModel, bert: BertModel) -> None:
    mine, theirs = ours.embeddings, bert.embeddings
    pairs = [
        (mine.word_embeddings, theirs.word_embeddings), (mine.position_embeddings, theirs.position_embeddings),
        (mine.token_type_embeddings, theirs.token_type_embeddings), (mine.norm, theirs.LayerNorm),
        (ours.pooler, bert.pooler.dense),
    ]  # fmt: skip
    for mine, theirs in zip(ours.encoder.layers, bert.encoder.layer, strict=True):
        attention = theirs.attention
        parts = zip(mine.attention.qkv.weight.chunk(3), mine.attention.qkv.bias.chunk(3), strict=True)
        for part, (weight, bias) in zip(
            (attention.self.query, attention.self.key, attention.self.value), parts, strict=True
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        pairs += [
            (mine.attention.out_proj, attention.output.dense), (mine.attention_norm, attention.output.LayerNorm),
            (mine.intermediate, theirs.intermediate.dense), (mine.output, theirs.output.dense),
            (mine.output_norm, theirs.output.LayerNorm),
        ]  # fmt: skip
    for mine, theirs in pairs:
        theirs.load_state_dict(mine.state_dict())


def test_positions_do_not_move_under_left_padding():
    torch.manual_seed(0)
    model = EhrBertModel(EhrBertConfig.tiny(vocab_size=50, initializer_range=0.2)).eval()
    tokens, left = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 5, 6, 7]])
    with torch.no_grad():
        plain, padded = model(tokens), model(left, attention_mask=(left > 0).long())
    torch.testing.assert_close(padded.last_hidden_state[:, 2:], plain.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.pooler_output, plain.pooler_output, atol=1e-5, rtol=0)


# More positions (row 58)


def test_random_extension_keeps_the_old_rows_and_draws_new_ones():
    torch.manual_seed(0)
    table = torch.randn(512, 16)
    longer = extended_positions(table, 1024, "random", std=0.02)
    assert torch.equal(longer[:512], table)
    assert longer[512:].std().item() == pytest.approx(0.02, rel=0.05)


def test_tiled_and_interpolated_extensions_by_hand():
    table = torch.tensor([[0.0, 8.0], [2.0, 4.0], [4.0, 0.0]])
    assert extended_positions(table, 5, "tile").tolist() == [[0, 8], [2, 4], [4, 0], [0, 8], [2, 4]]
    stretched = extended_positions(table, 5, "interpolate")
    torch.testing.assert_close(stretched, torch.tensor([[0.0, 8.0], [1.0, 6.0], [2.0, 4.0], [3.0, 2.0], [4.0, 0.0]]))


def small_bert(**fields) -> BertModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(**(sizes | {"vocab_size": 50, "max_position_embeddings": 512} | fields))).eval()


def small_roberta() -> RobertaModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return RobertaModel(RobertaConfig(**sizes, vocab_size=50, max_position_embeddings=514, pad_token_id=1)).eval()


@pytest.mark.parametrize("make", [
    small_bert,
    small_roberta,
    lambda: EhrBertForMaskedLM(EhrBertConfig.tiny(vocab_size=50, max_position_embeddings=512)).eval(),
    lambda: EhrBertForICDCoding.from_encoder(small_bert(), NAMES).eval(),
], ids=["bert", "roberta", "ehrbert-mlm", "icd-on-bert"])  # fmt: skip
def test_an_extended_model_reads_1024_tokens_and_reads_512_as_before(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    short, long = torch.randint(5, 50, (1, 512)), torch.randint(5, 50, (1, 1024))
    with torch.no_grad():
        before = model(short)[0]
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model(long)
        assert extend_position_embeddings(model, 1024) is model
        torch.testing.assert_close(model(short)[0], before, atol=1e-6, rtol=0)
        expected = model(long)[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(type(model).from_pretrained(tmp_path)(long)[0], expected, atol=1e-6, rtol=0)


def test_fewer_positions_or_none_are_refused():
    with pytest.raises(ValueError, match="at least the 512"):
        extend_position_embeddings(small_bert(), 256)
    with pytest.raises(ValueError, match="position embeddings"):
        extend_position_embeddings(EhrBertForICDCoding.from_encoder(small_modernbert(), NAMES), 1024)


def small_modernbert():
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    return ModernBertModel(ModernBertConfig(**sizes, **ids, vocab_size=50)).eval()


# Pre-training (row 59)


def test_next_sentence_prediction_is_optional():
    torch.manual_seed(0)
    model = EhrBertForPreTraining(EhrBertConfig.tiny(vocab_size=50)).eval()
    batch = text_batch(50)
    labels = masked_labels(batch)
    both = model(**batch, **labels, next_sentence_label=LABELS)
    alone = model(**batch, **labels)
    torch.testing.assert_close(alone.loss, both.mlm_loss)
    torch.testing.assert_close(both.loss, both.mlm_loss + both.next_sentence_loss)
    assert alone.next_sentence_loss is None
    assert model(**batch).loss is None


def test_both_objectives_overfit_32_pairs():
    torch.manual_seed(0)
    lengths = tuple(range(4, 12)) * 4
    batch = text_batch(60, lengths=lengths)
    rows = torch.arange(32)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[rows, 1] = batch["input_ids"][rows, 1]
    batch["input_ids"][rows, 1] = 4
    pairs = rows % 2
    inputs = pack(batch | {"labels": labels, "next_sentence_label": pairs})
    model = EhrBertForPreTraining(EhrBertConfig.tiny(vocab_size=60, hidden_dropout_prob=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    outputs = model.eval()(**inputs, return_logits=True)
    chosen = inputs["labels"][0] != -100
    correct = outputs.prediction_logits[0][chosen].argmax(-1) == inputs["labels"][0][chosen]
    assert correct.float().mean() > 0.9
    assert (outputs.seq_relationship_logits.argmax(-1) == pairs).float().mean() > 0.9


def test_masked_lm_loss_is_the_sum_over_the_items_of_the_whole_batch():
    model = EhrBertForMaskedLM(EhrBertConfig.tiny(vocab_size=50)).eval()
    batch = text_batch(50)
    batch |= masked_labels(batch)
    torch.testing.assert_close(model(**batch, num_items_in_batch=8).loss, model(**batch).loss * 4 / 8)


# What is refused


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_size": 50, "num_attention_heads": 4}, "divisible"),
    ({"vocab_size": 3}, "mask_token_id"),
    ({"head": "crf"}, "head"),
    ({"head": "cls", "segment_pooling": "attention"}, "segment_pooling"),
    ({"xml_hidden_sizes": (0,)}, "xml_hidden_sizes"),
])  # fmt: skip
def test_a_config_that_exists_is_valid(fields, message):
    with pytest.raises(Exception, match=message):
        EhrBertConfig(**fields)


def test_paper_exact_has_neither_scale_nor_norm():
    config = EhrBertConfig.paper_exact("small")
    assert (config.hidden_size, config.segment_pooling) == (512, "max")
    assert not config.label_attention_scale
    assert not config.label_attention_norm
    assert config.attention_probs_dropout_prob == 0.1


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, b: m(**b, inputs_embeds=torch.zeros(3, 10, 64)), "Exactly one of"),
    (lambda m, b: m(**b, cu_seqlens=torch.tensor([0, 30], dtype=torch.int32)), "packed input"),
    (lambda m, b: m(torch.ones(1, 1025, dtype=torch.long)), "max_position_embeddings"),
])  # fmt: skip
def test_bad_input_is_refused_with_the_next_step(call, message):
    with pytest.raises(ValueError, match=message):
        call(EhrBertModel(EhrBertConfig.tiny(vocab_size=50)), text_batch(50))


def test_the_own_encoder_refuses_the_configuration_of_another():
    config = EhrBertForICDCoding.from_encoder(small_bert(), NAMES).config
    with pytest.raises(ValueError, match="text_config"):
        EhrBertForMaskedLM(config)

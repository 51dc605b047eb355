"""BiLSTM-CRF taggers: the common suite, the CRF against brute force, whole notes (papers.md §2.5, row 40)."""

from itertools import pairwise, product

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForTokenClassification, BertConfig, BertModel, DistilBertConfig

from hf_ehr import EhrTaggerConfig, EhrTaggerForTokenClassification, EhrTaggerModel, MedMPLMModel
from hf_ehr.models.modeling_crf import FORBIDDEN, LinearChainCrf, iob2_rules
from tests.models.common import FamilySuite, Head, padded_batch
from tests.models.test_medmplm import BERT
from tests.models.test_medmplm import config as medmplm_config

TAGS = ["O", "B-problem", "I-problem", "B-test", "I-test"]
NAMES = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: n for n, tag in enumerate(TAGS)}}
TEXT = {"note_config": BertConfig(**(BERT | {"vocab_size": 50, "max_position_embeddings": 32}))}


def crf(seed: int = 0, scale: float = 1.0) -> LinearChainCrf:
    torch.manual_seed(seed)
    layer = LinearChainCrf(NAMES["id2label"])
    for weight in layer.parameters():
        nn.init.normal_(weight, std=scale)
    return layer


def score(layer: LinearChainCrf, emissions: torch.Tensor, tags) -> torch.Tensor:
    """Of one sequence, term by term."""
    total = layer.starts[tags[0]] + layer.ends[tags[-1]]
    for place, tag in enumerate(tags):
        total = total + emissions[place, tag]
        if place:
            total = total + layer.transitions[tags[place - 1], tag]
    return total


def allowed(tags) -> bool:
    names = ["O", *(TAGS[tag] for tag in tags)]
    return all(after[0] != "I" or (before[2:] == after[2:] and before != "O") for before, after in pairwise(names))


# The CRF against brute force


@torch.no_grad()
def test_the_likelihood_equals_a_sum_over_all_sequences():
    layer, lengths = crf(), torch.tensor([4, 1, 0, 3])
    emissions, tags = torch.randn(4, 4, 5), torch.randint(5, (4, 4))
    tags[3, 3] = -100  # behind the end
    found = layer.log_likelihood(emissions, tags, lengths)
    for row, length in enumerate(lengths.tolist()):
        if not length:
            assert found[row] == 0
            continue
        every = torch.stack([score(layer, emissions[row], one) for one in product(range(5), repeat=length)])
        expected = score(layer, emissions[row], tags[row, :length].tolist()) - every.logsumexp(dim=0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_sequences_together_have_probability_1():
    layer, emissions = crf(seed=1), torch.randn(1, 3, 5)
    every = torch.tensor(list(product(range(5), repeat=3)))
    found = layer.log_likelihood(emissions.expand(len(every), -1, -1), every, torch.full((len(every),), 3))
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_viterbi_equals_the_best_of_all_sequences_that_the_scheme_allows(seed):
    layer, lengths = crf(seed, scale=2.0), torch.tensor([4, 1, 3])
    emissions = torch.randn(3, 4, 5) * 2
    found = layer.decode(emissions, lengths)
    forbidden = 0
    for row, length in enumerate(lengths.tolist()):
        every = list(product(range(5), repeat=length))
        best = max((one for one in every if allowed(one)), key=lambda one: float(score(layer, emissions[row], one)))
        forbidden += not allowed(max(every, key=lambda one: float(score(layer, emissions[row], one))))
        assert found[row].tolist() == [*best, *[-100] * (4 - length)]
    if seed == 0:
        assert forbidden, "the rules decide nothing here"


def test_the_gradient_of_the_likelihood_is_what_was_minus_what_is_expected():
    """Of an emission: its indicator minus the share of all sequences, weighted, that have this tag there."""
    layer, emissions = crf(seed=2), torch.randn(1, 3, 5, requires_grad=True)
    layer.log_likelihood(emissions, torch.tensor([[1, 2, 0]]), torch.tensor([3])).sum().backward()
    every = list(product(range(5), repeat=3))
    with torch.no_grad():
        weights = torch.stack([score(layer, emissions[0], one) for one in every]).softmax(dim=0)
        expected = torch.zeros(3, 5)
        for weight, tags in zip(weights, every, strict=True):
            expected[torch.arange(3), torch.tensor(tags)] -= weight
        expected[torch.arange(3), torch.tensor([1, 2, 0])] += 1
    torch.testing.assert_close(emissions.grad[0], expected, atol=1e-5, rtol=1e-5)


def test_rules_of_iob2():
    transitions, starts = iob2_rules(NAMES["id2label"])
    assert [TAGS[i] for i, value in enumerate(starts) if value] == ["I-problem", "I-test"]
    into_problem = [TAGS[i] for i in range(5) if transitions[i][2] == FORBIDDEN]
    assert into_problem == ["O", "B-test", "I-test"]
    assert not any(transitions[i][j] for i in range(5) for j in (0, 1, 3))
    assert iob2_rules({0: "no", 1: "yes"}) == ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0])


# The taggers


def words(**kwargs) -> dict:
    batch = padded_batch(50, **kwargs)
    mask = batch["attention_mask"]
    # Of the tokens of each row the second and the fifth go on with a word.
    begins = mask * (torch.arange(mask.shape[1]) % 3 != 1)
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "word_mask": begins}


def tags_of(batch: dict) -> dict:
    tags = batch["input_ids"] % 5
    return {"labels": tags.masked_fill(batch["word_mask"] == 0, -100)}


def tagger(name: str, **fields) -> Head:
    return Head(
        EhrTaggerForTokenClassification, AutoModelForTokenClassification, "logits", True, tags_of, lambda *_: None,
        overrides=fields, name=name,
    )  # fmt: skip


class TestEhrTagger(FamilySuite):
    heads = [  # noqa: RUF012
        Head(EhrTaggerModel, AutoModel, "last_hidden_state", per_code=True),
        tagger("words"),
        tagger("encoder", **TEXT),
    ]
    fixture = "ehrtagger"
    lora_targets = ["word_embeddings", "query"]  # noqa: RUF012
    no_dropout = {"hidden_dropout_prob": 0.0}  # noqa: RUF012
    frozen = {"embedding_size": 8, "hidden_size": 8}  # noqa: RUF012
    test_packed_equals_padded = None
    test_packed_and_padded_training_give_one_loss_and_one_gradient = None
    test_changing_one_packed_patient_leaves_the_others_bit_equal = None
    test_untied_weights_survive_a_round_trip = None
    test_hidden_states_and_attentions_are_there_on_request = None
    test_gradient_checkpointing_gives_the_same_gradients = None
    test_bf16_stays_finite_and_near_fp32 = None

    def config(self, **overrides):
        sizes = {"vocab_size": 50, "embedding_size": 12, "hidden_size": 8}
        return EhrTaggerConfig(**(sizes | NAMES | overrides))

    def padded(self, **kwargs):
        return words(**kwargs)

    def test_the_loss_equals_one_computed_by_hand(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head), self.batch(head)
        with torch.no_grad():
            for weight in model.crf.parameters():
                weight.normal_()
            outputs = model(**batch)
            total, count = 0.0, 0
            for row in range(3):
                there = batch["word_mask"][row].bool()
                emissions, tags = outputs.logits[row, there], batch["labels"][row, there]
                alpha = model.crf.starts + emissions[0]
                for emission in emissions[1:]:  # over the words of this note alone
                    alpha = torch.stack([(alpha + model.crf.transitions[:, j]).logsumexp(0) for j in range(5)])
                    alpha = alpha + emission
                total += (alpha + model.crf.ends).logsumexp(0) - score(model.crf, emissions, tags.tolist())
                count += len(tags)
        torch.testing.assert_close(outputs.loss, total / count, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**batch, num_items_in_batch=40).loss, total / 40, atol=1e-5, rtol=1e-5)

    def test_it_overfits_a_few_patients(self, head):
        if head.hand_loss is None:
            pytest.skip("the base model has no loss")
        model, batch = self.model(head).train(), self.batch(head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(80):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model(**batch).loss.item() < 0.2

    def test_every_parameter_receives_a_gradient(self, head):
        model, batch = self.model(head).train(), self.batch(head)
        outputs = model(**batch)
        (outputs.loss if head.hand_loss else outputs[head.output].square().sum()).backward()
        named = dict(model.named_parameters())
        assert not [n for n, p in named.items() if p.grad is None or not p.grad.isfinite().all()]
        assert not [n for n, p in named.items() if not p.grad.abs().sum() and not n.endswith("key.bias")]


def model_of(**fields) -> EhrTaggerForTokenClassification:
    return TestEhrTagger().model(tagger("", **fields))


@torch.no_grad()
def test_tokens_that_begin_no_word_are_not_read_by_the_lstm_and_have_no_tag():
    model, batch = model_of(), words()
    begins = batch["word_mask"].bool()
    dirty = batch | {"input_ids": torch.where(begins, batch["input_ids"], 7)}
    outputs, other = model(**batch), model(**dirty)
    assert torch.equal(outputs.logits, other.logits)
    assert outputs.logits[~begins].abs().max() == 0
    assert torch.equal(outputs.tags >= 0, begins)
    encoder = model_of(**TEXT)  # which reads all of a word's tokens
    assert (encoder(**batch).logits - encoder(**dirty).logits).abs().max() > 1e-4


@torch.no_grad()
def test_a_border_between_windows_changes_nothing_for_word_embeddings():
    model, batch = model_of(), words(lengths=(10, 6))
    halves = {name: nn.functional.pad(value[:, :4], (0, 2)) for name, value in batch.items()}
    cut = {
        name: torch.stack([halves[name][0], value[0, 4:], halves[name][1], value[1, 4:]])
        for name, value in batch.items()
    }
    whole, apart = model(**batch), model(**cut, note_index=torch.tensor([0, 0, 1, 1]))
    joined = torch.stack([torch.cat([apart.logits[2 * n, :4], apart.logits[2 * n + 1]]) for n in range(2)])
    torch.testing.assert_close(joined, whole.logits, atol=1e-6, rtol=1e-5)
    tags = torch.stack([torch.cat([apart.tags[2 * n, :4], apart.tags[2 * n + 1]]) for n in range(2)])
    assert torch.equal(tags, whole.tags)
    lonely = model(**cut)
    assert (lonely.logits - apart.logits).abs().max() > 1e-4


@torch.no_grad()
def test_an_entity_goes_on_behind_the_border_between_windows():
    """Emissions that say B-problem, I-problem, I-problem: the second window begins in the midst of it."""
    model = model_of()
    model.classifier.weight.zero_()
    model.classifier.bias.copy_(torch.tensor([0.0, 0, 9, 0, 0]))
    for weight in model.crf.parameters():
        weight.zero_()
    batch = {"input_ids": torch.full((2, 3), 7), "note_index": torch.tensor([0, 0])}
    assert [TAGS[tag] for tag in model(**batch).tags.flatten()] == ["B-problem", *["I-problem"] * 5]
    apart = model(batch["input_ids"]).tags
    assert [TAGS[tag] for tag in apart[1]] == ["B-problem", "I-problem", "I-problem"]


@torch.no_grad()
def test_notes_and_batches_without_words_are_tagged_like_any_other():
    model, batch = model_of(), words()
    whole = model(**batch)
    batch["word_mask"][1] = 0
    outputs = model(**batch)
    assert (outputs.tags[1] == -100).all()
    torch.testing.assert_close(outputs.logits[[0, 2]], whole.logits[[0, 2]], atol=1e-6, rtol=0)
    nothing = model(
        **(batch | {"word_mask": torch.zeros_like(batch["word_mask"])}), labels=batch["input_ids"] * 0 - 100
    )
    assert nothing.loss == 0
    assert (nothing.tags == -100).all()


@torch.no_grad()
def test_the_recurrence_equals_pytorchs_bidirectional_one_on_the_words_of_each_note():
    model, batch = model_of().model, words()
    reference = nn.LSTM(12, 8, bidirectional=True, batch_first=True)
    forward, reverse = model.lstm.lstm.state_dict(), model.lstm.reverse_lstm.state_dict()
    reference.load_state_dict(forward | {f"{name}_reverse": weight for name, weight in reverse.items()})
    states = model(**batch).last_hidden_state
    for row in range(3):
        there = batch["word_mask"][row].bool()
        expected, _ = reference(model.word_embeddings(batch["input_ids"][row, there])[None])
        torch.testing.assert_close(states[row, there], expected[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_medm_plms_text_encoder_is_taken_over_trainable_or_frozen(frozen, tmp_path):
    source = MedMPLMModel(medmplm_config())
    source.save_pretrained(tmp_path / "medmplm")
    text = MedMPLMModel.from_pretrained(tmp_path / "medmplm").note_encoder
    model = EhrTaggerForTokenClassification.from_note_encoder(text, freeze_note_encoder=frozen, hidden_size=8, **NAMES)
    mine = dict(model.model.note_encoder.named_parameters())
    for name, weight in mine.items():
        assert torch.equal(weight, source.note_encoder.get_parameter(name)), name
    assert all(weight.requires_grad != frozen for weight in mine.values())
    assert model.train().model.note_encoder.training != frozen
    model.save_pretrained(tmp_path / "tagger")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "tagger")
    assert {weight.requires_grad for weight in again.model.note_encoder.parameters()} == {not frozen}
    assert all(weight.requires_grad for name, weight in again.named_parameters() if "note_encoder" not in name)


@pytest.mark.parametrize("text", [BertConfig(**BERT), DistilBertConfig(vocab_size=30, dim=12, n_heads=2, n_layers=1)])
@torch.no_grad()
def test_any_text_encoder_plugs_in(text):
    model = model_of(note_config=text)
    ids = torch.randint(1, 30, (2, 6))
    assert model(ids).tags.shape == (2, 6)


def test_a_trained_encoder_from_a_folder(tmp_path):
    text = BertModel(BertConfig(**BERT))
    text.save_pretrained(tmp_path)
    model = EhrTaggerForTokenClassification.from_note_encoder(tmp_path, **NAMES)
    weight = "embeddings.word_embeddings.weight"
    assert torch.equal(model.model.note_encoder.get_parameter(weight), text.get_parameter(weight))


def test_what_does_not_fit_is_refused():
    batch = words()
    with pytest.raises(ValueError, match="labels"):
        model_of()(**batch, labels=torch.full_like(batch["input_ids"], -100))
    with pytest.raises(ValueError, match="note_index"):
        model_of()(**batch, note_index=torch.tensor([0, 2, 3]))
    with pytest.raises(Exception, match="freeze_note_encoder"):
        EhrTaggerConfig(freeze_note_encoder=True)

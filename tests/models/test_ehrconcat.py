"""Encoders side by side: ClinicalBERT, G-BERT, Med-BERT on the tasks of MedM-PLM (papers.md §2.5, rows 46 to 48)."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

from hf_ehr import (
    EhrCodeTokenizer,
    EhrConcatConfig,
    EhrConcatForMedicationRecommendation,
    EhrConcatForNoteClassification,
    EhrConcatForSequenceClassification,
    EhrConcatModel,
    EhrTextConfig,
    EhrTextForICDCoding,
    GBertForPreTraining,
    MedBertConfig,
    MedBertForMaskedLM,
    MedBertModel,
)
from hf_ehr.models.modeling_ehrconcat import chunk_vote
from tests.models.common import FamilySuite, Head
from tests.models.test_gbert import config as gbert_config
from tests.models.test_medmplm import BERT, binary_cross_entropy, outcome_labels
from tests.models.visits import (
    DIAGNOSES,
    MEDICATIONS,
    SPECIAL,
    VisitSuite,
    recommendation_labels,
    recommendation_loss,
    visits,
)

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Med-BERT's own vocabulary: in another order, and without the last diagnosis.
CODES = [*SPECIAL, *reversed(MEDICATIONS), *DIAGNOSES[:-1]]
MAPS = EhrConcatConfig.code_maps(CODES, [*SPECIAL, *DIAGNOSES], [*SPECIAL, *MEDICATIONS])


def medbert_config() -> MedBertConfig:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 12, "initializer_range": 0.15}
    return MedBertConfig.tiny(vocab_size=len(CODES), **(sizes | QUIET))


PARTS = {
    "note": {"note_config": BertConfig(**BERT)},
    "gbert": {"gbert_config": gbert_config(**QUIET)},
    "medbert": {"medbert_config": medbert_config(), **MAPS},
}


def config(*parts: str, **overrides) -> EhrConcatConfig:
    drugs = {"id2label": dict(enumerate(MEDICATIONS)), "label2id": {name: n for n, name in enumerate(MEDICATIONS)}}
    fields = {"problem_type": "multi_label_classification", "initializer_range": 0.15, "classifier_dropout": 0.0}
    for part in parts:
        fields |= PARTS[part]
    return EhrConcatConfig(**(fields | drugs | overrides))


def model_of(kind, *parts: str, **overrides):
    torch.manual_seed(0)
    return kind(config(*parts, **overrides)).eval()


def outcomes(*parts: str, **fields) -> Head:
    overrides = {name: value for part in parts for name, value in PARTS[part].items()}
    return Head(
        EhrConcatForSequenceClassification, AutoModelForSequenceClassification, "logits", False, outcome_labels,
        binary_cross_entropy, overrides=overrides | fields, name="-".join([*parts, *fields]),
    )  # fmt: skip


def recommender(*parts: str) -> Head:
    overrides = {name: value for part in parts for name, value in PARTS[part].items()}
    return Head(
        EhrConcatForMedicationRecommendation, AutoModelForSequenceClassification, "logits", False,
        recommendation_labels, recommendation_loss, overrides=overrides, name="-".join(["drugs", *parts]),
    )  # fmt: skip


class TestEhrConcat(VisitSuite):
    heads = [  # noqa: RUF012
        Head(
            EhrConcatModel, AutoModel, "note_state", per_code=False, overrides=PARTS["note"] | PARTS["gbert"],
            name="note-gbert-model",
        ),
        Head(
            EhrConcatModel, AutoModel, "code_state", per_code=False, overrides=PARTS["note"] | PARTS["medbert"],
            name="note-medbert-model",
        ),
        outcomes("note", "gbert"),
        outcomes("note", "medbert"),
        recommender("note", "gbert"),
        recommender("note", "medbert"),
    ]  # fmt: skip
    base_class = EhrConcatModel
    lora_targets = ["qkv", "query"]  # noqa: RUF012
    fixture = "ehrconcat"
    no_dropout = {}  # noqa: RUF012
    frozen = {}  # noqa: RUF012
    test_hidden_states_and_attentions_are_there_on_request = None

    def config(self, **overrides):
        return config(**overrides)

    def test_the_config_round_trips_and_rejects_wrong_types(self, head, tmp_path):
        saved = self.config(**head.overrides)
        saved.save_pretrained(tmp_path)
        loaded = EhrConcatConfig.from_pretrained(tmp_path)
        assert loaded.to_json_string() == saved.to_json_string()
        assert (loaded.gbert_config is None) == (saved.gbert_config is None) != (loaded.medbert_config is None)
        with pytest.raises(Exception, match="note_pooling"):
            self.config(note_pooling=2)


# One encoder alone, and both end to end (rows 46 and 48)


@pytest.mark.parametrize("kind", [EhrConcatForSequenceClassification, EhrConcatForMedicationRecommendation])
@pytest.mark.parametrize("codes", ["gbert", "medbert"])
@torch.no_grad()
def test_the_vectors_of_note_and_codes_stand_end_to_end(kind, codes):
    both, batch = model_of(kind, "note", codes), visits()
    weight, parts = both.classifier.weight, []
    for part in ("note", codes):
        alone = model_of(kind, part)
        state = {name: value for name, value in both.state_dict().items() if "classifier" not in name}
        assert not alone.load_state_dict(state, strict=False).missing_keys[2:]  # its own classifier
        parts.append(alone(**batch).pooler_output)
    expected = torch.cat(parts, dim=-1) @ weight.T + both.classifier.bias
    torch.testing.assert_close(both(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert parts[0].shape[-1] == 12


@torch.no_grad()
def test_med_bert_reads_the_codes_of_an_admission_by_its_own_ids():
    model, batch = model_of(EhrConcatForSequenceClassification, "medbert"), visits()
    states = model(**batch).pooler_output
    tokens = ([*SPECIAL, *DIAGNOSES], [*SPECIAL, *MEDICATIONS])
    for patient, visit in ((0, 0), (3, 2), (2, 1)):
        rows = (batch["diagnosis_ids"][patient, visit], batch["medication_ids"][patient, visit])
        names = [table[int(i)] for table, row in zip(tokens, rows, strict=True) for i in row if i > 0]
        ids = [CODES.index(name) if name in CODES else CODES.index("[UNK]") for name in names]
        expected = model.model.code_encoder.medbert(torch.tensor([ids])).pooler_output[0]
        torch.testing.assert_close(states[patient, visit], expected, atol=1e-5, rtol=1e-5)
    assert states[1, 2].abs().max() == 0  # a visit without codes


@torch.no_grad()
def test_med_bert_reads_the_visits_before_and_the_diagnoses_of_the_visit():
    model, batch = model_of(EhrConcatForMedicationRecommendation, "medbert"), visits()
    states = model(**batch).pooler_output
    for patient in range(4):
        for t in range(3):
            ids, numbers = [], []
            for visit in range(t + 1):
                own = [MAPS["diagnosis_map"][i] for i in batch["diagnosis_ids"][patient, visit].tolist() if i]
                if visit < t:
                    own += [MAPS["medication_map"][i] for i in batch["medication_ids"][patient, visit].tolist() if i]
                ids, numbers = ids + own, numbers + [visit + 1] * len(own)
            encoder = model.model.code_encoder.medbert
            expected = encoder(torch.tensor([ids]), visit_ids=torch.tensor([numbers])).pooler_output[0]
            torch.testing.assert_close(states[patient, t], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_of_a_long_history_med_bert_reads_the_end():
    """A change of the first code is seen by the third visit; not where as many as can be read come after it."""
    model, batch = model_of(EhrConcatForMedicationRecommendation, "medbert"), visits()
    there = {kind: (batch[f"{kind}_ids"] > 0).sum(dim=2) for kind in ("diagnosis", "medication")}
    after = there["diagnosis"].sum(dim=1) + there["medication"][:, :2].sum(dim=1) - 1
    earlier = batch | {"diagnosis_ids": batch["diagnosis_ids"].clone()}
    earlier["diagnosis_ids"][:, 0, 0] = (batch["diagnosis_ids"][:, 0, 0] - 2) % len(DIAGNOSES) + 5
    whole = (model(**earlier).pooler_output - model(**batch).pooler_output)[:, 2].abs().amax(dim=1)
    assert (whole > 1e-4).all()
    limit = int(after.max())
    assert (after < limit).any()
    model.model.code_encoder.config.medbert_config.max_position_embeddings = limit
    end = (model(**earlier).pooler_output - model(**batch).pooler_output)[:, 2].abs().amax(dim=1)
    assert ((end < 1e-6) == (after >= limit)).all()


@pytest.mark.parametrize("parts", [("note", "gbert"), ("note", "medbert"), ("note",), ("gbert",), ("medbert",)])
@pytest.mark.parametrize("visit", [1, 2])
@torch.no_grad()
def test_a_visit_is_scored_without_its_medications_and_note_and_without_later_visits(parts, visit):
    model, batch, fresh = model_of(EhrConcatForMedicationRecommendation, *parts), visits(), visits(seed=11)
    before = model(**batch).logits
    other = {name: value.clone() for name, value in batch.items()}
    for name in other:
        first = visit + 1 if name == "diagnosis_ids" else visit
        other[name][:, first:] = fresh[name][:, first:]
    after = model(**other).logits
    torch.testing.assert_close(after[:, : visit + 1], before[:, : visit + 1], atol=1e-6, rtol=0)
    if visit == 1:
        assert (after[:, 2] - before[:, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("codes", ["gbert", "medbert"])
@torch.no_grad()
def test_diagnoses_that_are_predicted_are_not_read(codes):
    model, batch = model_of(EhrConcatForSequenceClassification, "note", codes, read_diagnoses=False), visits()
    other = batch | {"diagnosis_ids": visits(seed=5)["diagnosis_ids"]}
    assert torch.equal(model(**batch).logits, model(**other).logits)
    assert torch.equal(model(**(batch | {"diagnosis_ids": None})).logits, model(**batch).logits)
    drugs = batch | {"medication_ids": visits(seed=5)["medication_ids"]}
    assert (model(**drugs).logits - model(**batch).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="read_diagnoses"):
        model_of(EhrConcatForMedicationRecommendation, codes, read_diagnoses=False)


# Trained encoders are taken over


@pytest.mark.parametrize("from_folder", [True, False])
@pytest.mark.parametrize("codes", ["gbert", "medbert"])
def test_trained_encoders_are_taken_over_whatever_head_they_had(codes, from_folder, tmp_path):
    torch.manual_seed(3)
    trained = GBertForPreTraining(gbert_config()) if codes == "gbert" else MedBertForMaskedLM(medbert_config())
    text = BertModel(BertConfig(**BERT))
    if from_folder:
        trained.save_pretrained(tmp_path / "codes")
        text.save_pretrained(tmp_path / "text")
    sources = (tmp_path / "text", tmp_path / "codes") if from_folder else (text, trained)
    maps = MAPS if codes == "medbert" else {}
    model = EhrConcatForSequenceClassification.from_encoders(*sources, freeze_note_layers=1, **maps)
    inner = model.model.code_encoder if codes == "gbert" else model.model.code_encoder.medbert
    for ours, theirs in ((model.model.note_encoder, text), (inner, trained.base_model)):
        wanted = theirs.state_dict()
        assert ours.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert any("layer.0" in name for name in frozen)
    assert not any("layer.1" in name or "code_encoder" in name for name in frozen)
    model.save_pretrained(tmp_path / "both")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "both")
    assert {name for name, weight in again.named_parameters() if not weight.requires_grad} == frozen


def test_of_a_trained_g_bert_the_medications_alone_are_kept_where_diagnoses_are_predicted(tmp_path):
    trained = GBertForPreTraining(gbert_config())
    model = EhrConcatForSequenceClassification.from_encoders(code_encoder=trained, read_diagnoses=False)
    assert not [name for name in model.state_dict() if "diagnosis" in name]
    assert model.classifier.in_features == 16
    model.save_pretrained(tmp_path)
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_an_encoder_of_another_kind_is_refused(tmp_path):
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="code_encoder"):
        EhrConcatModel.from_encoders(code_encoder=tmp_path)


def test_maps_name_the_ids_of_a_tokenizer():
    tokenizer = EhrCodeTokenizer.from_codes(["ICD9CM/250.00", "ATC/C07A"])
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    maps = EhrConcatConfig.code_maps(tokens, ["[PAD]", "ICD9CM/250.00", "ICD9CM/1"], ["[PAD]", "ATC/C07A"])
    known = tokenizer.convert_tokens_to_ids(["ICD9CM/250.00", "[UNK]", "ATC/C07A"])
    assert (maps["diagnosis_map"][1:], maps["medication_map"][1:]) == (known[:2], known[2:])
    with pytest.raises(ValueError, match="UNK"):
        EhrConcatConfig.code_maps(["a"], ["a"], ["a"])


# ClinicalBERT on the windows of a note (row 47)


def test_a_note_is_scored_by_its_greatest_and_its_mean_window():
    """Three windows .2, .5, .8: (.8 + .5 · 3/2) / (1 + 3/2) = .62; one of .4: (.4 + .4/2) / (1 + 1/2) = .4."""
    windows = torch.tensor([[0.2], [0.5], [0.8], [0.4]])
    found = chunk_vote(windows, torch.tensor([0, 0, 0, 1]), 2)
    torch.testing.assert_close(found, torch.tensor([[0.62], [0.4]]))
    wider = chunk_vote(windows, torch.tensor([0, 0, 0, 1]), 2, scale=3.0)
    torch.testing.assert_close(wider, torch.tensor([[(0.8 + 0.5) / 2], [0.4]]))


def windows(**kwargs) -> dict:
    batch = {name.removeprefix("note_"): value[:, 0] for name, value in visits(**kwargs).items() if "note" in name}
    return batch


class TestNoteClassification(FamilySuite):
    heads = [  # noqa: RUF012
        Head(
            EhrConcatForNoteClassification, AutoModelForSequenceClassification, "logits", False,
            lambda batch: {"labels": (torch.arange(24).view(4, 6) % 3 == 1).float()}, binary_cross_entropy,
            overrides=PARTS["note"],
        )
    ]  # fmt: skip
    fixture = "ehrconcat_notes"
    lora_targets = ["query"]  # noqa: RUF012
    no_dropout = {}  # noqa: RUF012
    frozen = {}  # noqa: RUF012
    test_packed_equals_padded = None
    test_packed_and_padded_training_give_one_loss_and_one_gradient = None
    test_changing_one_packed_patient_leaves_the_others_bit_equal = None
    test_token_embeddings_can_be_resized = None
    test_untied_weights_survive_a_round_trip = None
    test_hidden_states_and_attentions_are_there_on_request = None
    test_gradient_checkpointing_gives_the_same_gradients = None
    test_bf16_stays_finite_and_near_fp32 = None
    test_it_overfits_a_few_patients = None
    test_a_base_checkpoint_fills_the_head_but_for_its_own_parameters = None
    test_the_config_round_trips_and_rejects_wrong_types = None

    def config(self, **overrides):
        return config(**overrides)

    def padded(self, seed: int = 0, **kwargs):
        return windows(seed=seed)

    def test_a_batch_equals_its_patients_one_by_one(self, head):
        model, batch = self.model(head), self.padded()
        together = self.output(head, model, batch)
        for row in range(4):
            alone = self.output(head, model, {name: value[row : row + 1] for name, value in batch.items()})
            torch.testing.assert_close(alone, together[row : row + 1], atol=1e-6, rtol=0)

    def test_every_parameter_receives_a_gradient(self, head):
        model = self.model(head).train()
        model(**self.batch(head)).loss.backward()
        named = dict(model.named_parameters())
        assert not [n for n, p in named.items() if p.grad is None or not p.grad.isfinite().all()]
        assert not [n for n, p in named.items() if not p.grad.abs().sum() and not n.endswith("key.bias")]


@torch.no_grad()
def test_the_windows_of_a_note_vote_and_each_learns_its_label():
    model = model_of(EhrConcatForNoteClassification, "note")
    batch, index = windows(), torch.tensor([0, 0, 1, 1])
    labels = torch.tensor([[1.0, 0, 0, 1, 0, 1], [0.0, 1, 0, 1, 1, 0]])
    outputs = model(**batch, note_index=index, labels=labels)
    alone = model(**batch).chunk_logits
    torch.testing.assert_close(outputs.chunk_logits, alone)
    for note in range(2):
        p = alone[2 * note : 2 * note + 2].sigmoid()
        expected = (p.amax(dim=0) + p.mean(dim=0)) / 2  # n/c = 1
        torch.testing.assert_close(outputs.logits[note].sigmoid(), expected, atol=1e-5, rtol=1e-5)
    p = alone.sigmoid()
    expected = -torch.where(labels[index] == 1, p.log(), (1 - p).log()).mean()
    torch.testing.assert_close(outputs.loss, expected)


@torch.no_grad()
def test_of_two_classes_the_second_is_voted_on():
    two = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "problem_type": None}
    model, batch = model_of(EhrConcatForNoteClassification, "note", **two), windows()
    outputs = model(**batch, note_index=torch.tensor([0, 0, 0, 1]), labels=torch.tensor([1, 0]))
    p = outputs.chunk_logits.softmax(dim=1)[:, 1]
    vote = (p[:3].max() + p[:3].mean() * 1.5) / 2.5
    torch.testing.assert_close(outputs.logits.softmax(dim=1)[:, 1], torch.stack([vote, p[3]]), atol=1e-5, rtol=1e-5)
    expected = -torch.stack([p[0], p[1], p[2], 1 - p[3]]).log().mean()
    torch.testing.assert_close(outputs.loss, expected)


# The convolution that notes are read with where there is no transformer (row 49)


@torch.no_grad()
def test_the_cnn_has_500_filters_of_4_words_and_takes_their_maxima_over_words_alone():
    with torch.device("meta"):
        layer = EhrTextForICDCoding(EhrTextConfig.cnn()).model.encoder.convolution
    assert (layer.out_channels, layer.in_channels, layer.kernel_size) == (500, 100, (4,))
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    torch.manual_seed(0)
    model = EhrTextForICDCoding(EhrTextConfig.cnn(vocab_size=30, embedding_size=5, hidden_size=7, **labels)).eval()
    batch, conv = windows(), model.model.encoder.convolution
    logits = model(**batch).logits
    for row, mask in enumerate(batch["attention_mask"]):
        words = model.model.word_embeddings(batch["input_ids"][row, mask.bool()])
        around = torch.nn.functional.pad(words.T, (1, 2))[None]
        greatest = torch.nn.functional.conv1d(around, conv.weight, conv.bias).tanh()[0].amax(dim=1)
        torch.testing.assert_close(logits[row], model.head.output(greatest), atol=1e-5, rtol=1e-5)
    wide = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    torch.testing.assert_close(model(**wide).logits, logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config("gbert", "medbert"), "must not both"),
        (lambda: config("gbert", freeze_note_layers=1), "freeze_note_layers"),
        (lambda: config("note", chunk_scale=0), "chunk_scale"),
        (lambda: config("medbert", diagnosis_map=None), "diagnosis_map"),
        (lambda: config("gbert", medication_map=[0]), "medication_map"),
        (lambda: config("medbert", medication_map=[99]), "medication_map"),
        (lambda: model_of(EhrConcatModel), "encoder"),
        (lambda: model_of(EhrConcatForNoteClassification, "note", problem_type=None), "2 labels"),
        (lambda: model_of(EhrConcatForNoteClassification, "gbert"), "note_config"),
        (lambda: model_of(EhrConcatModel, "note")(diagnosis_ids=torch.ones(1, 1).long()), "note_input_ids"),
        (lambda: model_of(EhrConcatModel, "gbert")(medication_ids=torch.ones(1, 1).long()), "diagnosis_ids"),
        (lambda: model_of(EhrConcatModel, "medbert")(medication_ids=torch.ones(1, 1).long()), "diagnosis_ids"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(Exception, match=message):
        make()


def test_the_medbert_inside_is_the_libraries_own():
    """Row 46: what pre-training saved is what the baseline reads."""
    assert type(model_of(EhrConcatModel, "medbert").code_encoder.medbert) is MedBertModel

"""MedHMP checkpoints carried over (acceptance rows 84, 88 and 106)."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTextEncoding

from hf_ehr import (
    EhrCodeTokenizer,
    EhrRnnConfig,
    EhrRnnForSequenceClassification,
    EhrRnnModel,
    MedHMPForAdmissionClassification,
    MedHMPForAdmissionPreTraining,
    MedHMPForStayClassification,
    MedHMPForStayPreTraining,
    MedHMPModel,
)
from hf_ehr.models.modeling_medhmp_transfer import (
    load_code_encoder,
    load_stage,
    with_new_features,
    with_note_encoder,
)
from tests.models.test_medhmp import DIAGNOSES, TEXT, admissions, model_of, with_tokens


@pytest.fixture
def first_stage(tmp_path):
    torch.manual_seed(5)
    model = model_of(MedHMPForStayPreTraining)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    model.save_pretrained(tmp_path / "stage-1")
    return model, tmp_path / "stage-1"


def stay_tensors(model) -> dict[str, torch.Tensor]:
    return model.medhmp.stay_encoder.state_dict()


@pytest.mark.parametrize("loader", ["from_pretrained", "load_stage"])
@pytest.mark.parametrize(
    "kind", [MedHMPForAdmissionPreTraining, MedHMPForAdmissionClassification, MedHMPForStayClassification]
)
def test_every_tensor_of_the_stay_encoder_goes_to_the_next_stage(first_stage, kind, loader):
    source, folder = first_stage
    if loader == "load_stage":
        model = model_of(kind)
        carried = load_stage(model, folder)
        assert sorted(carried) == sorted(f"stay_encoder.{name}" for name in stay_tensors(source))
    else:
        model = kind.from_pretrained(folder)
    assert len(stay_tensors(model)) > 20
    for name, weight in stay_tensors(source).items():
        assert torch.equal(stay_tensors(model)[name], weight), name


def test_the_second_stage_fills_both_encoders(tmp_path):
    source, model = model_of(MedHMPForAdmissionPreTraining), model_of(MedHMPForAdmissionClassification)
    with torch.no_grad():
        for weight in source.parameters():
            weight.normal_()
    source.save_pretrained(tmp_path)
    load_stage(model, tmp_path)
    for name, weight in source.medhmp.state_dict().items():
        assert torch.equal(model.medhmp.state_dict()[name], weight), name


@pytest.mark.parametrize("loader", ["from_pretrained", "load_stage"])
def test_a_checkpoint_that_lacks_a_tensor_of_the_encoder_is_refused_by_its_name(first_stage, tmp_path, loader):
    _, folder = first_stage
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    lost = "medhmp.stay_encoder.hourly.lstm.weight_hh_l1"
    weights["medhmp.stay_encoder.ICU.lstm.weight_hh_l1"] = weights.pop(lost)  # the mangled name of papers.md §4.8b
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    model = model_of(MedHMPForAdmissionPreTraining)
    with pytest.raises(ValueError, match=r"hourly\.lstm\.weight_hh_l1"):
        model.from_pretrained(broken) if loader == "from_pretrained" else load_stage(model, broken)


def test_a_stage_of_other_sizes_is_refused_and_changes_nothing(first_stage):
    model = model_of(MedHMPForAdmissionPreTraining, num_hourly_features=12)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="with_new_features"):
        load_stage(model, first_stage[1])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("decoder", ["init_hidden", "first_input"])
@pytest.mark.parametrize("sizes", [(11, 4), (7, 3)], ids=["equal", "other"])
def test_other_features_start_anew_and_all_else_is_kept(decoder, sizes):
    model = model_of(MedHMPForStayPreTraining, decoder=decoder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    moved, report = with_new_features(model, *sizes)
    fresh = {"medhmp.stay_encoder.hourly.input_lstm.weight_ih_l0", "medhmp.stay_encoder.demographics.0.weight"}
    last = "decoder.lstm." if decoder == "first_input" else "decoder.output."
    fresh |= {name for name in model.state_dict() if name.startswith(last)}
    assert set(report.fresh) == fresh
    assert set(report.kept) == set(model.state_dict()) - fresh
    for name, weight in moved.state_dict().items():
        same = weight.shape == model.state_dict()[name].shape and torch.equal(weight, model.state_dict()[name])
        assert same == (name in report.kept), name
    hours = torch.ones(2, 3, sizes[0])
    inputs = {"stay_hours": torch.tensor([3, 1]), "hourly_values": hours, "demographics": torch.ones(2, sizes[1])}
    assert moved(**inputs).reconstruction.shape == hours.shape


@pytest.mark.parametrize("family", TEXT)
def test_a_model_takes_a_text_encoder_and_keeps_the_rest(family, tmp_path):
    torch.manual_seed(3)
    encoder = AutoModelForTextEncoding.from_config(copy.deepcopy(TEXT[family])).eval()
    encoder.save_pretrained(tmp_path / "text")
    model = model_of(MedHMPModel)
    for given in (tmp_path / "text", encoder):
        moved = with_note_encoder(model, given)
        assert moved.admission_encoder.note.projection.in_features == moved.config.note_size == 8
        assert not any(weight.requires_grad for weight in moved.note_encoder.parameters())
        for name, weight in moved.note_encoder.state_dict().items():
            assert torch.equal(weight, encoder.state_dict()[name]), name
        for name, weight in moved.state_dict().items():
            if "note" not in name:
                assert torch.equal(weight, model.state_dict()[name]), name
    moved.save_pretrained(tmp_path / "moved")
    loaded = MedHMPModel.from_pretrained(tmp_path / "moved")
    with torch.no_grad():
        expected, actual = moved(**with_tokens()), loaded(**with_tokens())
    torch.testing.assert_close(actual.admission_state, expected.admission_state, atol=1e-6, rtol=0)


def test_what_reads_no_notes_takes_no_text_encoder():
    with pytest.raises(ValueError, match="level of admissions"):
        with_note_encoder(model_of(MedHMPForStayClassification), "unused")


def test_a_checkpoint_names_its_level(first_stage):
    assert json.loads((first_stage[1] / "config.json").read_text())["architectures"] == ["MedHMPForStayPreTraining"]
    assert model_of(MedHMPModel)(**admissions()).admission_state.shape == (4, 12)


# The code encoder before patient-level models (row 88)

CODES = [f"ICD10CM/A{number:02}" for number in range(DIAGNOSES - 5)]
TOKENIZER = EhrCodeTokenizer.from_codes(CODES)
HEADS = ["lstm", "dipole", "retain", "adacare", "hitanet"]


@pytest.fixture
def second_stage(tmp_path):
    """A stage-2 checkpoint of which no two numbers are equal."""
    torch.manual_seed(7)
    model = model_of(MedHMPForAdmissionPreTraining)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    model.save_pretrained(tmp_path / "stage-2")
    return model.medhmp.admission_encoder.diagnoses, tmp_path / "stage-2"


def visits_model(kind=EhrRnnForSequenceClassification, tokenizer=TOKENIZER, **fields):
    torch.manual_seed(1)
    sizes = {"vocab_size": len(tokenizer), "embedding_size": 12, "hidden_size": 12, "hidden_dropout_prob": 0.0}
    return kind(EhrRnnConfig(**(sizes | {"level": "visit", "visit_encoder": "mlp"} | fields))).eval()


def visits_as_steps(model, visits: list[list[int]]) -> torch.Tensor:
    """What the heads read of one patient's visits, (visits, embedding)."""
    ids = torch.tensor([code for visit in visits for code in visit])[None]
    numbers = torch.tensor([number for number, visit in enumerate(visits, 1) for _ in visit])[None]
    seen = []
    hook = model.base_model.embeddings.register_forward_hook(lambda *call: seen.append(call[2].states))
    model(input_ids=ids, visit_ids=numbers, day_ids=torch.ones_like(ids))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("head", HEADS)
def test_patient_models_start_from_the_pretrained_code_encoder_and_learn(second_stage, head, tmp_path):
    source, folder = second_stage
    model = visits_model(head=head)
    rows = load_code_encoder(model, folder, TOKENIZER, TOKENIZER)
    assert rows.tolist() == list(range(len(TOKENIZER)))
    embeddings = model.base_model.embeddings
    assert torch.equal(embeddings.code_embeddings.weight, source.embeddings.weight)
    for name, weight in source.state_dict().items():
        if "embeddings" not in name:
            assert torch.equal(embeddings.visit_encoder.state_dict()[name], weight), name
    visits = [[5, 9, 12], [6], [7, 5]]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(visit) for visit in visits], batch_first=True)
    with torch.no_grad():
        torch.testing.assert_close(visits_as_steps(model, visits), source(padded), atol=1e-5, rtol=1e-5)
    patients = torch.tensor([[5, 9, 12, 6], [7, 5, 8, 0]])
    batch = {
        "input_ids": patients, "attention_mask": (patients > 0).long(), "labels": torch.tensor([0, 1]),
        "visit_ids": torch.tensor([[1, 1, 2, 3], [1, 2, 2, 0]]), "day_ids": torch.tensor([[1, 1, 4, 9], [1, 8, 8, 0]]),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-2)
    first = model(**batch).loss.item()
    for _ in range(30):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5 * first
    assert not torch.equal(embeddings.code_embeddings.weight, source.embeddings.weight)
    model.save_pretrained(tmp_path / "model")
    loaded = EhrRnnForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.model.embeddings.code_embeddings.weight, embeddings.code_embeddings.weight)


def test_rows_go_over_by_code_and_an_unknown_one_takes_its_ancestors(second_stage):
    source, folder = second_stage
    tokenizer = EhrCodeTokenizer.from_codes(["ICD10CM/Z99", CODES[4], f"{CODES[2]}.5", CODES[0]])
    model = visits_model(EhrRnnModel, tokenizer)
    before = model.embeddings.code_embeddings.weight.detach().clone()
    rows = load_code_encoder(model, folder, TOKENIZER, tokenizer)
    known = {code: TOKENIZER.convert_tokens_to_ids(code) for code in CODES}
    assert rows.tolist() == [0, 1, 2, 3, 4, -1, known[CODES[4]], known[CODES[2]], known[CODES[0]]]
    after = model.embeddings.code_embeddings.weight
    assert torch.equal(after[5], before[5])
    kept = np.flatnonzero(rows >= 0)
    assert torch.equal(after[kept], source.embeddings.weight[rows[kept]])


SHUFFLED = EhrCodeTokenizer.from_codes(CODES[::-1])


def test_another_order_of_the_same_codes_gives_the_same_visits(second_stage):
    source, folder = second_stage
    model = visits_model(EhrRnnModel, SHUFFLED)
    load_code_encoder(model, folder, TOKENIZER, SHUFFLED)
    codes = [CODES[0], CODES[3], CODES[8]]
    with torch.no_grad():
        expected = source(torch.tensor([TOKENIZER.convert_tokens_to_ids(codes)]))
        torch.testing.assert_close(visits_as_steps(model, [SHUFFLED.convert_tokens_to_ids(codes)]), expected)


OTHERS = EhrCodeTokenizer.from_codes([f"ICD9CM/{number}" for number in range(100, 109)])


@pytest.mark.parametrize(("fields", "tokenizers", "message"), [
    ({"visit_encoder": "sum"}, (TOKENIZER, TOKENIZER), "visit_encoder='mlp'"),
    ({"embedding_size": 16}, (TOKENIZER, TOKENIZER), "embedding_size=12"),
    ({"vocab_size": 20}, (TOKENIZER, TOKENIZER), "`tokenizer` must be the model's own, with 20 tokens"),
    ({}, (EhrCodeTokenizer.from_codes(CODES[:3]), TOKENIZER), "`source_tokenizer` must be the model's own, with 14"),
    ({}, (OTHERS, TOKENIZER), "none in common"),
], ids=["sum", "width", "rows", "source-rows", "other-codes"])  # fmt: skip
def test_a_code_encoder_that_does_not_fit_is_refused_and_changes_nothing(second_stage, fields, tokenizers, message):
    model = visits_model(**fields)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_code_encoder(model, second_stage[1], *tokenizers)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_checkpoint_of_stays_has_no_code_encoder(first_stage):
    with pytest.raises(ValueError, match="`folder` must hold a model of admissions"):
        load_code_encoder(visits_model(), first_stage[1], TOKENIZER, TOKENIZER)

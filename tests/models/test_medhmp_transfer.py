"""MedHMP checkpoints carried over (acceptance rows 84 and 106)."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTextEncoding

from hf_ehr import (
    MedHMPForAdmissionClassification,
    MedHMPForAdmissionPreTraining,
    MedHMPForStayClassification,
    MedHMPForStayPreTraining,
    MedHMPModel,
)
from hf_ehr.models.modeling_medhmp_transfer import load_stage, with_new_features, with_note_encoder
from tests.models.test_medhmp import TEXT, admissions, model_of, with_tokens


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

"""Synthetic checkpoints in every form that users hold, converted with equal outputs; and what is refused."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer, BertConfig, BertForPreTraining

from hf_ehr import MedBertForPreTraining
from hf_ehr.convert import ConvertArguments, compare_outputs, convert, convert_medbert
from hf_ehr.convert._vocabulary import our_spelling
from hf_ehr.convert._weights import medbert_with
from hf_ehr.schema import EhrDataError

CODES = ["ICD9_150.6", "ICD10_C50", "ICD9_4280", "ICD10_e1165", "ICD9_8", "ICD9_428.0", "OTHER_1 a"]
CODES += [f"ICD10_Z{number}" for number in range(10, 42)]
TYPES = {"empty_pad": 0} | {code: index for index, code in enumerate(CODES, 1)}
SIZES = {
    "vocab_size": len(TYPES), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 48, "type_vocab_size": 30,
}  # fmt: skip


@pytest.fixture(scope="module")
def bert() -> BertForPreTraining:
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**SIZES, hidden_act="gelu_new")).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that none can be mistaken for another
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "types.json"
    path.write_text(json.dumps(TYPES))
    return path


def whole(bert) -> dict[str, torch.Tensor]:
    """The state dict with nothing shared, as safetensors wants it."""
    return {name: tensor.clone() for name, tensor in bert.state_dict().items()}


def as_tensorflow(bert) -> dict[str, torch.Tensor]:
    """The same weights under the names and in the orientation that TensorFlow saves, with an optimizer's slots."""
    tensors = {}
    for name, tensor in whole(bert).items():
        if name.startswith("cls.predictions.decoder"):
            continue  # TensorFlow reads the code embeddings
        name = re.sub(r"layer\.(\d+)", r"layer_\1", name).replace(".", "/")
        if name.endswith("_embeddings/weight"):
            name = name.removesuffix("/weight")
        elif "LayerNorm" in name:
            name = name.replace("weight", "gamma").replace("bias", "beta")
        elif name.startswith("cls/seq_relationship"):
            name = name.replace("weight", "output_weights").replace("bias", "output_bias")
        elif name == "cls/predictions/bias":
            name = "cls/predictions/output_bias"
        elif name.endswith("/weight"):
            name, tensor = name.removesuffix("weight") + "kernel", tensor.T.contiguous()
        tensors[name] = tensor
        tensors[name + "/adam_m"], tensors[name + "/adam_v"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    return tensors | {"global_step": torch.tensor(45_000_000)}


def held(form: str, bert, folder):
    """A checkpoint in one of the forms in which users hold it."""
    folder.mkdir()
    if form == "tensorflow names":
        save_file(as_tensorflow(bert), folder / "model.safetensors")
        return folder / "model.safetensors"
    if form == "folder of transformers":
        bert.save_pretrained(folder)
        return folder
    if form == "torch file in a folder":
        torch.save(
            whole(bert) | {"bert.embeddings.position_ids": torch.arange(48)[None]}, folder / "pytorch_model.bin"
        )
        return folder
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in whole(bert).items()}
    torch.save({name: tensor.half() for name, tensor in old.items()}, folder / "weights.pt")
    return folder / "weights.pt"


FORMS = ["tensorflow names", "folder of transformers", "torch file in a folder", "half precision, old norm names"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_converts_with_equal_outputs_and_loads_with_the_auto_classes(form, bert, vocabulary, tmp_path):
    checkpoint = held(form, bert, tmp_path / "held")
    report = convert(ConvertArguments(str(checkpoint), str(vocabulary), str(tmp_path / "medbert")))
    assert set(report.differences) == {"last_hidden_state", "prediction_logits", "stay_logits"}
    assert max(report.differences.values()) < 1e-4
    assert report.compared == 48 + 40 + 25 + 12 + 7 + 3 + 2 + 1
    assert report.layout == ("tensorflow" if "tensorflow" in form else "transformers")
    assert report.parameters == sum(p.numel() for p in bert.parameters())
    assert json.loads((tmp_path / "medbert" / "conversion.json").read_text())["differences"] == report.differences
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path / "medbert")
    assert type(loaded) is MedBertForPreTraining
    assert type(AutoModel.from_pretrained(tmp_path / "medbert")).__name__ == "MedBertModel"
    original = bert if "half" not in form else rounded(bert)
    differences, _ = compare_outputs(original, loaded)  # what was written, against the weights as they were held
    assert max(differences.values()) < 1e-4


def rounded(bert):
    copy = BertForPreTraining(bert.config).eval()
    copy.load_state_dict({name: tensor.half().float() for name, tensor in whole(bert).items()})
    return copy


def test_the_tokenizer_gives_our_codes_the_ids_of_the_authors(bert, vocabulary, tmp_path):
    report = convert_medbert(held(FORMS[0], bert, tmp_path / "held"), vocabulary, tmp_path / "medbert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "medbert")
    assert len(tokenizer) == len(TYPES)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 0)
    visits = [["ICD9CM/150.6", "ICD10CM/C50"], ["ICD9CM/428.0", "ICD10CM/E11.65", "ICD9CM/008"]]
    assert tokenizer.encode_patient(visits)["input_ids"] == [1, 2, 3, 4, 5]
    assert tokenizer.encode_patient([["ICD10CM/C50.911"]])["input_ids"] == [TYPES["ICD10_C50"]]  # backs off
    assert report.own_spelling == ["ICD9_428.0", "OTHER_1 a"]  # a second 428.0, and a code of no known vocabulary
    assert tokenizer.convert_tokens_to_ids(["ICD9_428.0", "OTHER_1_a"]) == [6, 7]
    assert report.codes == len(CODES)


def test_spelling_follows_the_rules_of_the_table_source():
    raw = ["ICD9_e8120", "ICD9_V5867", "ICD10_C50", "ICD9_8.45", "LOCAL", "ICD10_S52521A"]
    ours = ["ICD9CM/E812.0", "ICD9CM/V58.67", "ICD10CM/C50", "ICD9CM/008.45", None, "ICD10CM/S52.521A"]
    assert our_spelling(raw) == ours


@pytest.mark.parametrize("titles", ["", "code\tid\n"])
def test_the_vocabulary_may_be_a_table_in_any_order(titles, bert, vocabulary, tmp_path):
    table = tmp_path / "types.tsv"
    rows = [f"{code}\t{number}" for code, number in reversed(TYPES.items())]
    table.write_text(titles + "\n".join(rows) + "\n")
    checkpoint = held(FORMS[0], bert, tmp_path / "held")
    convert_medbert(checkpoint, vocabulary, tmp_path / "json")
    convert_medbert(checkpoint, table, tmp_path / "tsv")
    one, other = (AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("json", "tsv"))
    assert one == other


def test_the_stay_head_and_the_pooler_are_the_second_head_of_bert(bert, vocabulary, tmp_path):
    convert_medbert(held(FORMS[0], bert, tmp_path / "held"), vocabulary, tmp_path / "medbert")
    weights = load_file(tmp_path / "medbert" / "model.safetensors")
    assert torch.equal(weights["stay_classifier.weight"], bert.cls.seq_relationship.weight)
    assert torch.equal(weights["model.pooler.weight"], bert.bert.pooler.dense.weight)


@pytest.mark.parametrize("form", FORMS[:2])
def test_what_gelu_means_depends_on_who_wrote_the_config(form, bert, vocabulary, tmp_path):
    checkpoint = held(form, bert, tmp_path / "held")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SIZES | {"hidden_act": "gelu", "hidden_dropout_prob": 0.3}))
    report = convert_medbert(checkpoint, vocabulary, tmp_path / "medbert", config)
    assert report.hidden_act == ("gelu_pytorch_tanh" if form.startswith("tensorflow") else "gelu")
    saved = AutoModelForPreTraining.from_pretrained(tmp_path / "medbert").config
    assert (saved.hidden_dropout_prob, saved.pooling, saved.mask_token_id) == (0.3, "first", 0)


def test_a_decoder_of_its_own_stays_its_own(bert, vocabulary, tmp_path):
    tensors = whole(bert)
    tensors["cls.predictions.decoder.weight"] += 1
    save_file(tensors, tmp_path / "untied.safetensors")
    convert_medbert(tmp_path / "untied.safetensors", vocabulary, tmp_path / "medbert")
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path / "medbert")
    assert torch.equal(loaded.head.decoder.weight, tensors["cls.predictions.decoder.weight"])
    assert torch.equal(loaded.get_input_embeddings().weight, tensors["bert.embeddings.word_embeddings.weight"])


def test_the_proof_sees_a_single_wrong_weight(bert):
    model = medbert_with(bert)
    assert max(compare_outputs(bert, model)[0].values()) < 1e-4
    with torch.no_grad():
        model.model.encoder.layers[1].attention.qkv.bias[140] += 1
    assert compare_outputs(bert, model)[0]["last_hidden_state"] > 1e-3
    with torch.no_grad():
        model.stay_classifier.bias[0] += 0.01
    assert compare_outputs(bert, model)[0]["stay_logits"] > 5e-3
    with torch.no_grad():
        model.stay_classifier.bias[0] = float("nan")
    assert not compare_outputs(bert, model)[0]["stay_logits"] <= 1e-4


class Command:
    """What a hostile file runs when somebody unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(bert, vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(whole(bert) | {"bert.extra": Command()}, tmp_path / "weights.bin")
    with pytest.raises(EhrDataError, match=r"must hold tensors only, weights\.bin does not"):
        convert_medbert(tmp_path / "weights.bin", vocabulary, tmp_path / "medbert")
    assert not (tmp_path / "unpickled").exists()
    torch.load(tmp_path / "weights.bin", weights_only=False)  # the file is as dangerous as the test says
    assert (tmp_path / "unpickled").exists()
    assert not (tmp_path / "medbert").exists()


def refused(tensors, vocabulary, tmp_path, message, config=None):
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(EhrDataError, match=message):
        convert_medbert(tmp_path / "weights.safetensors", vocabulary, tmp_path / "medbert", config)
    assert sorted(path.name for path in tmp_path.iterdir() if "medbert" in path.name) == []  # nothing half-written


def test_missing_and_unexpected_keys_are_named(bert, vocabulary, tmp_path):
    tensors = whole(bert)
    del tensors["bert.encoder.layer.1.attention.self.key.bias"]
    message = r"1 missing \(bert.encoder.layer.1.attention.self.key.bias\)"
    refused(tensors, vocabulary, tmp_path, message)
    tensors["classifier.weight"] = torch.zeros(2)
    refused(tensors, vocabulary, tmp_path, message + r" and 1 unexpected \(classifier.weight\)")
    refused({"classifier.weight": torch.zeros(2)}, vocabulary, tmp_path, r"missing \(bert.*more\) and 1 unexpected")
    without_layer = {name: tensor for name, tensor in whole(bert).items() if ".layer.0." not in name}
    refused(without_layer, vocabulary, tmp_path, "16 missing")
    refused(whole(bert) | as_tensorflow(bert), vocabulary, tmp_path, "under two names")


def test_shapes_that_disagree_are_named(bert, vocabulary, tmp_path):
    tensors = whole(bert)
    tensors["cls.predictions.bias"] = torch.zeros(7)
    refused(tensors, vocabulary, tmp_path, r"shapes of one model, got cls.predictions.bias \(7,\) instead of \(40,\)")
    tensors = whole(bert)
    tensors["cls.predictions.decoder.bias"] += 1
    refused(tensors, vocabulary, tmp_path, "`cls.predictions.decoder.bias` must equal")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, "`num_hidden_layers` of `config` must be 2 as in the weights, got 3"),
        ({"num_attention_heads": 7}, "`num_attention_heads` must divide the width 64, got 7"),
    ],
)
def test_a_config_of_another_model_is_refused(fields, message, bert, vocabulary, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SIZES | fields))
    refused(whole(bert), vocabulary, tmp_path, message, config)


def dropped(*codes):
    return json.dumps({code: number for code, number in TYPES.items() if code not in codes})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v.json", dropped(CODES[-1]), "one id for each of the 40 rows of the code embeddings, got 39"),
        ("v.json", dropped(CODES[4]), "without gaps, 5 is missing"),
        ("v.json", dropped("empty_pad"), "without gaps, 0 is missing"),
        ("v.json", json.dumps(TYPES | {CODES[0]: 2}), "each id once, 2 is 'ICD9_150.6' and 'ICD10_C50'"),
        ("v.json", json.dumps(TYPES | {CODES[0]: "1"}), "whole number from 0, got '1' for 'ICD9_150.6'"),
        ("v.json", '{"empty_pad": 0, "A": 1, "A": 2}', "a name occurs twice"),
        ("v.json", '{"A": 0, "empty_pad": 1}', "`empty_pad` at id 0, got 'A'"),
        ("v.json", dropped(CODES[-1])[:-1], "must be a JSON file, v.json is not"),
        ("v.json", "[1]", "must be a JSON object, got a list"),
        ("v.tsv", "empty_pad\t0\nA\t1\nA\t2\n", "a code occurs twice"),
        ("v.tsv", "empty_pad\t0\nA 1\n", "line 2 has not"),
        ("v.tsv", "empty_pad\t0\nA\tone\n", "whole number from 0, got 'one'"),
        ("types.types", "", "A pickled one is not read"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(name, text, message, bert, tmp_path):
    (tmp_path / name).write_text(text)
    refused(whole(bert), tmp_path / name, tmp_path, message)


def test_a_used_output_and_a_missing_checkpoint_are_refused(bert, vocabulary, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(EhrDataError, match="`output` must not exist or be an empty folder"):
        convert_medbert(tmp_path, vocabulary, tmp_path / "used")
    with pytest.raises(EhrDataError, match=r"model.safetensors is missing"):
        convert_medbert(tmp_path, vocabulary, tmp_path / "medbert")
    save_file(whole(bert), tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "used")
    (tmp_path / "used").mkdir()
    assert str(convert_medbert(tmp_path, vocabulary, tmp_path / "used")).count("\n") >= 1


def test_the_report_says_what_was_done_in_words(bert, vocabulary, tmp_path):
    report = convert_medbert(held(FORMS[0], bert, tmp_path / "held"), vocabulary, tmp_path / "medbert")
    text = str(report)
    assert f"{report.parameters:,} parameters and 39 codes (tensorflow names) in medbert." in text
    assert "on 138 codes: last_hidden_state" in text
    assert "2 codes keep the authors' spelling" in text
    assert f"Left out: {len(report.ignored)} entries" in text
    assert len(report.ignored) == 2 * (len(whole(bert)) - 2) + 1
    assert report.ignored[-1] == "global_step"

"""Moving models to another vocabulary, and static embeddings into models."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

from hf_ehr import (
    EhrCodeTokenizer,
    EhrRnnConfig,
    EhrRnnForSequenceClassification,
    EhrRnnModel,
    MedBertConfig,
    MedBertForMaskedLM,
    MedBertForPreTraining,
    MedBertForSequenceClassification,
    MedBertModel,
)
from hf_ehr.code_embeddings import CodeEmbeddings, ppmi_svd
from hf_ehr.schema import EhrDataError, shard_name, write_parquet
from hf_ehr.training import SPLITS_FILE
from hf_ehr.transfer import (
    REPORT_FILE,
    TransferArguments,
    load_code_embeddings,
    move_to_vocabulary,
    transfer,
)

from .builders import patient, records, visit

SHARED = [*(f"LOCAL/{number}" for number in range(40)), "ICD10CM/E11", "ICD10CM/I50", "ICD10CM/I50.2"]
CHILDREN = {"ICD10CM/E11.65": "ICD10CM/E11", "ICD10CM/I50.22": "ICD10CM/I50.2", "ICD10CM/I50.9": "ICD10CM/I50"}
FRESH = ["LOCAL/NEW", "LOCAL/NEWER", "ICD10CM/C25"]
OLD = EhrCodeTokenizer.from_codes([*SHARED, "LOCAL/LEFT_BEHIND"])
# other ids, and other specials (padding and mask are one id) in the second
SHUFFLED = [str(code) for code in np.random.default_rng(0).permutation([*SHARED, *CHILDREN, *FRESH])]
NEW = EhrCodeTokenizer.from_codes(SHUFFLED)
EXACT = EhrCodeTokenizer.from_codes(SHUFFLED, code_exact=True)
HISTORY = [SHARED[:7], SHARED[30:], [SHARED[3], SHARED[41]]]


def medbert(model_class, **fields):
    torch.manual_seed(0)
    ids = {"vocab_size": len(OLD), "pad_token_id": OLD.pad_token_id, "mask_token_id": OLD.mask_token_id}
    model = model_class(MedBertConfig.tiny(**(ids | fields))).eval()
    if model.get_output_embeddings() is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def rnn(model_class, **fields):
    torch.manual_seed(0)
    return model_class(EhrRnnConfig.tiny(vocab_size=len(OLD), **fields)).eval()


MODELS = {
    "MedBertModel": lambda: medbert(MedBertModel),
    "MedBertForMaskedLM": lambda: medbert(MedBertForMaskedLM),
    "MedBertForMaskedLM, untied": lambda: medbert(MedBertForMaskedLM, tie_word_embeddings=False),
    "MedBertForPreTraining": lambda: medbert(MedBertForPreTraining),
    "MedBertForPreTraining, set": lambda: medbert(MedBertForPreTraining, objective="masked_set"),
    "MedBertForSequenceClassification": lambda: medbert(MedBertForSequenceClassification),
    "EhrRnnModel": lambda: rnn(EhrRnnModel),
    "EhrRnnForSequenceClassification": lambda: rnn(EhrRnnForSequenceClassification, level="visit", head="retain"),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def encode(tokenizer, hidden=()):
    """One patient as a batch; the places ``hidden`` hold the mask."""
    batch = {name: torch.tensor([values]) for name, values in tokenizer.encode_patient(HISTORY).items()}
    batch["input_ids"][0, list(hidden)] = tokenizer.mask_token_id
    return {name: values for name, values in batch.items() if name != "serial_ids"}


def outputs(model, tokenizer, hidden=()):
    with torch.no_grad():
        return model(**encode(tokenizer, hidden), output_hidden_states=True)


def code_rows(model, tokenizer, codes):
    return model.get_input_embeddings().weight[tokenizer.codes_to_ids(codes).tolist()].detach()


# Another vocabulary


@every_model
@pytest.mark.parametrize("target", [NEW, EXACT], ids=["new", "code_exact"])
def test_histories_of_shared_codes_give_the_same_outputs_bit_by_bit(make, target):
    model = make()
    moved, _ = move_to_vocabulary(model, OLD, target)
    assert encode(OLD)["input_ids"].tolist() != encode(target)["input_ids"].tolist()
    before, after = (outputs(m, t, hidden=[0, 5]) for m, t in ((model, OLD), (moved, target)))
    of_codes = {"prediction_logits", *(["logits"] if type(model) is MedBertForMaskedLM else [])}  # other columns
    for name in before.keys() - of_codes:
        values = (
            ((before[name], after[name]),) if name != "hidden_states" else zip(before[name], after[name], strict=True)
        )
        assert all(torch.equal(*pair) for pair in values), name


@every_model
def test_only_the_rows_of_codes_and_the_vocabulary_in_the_config_change(make):
    model = make()
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    moved, _ = move_to_vocabulary(model, OLD, EXACT)
    for name, value in moved.state_dict().items():
        if not name.endswith(("code_embeddings.weight", "decoder.weight", "decoder.bias")):
            assert torch.equal(value, state[name]), name
    changed = {name for name, value in moved.config.to_dict().items() if value != config[name]}
    assert changed == {"vocab_size"} | ({"mask_token_id"} if "mask_token_id" in config else set())
    assert moved.config.vocab_size == moved.get_input_embeddings().num_embeddings == len(EXACT)
    # the model that was moved is as it was
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_padding_and_mask_take_their_rows_with_them_to_other_ids():
    model = medbert(MedBertForMaskedLM)
    moved, _ = move_to_vocabulary(model, OLD, EXACT)
    assert (moved.config.pad_token_id, moved.config.mask_token_id) == (0, 0)
    rows, old_rows = (m.get_input_embeddings().weight for m in (moved, model))
    assert torch.equal(rows[0], old_rows[OLD.mask_token_id])  # of the two roles of one id the one that is read
    back, report = move_to_vocabulary(moved, EXACT, OLD)
    assert (back.config.pad_token_id, back.config.mask_token_id) == (0, 4)
    assert torch.equal(back.get_input_embeddings().weight[4], rows[0])
    assert report.fresh == 1  # what was left behind


@every_model
def test_a_new_code_starts_as_its_nearest_ancestor_and_one_without_any_near_the_mean(make):
    model = make()
    moved, report = move_to_vocabulary(model, OLD, NEW)
    parents = code_rows(model, OLD, list(CHILDREN.values()))
    assert torch.equal(code_rows(moved, NEW, list(CHILDREN)), parents)
    mean = model.get_input_embeddings().weight[5:].mean(dim=0)
    noise = code_rows(moved, NEW, FRESH) - mean
    assert 0.01 < noise.std() < 0.03  # the initialiser's range is .02
    assert not torch.equal(noise[0], noise[1])
    assert (report.codes, report.kept, report.from_ancestor, report.fresh) == (49, 43, 3, 3)


@pytest.mark.parametrize("name", ["MedBertForMaskedLM", "MedBertForMaskedLM, untied", "MedBertForPreTraining"])
def test_scores_of_codes_move_to_their_new_ids(name):
    model = MODELS[name]()
    moved, _ = move_to_vocabulary(model, OLD, NEW)
    field = "logits" if "Masked" in name else "prediction_logits"
    before, after = (outputs(m, t, hidden=[2])[field] for m, t in ((model, OLD), (moved, NEW)))
    old_ids, new_ids = (t.codes_to_ids([*SHARED, *CHILDREN]).tolist() for t in (OLD, NEW))
    torch.testing.assert_close(after[..., new_ids], before[..., old_ids], rtol=1e-5, atol=1e-6)
    decoder, old_decoder = moved.get_output_embeddings(), model.get_output_embeddings()
    assert decoder.out_features == len(NEW)
    assert (decoder.weight is moved.get_input_embeddings().weight) == ("untied" not in name)
    assert torch.equal(decoder.bias[new_ids], old_decoder.bias[old_ids])
    fresh = decoder.bias[NEW.codes_to_ids(FRESH).tolist()]
    torch.testing.assert_close(fresh, old_decoder.bias[5:].mean().expand(3))


def test_the_seed_decides_the_fresh_rows_and_nothing_else():
    model = medbert(MedBertForMaskedLM, tie_word_embeddings=False)
    torch.manual_seed(1)
    one, again, other = (move_to_vocabulary(model, OLD, NEW, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(1))  # no global draw was taken
    fresh = torch.zeros(len(NEW), dtype=torch.bool)
    fresh[NEW.codes_to_ids(FRESH).tolist()] = True
    for name, value in one.items():
        assert torch.equal(value, again[name])
        if value.shape == (len(NEW), 64):
            assert torch.equal((value != other[name]).any(dim=1), fresh), name
        else:
            assert torch.equal(value, other[name]), name


def test_dtype_mode_and_frozen_weights_are_kept():
    model = medbert(MedBertForMaskedLM).to(torch.bfloat16).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    moved, _ = move_to_vocabulary(model, OLD, NEW)
    assert moved.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not moved.get_input_embeddings().weight.requires_grad
    assert moved.get_output_embeddings().bias.requires_grad
    assert moved.training


@pytest.mark.parametrize("name", ["MedBertForMaskedLM", "MedBertForMaskedLM, untied", "EhrRnnModel"])
def test_a_moved_model_opens_through_the_auto_class(name, tmp_path):
    moved, _ = move_to_vocabulary(MODELS[name](), OLD, NEW)
    moved.save_pretrained(tmp_path)
    auto_class = AutoModelForMaskedLM if "Masked" in name else AutoModel
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert [name for name, found in info.items() if found] == []
    assert loaded.state_dict().keys() == moved.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in moved.state_dict().items())
    assert loaded.config.vocab_size == len(NEW)


def test_a_moved_model_learns_with_its_new_codes():
    moved, _ = move_to_vocabulary(medbert(MedBertForMaskedLM), OLD, NEW)
    ids = torch.tensor([NEW.codes_to_ids([*FRESH, *CHILDREN]).tolist()])
    moved.train()(input_ids=ids, labels=ids).loss.backward()
    gradient = moved.get_input_embeddings().weight.grad
    assert gradient.shape == (len(NEW), 64)
    assert (gradient[ids[0]] != 0).any(dim=1).all()


def test_the_report_weighs_codes_by_their_occurrences():
    counts = {
        "LOCAL/1": 50,  # kept
        "ICD10CM/I50.22": 20,  # from an ancestor
        "ICD10CM/E11.9": 8,  # not in the new vocabulary: counts under ICD10CM/E11, which is kept
        "LOCAL/NEW": 12,  # fresh
        "LOCAL/NOWHERE": 10,  # unknown to the new vocabulary
    }
    for target in (NEW, EXACT):
        _, report = move_to_vocabulary(medbert(MedBertModel), OLD, target, counts=counts)
        assert report.occurrences == 100
        assert (report.occurrences_kept, report.occurrences_from_ancestor) == (0.58, 0.2)
    assert str(report) == (
        "49 codes: 43 kept, 3 from an ancestor, 3 fresh; of 100 occurrences 58.0% kept, 20.0% from an ancestor."
    )
    assert json.loads(json.dumps(report.as_dict()))["from_ancestor"] == 3


def test_the_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"`old_tokenizer` must be the model's own, with 49 tokens, got 54"):
        move_to_vocabulary(medbert(MedBertModel), NEW, OLD)


# Folders


def prepared(folder):
    table = records(patient(1, [visit(0, diagnoses=["LOCAL/1", "LOCAL/NEW"]), visit(9, diagnoses=["LOCAL/1"])]))
    write_parquet(table, folder / "records" / shard_name(0, 1))
    return folder


@pytest.mark.parametrize("name", ["MedBertForPreTraining", "EhrRnnForSequenceClassification"])
def test_a_folder_moves_with_its_heads_its_splits_and_a_report(name, tmp_path):
    model = MODELS[name]()
    for part in (model, OLD):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / SPLITS_FILE).write_text("{}")
    NEW.save_pretrained(tmp_path / "tokenizer")
    folders = {"model": "model", "tokenizer": "tokenizer", "output": "moved"}
    paths = {field: str(tmp_path / folder) for field, folder in folders.items()}
    report = transfer(TransferArguments(**paths, data=str(prepared(tmp_path / "data"))))
    assert (report.kept, report.occurrences, report.occurrences_kept) == (43, 3, 2 / 3)
    assert json.loads((tmp_path / "moved" / REPORT_FILE).read_text()) == report.as_dict()
    assert (tmp_path / "moved" / SPLITS_FILE).read_text() == "{}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moved")
    loaded = type(model).from_pretrained(tmp_path / "moved").eval()
    field = "stay_logits" if name.startswith("Med") else "logits"
    # the file maps weights at other addresses, and sums of a matrix product follow these
    torch.testing.assert_close(outputs(loaded, tokenizer)[field], outputs(model, OLD)[field], rtol=0, atol=1e-6)
    with pytest.raises(EhrDataError, match=r"`output` must not exist or be an empty folder"):
        transfer(TransferArguments(**paths))


def test_a_model_of_another_package_is_refused(tmp_path):
    config = BertConfig(vocab_size=10, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    BertModel(config).save_pretrained(tmp_path / "bert")
    arguments = TransferArguments(str(tmp_path / "bert"), str(tmp_path), str(tmp_path / "output"))
    with pytest.raises(EhrDataError, match=r"`model` must hold a model of this package, got .* BertModel"):
        transfer(arguments)
    assert not (tmp_path / "output").exists()


# Static embeddings


def static(dim):
    """PPMI-SVD of random patients, with vectors for ``ICD10CM/E11`` and 20 more codes."""
    rng = np.random.default_rng(0)
    codes = [*SHARED[:20], "ICD10CM/E11"]
    table = records(*(patient(n, [visit(0, diagnoses=rng.choice(codes, 4, False).tolist())]) for n in range(200)))
    tokenizer = EhrCodeTokenizer.from_codes(codes)
    return ppmi_svd(table, tokenizer, subject_ids=range(200), dim=dim)


@every_model
def test_static_embeddings_become_the_rows_of_their_codes(make):
    model = make()
    weight = model.get_input_embeddings().weight
    before, table = weight.detach().clone(), static(min(weight.shape[1], 20))
    table = CodeEmbeddings(table.codes, np.tile(table.vectors, 4)[:, : weight.shape[1]], table.method, table.settings)
    report = load_code_embeddings(model, table, OLD)
    assert model.get_input_embeddings().weight is weight
    ids = OLD.codes_to_ids(table.codes).tolist()
    started = weight[ids].detach()
    factor = before[ids].norm() / np.linalg.norm(table.vectors)  # as large as the rows that were there
    torch.testing.assert_close(started, torch.from_numpy(table.vectors) * factor, rtol=1e-5, atol=0)
    others = np.setdiff1d(np.arange(len(OLD)), ids)
    assert torch.equal(weight[others], before[others])
    assert (report.codes, report.kept, report.from_ancestor, report.fresh) == (44, len(ids), 0, 44 - len(ids))


def test_a_code_without_a_vector_of_its_own_gets_its_ancestors():
    model = rnn(EhrRnnModel)
    moved, _ = move_to_vocabulary(model, OLD, NEW)
    table = CodeEmbeddings(["ICD10CM/E11"], np.full((1, 32), 7, np.float32), "ppmi_svd", {})
    report = load_code_embeddings(moved, table, NEW, counts={"ICD10CM/E11.65": 3, "ICD10CM/E11.9": 1, "LOCAL/1": 4})
    assert (report.kept, report.from_ancestor, report.fresh) == (1, 1, 47)
    assert (report.occurrences_kept, report.occurrences_from_ancestor) == (1 / 8, 3 / 8)
    rows = code_rows(moved, NEW, ["ICD10CM/E11", "ICD10CM/E11.65"])
    assert (rows == rows[0, 0]).all()
    assert rows[0, 0] > 0


@pytest.mark.parametrize("freeze", [False, True])
def test_freezing_keeps_the_embeddings_and_nothing_else_from_learning(freeze):
    model = medbert(MedBertForSequenceClassification, num_labels=2).train()
    table = static(20)
    table.vectors = np.tile(table.vectors, 4)[:, :64]
    load_code_embeddings(model, table, OLD, freeze=freeze)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**encode(OLD), labels=torch.tensor([1])).loss.backward()
    assert (model.get_input_embeddings().weight.grad is None) == freeze
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert ("model.embeddings.code_embeddings.weight" in moved) == (not freeze)
    assert {"classifier.weight", "model.embeddings.visit_embeddings.weight"} <= moved


def test_a_table_of_another_width_is_refused_with_the_way_out():
    message = r"`table` must have vectors of 64 numbers.*got 20\. Make it again with `dim=64`"
    with pytest.raises(ValueError, match=message):
        load_code_embeddings(medbert(MedBertModel), static(20), OLD)
    with pytest.raises(ValueError, match=r"`tokenizer` must be the model's own, with 49 tokens, got 54"):
        load_code_embeddings(medbert(MedBertModel), static(20), NEW)

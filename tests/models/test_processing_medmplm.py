"""The processor of visits: what becomes of raw ones, of bad ones, and how it is saved."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoProcessor

import hf_ehr
from hf_ehr import EhrCodeTokenizer, GBertConfig, MedMPLMConfig, MedMPLMModel, MedMPLMProcessor

DIAGNOSES = [f"ICD10CM/A0{n}" for n in range(6)]
DRUGS = [f"ATC/A0{n}" for n in range(4)]


def processor(notes: bool = True) -> MedMPLMProcessor:
    words = EhrCodeTokenizer.from_codes(["chest", "pain", "fever"], model_max_length=4) if notes else None
    return MedMPLMProcessor(
        EhrCodeTokenizer.from_codes(DIAGNOSES, kinds=["diagnoses"], fitted_on="abc"),
        EhrCodeTokenizer.from_codes(DRUGS, kinds=["medications"]),
        words,
    )


WHOLE = {"diagnoses": DIAGNOSES[:2], "medications": DRUGS[2:3], "note": "chest pain"}
OTHER = {"diagnoses": ["ICD10CM/A01.9", "X/1"], "note": " " + "fever " * 9}
BATCH = [WHOLE, {}, OTHER]
PATIENTS = [{"visits": [WHOLE, OTHER]}, {"visits": [{"diagnoses": DIAGNOSES[5:6]}]}]


def model(made: MedMPLMProcessor) -> MedMPLMModel:
    torch.manual_seed(0)
    codes = {f"{name}_vocab_size": len(tokenizer) for name, tokenizer in made.code_tokenizers.items()}
    notes = {"model_type": "bert", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    notes |= {"num_attention_heads": 2, "intermediate_size": 32}
    return MedMPLMModel(MedMPLMConfig(code_config=GBertConfig.tiny(**codes), note_config=notes)).eval()


def plain(batch) -> dict:
    return {name: value.tolist() for name, value in batch.items()}


def test_a_batch_of_visits_by_hand():
    assert plain(processor()(BATCH)) == {
        "diagnosis_ids": [[5, 6], [0, 0], [6, 1]],
        "medication_ids": [[7], [0], [0]],
        "note_input_ids": [[5, 6, 0, 0], [0] * 4, [7] * 4],  # cut at the most tokens
        "note_attention_mask": [[1, 1, 0, 0], [0] * 4, [1] * 4],
    }
    assert plain(processor()(WHOLE)) == {name: value[:1] for name, value in plain(processor()([WHOLE])).items()}


def test_patients_have_visits_of_padding_behind_their_own():
    assert plain(processor()(PATIENTS)) == {
        "diagnosis_ids": [[[5, 6], [6, 1]], [[10, 0], [0, 0]]],
        "medication_ids": [[[7], [0]], [[0], [0]]],
        "note_input_ids": [[[5, 6, 0, 0], [7] * 4], [[0] * 4] * 2],
        "note_attention_mask": [[[1, 1, 0, 0], [1] * 4], [[0] * 4] * 2],
    }


def test_a_visit_by_itself_has_the_state_that_it_has_in_a_batch():
    made = processor()
    read = model(made)
    with torch.no_grad():
        together = read(**made(BATCH))
        for number, row in enumerate(BATCH):
            alone = read(**made(row))
            for name in ("diagnosis_state", "medication_state", "note_diagnosis_state"):
                torch.testing.assert_close(alone[name][0], together[name][number], atol=1e-5, rtol=1e-5)


def test_what_is_missing_is_empty_and_sets_have_sixty_codes():
    made = processor()
    nothing = [{}, {"diagnoses": None, "medications": None, "note": None}]
    assert not any(value.any() for value in made(nothing).values())
    many = MedMPLMProcessor(EhrCodeTokenizer.from_codes([f"X/{n}" for n in range(80)]), made.medication_tokenizer)
    assert plain(many({"diagnoses": [f"X/{n}" for n in range(80)]}))["diagnosis_ids"] == [list(range(5, 65))]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must hold visits"),
        ([{"visits": []}], "at least one visit"),
        ([{"visits": [{}]}, {}], "must hold visits, or patients"),
        ([{"diagnosis": []}], r"got \['diagnosis'\]"),
        ([{"visits": [{}], "age": 3}], r"A patient must hold the fields visits only, got \['age'\]"),
        ([{"note": "pain"}], "no `note_tokenizer`"),
    ],
)
def test_what_cannot_be_a_visit_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        processor(notes=False)(rows)


@pytest.mark.parametrize("notes", [True, False], ids=["notes", "no-notes"])
def test_it_saves_and_loads_with_the_package(tmp_path, notes):
    made = processor(notes)
    rows = BATCH if notes else [{**row, "note": None} for row in BATCH]
    made.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is hf_ehr.MedMPLMProcessor
    assert plain(loaded(rows)) == plain(made(rows))
    assert (loaded.note_tokenizer is not None) == notes
    assert loaded.diagnosis_tokenizer.init_kwargs["fitted_on"] == "abc"
    loaded.save_pretrained(tmp_path / "again")
    assert plain(AutoProcessor.from_pretrained(tmp_path / "again")(rows)) == plain(made(rows))


def test_it_loads_where_the_package_cannot_be_imported(tmp_path):
    rows = {"notes": BATCH, "silent": [{**row, "note": None} for row in BATCH]}
    answers = {}
    for name in rows:
        made = processor(notes=name == "notes")
        made.save_pretrained(tmp_path / name)
        model(made).save_pretrained(tmp_path / name)  # as training leaves them
        answers[name] = [plain(made(rows[name]))] * 2
    script = """
import sys
sys.modules["hf_ehr"] = None
import json
from transformers import AutoProcessor
answers = {}
for name, rows in json.loads(sys.argv[2]).items():
    loaded = AutoProcessor.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    loaded.save_pretrained(f"{sys.argv[1]}/{name}-again")
    again = AutoProcessor.from_pretrained(f"{sys.argv[1]}/{name}-again", trust_remote_code=True)
    answers[name] = [{key: value.tolist() for key, value in one(rows).items()} for one in (loaded, again)]
print(json.dumps(answers))
"""
    command = [sys.executable, "-c", script, str(tmp_path), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == answers


def test_parts_of_another_kind_are_refused():
    made = processor()
    with pytest.raises(TypeError, match="tokenizer"):
        MedMPLMProcessor(made.diagnosis_tokenizer, "drugs")
    with pytest.raises(TypeError, match="tokenizer"):
        MedMPLMProcessor(made.diagnosis_tokenizer, made.medication_tokenizer, "words")

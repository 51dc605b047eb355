"""The processor of admissions: what becomes of raw ones, of bad ones, and how it is saved."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor

import hf_ehr
from hf_ehr import EhrCodeTokenizer, HourlyFeatureExtractor, MedHMPConfig, MedHMPModel, MedHMPProcessor

DIAGNOSES = [f"ICD10CM/A0{n}" for n in range(6)]
DRUGS = [f"ATC/A0{n}" for n in range(4)]
HOURS = 6


def variable(name: str) -> dict:
    edges = {statistic: [70.0, 90.0] for statistic in ("min", "max", "mean", "last")} | {"since": [1.0]}
    return {
        "name": name, "valid_range": [0, 300], "as_text": False, "category": None,
        "numeric": {"frequent": True, "edges": edges, "scale": [0, 200, 80, 10]},
    }  # fmt: skip


def processor(notes: bool = True, form: str = "binned") -> MedHMPProcessor:
    fields = [
        {"name": "age", "static": False, "valid_range": None, "as_text": False, "categories": None,
         "scale": [20, 90, 60, 10], "edges": None},
        {"name": "sex", "static": False, "valid_range": None, "as_text": True, "categories": ["F", "M"],
         "scale": None, "edges": None},
    ]  # fmt: skip
    extractor = HourlyFeatureExtractor([variable("HR"), variable("MAP")], fields, n_hours=HOURS, form=form)
    words = EhrCodeTokenizer.from_codes(["chest", "pain", "fever"], model_max_length=4) if notes else None
    return MedHMPProcessor(
        extractor,
        EhrCodeTokenizer.from_codes(DIAGNOSES, kinds=["diagnoses"], fitted_on="abc"),
        EhrCodeTokenizer.from_codes(DRUGS, kinds=["medications"]),
        words,
    )


def measured(hour, name="HR", value=80.0, **fields) -> dict:
    return {"hour": hour, "name": name, "value": value, **fields}


STAY = {"hours": 3, "measurements": [measured(0.5), measured(2.5, "MAP", 60.0)]}
WHOLE = {
    "stays": [STAY, {"measurements": [measured(1.2)]}],
    "demographics": {"age": 70.0, "sex": "F"},
    "diagnoses": DIAGNOSES[:2],
    "medications": DRUGS[2:3],
    "note": "chest pain",
}
BATCH = [WHOLE, {}, {"diagnoses": ["ICD10CM/A01.9", "X/1"], "stays": [], "note": "fever " * 9}]


def model(made: MedHMPProcessor) -> MedHMPModel:
    torch.manual_seed(0)
    sizes = {name: getattr(made.feature_extractor, name) for name in ("num_hourly_features", "num_demographics")}
    codes = {f"{name}_vocab_size": len(tokenizer) for name, tokenizer in made.code_tokenizers.items()}
    return MedHMPModel(MedHMPConfig.tiny(n_hours=HOURS, note_size=2, **sizes, **codes)).eval()


def plain(batch) -> dict:
    return {name: value.tolist() for name, value in batch.items()}


def test_a_batch_by_hand():
    made = processor()
    batch = made(BATCH)
    assert batch["stay_admissions"].tolist() == [0, 0]
    assert batch["stay_hours"].tolist() == [3, 2]
    names = made.feature_extractor.demographic_names
    assert names == ["age", "age unknown", "sex = F", "sex = M", "sex other", "sex unknown"]
    assert batch["demographics"].tolist() == [[1, 0, 1, 0, 0, 0]] * 2
    codes = made.diagnosis_tokenizer.convert_ids_to_tokens
    found = [codes(row) for row in batch["diagnosis_ids"].tolist()]
    assert found == [DIAGNOSES[:2], ["[PAD]"] * 2, ["ICD10CM/A01", "[UNK]"]]
    assert made.medication_tokenizer.convert_ids_to_tokens(batch["medication_ids"][0].tolist()) == DRUGS[2:3]
    assert batch["note_attention_mask"].tolist() == [[1, 1, 0, 0], [0] * 4, [1] * 4]  # cut at the most tokens
    counts = batch["feature_counts"].tolist()
    words = [made.feature_extractor.feature_names[n] for n in batch["feature_ids"].tolist()]
    assert words[: counts[0]] == [
        "HR min in (70, 90]", "HR max in (70, 90]", "HR mean in (70, 90]", "HR last in (70, 90]", "HR present",
        "HR hours since last <= 1",
    ]  # fmt: skip


def test_an_admission_by_itself_has_the_state_that_it_has_in_a_batch():
    made = processor(notes=False)
    read = model(made)
    rows = [{name: value for name, value in row.items() if name != "note"} for row in BATCH]
    with torch.no_grad():
        together = read(**made(rows)).admission_state
        for row, state in zip(rows, together, strict=True):
            torch.testing.assert_close(read(**made(row)).admission_state[0], state, atol=1e-5, rtol=1e-5)


def test_what_is_missing_is_missing_to_the_model():
    made = processor()
    rows = [
        {"stays": [{"hours": 0, "measurements": [measured(0.5)]}]},  # nothing was seen of it yet
        {"stays": [{"hours": 2}], "demographics": None},  # two hours without a measurement
        {"stays": [{"measurements": []}], "diagnoses": None},
        {"note": "  "},
        {"medications": DRUGS[:1], "note": None},
    ]
    batch = made(rows)
    assert batch["stay_hours"].tolist() == [0, 2, 0]
    assert batch["feature_ids"].tolist() == []
    assert batch["demographics"].tolist() == [[0, 1, 0, 0, 0, 1]] * 3  # age and sex unknown
    assert not batch["note_attention_mask"].any()
    batch = {name: value for name, value in batch.items() if not name.startswith("note")}
    with torch.no_grad():
        outputs = model(made)(**batch)
    assert outputs.modality_mask.tolist() == [
        [False] * 4, [True, False, False, False], [False] * 4, [False] * 4, [False, False, True, False]
    ]  # fmt: skip
    assert outputs.admission_state.isfinite().all()


@pytest.mark.parametrize(
    "broken",
    [
        measured(0.7, "unheard of"), measured(0.7, value=math.nan), measured(0.7, value=math.inf),
        measured(-0.5), measured(math.nan), measured(None), measured(0.7, value=None), measured(0.7, value=999.0),
        measured(3.0, value=120.0), measured(99.0),
    ],
    ids=["unknown", "nan", "inf", "before", "no-hour", "null-hour", "no-value", "range", "at-the-end", "after"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["binned", "continuous"])
def test_a_measurement_that_cannot_be_used_changes_nothing(broken, form):
    made = processor(form=form)
    clean, dirty = ({"stays": [{**STAY, "measurements": [*STAY["measurements"], *more]}]} for more in ([], [broken]))
    assert plain(made(dirty)) == plain(made(clean))


def test_a_stay_is_cut_at_the_hours_of_the_features():
    made = processor()
    long = {"stays": [{"hours": 100.5, "measurements": [measured(2.5), measured(50.0)]}]}
    assert made(long)["stay_hours"].tolist() == [HOURS]
    assert made({"stays": [{"measurements": [measured(50.0)]}]})["stay_hours"].tolist() == [HOURS]
    assert made({"stays": [{"hours": 2.2, "measurements": []}]})["stay_hours"].tolist() == [3]


def test_demographics_of_a_stay_go_over_those_of_its_admission():
    row = {"stays": [{"demographics": {"age": 80.0}}], "demographics": {"age": 60.0, "sex": "M"}}
    assert processor()(row)["demographics"].tolist() == [[2, 0, 0, 1, 0, 0]]


def test_notes_as_vectors():
    made = processor(notes=False)
    batch = made([{"note_vector": [1.0, 2.0]}, {}, {"note_vector": None}])
    assert batch["note_vectors"].tolist() == [[1, 2], [0, 0], [0, 0]]
    assert batch["note_mask"].tolist() == [True, False, False]
    assert "note_vectors" not in made([{}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one admission"),
        ([{"diagnosis": []}], r"got \['diagnosis'\]"),
        ([{"stays": [{"hour": 3}]}], r"got \['hour'\]"),
        ([{"stays": [{"hours": -1}]}], "`hours` of a stay must be a number from 0, got -1"),
        ([{"stays": [{"hours": math.nan}]}], "`hours` of a stay"),
        ([{"stays": [{"hours": math.inf}]}], "`hours` of a stay"),
        ([{"note": "pain"}], "no `note_tokenizer`"),
        ([{"note_vector": [1.0]}, {"note_vector": [1.0, 2.0]}], "of one size"),
        ([{"note_vector": [math.nan]}], "must be finite"),
        ([{"note_vector": [1.0]}, {"note": "pain"}], "got both"),
    ],
)
def test_what_cannot_be_an_admission_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        processor(notes=False)(rows)


@pytest.mark.parametrize("notes", [True, False], ids=["notes", "no-notes"])
def test_it_saves_and_loads_with_the_package(tmp_path, notes):
    made = processor(notes)
    rows = BATCH if notes else [{**row, "note": None} for row in BATCH]
    made.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is hf_ehr.MedHMPProcessor
    assert plain(loaded(rows)) == plain(made(rows))
    assert (loaded.note_tokenizer is not None) == notes
    assert loaded.diagnosis_tokenizer.init_kwargs["fitted_on"] == "abc"
    assert type(loaded.feature_extractor) is HourlyFeatureExtractor
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.feature_names == made.feature_extractor.feature_names
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


def test_saving_adds_nothing_to_the_parts(tmp_path):
    made = processor()
    before = [dict(tokenizer.init_kwargs) for tokenizer in made.code_tokenizers.values()]
    made.save_pretrained(tmp_path)
    assert [dict(tokenizer.init_kwargs) for tokenizer in made.code_tokenizers.values()] == before
    state = json.loads((tmp_path / "processor_config.json").read_text())
    assert not [name for name in state if name.startswith("_")]


def test_parts_of_another_kind_are_refused():
    made = processor()
    with pytest.raises(TypeError, match="feature_extractor"):
        MedHMPProcessor(made.diagnosis_tokenizer, made.feature_extractor, made.medication_tokenizer)
    with pytest.raises(TypeError, match="tokenizer"):
        MedHMPProcessor(made.feature_extractor, made.diagnosis_tokenizer, made.medication_tokenizer, "words")

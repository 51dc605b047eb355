"""The pipelines over patients: the model's own answers, frames in and out, refusals, folders without the package."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hf_ehr
from hf_ehr import (
    EhrCodeTokenizer,
    GBertConfig,
    GBertForMedicationRecommendation,
    HourlyFeatureExtractor,
    MedBertConfig,
    MedBertForSequenceClassification,
    MedHMPConfig,
    MedHMPForAdmissionClassification,
    MedHMPForStayClassification,
    MedHMPProcessor,
    MedHMPStayModel,
    MedicationRecommendationPipeline,
    MedMPLMConfig,
    MedMPLMForReadmission,
    MedMPLMProcessor,
    PatientFeatureExtractionPipeline,
    RiskPredictionPipeline,
    VisitRnnConfig,
    VisitRnnForMedicationRecommendation,
)

CODES = [f"ICD10CM/{code}" for code in ("E11", "I10", "I50.9", "N18.3")]
DRUGS = [f"ATC/{code}" for code in ("C07A", "A10B", "C03C")]
LONG = {"visits": [[CODES[0], CODES[1]], [CODES[2]], [CODES[3], CODES[0]]]}
SHORT = {"visits": [[CODES[2]]]}
TOLERANCE = {"abs": 1e-6}


def labels(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}


def history_tokenizer(**state) -> EhrCodeTokenizer:
    return EhrCodeTokenizer.from_codes(CODES, kinds=["diagnoses"], **state)


def medbert(**fields) -> MedBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.5, "vocab_size": len(CODES) + 5}
    return MedBertForSequenceClassification(MedBertConfig.tiny(**(sizes | fields))).eval()


def risk_of(model, **parts) -> RiskPredictionPipeline:
    return RiskPredictionPipeline(model=model, device="cpu", **parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier as training leaves it."""
    path = tmp_path_factory.mktemp("classifier")
    medbert(thresholds={"heart_failure": 0.3}).save_pretrained(path)
    history_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def risk(folder):
    return pipeline("risk-prediction", model=folder, device="cpu")


def visit_processor(notes: bool) -> MedMPLMProcessor:
    words = EhrCodeTokenizer.from_codes(["chest", "pain"], model_max_length=4) if notes else None
    return MedMPLMProcessor(
        EhrCodeTokenizer.from_codes(CODES, kinds=["diagnoses"]),
        EhrCodeTokenizer.from_codes(DRUGS, kinds=["medications"]),
        words,
    )


SIZES = {"diagnosis_vocab_size": len(CODES) + 5, "medication_vocab_size": len(DRUGS) + 5}
VISITS = [
    {"diagnoses": CODES[:2], "medications": DRUGS[:1]},
    {"diagnoses": CODES[2:3], "medications": DRUGS[1:]},
    {"diagnoses": CODES[3:]},
]


def recommender(kind: str):
    torch.manual_seed(0)
    if kind == "gbert":
        config = GBertConfig.tiny(**SIZES, **labels(*DRUGS), initializer_range=0.1)
        return GBertForMedicationRecommendation(config).eval()
    config = VisitRnnConfig(**SIZES, **labels(*DRUGS), hidden_size=8, initializer_range=0.5)
    return VisitRnnForMedicationRecommendation(config).eval()


def readmission() -> MedMPLMForReadmission:
    torch.manual_seed(0)
    note = {"model_type": "bert", "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    note |= {"num_attention_heads": 2, "intermediate_size": 16}
    config = MedMPLMConfig(code_config=GBertConfig.tiny(**SIZES), note_config=note, initializer_range=0.5)
    return MedMPLMForReadmission(config).eval()


def hourly() -> HourlyFeatureExtractor:
    scale = {"frequent": False, "edges": {}, "scale": [20.0, 250.0, 80.0, 10.0]}
    variable = {"name": "HR", "valid_range": None, "as_text": False, "numeric": scale, "category": None}
    age = {
        "name": "age",
        "static": False,
        "valid_range": None,
        "as_text": False,
        "scale": [18.0, 90.0, 60.0, 10.0],
        "categories": None,
        "edges": None,
    }
    return HourlyFeatureExtractor([variable], [age], n_hours=6, form="continuous")


def medhmp(kind):
    torch.manual_seed(0)
    extractor = hourly()
    config = MedHMPConfig.tiny(
        num_hourly_features=extractor.num_hourly_features, num_demographics=extractor.num_demographics, **SIZES
    )
    return kind(config).eval()


STAY = {
    "hours": 3,
    "measurements": [{"hour": 0.5, "name": "HR", "value": 90.0}, {"hour": 2.5, "name": "HR", "value": 120.0}],
    "demographics": {"age": 70.0},
}


# Risk


def test_the_risk_is_that_of_the_model_through_its_auto_classes(risk, folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    history = AutoTokenizer.from_pretrained(folder).encode_patient(LONG["visits"])
    with torch.no_grad():
        logits = model(**{name: torch.tensor([stream]) for name, stream in history.items()}).logits[0]
    answer = risk(LONG)
    assert isinstance(risk, RiskPredictionPipeline)
    assert answer["probability"] == pytest.approx(logits.softmax(-1)[1].item(), **TOLERANCE)
    assert (answer["threshold"], answer["positive"]) == (0.3, answer["probability"] >= 0.3)
    assert json.loads(json.dumps(answer)) == answer


def test_patients_are_scored_alike_alone_in_batches_and_from_a_generator(risk):
    patients = [LONG, SHORT, {"visits": [[CODES[1]], [CODES[1], CODES[3]]]}, SHORT, LONG]
    alone = [risk(patient)["probability"] for patient in patients]
    assert len({round(p, 4) for p in alone}) == 3
    for size in (1, 2, 5):
        assert [a["probability"] for a in risk(patients, batch_size=size)] == pytest.approx(alone, **TOLERANCE)
    lazily = risk(patient for patient in patients)
    assert next(lazily)["probability"] == pytest.approx(alone[0], **TOLERANCE)
    assert len(list(lazily)) == 4
    assert risk([]) == []


def test_a_record_is_a_patient_and_only_its_own_kinds_of_codes_are_read(risk):
    visits = [
        {"visit_id": 1, "start": datetime(2020, 1, 1), "diagnoses": codes, "diagnoses_at": [], "medications": ["X/1"]}
        for codes in LONG["visits"]
    ]
    record = {"subject_id": 4, "birth_time": datetime(1950, 1, 1), "visits": visits}
    assert risk(record) == risk(LONG)


def test_ages_come_from_birth_and_visit(tmp_path):
    tokenizer = history_tokenizer(ages=True)
    made = risk_of(medbert(max_age=100), tokenizer=tokenizer)
    old, young = (
        {
            "birth_time": datetime(year, 1, 1),
            "visits": [{"start": datetime(2020, 1, 1), "diagnoses": CODES[:2]}],
        }
        for year in (1930, 1990)
    )
    assert abs(made(old)["probability"] - made(young)["probability"]) > 1e-4


def test_a_threshold_of_the_call_goes_before_that_of_the_model_and_a_half_stands_for_none(risk):
    p = risk(LONG)["probability"]
    assert risk(LONG, threshold=min(1, p + 1e-3)) == {
        "probability": p,
        "threshold": min(1, p + 1e-3),
        "positive": False,
    }
    assert risk_of(medbert(), tokenizer=history_tokenizer())(LONG)["threshold"] == 0.5


def test_several_classes_and_several_labels_have_a_probability_each():
    tokenizer = history_tokenizer()
    classes = risk_of(medbert(**labels("home", "hospice", "dead")), tokenizer=tokenizer)(LONG)
    assert sum(classes["probabilities"].values()) == pytest.approx(1)
    assert classes["label"] == max(classes["probabilities"], key=classes["probabilities"].get)
    several = {"problem_type": "multi_label_classification", "thresholds": {"a": 0.0, "b": 1.0}}
    model = medbert(**labels("a", "b", "c"), **several)
    made = risk_of(model, tokenizer=tokenizer)
    answer = made(LONG)
    assert ("a" in answer["positive"], "b" in answer["positive"]) == (True, False)
    assert ("c" in answer["positive"]) == (answer["probabilities"]["c"] >= 0.5)
    assert made(LONG, threshold=0.0)["positive"] == ["a", "b", "c"]


def test_too_long_a_history_keeps_its_newest_visits():
    short = risk_of(medbert(max_position_embeddings=3), tokenizer=history_tokenizer())
    assert short(LONG) == short({"visits": LONG["visits"][1:]})


@pytest.mark.parametrize("notes", [True, False])
def test_readmission_is_asked_of_the_last_visit_with_its_note(notes):
    processor, model = visit_processor(notes=True), readmission()
    visit = VISITS[1] | ({"note": "chest pain"} if notes else {})
    made = risk_of(model, processor=processor)
    with torch.no_grad():
        expected = model(**processor([visit])).logits.softmax(-1)[0, 1].item()
    assert made({"visits": [VISITS[0], visit]})["probability"] == pytest.approx(expected, **TOLERANCE)
    batch = made([{"visits": [visit]}, {"visits": [VISITS[0]]}])
    assert batch[0]["probability"] == pytest.approx(expected, **TOLERANCE)
    record = {"visits": [visit | {"visit_id": 1, "kind": "inpatient", "diagnoses_at": [], "stays": [STAY]}]}
    assert made(record)["probability"] == pytest.approx(expected, **TOLERANCE)


def test_the_notes_of_a_record_are_not_passed_over():
    made = risk_of(readmission(), processor=visit_processor(notes=True))
    with pytest.raises(ValueError, match="`note` of a visit must be the text"):
        made({"visits": [VISITS[0] | {"notes": [{"text": "chest pain"}]}]})


def test_stays_are_read_up_to_the_hours_that_are_seen():
    model, extractor = medhmp(MedHMPForStayClassification), hourly()
    made = risk_of(model, feature_extractor=extractor)
    codes = visit_processor(notes=False).code_tokenizers
    processor = MedHMPProcessor(extractor, codes["diagnosis"], codes["medication"])
    batch = processor([{"stays": [STAY]}, {"stays": [STAY | {"hours": 1}]}])
    names = ("stay_hours", "feature_ids", "feature_counts", "feature_values", "demographics")
    with torch.no_grad():
        expected = model(**{name: batch[name] for name in names}).logits.softmax(-1)[:, 1].tolist()
    found = [answer["probability"] for answer in made([STAY, STAY | {"hours": 1}])]
    assert found == pytest.approx(expected, **TOLERANCE)
    late = [STAY["measurements"][0], STAY["measurements"][1] | {"value": 300.0}]
    assert made(STAY | {"hours": 2.4, "measurements": late}) == made(STAY | {"hours": 2.4})
    with pytest.raises(ValueError, match="`hours` of stay 0 must be"):
        made({"measurements": []})


def test_an_admission_is_read_with_its_stays():
    extractor, codes = hourly(), visit_processor(notes=False).code_tokenizers
    processor = MedHMPProcessor(extractor, codes["diagnosis"], codes["medication"])
    model = medhmp(MedHMPForAdmissionClassification)
    made = risk_of(model, processor=processor, feature_extractor=extractor)
    admission = VISITS[1] | {"stays": [STAY]}
    with torch.no_grad():
        expected = model(**processor([admission])).logits.softmax(-1)[0, 1].item()
    assert made({"visits": [VISITS[0], admission]})["probability"] == pytest.approx(expected, **TOLERANCE)
    assert abs(made({"visits": [VISITS[1]]})["probability"] - expected) > 1e-6


# Drugs


@pytest.mark.parametrize("kind", ["gbert", "visitrnn"])
def test_drugs_of_the_last_visit_come_from_its_diagnoses_and_the_history(kind, tmp_path):
    model, processor = recommender(kind), visit_processor(notes=False)
    model.config.thresholds = {DRUGS[0]: 0.0, DRUGS[1]: 1.0}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    made = pipeline("medication-recommendation", model=tmp_path, device="cpu")
    assert isinstance(made, MedicationRecommendationPipeline)
    with torch.no_grad():
        expected = model(**processor([{"visits": VISITS}])).logits[0, -1].sigmoid().tolist()
    answer = made({"visits": VISITS})
    assert {drug["code"]: drug["probability"] for drug in answer} == pytest.approx(
        dict(zip(DRUGS, expected, strict=True)), **TOLERANCE
    )
    assert [drug["probability"] for drug in answer] == pytest.approx(sorted(expected, reverse=True), **TOLERANCE)
    recommended = {drug["code"]: drug["recommended"] for drug in answer}
    assert (recommended[DRUGS[0]], recommended[DRUGS[1]]) == (True, False)
    given = [*VISITS[:2], VISITS[2] | {"medications": DRUGS}]
    assert made({"visits": given}) == answer
    together = made([{"visits": VISITS}, {"visits": VISITS[:2]}], top_k=1)
    assert [len(each) for each in together] == [1, 1]
    assert together[1][0]["probability"] == pytest.approx(made({"visits": VISITS[:2]})[0]["probability"], **TOLERANCE)


def test_a_first_visit_has_no_history_to_recommend_from():
    made = MedicationRecommendationPipeline(model=recommender("gbert"), processor=visit_processor(False), device="cpu")
    with pytest.raises(ValueError, match="`visits` of patient 1 must be two at least"):
        made([{"visits": VISITS}, {"visits": VISITS[:1]}])


# Vectors


def test_vectors_are_the_pooled_outputs_and_differ_between_patients(folder):
    made = pipeline("patient-feature-extraction", model=folder, device="cpu")
    assert isinstance(made, PatientFeatureExtractionPipeline)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    history = history_tokenizer().encode_patient(LONG["visits"])
    with torch.no_grad():
        expected = model(**{name: torch.tensor([stream]) for name, stream in history.items()}).pooler_output[0]
    long, short = made([LONG, SHORT])
    assert long == pytest.approx(expected.tolist(), abs=1e-5)
    assert short != pytest.approx(long, abs=1e-2)
    assert torch.equal(made(LONG, return_tensors=True), torch.tensor(made(LONG)))


@pytest.mark.parametrize("kind", ["gbert", "visitrnn"])
def test_vectors_of_visits_are_those_of_the_last_one(kind):
    processor, model = visit_processor(notes=False), recommender(kind).base_model.eval()
    made = PatientFeatureExtractionPipeline(model=model, processor=processor, device="cpu")
    with torch.no_grad():
        outputs = model(**processor([{"visits": VISITS}]))
    parts = [outputs.visit_state] if kind == "visitrnn" else [outputs.diagnosis_state, outputs.medication_state]
    expected = torch.cat(parts, dim=-1)[0, -1].tolist()
    found = made([{"visits": VISITS[:1]}, {"visits": VISITS}])
    assert found[1] == pytest.approx(expected, abs=1e-5)
    assert len(found[0]) == len(expected)


def test_a_stay_checkpoint_gives_no_vectors_of_admissions_that_nobody_trained(tmp_path):
    medhmp(MedHMPForStayClassification).save_pretrained(tmp_path)
    hourly().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a `MedHMPStayModel`"):
        pipeline("patient-feature-extraction", model=tmp_path, device="cpu")(STAY)
    stays = MedHMPStayModel.from_pretrained(tmp_path)
    made = PatientFeatureExtractionPipeline(model=stays, feature_extractor=hourly(), device="cpu")
    assert len(made(STAY)) == stays.config.hidden_size


# Frames


def frames():
    pandas = pytest.importorskip("pandas")
    return {"pandas": pandas.DataFrame, "polars": pl.DataFrame}


def records(frame) -> list[dict]:
    return frame.to_dicts() if isinstance(frame, pl.DataFrame) else frame.to_dict("records")


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_of_patients_or_of_codes_becomes_a_frame_of_answers(risk, library):
    kind = frames()[library]
    wide = kind({"subject_id": [7, 9], "visits": [LONG["visits"], SHORT["visits"]]})
    answers = risk(wide)
    assert type(answers) is kind
    expected = [{"subject_id": 7, **risk(LONG)}, {"subject_id": 9, **risk(SHORT)}]
    found = records(answers)
    assert [row["subject_id"] for row in found] == [7, 9]
    assert [row["probability"] for row in found] == pytest.approx(
        [row["probability"] for row in expected], **TOLERANCE
    )
    assert [row["positive"] for row in found] == [row["positive"] for row in expected]
    rows = [
        {"subject_id": subject, "visit_id": place, "code": code}
        for subject, patient in ((7, LONG), (9, SHORT))
        for place, visit in reversed(list(enumerate(patient["visits"])))
        for code in visit
    ]
    long = records(risk(kind(rows)))
    assert [row["probability"] for row in long] == pytest.approx([row["probability"] for row in found], **TOLERANCE)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_of_drugs_have_a_row_a_drug_and_frames_of_vectors_a_list(library, folder):
    kind = frames()[library]
    rows = [
        {"subject_id": 3, "visit_id": place, "kind": name, "code": code}
        for place, visit in enumerate(VISITS)
        for name in visit
        for code in visit[name]
    ]
    made = MedicationRecommendationPipeline(model=recommender("gbert"), processor=visit_processor(False), device="cpu")
    found = records(made(kind(rows), top_k=2))
    assert [(row["subject_id"], row["code"]) for row in found] == [
        (3, drug["code"]) for drug in made({"visits": VISITS}, top_k=2)
    ]
    vectors = pipeline("patient-feature-extraction", model=folder, device="cpu")
    row = records(vectors(kind({"visits": [LONG["visits"]]})))[0]
    assert list(row["features"]) == pytest.approx(vectors(LONG), **TOLERANCE)


def test_arrays_of_a_parquet_file_and_missing_numbers_are_read(risk, tmp_path):
    pandas = pytest.importorskip("pandas")
    visits = [{"diagnoses": codes, "start": None} for codes in LONG["visits"]]
    pl.DataFrame({"subject_id": [1], "visits": [visits]}).write_parquet(tmp_path / "x.parquet")
    frame = pandas.read_parquet(tmp_path / "x.parquet")
    assert isinstance(frame["visits"][0], np.ndarray)
    frame["birth_time"] = float("nan")
    assert records(risk(frame))[0]["probability"] == pytest.approx(risk(LONG)["probability"], **TOLERANCE)


# Refusals


@pytest.mark.parametrize(
    ("patient", "message"),
    [
        ("ICD10CM/I10", "`inputs` must be a patient"),
        (5, "`inputs` must be a patient"),
        ([[CODES]], "number 0 is a list"),
        ({}, "`visits` of patient 0 must be a list"),
        ({"visits": []}, "`visits` of patient 0 must be a list"),
        ({"visits": "I10"}, "`visits` of patient 0 must be a list"),
        ({"visits": [CODES[0]]}, "a list of visits"),
        ([LONG, {"visits": [[]]}], "`visits` of patient 1 must hold a code"),
        (pl.DataFrame({"subject_id": [1], "code": ["x"]}), "lacks visit_id"),
    ],
    ids=str,
)
def test_what_is_no_patient_is_refused(risk, patient, message):
    with pytest.raises(ValueError, match=message):
        risk(patient)


def test_unknown_arguments_and_values_out_of_range_are_refused(risk):
    with pytest.raises(ValueError, match="must be among threshold, batch_size"):
        risk(LONG, top_k=3)
    with pytest.raises(ValueError, match=r"`threshold` must lie in \[0, 1\]"):
        risk(LONG, threshold=2)
    with pytest.raises(ValueError, match="`model` must come with what reads its patients"):
        risk_of(medbert())


# Folders without the package

REMOTE = """
import json, sys
sys.modules["hf_ehr"] = None
from transformers import pipeline
for task, folder, patient in json.loads(sys.stdin.read()):
    made = pipeline(task, model=folder, trust_remote_code=True, device="cpu")
    assert "transformers_modules" in type(made).__module__, type(made)
    print(json.dumps(made(patient)))
"""


def test_saved_pipelines_open_from_their_folders_without_the_package(risk, tmp_path):
    assert hf_ehr.__version__
    drugs = MedicationRecommendationPipeline(
        model=recommender("gbert"), processor=visit_processor(False), device="cpu"
    )
    stays = risk_of(medhmp(MedHMPForStayClassification), feature_extractor=hourly())
    vectors = pipeline("patient-feature-extraction", model=risk.model.name_or_path, device="cpu")
    plan = []
    for task, made, patient in (
        ("risk-prediction", risk, LONG),
        ("medication-recommendation", drugs, {"visits": VISITS}),
        ("risk-prediction", stays, STAY),
        ("patient-feature-extraction", vectors, LONG),
    ):
        path = tmp_path / f"{task}-{len(plan)}"
        made.save_pretrained(path)
        plan.append((task, str(path), patient))
    assert json.loads((tmp_path / "risk-prediction-0" / "config.json").read_text())["custom_pipelines"] == {
        "risk-prediction": {
            "impl": "pipeline_patient_tasks.RiskPredictionPipeline",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "text",
        }
    }
    printed = subprocess.run(
        [sys.executable, "-c", REMOTE], input=json.dumps(plan), capture_output=True, text=True, check=False
    )
    assert printed.returncode == 0, printed.stderr[-3000:]
    lines = [json.loads(line) for line in printed.stdout.splitlines()]
    assert lines[0] == pytest.approx(risk(LONG), abs=1e-5)
    assert [drug["code"] for drug in lines[1]] == [drug["code"] for drug in drugs({"visits": VISITS})]
    assert lines[2]["probability"] == pytest.approx(stays(STAY)["probability"], abs=1e-5)
    assert lines[3] == pytest.approx(vectors(LONG), abs=1e-5)

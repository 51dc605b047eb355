"""What a risk rests on: changes are those between two answers of the model, and the command writes and refuses."""

from __future__ import annotations

import csv
import json
import math

import pytest

from hf_ehr import EhrCodeTokenizer
from hf_ehr.cli.main import main
from hf_ehr.risk_explanations import explain_risk, patient_from
from tests.test_pipelines_patients import (
    CODES,
    DRUGS,
    STAY,
    history_tokenizer,
    hourly,
    labels,
    medbert,
    medhmp,
    readmission,
    risk_of,
    visit_processor,
)

HISTORY = {"visits": [[CODES[0], CODES[1]], [CODES[2]], [CODES[0], CODES[3]]]}


def odds(answer):
    return math.log(answer["probability"] / (1 - answer["probability"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    medbert(thresholds={"heart_failure": 0.3}, **labels("none", "heart_failure")).save_pretrained(path)
    history_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def risk(folder):
    from transformers import pipeline

    return pipeline("risk-prediction", model=folder, device="cpu")


def by_part(found):
    return {(one.part, one.visit, one.name): one.log_odds for one in found.contributions}


def test_each_change_is_the_difference_of_two_answers(risk):
    found = explain_risk(risk, HISTORY, batch_size=2)
    visits, whole = HISTORY["visits"], odds(risk(HISTORY))
    without = {
        ("code", 1, CODES[0]): [[CODES[1]], *visits[1:]],
        ("code", 1, CODES[1]): [[CODES[0]], *visits[1:]],
        ("code", 2, CODES[2]): [visits[0], visits[2]],  # its visit goes with its only code
        ("code", 3, CODES[0]): [*visits[:2], [CODES[3]]],
        ("code", 3, CODES[3]): [*visits[:2], [CODES[0]]],
    }
    expected = {part: whole - odds(risk({"visits": rest})) for part, rest in without.items()}
    assert by_part(found) == pytest.approx(expected, abs=1e-5)
    assert len({round(change, 4) for change in expected.values()}) == 5
    sizes = [abs(one.log_odds) for one in found.contributions]
    assert sizes == sorted(sizes, reverse=True)
    assert (found.label, found.threshold) == ("heart_failure", 0.3)
    assert found.probability == pytest.approx(risk(HISTORY)["probability"], abs=1e-6)
    described = {one.name: one.description for one in found.contributions}
    assert "eart failure" in described["ICD10CM/I50.9"]


def test_the_course_is_the_risk_after_each_visit(risk):
    expected = [risk({"visits": HISTORY["visits"][:number]})["probability"] for number in (1, 2, 3)]
    assert explain_risk(risk, HISTORY).course == pytest.approx(expected, abs=1e-6)
    assert explain_risk(risk, {"visits": HISTORY["visits"][:1]}).course == ()


def test_what_cannot_be_left_out_is_no_part(risk):
    assert explain_risk(risk, {"visits": [[CODES[2]]]}).contributions == ()
    named = {"visits": [{"diagnoses": [CODES[2]], "medications": DRUGS}, {"diagnoses": [CODES[1]]}]}
    assert set(by_part(explain_risk(risk, named))) == {("code", 1, CODES[2]), ("code", 2, CODES[1])}


def test_of_several_outcomes_one_is_named():
    tokenizer = history_tokenizer()
    classes = risk_of(medbert(**labels("home", "hospice", "dead")), tokenizer=tokenizer)
    several = medbert(**labels("a", "b"), problem_type="multi_label_classification")
    for made, label in ((classes, "dead"), (risk_of(several, tokenizer=tokenizer), "b")):
        found = explain_risk(made, HISTORY, label=label)
        shares = [made(one)["probabilities"][label] for one in (HISTORY, {"visits": HISTORY["visits"][:2]})]
        assert found.probability == pytest.approx(shares[0], abs=1e-6)
        assert found.course[1] == pytest.approx(shares[1], abs=1e-6)
        with pytest.raises(ValueError, match="`label` must be an outcome of the model"):
            explain_risk(made, HISTORY, label="c")
        with pytest.raises(ValueError, match="`label` must be an outcome of the model"):
            explain_risk(made, HISTORY)


def test_of_an_admission_codes_and_note_of_the_last_visit_are_parts():
    made = risk_of(readmission(), processor=visit_processor(notes=True))
    visit = {"diagnoses": CODES[:2], "medications": DRUGS[:1], "note": "chest pain"}
    patient = {"visits": [{"diagnoses": CODES[2:], "medications": []}, visit]}
    found, whole = by_part(explain_risk(made, patient)), odds(made(patient))
    without = {
        ("code", 2, CODES[0]): visit | {"diagnoses": CODES[1:2]},
        ("code", 2, CODES[1]): visit | {"diagnoses": CODES[:1]},
        ("code", 2, DRUGS[0]): visit | {"medications": []},
        ("note", 2, "note"): {"diagnoses": CODES[:2], "medications": DRUGS[:1]},
    }
    assert found == pytest.approx(
        {key: whole - odds(made({"visits": [one]})) for key, one in without.items()}, abs=1e-5
    )


def test_of_a_stay_variables_and_demographics_are_parts():
    from hf_ehr import MedHMPForStayClassification

    made = risk_of(medhmp(MedHMPForStayClassification), feature_extractor=hourly())
    found, whole = by_part(explain_risk(made, STAY)), odds(made(STAY))
    expected = {
        ("variable", None, "HR"): whole - odds(made(STAY | {"measurements": []})),
        ("demographic", None, "age"): whole - odds(made(STAY | {"demographics": {}})),
    }
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(abs(change) > 1e-4 for change in expected.values())


def test_the_command_writes_a_figure_and_every_part(folder, tmp_path, capsys):
    (tmp_path / "patient.json").write_text(json.dumps(HISTORY))
    words = ["explain", "--model", str(folder), "--patient", str(tmp_path / "patient.json")]
    assert main([*words, "--output", str(tmp_path / "whole"), "--top_k", "2"]) == 0
    printed = capsys.readouterr().out
    with (tmp_path / "whole" / "contributions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert f"{float(rows[0]['log_odds']):+7.3f}" in printed
    assert f"{float(rows[2]['log_odds']):+7.3f}" not in printed
    assert (tmp_path / "whole" / "explanation.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--output", str(tmp_path / "two"), "--visits", "2"]) == 0
    assert len((tmp_path / "two" / "contributions.csv").read_text().splitlines()) == 4


def test_two_codes_that_differ_in_their_vocabulary_alone_have_a_line_each(tmp_path, capsys):
    codes = ["ICD10CM/I10", "ICD9CM/I10", "ICD9CM/428.0"]
    EhrCodeTokenizer.from_codes(codes, kinds=["diagnoses"]).save_pretrained(tmp_path)
    medbert(vocab_size=len(codes) + 5, **labels("none", "heart_failure")).save_pretrained(tmp_path)
    (tmp_path / "patient.json").write_text(json.dumps({"visits": [codes]}))
    words = ["explain", "--model", str(tmp_path), "--patient", str(tmp_path / "patient.json")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("visit 1: I10") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`patient` or `data` must be given"),
        (["--patient", "nowhere.json"], "`patient` must be a JSON file"),
        (["--patient", "list.json"], "A patient must be a JSON object"),
        (["--patient", "patient.json", "--visits", "9"], "`visits` must be 1 to 3"),
        (["--patient", "patient.json", "--top_k", "0"], "`top_k` must be at least 1"),
        (["--patient", "born.json"], "`birth_time` must be a time"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patient.json").write_text(json.dumps(HISTORY))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "born.json").write_text(json.dumps(HISTORY | {"birth_time": "in spring"}))
    assert main(["explain", "--model", str(folder), "--output", "out", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_coder_is_sent_to_highlight(tmp_path, capsys):
    from transformers import AutoConfig

    config = AutoConfig.for_model("ehr_bert", architectures=["EhrBertForICDCoding"])
    config.save_pretrained(tmp_path)
    assert main(["explain", "--model", str(tmp_path), "--patient", "x", "--output", "out"]) == 2
    assert "hf-ehr highlight" in capsys.readouterr().err


def test_times_of_a_file_become_times():
    patient = patient_from({"birth_time": "1950-01-01", "visits": [{"start": "2020-05-01T08:00", "diagnoses": CODES}]})
    assert (patient["birth_time"].year, patient["visits"][0]["start"].hour) == (1950, 8)
    assert patient["visits"][0]["diagnoses"] == CODES

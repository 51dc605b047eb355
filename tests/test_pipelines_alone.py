"""``pipeline("icd-coding")`` from its folder where the package cannot be imported: equal codes from equal words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, pipeline

from hf_ehr import EhrBertForICDCoding
from hf_ehr.hub import MODELS, check_publishable, write_folder
from hf_ehr.models.pipeline_icd_coding import ICDCodingPipeline
from hf_ehr.pipelines import highlight_note, open_coder
from hf_ehr.sources.synthetic_notes import SyntheticNotesConfig, generate_notes
from tests.coders import HIP, names, pointing_coder, random_coder, words_of
from tests.released import RELEASED

WORDS = {"ICD10CM/S72.002A": ["hip", "fracture"], "ICD10CM/J45.909": ["asthma"], "local": ["thyroid"]}
S72, J45, LOCAL = WORDS
CODE = {
    "pipeline_icd_coding.py", "pipeline_frames.py", "note_evidence.py", "note_windows.py", "evidence_spans.py",
    "integrated_gradients.py", "code_decisions.py", "any_encoder.py",
}  # fmt: skip
NOTES = [HIP, "asthma " * 70 + "hip", "", "🫀🫀 心房細動\r\n\r\nأزمة  HIP   fracture ñandú ASTHMA"]
EVIDENCE = ("label_attention", "attention_gradient", "gradient", "integrated_gradients", None)
ALONE = """
import json, sys
sys.modules["hf_ehr"] = None
import polars
from transformers import pipeline
plan, again = json.loads(sys.stdin.read()), sys.argv[1]
answers = {}
for name, (folder, questions) in plan.items():
    coder = pipeline("icd-coding", model=folder, trust_remote_code=True, device="cpu")
    assert "transformers_modules" in type(coder).__module__, type(coder)
    answers[name] = [coder(notes, **arguments) for notes, arguments in questions]
frame = coder(polars.DataFrame({"note_id": ["a"], "text": [questions[0][0][0]]}), top_k=1)
answers["frame"] = frame.to_dicts()
try:
    coder("x", evidence="lime")
except ValueError as error:
    answers["error"] = str(error)
coder.save_pretrained(again)
saved = pipeline("icd-coding", model=again, trust_remote_code=True, device="cpu")
answers["again"] = [saved(notes, **arguments) for notes, arguments in questions]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return words_of(*NOTES, "thyroid")


@pytest.fixture(scope="module")
def coders(tokenizer, tmp_path_factory):
    """Saved by the pipeline with random weights and on another encoder; published from a checkpoint of a recipe."""
    root = tmp_path_factory.mktemp("coders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=9, **sizes))
    settings = {"auto_code_thresholds": {J45: 0.9}, "thresholds": {S72: 0.9999}, "max_segments": 6}
    models = {
        "random": random_coder(tokenizer, *WORDS, segment_pooling="max"),
        "cls": EhrBertForICDCoding.from_encoder(encoder, names(*WORDS)["id2label"], head="cls").eval(),
        "pointing": pointing_coder(tokenizer, WORDS, label_descriptions={LOCAL: "Goitre"}, **settings),
    }
    for name, model in models.items():
        ICDCodingPipeline(model=model, tokenizer=tokenizer, device="cpu").save_pretrained(root / name)
    trained = shutil.copytree(RELEASED / "ehrbert-synthetic-tiny", root / "trained")
    config = json.loads((trained / "config.json").read_text())
    for written_when_published in ("custom_pipelines", "label_descriptions"):
        del config[written_when_published]
    (trained / "config.json").write_text(json.dumps(config))
    write_folder(trained, root / "published")
    check_publishable(root / "published")
    return {name: root / name for name in ("published", *models)}


def questions(name: str) -> list[tuple]:
    if name == "published":
        notes = (
            generate_notes(SyntheticNotesConfig(patients=2, codes=12, codes_per_note=3, seed=5))
            .notes["text"]
            .to_pylist()
        )
        return [(notes[:3], {})]
    if name == "cls":
        return [(NOTES, {}), (NOTES[0], {"evidence": "integrated_gradients"})]
    own = [(NOTES[:2], {"evidence": method, "top_k": 2, "max_length": 12}) for method in EVIDENCE]
    return [(NOTES, {"max_spans": None, "relative_threshold": 0.2, "threshold": 0.3}), *own, (NOTES, {})]


@pytest.fixture(scope="module")
def answers(coders, tmp_path_factory):
    plan = {name: (str(folder), questions(name)) for name, folder in coders.items()}
    again = str(tmp_path_factory.mktemp("again") / "model")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, again], input=json.dumps(plan), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def without(codes, *fields):
    return [{name: value for name, value in code.items() if name not in fields} for code in codes]


def assert_same(found, expected, *left_out):
    """Codes, decisions, texts and places are equal; probabilities and weights to the sixth digit."""
    assert without(found, "probability", "spans", *left_out) == without(expected, "probability", "spans", *left_out)
    for one, other in zip(found, expected, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)
        assert without(one["spans"], "weight") == without(other["spans"], "weight")
        weights = [[span["weight"] for span in code["spans"]] for code in (one, other)]
        assert weights[0] == pytest.approx(weights[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["random", "cls", "pointing", "published"])
def test_a_folder_codes_without_the_package_as_with_it(name, coders, answers):
    """Names of the public lists are the package's: a saved pipeline takes its configuration's alone."""
    coder = open_coder(coders[name])
    assert type(coder) is ICDCodingPipeline
    spans = 0
    for (notes, arguments), found in zip(questions(name), answers[name], strict=True):
        expected = coder(notes, **arguments)
        pairs = [(found, expected)] if isinstance(notes, str) else zip(found, expected, strict=True)
        for one, other in pairs:
            assert_same(one, other, *([] if name == "published" else ["description"]))
            spans += sum(len(code["spans"]) for code in one)
    assert spans > 5


def test_thresholds_and_descriptions_come_from_the_configuration(answers):
    codes = {code["code"]: code for code in answers["pointing"][-1][0]}
    assert {code: one["decision"] for code, one in codes.items()} == {S72: "ignore", J45: "auto-code", LOCAL: "ignore"}
    assert {code: one["description"] for code, one in codes.items()} == {S72: None, J45: None, LOCAL: "Goitre"}


def test_frames_errors_and_saving_work_without_the_package(answers):
    (row,) = answers["frame"]
    assert {name: row.pop(name) for name in ("note_id",)} == {"note_id": "a"}
    assert_same([row], answers["pointing"][-1][0][:1])
    assert answers["error"].startswith("`evidence` must be one of label_attention")
    assert answers["again"] == answers["pointing"]


def test_a_published_coder_carries_its_code_and_what_its_codes_mean(coders):
    folder = coders["published"]
    config = json.loads((folder / "config.json").read_text())
    assert list(config["custom_pipelines"]) == ["icd-coding"]
    assert config["custom_pipelines"]["icd-coding"]["impl"] == "pipeline_icd_coding.ICDCodingPipeline"
    assert set(config["label_descriptions"]) <= set(config["label2id"])
    assert config["label_descriptions"]["ICD10CM/B02.21"] == "Postherpetic geniculate ganglionitis"
    for carrier in (folder, coders["random"]):
        assert {path.name for path in carrier.glob("*.py")} >= CODE
        assert all((carrier / name).read_bytes() == (MODELS / name).read_bytes() for name in CODE)


def test_with_the_package_its_own_code_opens_a_published_coder(coders, tmp_path):
    """The library asks for trust wherever a folder names code; the command line and pages need none of it."""
    folder = coders["published"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline("icd-coding", model=folder, device="cpu")
    codes = highlight_note(folder, "Known asthma.", Path(tmp_path) / "page.html", top_k=2)
    assert codes == open_coder(folder)("Known asthma.", top_k=2)

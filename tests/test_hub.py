"""Publishing: what leaves, what must not, that it loads alone with equal numbers, and a Hub over a real socket."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import hf_ehr
from hf_ehr import (
    EhrCodeTokenizer,
    GBertConfig,
    MedBertConfig,
    MedBertForSequenceClassification,
    MedMPLMConfig,
    MedMPLMForReadmission,
    MedMPLMProcessor,
)
from hf_ehr._publish_alone import outputs_of, reading_of
from hf_ehr._publish_checks import check_vocabularies, why_not
from hf_ehr._publish_inputs import STREAMS, example_inputs
from hf_ehr.hub import (
    MODELS,
    PublishArguments,
    PublishingError,
    _compare,
    assemble,
    check_publishable,
    publish,
    verify,
    write_folder,
)
from hf_ehr.schema import EhrDataError
from tests.hub_stub import TOKEN, HubStub, Repository
from tests.models.freeze import FAMILIES

CODES = [f"ICD10CM/A{number}" for number in range(10, 40)]
FITTED = {"fitted_on": "0" * 64, "min_patients": 11}
LEFT_BEHIND = (
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "splits.json",
    "finetune.json", "predictions.csv", "patients.parquet", "examples/data-00000-of-00001.arrow", "model.pkl",
    "checkpoint-20/config.json", "attention.html", "patient_7.png", "notes.jsonl", "states.npy", "split_salt",
)  # fmt: skip
"""What may lie in a model folder and does not leave it."""


def saved_classifier(folder: Path, seed: int = 0, **fitted) -> Path:
    """A small Med-BERT with its tokenizer, as `hf-ehr finetune` leaves it."""
    tokenizer = EhrCodeTokenizer.from_codes(CODES, kinds=["diagnoses"], **(FITTED | fitted))
    torch.manual_seed(seed)
    config = MedBertConfig.tiny(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=16)
    config.thresholds = {"readmission": 0.3}
    config.id2label, config.label2id = {0: "no", 1: "readmission"}, {"no": 0, "readmission": 1}
    MedBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tmp_path) -> Path:
    return saved_classifier(tmp_path / "classifier")


@pytest.fixture(scope="module")
def assembled(tmp_path_factory) -> Path:
    """A folder that was assembled and proved."""
    root = tmp_path_factory.mktemp("published")
    source = saved_classifier(root / "classifier")
    for name in LEFT_BEHIND:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    return assemble(source, root / "published")


# What leaves


def test_a_published_folder_is_whole_and_holds_nothing_else(assembled):
    names = {path.relative_to(assembled).as_posix() for path in assembled.rglob("*") if path.is_file()}
    assert {name for name in names if not name.endswith(".py")} == {
        "config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    code = {name for name in names if name.endswith(".py")}
    assert {"modeling_medbert.py", "configuration_medbert.py", "tokenization_ehr.py", "code_hierarchy.py"} <= code
    assert all((assembled / name).read_bytes() == (MODELS / name).read_bytes() for name in code)
    config = json.loads((assembled / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining",
        "AutoModelForSequenceClassification",
    }  # fmt: skip
    assert config["thresholds"] == {"readmission": 0.3}
    assert config["id2label"] == {"0": "no", "1": "readmission"}
    assert config["custom_pipelines"]["risk-prediction"]["impl"] == "pipeline_patient_tasks.RiskPredictionPipeline"
    assert {"pipeline_patient_tasks.py", "pipeline_patients.py"} <= code


def test_a_folder_without_a_card_gets_one_that_the_hubs_parser_reads(assembled):
    card = ModelCard.load(assembled / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.model_name is None or "MedBert" in card.data.model_name
    assert "has not been evaluated" in card.text
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    assert "Known differences from the paper" in card.text


def test_a_second_run_replaces_what_the_first_one_wrote_and_nothing_else(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ehr.hub.verify", lambda folders: None)
    published = assemble(trained, tmp_path / "out")
    (published / "stale.py").write_bytes((MODELS / "modeling_gbert.py").read_bytes())
    with pytest.raises(EhrDataError, match=r"stale\.py.*Choose another"):
        assemble(trained, published)
    (published / "stale.py").unlink()
    (published / "modeling_gbert.py").write_bytes((MODELS / "modeling_gbert.py").read_bytes())
    assemble(trained, published)
    assert not (published / "modeling_gbert.py").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(EhrDataError, match=r"thesis\.tex"):
        assemble(trained, mine)
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))


# Every architecture and head


def heads(first_only: bool) -> list[tuple]:
    """Suite and head; of each class the first, or all."""
    found, seen = [], set()
    for family in FAMILIES:
        for head in family.heads:
            if not (first_only and head.model_class in seen):
                found.append((family, head))
            seen.add(head.model_class)
    return found


def classifier_of_visits(folder: Path) -> Path:
    """A MedM-PLM with its processor."""
    words = EhrCodeTokenizer.from_codes(["chest", "pain"], model_max_length=4, **FITTED)
    processor = MedMPLMProcessor(*(EhrCodeTokenizer.from_codes(CODES, **FITTED) for _ in range(2)), words)
    sizes = {"diagnosis_vocab_size": 35, "medication_vocab_size": 35}
    note = {"model_type": "bert", "vocab_size": 7, "hidden_size": 32, "num_hidden_layers": 1}
    note |= {"num_attention_heads": 2, "intermediate_size": 32}
    config = MedMPLMConfig(code_config=GBertConfig.tiny(**sizes), note_config=note, num_labels=2)
    MedMPLMForReadmission(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def published_heads(which: list[tuple], folder: Path) -> dict[Path, Path]:
    pairs = {}
    for family, head in which:
        source = folder / f"{family.fixture}-{head}" / "source"
        target = source.parent / "model"
        family.model(head).save_pretrained(source)
        for code in source.glob("*.py"):
            code.unlink()  # what travels comes from the package
        write_folder(source, target)
        check_publishable(target, source)
        pairs[target] = source
    return pairs


def test_the_heads_are_all_there_are():
    classes = {head.model_class.__name__ for _, head in heads(first_only=True)}
    assert classes == {name for name in hf_ehr.__all__ if "For" in name or name.endswith("Model")}
    assert {family.config(**head.overrides).model_type for family, head in heads(first_only=True)} == set(STREAMS)


@pytest.mark.parametrize("first_only", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["classes", "heads"])
def test_every_architecture_and_head_loads_alone_with_equal_numbers(first_only, tmp_path):
    which = heads(first_only)
    pairs = published_heads(which, tmp_path)
    assert len(pairs) == len(which)
    with_processor = tmp_path / "processor" / "model"
    pairs[with_processor] = classifier_of_visits(tmp_path / "processor" / "source")
    write_folder(pairs[with_processor], with_processor)
    verify(pairs)
    names = {path.name for path in with_processor.iterdir()}
    assert {"processor_config.json", "processing_medmplm.py", "diagnosis_tokenizer", "note_tokenizer"} <= names


def test_example_inputs_move_every_model(tmp_path):
    """A comparison of outputs that do not depend on the input would compare little."""
    for family, head in heads(first_only=True):
        model = family.model(head)
        one, other = (outputs_of(model, example_inputs(model, seed)) for seed in (0, 1))
        assert set(one) == set(other)
        changed = [name for name in one if one[name].is_floating_point() and not torch.equal(one[name], other[name])]
        assert changed, head


# What is found out


def told(scratch: Path, **changes) -> dict[str, str]:
    """What a process without the package left behind."""
    answer = {"module": "transformers_modules.model", "class": "M", "reading": {"tokenizer": ["T", "abc"]}}
    save_file(changes.pop("outputs", {"logits.0": torch.ones(2)}), scratch / "outputs.safetensors")
    (scratch / "outputs.json").write_text(json.dumps(answer | changes))
    return {"name": "model", "outputs": str(scratch / "outputs.safetensors")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": {"logits.0": torch.tensor([1.0, 1.001])}}, r"`logits\.0` of model must be the same"),
        ({"outputs": {"logits.0": torch.ones(2, 1)}}, r"`logits\.0` of model must be the same"),
        ({"outputs": {"logits.0": torch.ones(2), "more.0": torch.ones(1)}}, r"`more\.0` of model must be the same"),
        ({"reading": {"tokenizer": ["T", "abd"]}}, "tokenizer or processor of model must be the same"),
        ({"class": "N"}, "model must load as M from its own code"),
        ({"module": "hf_ehr.models.modeling_medbert"}, "model must load as M from its own code"),
    ],
)
def test_whatever_differs_without_the_package_is_found(changes, message, tmp_path):
    expected = {"logits.0": torch.ones(2)}, {"tokenizer": ["T", "abc"]}, "M"
    _compare(told(tmp_path), *expected)
    with pytest.raises(PublishingError, match=message):
        _compare(told(tmp_path, **changes), *expected)


def test_what_is_read_is_told_apart_by_what_it_knows(assembled, tmp_path):
    EhrCodeTokenizer.from_codes(CODES[::-1], **FITTED).save_pretrained(tmp_path)
    one, other = reading_of(assembled), reading_of(tmp_path)
    assert one["tokenizer"][0] == other["tokenizer"][0] == "EhrCodeTokenizer"
    assert one["tokenizer"][1] != other["tokenizer"][1]


def test_code_that_needs_the_package_is_found(assembled, tmp_path):
    changed = tmp_path / "model"
    shutil.copytree(assembled, changed)
    code = changed / "modeling_medbert.py"
    code.write_text("import hf_ehr.schema\n" + code.read_text())
    with pytest.raises(PublishingError, match="must load where this package is not installed"):
        verify({changed: assembled})
    with pytest.raises(PublishingError, match=r"modeling_medbert\.py.*not that of"):
        check_publishable(changed)


def test_weights_that_are_missing_are_found(trained, tmp_path):
    weights = load_file(trained / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EhrDataError, match=r"missing keys: \['classifier\.weight'\]"):
        assemble(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_others_are_refused(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(EhrDataError, match="must hold a model of this package, got BertModel"):
        publish(tmp_path / "bert")
    with pytest.raises(EhrDataError, match=r"config\.json is missing"):
        publish(tmp_path)


# What must not leave


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_must_not_leave_is_refused_by_its_place(name, assembled, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(assembled, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(PublishingError, match=Path(name).name):
        check_publishable(folder)


def test_what_belongs_to_a_model_is_not_refused():
    assert why_not(Path("diagnosis_tokenizer/tokenizer.json")) is None
    assert why_not(Path("model-00001-of-00002.safetensors")) is None
    assert why_not(Path("calibration.png")) is None
    assert why_not(Path("sub/config.json")) is not None
    assert why_not(Path("a_tokenizer/deeper/tokenizer.json")) is not None


def poisoned(folder: Path, kind: str) -> None:
    """Puts something into a folder under a name that may leave."""
    card = folder / "README.md"
    if kind == "pickle":
        (folder / "model.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))
    elif kind == "text":
        (folder / "model.safetensors").write_text("the patient was admitted with chest pain")
    elif kind == "archive":
        with zipfile.ZipFile(folder / "calibration.png", "w") as archive:
            archive.writestr("notes.txt", "text")
    elif kind == "token":
        card.write_text(card.read_text() + "hf_" + "Ab1" * 12)
    elif kind == "own token":
        card.write_text(card.read_text() + "Bearer secret-of-mine")
    elif kind == "home":
        card.write_text(card.read_text() + f"data in {Path.home() / 'mimic'}")
    elif kind == "folder":
        card.write_text(card.read_text() + f"made in {folder.resolve()}")
    elif kind == "patients":
        (folder / "evaluation.json").write_text(json.dumps({"rows": [{"subject_id": 17, "p": 0.2}]}))
    elif kind == "link":
        (folder / "LICENSE").symlink_to("/etc/hostname")
    elif kind == "licence":
        card.write_text(card.read_text().replace("license: apache-2.0\n", ""))
    else:
        raise ValueError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "pickle or an archive"),
        ("archive", "pickle or an archive"),
        ("text", "no safetensors file"),
        ("token", "access token"),
        ("own token", "access token"),
        ("home", "folder of this machine"),
        ("folder", "folder of this machine"),
        ("patients", "subject_id"),
        ("link", "must be a file, got a link"),
        ("licence", "must name a `license`"),
    ],
)
def test_what_must_not_leave_is_refused_by_what_it_holds(kind, message, assembled, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    folder = tmp_path / "model"
    shutil.copytree(assembled, folder)
    check_publishable(folder)
    poisoned(folder, kind)
    with pytest.raises(PublishingError, match=message):
        check_publishable(folder)


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        ({"min_patients": 5}, "at least 11 to publish a vocabulary, got 5"),
        ({"min_patients": None}, "at least 11"),
    ],
)
def test_vocabularies_of_few_patients_are_refused(fitted, message, tmp_path):
    source = saved_classifier(tmp_path / "model", **fitted)
    with pytest.raises(PublishingError, match=message):
        publish(source)
    assert not (tmp_path / "model-published").exists()


def test_vocabularies_that_do_not_say_of_how_many_patients_they_are_are_refused(trained):
    EhrCodeTokenizer.from_codes(CODES).save_pretrained(trained)
    with pytest.raises(PublishingError, match="must say of how many patients"):
        check_vocabularies(trained)


def test_labels_of_few_patients_are_refused_by_the_record_of_training(trained):
    check_vocabularies(trained)
    (trained / "coder.json").write_text(json.dumps({"options": {"min_patients": 2}}))
    with pytest.raises(PublishingError, match=r"got 2 in coder\.json"):
        check_vocabularies(trained)


# The Hub


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=600, check=False
    )


STRANGER = """
import sys
sys.modules["hf_ehr"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
name = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__, type(model)
with torch.no_grad():
    logits = model(**load_file(sys.argv[2])).logits
torch.testing.assert_close(logits, load_file(sys.argv[3])["logits.0"], atol=1e-6, rtol=0)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
assert tokenizer.encode_patient([["ICD10CM/A10.9"]])["input_ids"] == [5]
assert AutoModel.from_pretrained(name, trust_remote_code=True).config.thresholds == {"readmission": 0.3}
answer = pipeline("risk-prediction", model=name, trust_remote_code=True)({"visits": [["ICD10CM/A10.9"]]})
assert answer["threshold"] == 0.3 and 0 < answer["probability"] < 1, answer
print("equal")
"""

OWNER = """
import sys
from pathlib import Path
import torch
import hf_ehr
from hf_ehr.hub import PublishingError, push
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
assert type(model) is hf_ehr.MedBertForSequenceClassification
with torch.no_grad():
    logits = model(**load_file(sys.argv[2])).logits
torch.testing.assert_close(logits, load_file(sys.argv[3])["logits.0"], atol=1e-6, rtol=0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = [{"input_ids": [5, 6 + n], "visit_ids": [1, 1 + n], "labels": n} for n in (0, 1)]
settings = TrainingArguments(
    sys.argv[4], max_steps=1, push_to_hub=True, hub_model_id="tester/trained", hub_private_repo=True, use_cpu=True,
    report_to="none", hub_strategy="end", disable_tqdm=True,
)
trainer = Trainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
again = AutoModelForSequenceClassification.from_pretrained("tester/trained")
for name, weight in model.state_dict().items():
    assert torch.equal(again.state_dict()[name], weight), name
try:
    push(Path(sys.argv[5]), "org/open")
except PublishingError as error:
    assert "org/open must be private" in str(error)
    print("equal")
"""


@pytest.fixture(scope="module")
def hub(assembled, tmp_path_factory):
    """A Hub to which the command line has pushed the model."""
    root = tmp_path_factory.mktemp("hub")
    source = saved_classifier(root / "classifier")
    model = MedBertForSequenceClassification.from_pretrained(source).eval()
    inputs = example_inputs(model)
    save_file({name: value.contiguous() for name, value in inputs.items()}, root / "inputs")
    save_file(outputs_of(model, inputs), root / "outputs")
    with HubStub() as stub:
        words = ["-m", "hf_ehr.cli.main", "publish", str(source), "--repo-id", "org/readmission"]
        stub.root = root
        stub.result = run(words, stub.client_environment(root / "home"))
        yield stub


def test_the_command_pushes_privately_what_it_assembled(hub, assembled):
    assert hub.result.returncode == 0, hub.result.stderr
    assert f"{hub.url}/org/readmission" in hub.result.stdout
    repository = hub.repositories["org/readmission"]
    assert repository.private
    assert repository.commits == ["Publish MedBertForSequenceClassification"]
    written = hub.root / "classifier-published"
    assert repository.files == {
        path.relative_to(written).as_posix(): path.read_bytes() for path in written.rglob("*") if path.is_file()
    }
    assert not hub.unknown or all("agent-harnesses" in one for one in hub.unknown)


def test_strangers_load_it_by_name_without_the_package(hub):
    (hub.root / "stranger.py").write_text(STRANGER)
    command = [
        "-I",
        str(hub.root / "stranger.py"),
        "org/readmission",
        *(str(hub.root / n) for n in ("inputs", "outputs")),
    ]
    done = run(command, hub.client_environment(hub.root / "stranger"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("equal")
    with pytest.raises(HTTPError, match="404"):  # it is private
        urlopen(f"{hub.url}/org/readmission/resolve/main/config.json")


@pytest.mark.slow
def test_with_the_package_it_loads_the_trainer_pushes_and_nothing_private_goes_to_a_public_repository(hub):
    (hub.root / "owner.py").write_text(OWNER)
    hub.repositories["org/open"] = Repository(private=False)
    files = [str(hub.root / name) for name in ("inputs", "outputs", "run", "classifier-published")]
    done = run([str(hub.root / "owner.py"), "org/readmission", *files], hub.client_environment(hub.root / "owner"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("equal")
    assert not hub.repositories["org/open"].files
    assert hub.repositories["tester/trained"].private
    assert {"modeling_medbert.py", "model.safetensors", "config.json"} <= set(hub.repositories["tester/trained"].files)


def test_no_token_is_in_any_byte_that_was_uploaded(hub):
    assert sum(len(body) for body in hub.uploaded) > 50_000
    assert not any(TOKEN.encode() in body for body in hub.uploaded)


def test_without_a_token_nothing_is_done(trained, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PublishingError, match="hf auth login"):
        publish(trained, PublishArguments(repo_id="org/name"))
    assert not (tmp_path / "classifier-published").exists()

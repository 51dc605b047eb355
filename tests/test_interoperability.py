"""The models in other people's tools, tried with the real thing: PEFT, ONNX, captum, TensorBoard, Optuna, MEDS.

A tool of the `dev` extra that is missing fails its test: the installation is then not the one that is promised.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_ehr import EhrCodeTokenizer, MedBertConfig, MedBertForSequenceClassification
from hf_ehr.collators import PaddedCollator
from hf_ehr.models.integrated_gradients import integrated_gradient_evidence, integrated_gradients
from hf_ehr.models.note_evidence import EncodedNotes, segment_texts
from hf_ehr.pipelines import ICDCodingPipeline
from hf_ehr.prediction_files import prediction_table, write_predictions
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks import read_labels
from tests.builders import day
from tests.coders import HIP, pointing_coder, random_coder, words_of
from tests.models.common import padded_batch

ROOT = Path(__file__).parents[1]
VOCABULARY = 30
STREAMS = ("input_ids", "attention_mask", "visit_ids")


def classifier(**fields) -> MedBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.3, "hidden_dropout_prob": 0.0}
    return MedBertForSequenceClassification(MedBertConfig.tiny(vocab_size=VOCABULARY, **(sizes | fields))).eval()


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


class Positional(torch.nn.Module):
    """A classifier whose inputs have places: what exporters take."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, visit_ids):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, visit_ids=visit_ids).logits


class Histories(Dataset):
    """Sixteen patients whose outcome is whether code 7 is in their history."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        generator = np.random.default_rng(index)
        codes = generator.integers(8, VOCABULARY, 6)
        codes[0] = 7 if index % 2 else 8
        return {
            "input_ids": codes.tolist(), "visit_ids": [1, 1, 1, 2, 2, 2], "serial_ids": [0, 1, 2, 0, 1, 2],
            "labels": index % 2,
        }  # fmt: skip


def trainer(output, model=None, **arguments) -> Trainer:
    tokenizer = EhrCodeTokenizer.from_codes([f"X/{number}" for number in range(VOCABULARY - 5)])
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 1}
    settings |= {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return Trainer(
        model, TrainingArguments(str(output), **(settings | arguments)), PaddedCollator(tokenizer),
        train_dataset=Histories(), eval_dataset=Histories(),
        **({"model_init": lambda trial=None: classifier()} if model is None else {}),
    )  # fmt: skip


# Adapters


def test_a_lora_adapter_is_saved_alone_and_merged_gives_the_same_logits(tmp_path):
    import peft

    classifier().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["classifier"], init_lora_weights=False)
    ).eval()
    batch = padded_batch(VOCABULARY)
    expected = logits_of(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(logits_of(fresh, batch), expected, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits_of(loaded.merge_and_unload(), batch), expected, atol=1e-5, rtol=0)
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert weights < (tmp_path / "base" / "model.safetensors").stat().st_size / 2


# Compilers and ONNX


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ffn", "gru"])
def test_a_compiled_model_gives_the_same_logits_and_gradients(head):
    """Through `aot_eager`: what inductor would get. Other lengths than the first must not give other numbers."""
    model, gradients = classifier(head=head, head_hidden_size=8), []
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in ((10, 6, 3), (4, 7)):
        batch = padded_batch(VOCABULARY, lengths=lengths)
        torch.testing.assert_close(logits_of(compiled, batch), logits_of(model, batch), atol=1e-5, rtol=0)
    for one in (model, compiled):
        model.zero_grad()
        one(**batch, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_inductor_gives_the_same_logits():
    model, batch = classifier(), padded_batch(VOCABULARY)
    torch.testing.assert_close(logits_of(torch.compile(model), batch), logits_of(model, batch), atol=1e-5, rtol=0)


def test_an_exported_program_gives_the_same_logits_for_other_patients():
    model, batch = Positional(classifier()), padded_batch(VOCABULARY)
    sizes = {0: torch.export.Dim("patients", min=1, max=64), 1: torch.export.Dim("codes", min=2, max=512)}
    program = torch.export.export(
        model, tuple(batch[name] for name in STREAMS), dynamic_shapes=dict.fromkeys(STREAMS, sizes)
    )
    for lengths in ((10, 6, 3), (4, 7, 2, 9, 1)):
        other = padded_batch(VOCABULARY, lengths=lengths, seed=3)
        expected = model(*(other[name] for name in STREAMS))
        found = program.module()(*(other[name] for name in STREAMS))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_onnxruntime_gives_the_same_logits_for_other_patients(tmp_path):
    import onnxruntime

    model, batch = Positional(classifier()), padded_batch(VOCABULARY)
    sizes = {0: torch.export.Dim("patients", min=1, max=64), 1: torch.export.Dim("codes", min=2, max=512)}
    torch.onnx.export(
        model, tuple(batch[name] for name in STREAMS), tmp_path / "model.onnx", input_names=list(STREAMS),
        output_names=["logits"], dynamic_shapes=dict.fromkeys(STREAMS, sizes), dynamo=True, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for lengths in ((10, 6, 3), (4, 7, 2, 9, 1)):
        other = padded_batch(VOCABULARY, lengths=lengths, seed=3)
        (found,) = session.run(None, {name: other[name].numpy() for name in STREAMS})
        expected = model(*(other[name] for name in STREAMS)).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


# Integrated gradients

WORDS = {"ICD10CM/S72.002A": ["hip", "fracture"], "ICD10CM/J45.909": ["asthma"]}


@pytest.fixture(scope="module")
def words():
    return words_of(HIP)


@pytest.fixture(scope="module", params=["xml", "cls"])
def coder(request, words):
    return random_coder(words, *WORDS, head=request.param, hidden_dropout_prob=0.0)


def test_captum_gives_the_same_integrated_gradients_of_a_coder(coder, words):
    from captum.attr import IntegratedGradients

    note = EncodedNotes(coder, segment_texts(coder, words, [HIP]))
    ids, mask = note.segments.input_ids, note.segments.attention_mask
    embed = coder.get_input_embeddings()
    special = torch.from_numpy(note.segments.offsets[:, 0] < 0)[None]
    silent = torch.where(special, ids, coder.config.pad_token_id)
    with torch.no_grad():
        inputs, baseline = embed(ids), embed(silent)
    captum = IntegratedGradients(lambda x, mask: coder(inputs_embeds=x, attention_mask=mask).logits)
    mine = integrated_gradients(note, [0, 1], steps=16)
    for label in (0, 1):
        theirs = captum.attribute(
            inputs, baseline, target=label, additional_forward_args=mask, n_steps=16, method="gausslegendre"
        )
        np.testing.assert_allclose(mine[label], theirs.sum(dim=-1)[0].detach().numpy(), atol=1e-5)


def test_integrated_gradients_add_up_to_the_difference_of_the_scores(coder, words):
    note = EncodedNotes(coder, segment_texts(coder, words, [HIP]))
    ids = note.segments.input_ids
    special = torch.from_numpy(note.segments.offsets[:, 0] < 0)[None]
    with torch.no_grad():
        full, silent = (
            coder(input_ids=one, attention_mask=note.segments.attention_mask).logits[0]
            for one in (ids, torch.where(special, ids, coder.config.pad_token_id))
        )
    found = integrated_gradients(note, [0, 1], steps=128)
    np.testing.assert_allclose(found.sum(axis=1), (full - silent).numpy(), rtol=0.02)
    assert np.abs(found[:, special[0].numpy()]).max() == 0


def test_a_note_of_several_segments_is_explained_as_a_whole(coder, words):
    longer = " ".join([HIP] * 5)
    one, several = (
        integrated_gradient_evidence(coder, words, longer, [1], steps=4, max_length=16, batch_size=size).weights
        for size in (1, 64)
    )
    assert one.shape[1] > 64
    np.testing.assert_allclose(one, several, atol=1e-6)


def test_the_pipeline_marks_the_words_that_integrated_gradients_find(words):
    coder = ICDCodingPipeline(model=pointing_coder(words, WORDS), tokenizer=words, device="cpu")
    spans = {
        method: {code["code"]: code["spans"][0]["text"] for code in coder(HIP, evidence=method, max_spans=1)}
        for method in ("integrated_gradients", "label_attention")
    }
    assert spans["integrated_gradients"]["ICD10CM/J45.909"] == "asthma"
    assert set(spans["integrated_gradients"]["ICD10CM/S72.002A"].split()) <= {"hip", "fracture"}
    assert spans["integrated_gradients"].keys() == spans["label_attention"].keys()


def test_captum_explains_the_codes_of_a_patient():
    from captum.attr import LayerIntegratedGradients

    model, batch = classifier(), padded_batch(VOCABULARY, lengths=(6,))
    model.requires_grad_(True)

    def positive(input_ids, attention_mask, visit_ids):
        return model(input_ids=input_ids, attention_mask=attention_mask, visit_ids=visit_ids).logits[:, 1]

    layer = LayerIntegratedGradients(positive, model.get_input_embeddings())
    others = (batch["attention_mask"], batch["visit_ids"])
    silent = torch.full_like(batch["input_ids"], model.config.mask_token_id)
    parts, gap = layer.attribute(
        batch["input_ids"], silent, additional_forward_args=others, n_steps=64, return_convergence_delta=True
    )
    difference = positive(batch["input_ids"], *others) - positive(silent, *others)
    torch.testing.assert_close(parts.sum(dim=(1, 2)), difference.detach().to(parts.dtype), atol=1e-3, rtol=0)
    assert abs(gap.item()) < 1e-3


# Training tools


def test_tensorboard_reads_what_the_trainer_logs(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    made = trainer(tmp_path / "run", classifier(), report_to="tensorboard")
    made.train()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses == pytest.approx(logged, abs=1e-4)
    assert len(losses) == 4


def test_optuna_searches_learning_rates_through_the_trainer(tmp_path):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = trainer(tmp_path, eval_strategy="epoch", num_train_epochs=8)
    rates = [1e-7, 2e-2]
    best = made.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        lambda metrics: metrics["eval_loss"],
        n_trials=2, direction="minimize", backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}),
    )  # fmt: skip
    assert best.hyperparameters == {"learning_rate": 2e-2}
    assert best.objective < 0.6


# The tools around MEDS

LABELS = pa.table(
    {
        "subject_id": [1, 1, 2, 3],
        "prediction_time": pa.array([day(0), day(5), day(1), day(2)], pa.timestamp("us")),
        "boolean_value": [True, False, True, False],
    }
)


def test_a_prediction_file_has_the_labels_and_what_was_predicted(tmp_path):
    write_predictions(LABELS, [0.9, 0.2, 0.4, 0.1], tmp_path / "p.parquet", threshold=0.4)
    found = pl.read_parquet(tmp_path / "p.parquet")
    assert found.drop("predicted_boolean_value", "predicted_boolean_probability").to_arrow().equals(LABELS)
    assert found["predicted_boolean_value"].to_list() == [True, False, True, False]
    assert found["predicted_boolean_probability"].to_list() == pytest.approx([0.9, 0.2, 0.4, 0.1])
    assert prediction_table(LABELS, [0.5] * 4)["predicted_boolean_value"].null_count == 4
    with pytest.raises(ValueError, match="must be 4 numbers in"):
        prediction_table(LABELS, [0.5, 1.5, 0, 0])
    floats = pa.table({name: LABELS[name] for name in ("subject_id", "prediction_time")} | {"float_value": [1.0] * 4})
    with pytest.raises(EhrDataError, match="must have a `boolean_value` in every row"):
        prediction_table(floats, [0.5] * 4)


TASK = """
predicates: {admission: {code: ADMISSION}, drug: {code: "DRUG//A"}}
trigger: admission
windows:
  target: {start: trigger, end: start + 30d, start_inclusive: False, end_inclusive: True, label: drug, index_timestamp: start}
"""  # noqa: E501 - as ACES writes it
MEDS_TOOLS = ["es-aces==0.7.3", "meds-evaluation==0.0.6"]
"""ACES asks for polars 1: it lives in an environment of its own, beside that of this package."""


@pytest.fixture(scope="module")
def meds_commands(tmp_path_factory):
    """The commands of the tools around MEDS, installed for this test."""
    folder = tmp_path_factory.mktemp("meds")
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *MEDS_TOOLS]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"the tools around MEDS could not be installed: {done.stderr[-1000:]}"
    return folder / "bin"


@pytest.mark.slow
def test_labels_of_aces_are_read_and_meds_evaluation_reads_our_predictions(meds_commands, tmp_path):
    rows = [
        {"subject_id": subject, "time": day(time), "code": code, "numeric_value": None}
        for subject, time, code in (
            *((1, 0, "ADMISSION"), (1, 3, "DRUG//A"), (1, 60, "ADMISSION"), (1, 61, "DRUG//B")),
            *((2, 0, "ADMISSION"), (2, 40, "DRUG//A")),
        )
    ]
    schema = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
    pl.DataFrame(rows, schema=schema).write_parquet(tmp_path / "events.parquet")
    (tmp_path / "task.yaml").write_text(TASK)
    write_predictions(LABELS, [0.9, 0.2, 0.4, 0.1], tmp_path / "predictions.parquet", threshold=0.5)
    events, predictions, scores = (
        tmp_path / name for name in ("events.parquet", "predictions.parquet", "scores.json")
    )
    for words in (
        ["aces-cli", f"cohort_dir={tmp_path}", "cohort_name=task", "data.standard=meds", f"data.path={events}"],
        ["meds-evaluation-cli", f"predictions_path={predictions}", f"output_file={scores}"],
    ):
        command = [meds_commands / words[0], *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    labels = read_labels(tmp_path / "task.parquet").select(["subject_id", "prediction_time", "boolean_value"])
    found = {(row["subject_id"], row["prediction_time"]): row["boolean_value"] for row in labels.to_pylist()}
    assert found == {(1, day(0)): True, (1, day(60)): False, (2, day(0)): False}
    figures = json.loads(scores.read_text())["samples_equally_weighted"]
    assert (figures["roc_auc_score"], figures["binary_accuracy"]) == (1.0, 0.75)


# The wheel


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_works_there(tmp_path):
    """Its requirements are those of this environment, lent by path; the package itself comes from the wheel alone."""
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    pip = ["-m", "pip", "--disable-pip-version-check"]
    build = [sys.executable, *pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("transformers_ehr-*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "hf_ehr").rglob("*.py")}
    tracked = {name.removeprefix("src/") for name in names.split("\0") if name.startswith("src/")}
    assert (modules & tracked) - set(inside) == set()
    assert {name for name in tracked if name.endswith((".yaml", ".html", "py.typed"))} - set(inside) == set()
    assert {f"hf_ehr/model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.md")} - set(inside) == set()
    assert not [name for name in inside if name.startswith("tests/")]

    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    install = [python, *pip, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    lent = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (Path(lent) / "lent.pth").write_text("\n".join(paths) + "\n")
    program = (
        "import hf_ehr; print(hf_ehr.__file__)\n"
        "model = hf_ehr.MedBertModel(hf_ehr.MedBertConfig.tiny(vocab_size=20)); print(model.num_parameters())"
    )
    shown = subprocess.run([python, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True, env={})
    assert shown.stdout.startswith(str(tmp_path / "empty"))
    command = [tmp_path / "empty" / "bin" / "hf-ehr"]
    for words, answer in ((["--version"], "transformers-ehr "), (["doctor"], "Attention")):
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path, env={}, timeout=300)
        assert answer in done.stdout, done.stderr[-2000:]

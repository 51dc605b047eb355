"""The road end to end on a few synthetic patients, and the rules of training."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hf_ehr import EhrCodeTokenizer, MedBertConfig, MedBertForPreTraining, MedBertForSequenceClassification, training
from hf_ehr.collators import PackedCollator
from hf_ehr.datasets import build_examples
from hf_ehr.evaluation import EvaluateArguments, evaluate
from hf_ehr.metrics import auroc
from hf_ehr.prepare import prepare
from hf_ehr.reports import MANDATORY_ROWS
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks import LeakageError, SplitManifest
from hf_ehr.training import DataArguments, FinetuneArguments, PretrainArguments
from hf_ehr.training._runs import Run, last_checkpoint
from hf_ehr.training.finetuning import positive, set_probe
from tests.builders import patient, records, visit

WORLD = {"world": "C", "patients": 900, "conditions": 18, "synonyms": 5, "noise_codes": 10}
SETTINGS = {"use_cpu": True, "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataArguments:
    folder = tmp_path_factory.mktemp("road") / "data"
    prepare("synthetic", None, folder, shards=2, workers=1, progress=False, options=WORLD)
    return DataArguments(data=str(folder), max_length=128)


def arguments(folder: Path, **more) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), **(SETTINGS | more))


SMALL = {"preset": "tiny", "model_options": '{"hidden_size": 16, "num_attention_heads": 2}', "max_tokens": 512}


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("road") / "pretrained"
    training.pretrain(
        data, PretrainArguments(**SMALL), arguments(folder, num_train_epochs=2, learning_rate=1e-2, save_strategy="no")
    )
    return folder


@pytest.fixture(scope="module")
def classifier(data, pretrained, tmp_path_factory) -> Path:
    options = FinetuneArguments(task="synthetic_outcome", model=str(pretrained), train_patients=200)
    return training.finetune(
        data, options, arguments(tmp_path_factory.mktemp("road") / "classifier", num_train_epochs=1)
    )


def test_pretraining_beats_guessing_by_frequency_on_hidden_codes(pretrained):
    figures = json.loads((pretrained / "pretraining.json").read_text())["held_out"]
    assert figures["code_loss"] < figures["unigram_loss"]


def test_a_classifier_folder_loads_through_the_auto_classes_and_scores_as_in_training(data, classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    options = FinetuneArguments(task="synthetic_outcome", model=str(classifier))
    examples = training.examples_of(data, options, EhrCodeTokenizer.from_pretrained(classifier), data.splits(), "test")
    row = examples[3]
    inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "visit_ids", "serial_ids")}
    with torch.no_grad():
        alone = model(**inputs).logits.softmax(-1)[0, 1].item()
    assert alone == pytest.approx(training.predict(model, examples, tokenizer)[3], abs=1e-5)
    assert set(model.config.thresholds) == {"synthetic_outcome"}


def test_a_model_folder_holds_no_patients_and_no_pickle(pretrained, classifier):
    for folder in (pretrained, classifier):
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".arrow", ".parquet", ".pt", ".pth")]
        assert not list(folder.glob("checkpoint-*"))
        assert not (folder / "run.json").exists()


def test_evaluation_carries_every_mandatory_row_and_a_card(classifier, tmp_path):
    table = evaluate(EvaluateArguments(model=str(classifier), output=str(tmp_path))).read_text()
    assert all(f"| {row} |" in table for row in (*MANDATORY_ROWS, "Untrained Med-BERT", "Med-BERT"))
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    card = (classifier / "README.md").read_text()
    assert "not a medical device" in card
    assert table in card


def test_pretraining_never_reads_a_held_out_patient(data, pretrained):
    splits, manifest = data.splits(), SplitManifest.load(pretrained / "splits.json")
    assert all(len(manifest.splits[name]) == len(ids) for name, ids in splits.items())
    moved = DataArguments(data=data.data, split_seed=1)
    options = FinetuneArguments(task="synthetic_outcome", model=str(pretrained))
    with pytest.raises(LeakageError, match="L1"):
        training.finetune(moved, options, arguments(pretrained / "other"))


def test_a_tokenizer_of_other_patients_is_refused(data, pretrained, tmp_path):
    options = PretrainArguments(preset="tiny", tokenizer=str(pretrained))
    with pytest.raises(LeakageError, match="L5"):
        training.pretrain(DataArguments(data=data.data, split_seed=1), options, arguments(tmp_path))


def test_options_may_be_longer_than_the_name_of_a_file(data, tmp_path):
    long = json.dumps({"initializer_range": 0.02, "label2id": {f"label {n}": n for n in range(40)}})
    assert len(long) > 255
    run = Run(arguments(tmp_path), "made.json", PretrainArguments(model_options=long))
    assert run.digest != Run(arguments(tmp_path / "other"), "made.json", PretrainArguments()).digest


def test_few_shot_subsets_are_nested_and_of_training_patients(data, pretrained):
    tokenizer, splits = EhrCodeTokenizer.from_pretrained(pretrained), data.splits()
    chosen = {}
    for size in (50, 200):
        options = FinetuneArguments(task="synthetic_outcome", model=str(pretrained), train_patients=size)
        chosen[size] = set(training.examples_of(data, options, tokenizer, splits, "train")["subject_id"])
    assert 190 <= len(chosen[200]) <= 200  # those without a visible code are left out
    assert chosen[50] < chosen[200] <= set(splits["train"].tolist())


def test_the_unigram_start_is_the_log_frequency_of_training_codes():
    both, one = visit(1, diagnoses=["ICD10CM/I10", "ICD10CM/E11"]), visit(1, diagnoses=["ICD10CM/I10"])
    history = records(patient(1, [both]), patient(2, [one]))
    tokenizer = EhrCodeTokenizer.from_codes(["ICD10CM/I10", "ICD10CM/E11"])
    model = MedBertForPreTraining(MedBertConfig.tiny(vocab_size=len(tokenizer)))
    training.start_from_unigram(model, build_examples(history, tokenizer), tokenizer)
    counts = np.array([0, 0, 0, 0, 0, 2, 1]) + 0.5
    np.testing.assert_allclose(model.head.decoder.bias.detach().numpy(), np.log(counts / counts.sum()), rtol=1e-5)


def test_the_paper_schedule_warms_up_decays_and_spares_norms_and_biases(tmp_path):
    settings = arguments(
        tmp_path, learning_rate=5e-5, weight_decay=0.01, warmup_steps=10_000, max_steps=100_000, adam_epsilon=1e-6
    )
    model = MedBertForPreTraining(MedBertConfig.tiny(vocab_size=50))
    trainer = Trainer(model, settings)
    trainer.create_optimizer_and_scheduler(100_000)
    decayed, spared = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed["params"])
    rates = {}
    for step in range(1, 100_001):
        trainer.lr_scheduler.step()
        if step in (5_000, 10_000, 55_000, 100_000):
            rates[step] = trainer.lr_scheduler.get_last_lr()[0]
    assert rates == pytest.approx({5_000: 2.5e-5, 10_000: 5e-5, 55_000: 2.5e-5, 100_000: 0.0})


def test_the_classifier_learns_a_pair_of_codes_from_two_visits(tmp_path):
    """Risk needs A in one visit and B in another: no single code tells (acceptance row 10)."""
    random = np.random.default_rng(0)
    has_a, has_b = random.random(1200) < 0.5, random.random(1200) < 0.5
    noise = random.integers(0, 20, (1200, 2))
    codes = ["ICD10CM/A01", "ICD10CM/B02", *(f"ICD10CM/C{i:02d}" for i in range(20))]
    people = []
    for i, (a, b) in enumerate(zip(has_a, has_b, strict=True)):
        early = visit(1, diagnoses=[codes[2 + noise[i, 0]]] + [codes[0]] * int(a))
        late = visit(9, diagnoses=[codes[2 + noise[i, 1]]] + [codes[1]] * int(b))
        people.append(patient(i, [early, late]))
    tokenizer = EhrCodeTokenizer.from_codes(codes)
    examples = build_examples(records(*people), tokenizer)
    examples = examples.remove_columns("prolonged_stay_labels").add_column(
        "labels", (has_a ^ has_b).astype(int).tolist()
    )
    torch.manual_seed(0)
    model = MedBertForSequenceClassification(MedBertConfig.tiny(vocab_size=len(tokenizer), initializer_range=0.1))
    settings = arguments(
        tmp_path, num_train_epochs=12, learning_rate=2e-3, per_device_train_batch_size=32, save_strategy="no"
    )
    Trainer(model, settings, PackedCollator(tokenizer), train_dataset=examples.select(range(900))).train()
    held_out = examples.select(range(900, 1200))
    assert auroc(np.asarray(held_out["labels"]), training.predict(model, held_out, tokenizer)) > 0.9


CRASHING = """
import sys, json
from transformers import TrainingArguments
from hf_ehr import training
data, output = training.DataArguments(data=sys.argv[1], max_length=128), sys.argv[2]
options = training.PretrainArguments(**json.loads(sys.argv[3]))
training.pretrain(data, options, TrainingArguments(output_dir=output, **json.loads(sys.argv[4])))
"""


def test_pretraining_killed_in_the_middle_resumes_to_the_same_weights(data, tmp_path):
    settings = SETTINGS | {"num_train_epochs": 3, "learning_rate": 1e-2, "save_steps": 5, "save_total_limit": 1}
    command = [sys.executable, "-c", CRASHING, data.data, str(tmp_path / "killed")]
    command += [json.dumps(SMALL), json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    arguments_of = lambda name: TrainingArguments(output_dir=str(tmp_path / name), **settings)  # noqa: E731
    training.pretrain(data, PretrainArguments(**SMALL), arguments_of("killed"))
    training.pretrain(data, PretrainArguments(**SMALL), arguments_of("whole"))
    resumed, whole = (
        MedBertForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in ("killed", "whole")
    )
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_finished_run_is_not_run_again_and_no_other_run_may_take_its_folder(data, pretrained, tmp_path):
    options = FinetuneArguments(task="synthetic_outcome", model=str(pretrained), train_patients=60)
    settings = arguments(tmp_path / "run", num_train_epochs=1)
    weights = training.finetune(data, options, settings) / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert training.finetune(data, options, settings) / "model.safetensors" == weights
    assert weights.stat().st_mtime_ns == made
    others = [
        (data, replace(options, train_patients=61), settings),
        (data, options, arguments(tmp_path / "run", num_train_epochs=2)),
        (replace(data, min_patients=12), options, settings),
    ]
    for other in others:
        with pytest.raises(EhrDataError, match="`output_dir` must not hold a run of other data"):
            training.finetune(*other)
    assert weights.stat().st_mtime_ns == made


def test_a_model_that_was_trained_anew_in_its_place_is_another_model(data, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "pretrained")
    options = FinetuneArguments(task="synthetic_outcome", model=str(tmp_path / "pretrained"), train_patients=60)
    settings = arguments(tmp_path / "run", num_train_epochs=1)
    training.finetune(data, options, settings)
    model = MedBertForPreTraining.from_pretrained(pretrained)
    model.head.norm.bias.data += 1
    model.save_pretrained(tmp_path / "pretrained")
    with pytest.raises(EhrDataError, match="`output_dir`"):
        training.finetune(data, options, settings)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (10, '{"epoch": 1'), (9, "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-11").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert last_checkpoint(tmp_path / "nothing") is None


def test_checkpoints_of_which_nobody_knows_what_they_are_are_not_resumed(data, pretrained, tmp_path):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    options = FinetuneArguments(task="synthetic_outcome", model=str(pretrained))
    with pytest.raises(EhrDataError, match="`output_dir`"):
        training.finetune(data, options, arguments(tmp_path / "run"))


def test_a_probe_does_not_hang_on_a_feature_that_hardly_varies():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    shifts = {"early": 1.5 * labels, "constant": 1e-3 * labels}
    states = np.stack([rng.normal(0, 1, 200) + shifts["early"], 5 + rng.normal(0, 3e-4, 200) + shifts["constant"]], 1)
    layer = torch.nn.Linear(2, 2)
    set_probe(layer, states.astype(np.float32), labels, states.astype(np.float32), labels)

    def probabilities(moved: float) -> np.ndarray:
        with torch.no_grad():
            return positive(layer(torch.from_numpy(states + np.array([0.0, moved])).float()).numpy())

    assert auroc(labels, probabilities(0.0)) > 0.8
    assert np.abs(probabilities(0.0).mean() - 0.5) < 0.05
    # One hundredth of the feature, as the first steps of fine-tuning move it.
    assert np.abs(probabilities(0.05) - probabilities(0.0)).max() < 0.1


def test_the_decision_to_keep_fine_tuned_weights_is_made_on_validation(data, pretrained, tmp_path):
    """With a learning rate that destroys the model the probe it started from is kept."""
    options = FinetuneArguments(task="synthetic_outcome", model=str(pretrained), train_patients=200)
    folder = training.finetune(data, options, arguments(tmp_path / "wild", num_train_epochs=1, learning_rate=0.3))
    shutil.rmtree(tmp_path / "wild" / "examples", ignore_errors=True)
    tokenizer = EhrCodeTokenizer.from_pretrained(folder)
    splits = data.splits()
    parts = {n: training.examples_of(data, options, tokenizer, splits, n) for n in ("train", "validation")}
    probe = MedBertForSequenceClassification.from_pretrained(pretrained)
    training.start_from_probe(probe, parts["train"], parts["validation"], tokenizer)
    model = MedBertForSequenceClassification.from_pretrained(folder)
    truth = np.asarray(parts["validation"]["labels"])
    kept = auroc(truth, training.predict(model, parts["validation"], tokenizer))
    assert kept >= auroc(truth, training.predict(probe, parts["validation"], tokenizer)) - 1e-9

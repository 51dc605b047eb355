"""Every script in examples/ runs from beginning to end on a few synthetic patients, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

import hf_ehr

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
SMALL = {
    "train_medbert": ["--patients", "120", "--max_steps", "2", "--cpu"],
    "train_medmplm": ["--patients", "60", "--max_steps", "2"],
    "train_medhmp": ["--patients", "60", "--max_steps", "2"],
    "accelerate_loop": ["--patients", "120", "--epochs", "1", "--cpu"],
    "lora": ["--patients", "120", "--max_steps", "2"],
    "similar_patients": ["--patients", "60"],
    "attention_of_a_patient": [],
    "code_notes_with_any_encoder": ["--max_steps", "2"],
}
LEFT = {
    "train_medbert": "classifier/model.safetensors",
    "train_medmplm": "recommender/processor_config.json",
    "train_medhmp": "classifier/preprocessor_config.json",
    "accelerate_loop": "classifier/model.safetensors",
    "lora": "merged/model.safetensors",
    "similar_patients": "",
    "attention_of_a_patient": "patient.html",
    "code_notes_with_any_encoder": "note.html",
}


def run(script: str, output: Path, *arguments: str, launcher: tuple[str, ...] | list[str] = ()) -> str:
    command = [sys.executable, *launcher, str(EXAMPLES / f"{script}.py"), "--output", str(output), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_script_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_script_runs_and_leaves_what_it_says(script, tmp_path):
    output = tmp_path / ("similar.csv" if script == "similar_patients" else "out")
    printed = run(script, output, *SMALL[script])
    assert (output / LEFT[script]).is_file() if LEFT[script] else output.is_file()
    if script in ("train_medbert", "train_medhmp", "lora"):
        assert "'probability': " in printed
    if script == "train_medmplm":
        assert printed.count("'code': 'ATC/") == 3
    if script == "accelerate_loop":
        assert 0 <= float(printed.split("test AUROC ")[1].split()[0]) <= 1
    if script == "similar_patients":
        lines = output.read_text().splitlines()
        assert (lines[0], len(lines)) == ("subject_id,cosine,shared_codes", 6)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_medbert", "accelerate_loop"])
def test_a_script_runs_on_two_ranks(script, tmp_path):
    printed = run(script, tmp_path / "out", *SMALL[script], launcher=TORCHRUN)
    assert "AUROC" in printed or "'probability': " in printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "classifier")
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_fsdp_configuration_shards_by_layers_that_the_models_have():
    config = yaml.safe_load((EXAMPLES / "fsdp.yaml").read_text())
    layers = config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert set(layers) <= set(hf_ehr.MedBertForPreTraining._no_split_modules)
    model = hf_ehr.MedBertForPreTraining(hf_ehr.MedBertConfig.tiny(vocab_size=20))
    found = [module for module in model.modules() if type(module).__name__ in layers]
    assert len(found) == model.config.num_hidden_layers


@pytest.mark.slow
def test_a_model_sharded_as_the_file_says_learns_as_the_whole_one(tmp_path):
    script = Path(__file__).parent / "scripts" / "fully_sharded.py"
    command = [sys.executable, *TORCHRUN, script, EXAMPLES / "fsdp.yaml", tmp_path]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    ranks = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["sharded"] == pytest.approx(rank["whole"], rel=1e-5)
        assert rank["whole"][2] < rank["whole"][0]
    assert sum(rank["held"] for rank in ranks) == ranks[0]["all"]

"""Ctrl-C in the middle of a command, with a real signal: one sentence, status 130, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_ehr import MedBertForPreTraining, MedBertForSequenceClassification
from hf_ehr.cli.main import RESUME
from hf_ehr.prepare import prepare

pytestmark = pytest.mark.slow

WORLD = {"world": "C", "patients": 600, "seed": 0}
COMMAND = [sys.executable, "-m", "hf_ehr.cli.main"]
TRAINING = ["--use_cpu", "true", "--report_to", "none", "--logging_strategy", "no", "--save_total_limit", "2"]
REPORT = """
title: Small
datasets:
  - {name: site A, source: synthetic, options: {world: C, patients: 300, seed: 0}, min_patients: 2}
tasks: [synthetic_outcome]
sizes: [60]
draws: {60: 30}
validation_patients: 30
test_patients: 50
finetuning: {num_train_epochs: 1, per_device_train_batch_size: 32}
rows:
  - {name: L2 LR, model: Bag-of-codes LR}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("synthetic", None, folder, shards=2, workers=1, progress=False, options=WORLD)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def whole(*words: str) -> None:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def interrupted(ready: Callable[[], bool], *words: str) -> str:
    """Starts a command, presses Ctrl-C as soon as it is `ready`, and gives what it said.

    A terminal sends the signal to all processes of the command, so that the workers of a pool get it too.
    """
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said[-3000:]
    return said


def checkpoints(folder: Path) -> Callable[[], bool]:
    return lambda: any(folder.glob("checkpoint-*/trainer_state.json"))


def assert_equal_weights(kind, *folders: Path) -> None:
    resumed, once = (kind.from_pretrained(folder).state_dict() for folder in folders)
    for name, value in once.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_pretraining_stops_in_one_sentence_and_goes_on_to_the_same_weights(data, tmp_path):
    words = ["pretrain", "medbert", "--data", str(data), "--preset", "tiny", "--min_patients", "2", *TRAINING]
    words += ["--max_steps", "60", "--save_steps", "3", "--max_tokens", "1024", "--learning_rate", "1e-3"]
    stopped, once = tmp_path / "stopped", tmp_path / "once"
    said = interrupted(checkpoints(stopped), *words, "--output_dir", str(stopped))
    assert f"\nhf-ehr: {RESUME}\n" in said
    assert "Traceback" not in said
    assert not (stopped / "pretraining.json").exists()
    for folder in (stopped, once):
        whole(*words, "--output_dir", str(folder))
        assert (folder / "pretraining.json").is_file()
        assert not list(folder.glob("checkpoint-*"))
    assert_equal_weights(MedBertForPreTraining, stopped, once)


def test_finetuning_stops_in_one_sentence_and_goes_on_to_the_same_weights(data, tmp_path):
    encoder = tmp_path / "encoder"
    words = ["pretrain", "medbert", "--data", str(data), "--preset", "tiny", "--min_patients", "2", *TRAINING]
    whole(*words, "--max_steps", "1", "--output_dir", str(encoder))
    words = ["finetune", "medbert", "--data", str(data), "--model", str(encoder), "--task", "synthetic_outcome"]
    words += ["--min_patients", "2", "--num_train_epochs", "12", *TRAINING]
    stopped, once = tmp_path / "stopped", tmp_path / "once"
    said = interrupted(checkpoints(stopped), *words, "--output_dir", str(stopped))
    assert f"\nhf-ehr: {RESUME}\n" in said
    assert "Traceback" not in said
    assert not (stopped / "finetune.json").exists()
    for folder in (stopped, once):
        whole(*words, "--output_dir", str(folder))
        assert (folder / "finetune.json").is_file()
    assert_equal_weights(MedBertForSequenceClassification, stopped, once)


def test_a_report_stops_in_one_sentence_and_keeps_its_cells(tmp_path):
    (tmp_path / "small.yaml").write_text(REPORT)
    work = tmp_path / "work"
    words = ["report", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out"), "--work", str(work)]
    words += ["--workers", "1"]
    said = interrupted(lambda: len(list(work.glob("**/cells/*.npz"))) >= 2, *words)
    assert f"\nhf-ehr: {RESUME}\n" in said
    assert "Traceback" not in said
    done = {path: path.stat().st_mtime_ns for path in work.glob("**/cells/*.npz")}
    assert 2 <= len(done) < 30
    assert not list((tmp_path / "out").rglob("*.md"))
    whole(*words)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(work.glob("**/cells/*.npz"))) == 30
    assert list((tmp_path / "out").rglob("*.md"))

"""What pre-training and fine-tuning share: the data they read, packed batches, and how a run resumes and is left."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from hf_ehr.datasets import split_patients
from hf_ehr.samplers import FlatExamples
from hf_ehr.schema import DatasetInfo, EhrDataError, atomic_path, shard_paths
from hf_ehr.tasks import SplitManifest
from hf_ehr.training._dry_runs import run_dry

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

SPLITS_FILE = "splits.json"
PRETRAIN_FILE = "pretraining.json"
RUN_FILE = "run.json"
RUN_SETTINGS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "weight_decay", "warmup_steps", "lr_scheduler_type", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "seed", "bf16", "fp16",
)  # fmt: skip
IDENTITY = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "preprocessor_config.json",
    "processor_config.json", "dataset.json",
)  # fmt: skip
CONFIG_PARAMETERS = {"num_labels", "attn_implementation"}
"""What every configuration takes beside its fields."""
PREDICT_TOKENS = 65_536
"""Codes scored at a time outside training."""


@dataclass
class DataArguments:
    """Which patients a run reads."""

    data: str = field(metadata={"help": "Prepared folder (output of `hf-ehr prepare`)."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient (7:1:2)."})
    max_length: int = field(default=512, metadata={"help": "Most codes of a patient; older visits go first."})
    min_patients: int = field(default=11, metadata={"help": "Codes of fewer training patients back off to ancestors."})

    def splits(self) -> dict[str, np.ndarray]:
        """Patients of `train`, `validation` and `test`."""
        return patient_splits(self.data, self.split_seed)

    def manifest(self, splits: Mapping[str, np.ndarray]) -> SplitManifest:
        """The splits as hashes, salted with a secret that stays in the prepared folder."""
        return salted_manifest(Path(self.data), splits)


def patient_splits(folder: str, seed: int) -> dict[str, np.ndarray]:
    """Patients of `train`, `validation` and `test` of a prepared folder (7:1:2)."""
    ids = [pq.read_table(path, columns=["subject_id"])["subject_id"] for path in shard_paths(folder, "records")]
    return split_patients(pa.chunked_array([c for i in ids for c in i.chunks]).to_numpy(), seed=seed)


def salted_manifest(folder: Path, splits: Mapping[str, np.ndarray]) -> SplitManifest:
    """The patients of each split as hashes; the salt is made once and stays in the prepared folder."""
    salt = folder / "split_salt"
    if not salt.is_file():
        mine = salt.with_name(f".split_salt.{os.getpid()}")
        mine.write_text(secrets.token_hex(16))
        with suppress(FileExistsError):  # another rank was first: all take its salt
            os.link(mine, salt)
        mine.unlink()
    return SplitManifest.of(DatasetInfo.load(folder).source, splits, salt=salt.read_text())


def run_arguments(training: TrainingArguments, **changes: Any) -> TrainingArguments:
    """A copy with what a run of ours needs; pinned memory only where there is a device to copy to."""
    return replace(training, dataloader_pin_memory=torch.cuda.is_available(), **changes)


def quiet(trainer: Trainer) -> Trainer:
    """Under `logging_strategy="no"` the loop prints nothing at all."""
    if trainer.args.logging_strategy == "no":
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    return trainer


def train_from_last_checkpoint(trainer: Trainer) -> None:
    """Trains on from the last whole checkpoint of the output folder; under `dry_run` only some steps."""
    run_dry(trainer)
    quiet(trainer).train(resume_from_checkpoint=last_checkpoint(output_of(trainer.args)))


class Batch(dict):
    def to(self, device) -> Batch:
        return Batch({name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in self.items()})


def batches(examples: datasets.Dataset, collate, masked: bool = False) -> Iterator[tuple[np.ndarray, Batch]]:
    """Packed batches with their rows; the same masks at every call.

    Shorter examples come first: attention and recurrent heads treat examples of one length as one piece.
    """
    flat = FlatExamples(examples)
    order = np.argsort(flat.lengths, kind="stable")
    bins = np.cumsum(flat.lengths[order]) // PREDICT_TOKENS
    for index, rows in enumerate(np.split(order, np.flatnonzero(np.diff(bins)) + 1)):
        yield rows, Batch(collate([flat.gather(rows, key=(0, index) if masked else None)]))


def log_frequency(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Smoothed log frequency of each token, (vocab,) float32; special tokens, never a target, do not count."""
    counts = np.bincount(ids, minlength=len(tokenizer)) + 0.5
    counts[tokenizer.all_special_ids] = 0.5
    return np.log(counts / counts.sum()).astype(np.float32)


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint in a folder; its state is what is written last."""
    folders = folder.glob("checkpoint-*")
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with suppress(OSError, json.JSONDecodeError):
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
    return None


def output_of(training: TrainingArguments) -> Path:
    return Path(str(training.output_dir))


class Run:
    """One training run in its output folder: it goes on where it stopped, and is never taken for another.

    While it runs, `run.json` tells what it is; in the end that is in the marker. Of folders that an option names
    (data, models, tokenizers) the content counts and not the place.

    Args:
        training: The settings; those of `RUN_SETTINGS` make a run what it is.
        marker: File that says how the run was made; written last.
        parts: Dataclasses of the other options.

    Attributes:
        finished: Whether this very run is there already.

    Raises:
        EhrDataError: The folder holds another run, or checkpoints of which nobody knows what they are.
    """

    def __init__(self, training: TrainingArguments, marker: str, *parts: Any):
        self.folder, self.marker, self.rank = output_of(training), output_of(training) / marker, training.process_index
        settings = {name: str(getattr(training, name)) for name in RUN_SETTINGS}
        contents = [{name: _content(value) for name, value in asdict(part).items()} for part in parts]
        self.digest = _digest(json.dumps([marker, settings, contents], sort_keys=True, default=str).encode())
        known = next((self._read(path) for path in (self.marker, self.folder / RUN_FILE) if path.is_file()), None)
        if known != self.digest and (known is not None or any(self.folder.glob("checkpoint-*"))):
            raise EhrDataError(
                f"`output_dir` must not hold a run of other data, options or settings, and {self.folder} does. Choose "
                "another folder, or remove it."
            )
        self.finished = self.marker.is_file()
        if not self.finished and self.rank == 0:
            write_json(self.folder / RUN_FILE, {"run": self.digest})

    def record(self) -> dict[str, Any]:
        """What the marker of a finished run says."""
        return json.loads(self.marker.read_text())

    def finish(self, content: dict[str, Any]) -> None:
        """Writes the marker; a model folder then holds no patients, no checkpoints and no pickles."""
        for leftover in (self.folder / "examples", *self.folder.glob("checkpoint-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        (self.folder / "training_args.bin").unlink(missing_ok=True)
        write_json(self.marker, {"run": self.digest, **content})
        (self.folder / RUN_FILE).unlink(missing_ok=True)

    @staticmethod
    def standing(folder: Path, rehearsed: Path) -> str:
        """What the run that was begun in `rehearsed` finds in `folder`, as a sentence; empty for nothing."""
        digest = Run._read(rehearsed / RUN_FILE)
        markers = {path: Run._read(path) for path in folder.glob("*.json")} if folder.is_dir() else {}
        checkpoint, known = last_checkpoint(folder), set(markers.values()) - {""}
        if known - {digest} or (not known and any(folder.glob("checkpoint-*"))):
            return f"{folder} holds another run, and this one would be refused: choose another `output_dir`."
        if digest in (found for path, found in markers.items() if path.name != RUN_FILE):
            return f"{folder} holds this very run, finished: it would return at once."
        return "" if checkpoint is None else f"It would go on from {checkpoint}."

    @staticmethod
    def _read(path: Path) -> str:
        content = json.loads(path.read_text())
        found = content.get("run", "") if isinstance(content, dict) else ""
        return found if isinstance(found, str) else ""


def _content(value: Any) -> Any:
    """An option; of a folder a digest of the files that make a model, a tokenizer or prepared data what they are."""
    # Not `Path.is_dir`, which raises where JSON is longer than the name of a file may be.
    if not isinstance(value, str) or not os.path.isdir(value):
        return value
    # A processor keeps its tokenizers in folders of their own.
    found = [*Path(value).iterdir(), *Path(value).glob("*_tokenizer/*")]
    files = sorted(path for path in found if path.name in IDENTITY or path.suffix == ".safetensors")
    return [(str(path.relative_to(value)), _digest(path.read_bytes())) for path in files]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def write_json(path: Path, content: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def arguments_from(kind: type[T], content: dict[str, Any]) -> T:
    """A dataclass from what a run wrote of it; fields of other versions are left out."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content.items() if name in known})


def json_options(text: str, name: str) -> dict[str, Any]:
    """Options that the command line takes as JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be a JSON object, got {text!r}: {error}.") from error


def config_options(text: str, kind: type) -> dict[str, Any]:
    """Fields of a configuration that the command line takes as JSON.

    Raises:
        ValueError: The text is no JSON object, or names no field of `kind`: the library would take it without a word.
    """
    given = json_options(text, "model_options")
    check_config_fields(given, kind, "model_options")
    return given


def check_config_fields(given: Any, kind: Any, name: str) -> None:
    """Refuses what is no mapping of fields of a configuration.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f'`{name}` must be a JSON object, got {given!r}. Write {{"field": value}}.')
    known = {item.name for item in fields(kind)} | CONFIG_PARAMETERS | set(kind.attribute_map)
    if unknown := sorted(set(given) - known):
        raise ValueError(f"`{name}` must be fields of {kind.__name__}, got {unknown}. See its documentation.")

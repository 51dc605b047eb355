"""What pre-training and fine-tuning share: the data they read, packed batches, and how a run resumes and is left."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_ehr.datasets import split_patients
from hf_ehr.samplers import FlatExamples
from hf_ehr.schema import DatasetInfo, atomic_path, shard_paths
from hf_ehr.tasks import SplitManifest

if TYPE_CHECKING:
    import datasets

SPLITS_FILE = "splits.json"
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
        ids = [pq.read_table(path, columns=["subject_id"])["subject_id"] for path in shard_paths(self.data, "records")]
        return split_patients(pa.chunked_array([c for i in ids for c in i.chunks]).to_numpy(), seed=self.split_seed)

    def manifest(self, splits: Mapping[str, np.ndarray]) -> SplitManifest:
        """The splits as hashes, salted with a secret that stays in the prepared folder."""
        return salted_manifest(Path(self.data), splits)


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


def last_checkpoint(training: TrainingArguments) -> str | None:
    """The last checkpoint of an interrupted run in the output folder."""
    return get_last_checkpoint(training.output_dir) if output_of(training).is_dir() else None


def output_of(training: TrainingArguments) -> Path:
    return Path(str(training.output_dir))


def leave_no_patients(folder: Path) -> None:
    """A model folder holds no examples, and not the pickle of arguments with its local paths."""
    shutil.rmtree(folder / "examples", ignore_errors=True)
    (folder / "training_args.bin").unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")

"""What pre-training on notes and coding share: the notes they read, by patient."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.note_datasets import split_notes
from hf_ehr.notes import NoteFolder
from hf_ehr.tasks import SplitManifest
from hf_ehr.training._runs import salted_manifest


@dataclass
class NoteArguments:
    """Which notes a run reads."""

    data: str = field(metadata={"help": "Prepared folder of notes (output of `hf-ehr prepare-notes`)."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient, where the source has none."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a window; long notes have several."})

    @cached_property
    def folder(self) -> NoteFolder:
        """The notes."""
        return NoteFolder.open(self.data)

    @cached_property
    def splits(self) -> dict[str, pa.Array]:
        """Note ids of `train`, `validation`, `test`, and `unlabelled` where there are notes that nobody coded."""
        return split_notes(self.folder, self.split_seed)

    def subjects(self, *names: str) -> np.ndarray:
        """Patients of some splits; a split that there is not has none."""
        wanted = pa.concat_arrays([pa.array([], pa.string()), *(self.splits[n] for n in names if n in self.splits)])
        parts = [table["subject_id"].to_numpy() for table in self.folder.notes(wanted, ["subject_id"])]
        return np.unique(np.concatenate(parts))

    def manifest(self) -> SplitManifest:
        """The patients of each split as salted hashes; those of uncoded notes are training patients."""
        splits = {"train": self.subjects("train", "unlabelled")}
        return salted_manifest(
            Path(self.data), splits | {name: self.subjects(name) for name in ("validation", "test")}
        )

    def patients_of_codes(self, note_ids: Any) -> dict[str, int]:
        """Code → number of patients among the notes `note_ids`."""
        notes = pa.concat_tables(self.folder.notes(note_ids, ["note_id", "subject_id"]))
        labels = self.folder.labels().join(notes, "note_id", join_type="inner")
        counts = labels.group_by("code").aggregate([("subject_id", "count_distinct")])
        return dict(zip(counts["code"].to_pylist(), counts["subject_id_count_distinct"].to_pylist(), strict=True))


def flat_column(examples: Any, name: str) -> np.ndarray:
    """A list column of a data set end to end, without a copy in Python objects."""
    column = examples.with_format("arrow")[:][name]
    return np.asarray(pc.list_flatten(column))

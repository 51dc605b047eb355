"""Records → examples of visits: sets of diagnoses and of medications, and a note, as far as known when asked about.

records ─ labels ─▶ slots (_visit_slots.py) ─┬─ codes known by then ─ a tokenizer each ─┬─▶ datasets.Dataset
                                             └─ the last note of a category by then ────┘
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ._example_writer import ExampleWriter
from ._histories import offsets_of, one_chunk, ragged_indices, total_before
from ._visit_shards import Shard, VisitReading
from ._visit_slots import admission_slots, every_visit, recommendation_slots
from .schema import EhrDataError, shard_paths, validate_labels

if TYPE_CHECKING:
    import datasets

    from .models.processing_medmplm import MedMPLMProcessor

logger = logging.getLogger(__name__)

Setting: TypeAlias = Literal["visits", "admission", "recommendation", "coding"]
NOTE_SEPARATOR = "\n\n"


def build_visit_examples(
    data: str | Path,
    processor: MedMPLMProcessor,
    *,
    labels: pa.Table | None = None,
    setting: Setting | None = None,
    label_names: Sequence[str] | None = None,
    subject_ids: Any = None,
    cache_dir: str | Path | None = None,
    max_visits: int = 10,
    **reading: Any,
) -> datasets.Dataset:
    """Rows of visits, each visit with what was known of it.

    - ``visits``, without labels: a row for each visit with a code, all that it holds, for pre-training.
    - ``admission``, labels with ``boolean_value``: a row for each label, the visit in which it is asked. Codes whose
      ``*_at`` is not after the prediction time are seen, and notes written by then.
    - ``recommendation``, labels with ``codes`` asked at the start of a visit: the visits that began before, as known
      at that time, and the visit itself, of which all diagnoses are seen (they are coded later: a retrospective task)
      and neither medications nor notes. Visits of which nothing is known are left out. Labels of a patient share a row
      where that changes nothing for any of them (:func:`hf_ehr._visit_slots.recommendation_slots`); then a visit that
      is asked about holds its medications and notes for those behind it, and it is the model that keeps them from its
      own score, as all of the family do. The labels are ids of ``processor.medication_tokenizer`` without its special
      tokens; a rare drug counts as its class.
    - ``coding``, labels with ``codes`` asked within or at the close of a visit: its medications and notes. Diagnoses
      and procedures are not read.

    Args:
        data: Prepared folder.
        processor: Tokenizers, fitted on the training patients; without one of notes these are not read.
        labels: LABELS.
        setting: As above. By default the one that the labels' value column stands for; ``codes`` for
            ``recommendation``.
        label_names: Codes that are coded, in the order of the labels; take them from the training patients.
        subject_ids: Patients to take, e.g. a split; all by default.
        cache_dir: Folder for the Arrow files; in memory without.
        max_visits: See :class:`VisitReading`.
        **reading: Its other fields.

    Returns:
        Columns ``subject_id``; lists with one entry a visit: ``visit_ids``, ``diagnosis_ids`` (not under ``coding``),
        ``medication_ids`` and with a tokenizer of notes ``note_input_ids``, lists of ids each, empty where there is
        none. Under ``admission`` ``labels`` (int64), under the other two for each visit ``asked`` (bool) and
        ``label_ids``, a list.

    Raises:
        EhrDataError: No example is left, or a label has no value of the setting.
        ValueError: An option has no meaning in this setting.
    """
    chosen = _setting(labels, setting, label_names)
    kept = None if subject_ids is None else np.unique(np.asarray(subject_ids, np.int64))
    options = VisitReading(max_visits=max_visits, **reading)
    asked = None if labels is None else _Asked.of(labels, chosen, kept)
    builder = _Builder(processor, chosen, options, asked, kept, label_names)
    writer = ExampleWriter(builder.features(), None if cache_dir is None else Path(cache_dir))
    for path in tqdm(shard_paths(data, "records"), desc="Building examples", unit="shard"):
        writer.add(builder.rows(path))
    return writer.finish(builder.report())


def _setting(labels: pa.Table | None, setting: str | None, names: Sequence[str] | None) -> str:
    if setting is not None and setting not in get_args(Setting):
        raise ValueError(f"`setting` must be one of {', '.join(get_args(Setting))}, got {setting!r}.")
    if labels is None:
        chosen = setting or "visits"
    else:
        codes = "codes" in labels.column_names and labels["codes"].null_count < labels.num_rows
        chosen = setting or ("recommendation" if codes else "admission")
    if (chosen == "visits") != (labels is None):
        raise ValueError(f"`labels` must {'be given' if labels is None else 'be None'} with the setting {chosen!r}.")
    if (chosen == "coding") != (names is not None):
        raise ValueError("`label_names` must be given with the setting 'coding', and with no other.")
    return chosen


@dataclass
class _Asked:
    """LABELS as the slots take them."""

    frame: pl.DataFrame
    values: pa.Array

    @classmethod
    def of(cls, labels: pa.Table, setting: str, kept: np.ndarray | None) -> _Asked:
        column = "boolean_value" if setting == "admission" else "codes"
        labels = validate_labels(labels)
        if labels[column].null_count:
            raise EhrDataError(f"`labels` must have `{column}` in every row. Other questions are not of {setting}.")
        if kept is not None:
            labels = labels.filter(pa.array(np.isin(labels["subject_id"].to_numpy(), kept)))
        frame = pl.DataFrame(labels.select(["subject_id", "prediction_time"]))
        frame = frame.select("subject_id", time=pl.col("prediction_time").dt.timestamp("us"))
        return cls(frame.with_row_index("label").cast({"label": pl.Int64}), one_chunk(labels.combine_chunks(), column))


@dataclass
class _Builder:
    """Turns shards of RECORDS into tables of examples and counts what is left out."""

    processor: MedMPLMProcessor
    setting: str
    reading: VisitReading
    asked: _Asked | None
    kept: np.ndarray | None
    label_names: Sequence[str] | None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers of codes that are read."""
        return {
            name: tokenizer
            for name, tokenizer in self.processor.code_tokenizers.items()
            if name != "diagnosis" or self.setting != "coding"
        }

    @property
    def reads_notes(self) -> bool:
        return self.processor.note_tokenizer is not None

    def features(self) -> datasets.Features:
        """The columns of the examples."""
        from datasets import Features, List, Value

        sets = [f"{name}_ids" for name in self.tokenizers] + ["note_input_ids"] * self.reads_notes
        columns: dict[str, Any] = {"subject_id": Value("int64"), "visit_ids": List(Value("int64"))}
        columns |= {name: List(List(Value("int32"))) for name in sets}
        if self.setting == "admission":
            columns["labels"] = Value("int64")
        elif self.setting != "visits":
            columns |= {"asked": List(Value("bool")), "label_ids": List(List(Value("int32")))}
        return Features(columns)

    def rows(self, path: Path) -> Iterator[pa.Table]:
        """The examples of one shard."""
        kinds = {name: tokenizer.kinds for name, tokenizer in self.tokenizers.items()}
        shard = Shard.read(path, kinds, self.reads_notes, self.kept)
        slots = self._slots(shard)
        if not len(slots):
            return
        row, visit = slots["row"].to_numpy(), slots["visit"].to_numpy()
        bounds = np.append(0, np.flatnonzero(np.diff(row, append=row[-1] + 1)) + 1)
        columns: dict[str, Any] = {
            "subject_id": shard.subject_ids[visit[bounds[:-1]]],
            "visit_ids": _lists(bounds, shard.visit_ids[visit]),
        }
        for name, tokenizer in self.tokenizers.items():
            codes, lengths = shard.known_codes(name, slots)
            encoded = tokenizer.encode_column(
                codes, lengths, np.ones(len(slots), np.int64), max_length=self.processor.max_codes
            )
            columns[f"{name}_ids"] = _lists(bounds, _lists(encoded.offsets, encoded.input_ids))
        if self.reads_notes:
            columns["note_input_ids"] = _lists(bounds, self._note_ids(shard, slots))
        columns |= self._labels(slots, bounds)
        self.counts["examples"] += len(bounds) - 1
        yield pa.table(columns).select(self.features().arrow_schema.names)

    def report(self) -> str:
        """What was built and left out, in words.

        Raises:
            EhrDataError: No example is left.
        """
        built = self.counts.pop("examples", 0)
        if self.asked is not None:
            self.counts["label of a patient without a record"] += len(self.asked.frame) - self.counts.pop("labels", 0)
        left_out = ", ".join(f"{count} × {reason}" for reason, count in self.counts.items() if count) or "none"
        if not built:
            raise EhrDataError(
                f"No example is left ({left_out}). Check that `labels` and `subject_ids` belong to these records, and "
                "that their visits hold codes."
            )
        if left_out != "none":
            logger.warning("Labels and visits left out of %d examples: %s.", built, left_out)
        return f"{built} examples; left out: {left_out}."

    def _slots(self, shard: Shard) -> pl.DataFrame:
        """The slots of the shard, without those that hold nothing and labels without a history."""
        visits = shard.visits
        if self.asked is None:
            slots = every_visit(visits)
            held = [shard.known_codes(name, slots)[1] > 0 for name in shard.histories]
            return slots.filter(pl.Series(np.any(held, axis=0)))
        asked = self.asked.frame.join(visits.select("subject_id").unique(), on="subject_id", how="semi")
        self.counts["labels"] += len(asked)
        if self.setting != "recommendation":
            closed = "closed" if self.setting == "coding" else "end"
            slots = admission_slots(visits.with_columns(closed=closed), asked)
            self.counts["asked outside of a visit"] += len(asked) - len(slots)
            return slots
        slots = recommendation_slots(shard.settled(), asked, self.reading.max_visits)
        self.counts["not asked at the start of a visit, or twice"] += len(asked) - slots["label"].count()
        return self._with_history(shard, slots)

    def _with_history(self, shard: Shard, slots: pl.DataFrame) -> pl.DataFrame:
        """Slots of which something is known, the last ``max_visits`` of a row, the first of them never asked about."""
        held = [shard.known_codes(name, slots)[1] > 0 for name in shard.histories]
        held.append(slots["label"].is_not_null().to_numpy())
        if self.reads_notes:
            noted = np.zeros(len(slots), bool)
            noted[shard.known_notes(slots, self.reading)["slot"].unique().to_numpy()] = True
            held.append(noted)
        slots = slots.filter(pl.Series(np.any(held, axis=0)))
        place, places = pl.int_range(pl.len()).over("row"), pl.len().cast(pl.Int64).over("row")
        slots = slots.filter(place >= places - self.reading.max_visits)
        before = slots["label"].count()
        slots = slots.with_columns(label=pl.when(place == 0).then(None).otherwise(pl.col("label")))
        self.counts["nothing is known of earlier visits"] += before - slots["label"].count()
        return slots.filter(pl.col("label").count().over("row") > 0)

    def _note_ids(self, shard: Shard, slots: pl.DataFrame) -> pa.Array:
        """The tokens of each slot's note."""
        texts = shard.known_notes(slots, self.reading).group_by("slot", maintain_order=True)
        joined = texts.agg(pl.col("text").str.join(NOTE_SEPARATOR))
        distinct = joined["text"].unique(maintain_order=True)
        place = joined.join(pl.DataFrame({"text": distinct}).with_row_index("place"), on="text", maintain_order="left")
        made = self.processor.note_ids(distinct.to_list())
        lengths = np.array([len(ids) for ids in made], np.int64)
        flat = np.fromiter((token for ids in made for token in ids), np.int32, lengths.sum())
        which = np.full(len(slots), -1)
        which[place["slot"].to_numpy()] = place["place"].to_numpy()
        counts = np.where(which >= 0, np.append(lengths, 0)[which], 0)
        tokens = flat[ragged_indices(total_before(lengths)[which], counts)]
        return _lists(total_before(counts), tokens)

    def _labels(self, slots: pl.DataFrame, bounds: np.ndarray) -> dict[str, Any]:
        if self.asked is None:
            return {}
        label = slots["label"].fill_null(-1).to_numpy()
        if self.setting == "admission":
            return {"labels": self.asked.values.take(pa.array(label)).cast(pa.int64())}
        lists = self.asked.values
        starts, lengths = offsets_of(lists)[:-1], np.diff(offsets_of(lists))
        counts = np.where(label >= 0, lengths[label], 0)
        codes = lists.flatten().take(pa.array(ragged_indices(starts[label], counts)))
        ids = self._label_ids(codes)
        owner = np.repeat(np.arange(len(label)), counts)
        # A label that stands twice, or two drugs of one class, is one.
        width = 1 + ids.max(initial=0)
        owner, ids = np.divmod(np.unique((owner * width + ids)[ids >= 0]), width)
        ids_of = _lists(total_before(np.bincount(owner, minlength=len(label))), ids.astype(np.int32))
        return {"asked": _lists(bounds, label >= 0), "label_ids": _lists(bounds, ids_of)}

    def _label_ids(self, codes: pa.Array) -> np.ndarray:
        """(codes,), -1 for what is no label."""
        if self.label_names is not None:
            return pc.fill_null(pc.index_in(codes, pa.array(self.label_names)), -1).to_numpy().astype(np.int64)
        tokenizer = self.processor.medication_tokenizer
        ids = tokenizer.codes_to_ids(pc.dictionary_encode(codes)).astype(np.int64)
        special = len(tokenizer.all_special_ids)
        return np.where(ids >= special, ids - special, -1)


def _lists(offsets: np.ndarray, values: Any) -> pa.Array:
    """Lists of a shard; 64-bit offsets where 32 bits are too few."""
    values = values if isinstance(values, pa.Array) else pa.array(values)
    if offsets[-1] > np.iinfo(np.int32).max:
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
    return pa.ListArray.from_arrays(pa.array(np.asarray(offsets, np.int32)), values)


__all__ = ["NOTE_SEPARATOR", "Setting", "VisitReading", "build_visit_examples"]

"""Named entities of notes with the stock ``Trainer``: BiLSTM-CRF taggers on words or on any text encoder.

notes with entities ─ split by patient ─ tokenizer ─▶ tags of words ─▶ tagger, the epoch with the best validation F1
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import AutoTokenizer, EarlyStoppingCallback, PreTrainedConfig, Trainer, TrainingArguments

from hf_ehr.datasets import split_patients
from hf_ehr.entity_corpora import read_i2b2_2010
from hf_ehr.entity_datasets import (
    ENTITY_TABLE_SCHEMA,
    EntityCollator,
    build_entity_examples,
    entities_of_spans,
    predicted_entities,
    tag_names,
)
from hf_ehr.entity_tags import Entity, entities_of_tags
from hf_ehr.models.any_encoder import table_positions
from hf_ehr.models.configuration_ehrtagger import EhrTaggerConfig
from hf_ehr.models.configuration_medmplm import MedMPLMConfig
from hf_ehr.models.modeling_ehrtagger import EhrTaggerForTokenClassification
from hf_ehr.models.modeling_medmplm import MedMPLMModel
from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.named_entities import EntityCounts
from hf_ehr.note_datasets import split_notes
from hf_ehr.notes import NoteFolder, fit_word_tokenizer
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import SplitManifest
from hf_ehr.training._runs import (
    SPLITS_FILE,
    Run,
    config_options,
    output_of,
    run_arguments,
    salted_manifest,
    train_from_last_checkpoint,
)
from hf_ehr.training.finetuning import FINETUNE_FILE, FINETUNE_SETTINGS, check_earlier_stage

if TYPE_CHECKING:
    import datasets

ENTITY_RECIPE = {"learning_rate": 1e-3, "per_device_train_batch_size": 16, "num_train_epochs": 20.0}
"""For words, whose embeddings start anew. MedM-PLM's rate for its text encoder is 3e-5."""


@dataclass
class EntityArguments:
    """Which notes with entities a run reads."""

    data: str = field(
        metadata={
            "help": "Folder of `hf-ehr prepare-notes` whose notes have spans; or the texts (*.txt) of i2b2 2010."
        }
    )
    entities: str | None = field(
        default=None,
        metadata={"help": "CSV or Parquet of note_id, start, end, type in place of the spans; or i2b2's concepts."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient, where the source has none."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a window; no note is cut."})

    @property
    def is_i2b2(self) -> bool:
        """Whether the files are those of the 2010 challenge."""
        return self.entities is not None and Path(self.entities).is_dir()

    @property
    def source(self) -> str:
        """Where the notes are from."""
        return "i2b2_2010" if self.is_i2b2 else NoteFolder.open(self.data).info.source

    @cached_property
    def corpus(self) -> tuple[pa.Table, pa.Table]:
        """NOTES and ENTITIES."""
        if self.is_i2b2:
            return read_i2b2_2010(self.data, str(self.entities))
        folder = NoteFolder.open(self.data)
        notes = pa.concat_tables(folder.notes(columns=["note_id", "subject_id", "text"]))
        if self.entities is not None:
            return notes, _read_entities(Path(self.entities))
        spans = folder.spans()
        if not spans.num_rows:
            raise EhrDataError(
                f"`data` must hold notes with spans, got none in {self.data}. Give `entities`, or notes with spans."
            )
        return notes, entities_of_spans(spans)

    def splits(self) -> dict[str, pa.Array]:
        """Note ids of `train`, `validation` and `test`."""
        if not self.is_i2b2:
            found = split_notes(NoteFolder.open(self.data), self.split_seed)
            return {name: found[name] for name in ("train", "validation", "test")}
        notes, _ = self.corpus
        patients = split_patients(notes["subject_id"].to_numpy(), seed=self.split_seed)
        subjects, ids = notes["subject_id"].combine_chunks(), notes["note_id"].combine_chunks()
        return {name: ids.filter(pc.is_in(subjects, pa.array(part))) for name, part in patients.items()}

    def part(self, note_ids: pa.Array) -> tuple[pa.Table, pa.Table]:
        """NOTES and ENTITIES of some notes."""
        notes, entities = (table.filter(pc.is_in(table["note_id"], value_set=note_ids)) for table in self.corpus)
        return notes, entities

    def manifest(self) -> SplitManifest:
        """The patients of each split as hashes; of i2b2, which does not say whose a note is, the notes."""
        subjects = {name: np.unique(self.part(ids)[0]["subject_id"].to_numpy()) for name, ids in self.splits().items()}
        if self.is_i2b2:
            return SplitManifest.of(self.source, subjects)
        return salted_manifest(Path(self.data), subjects)


def _read_entities(path: Path) -> pa.Table:
    frame = (
        pl.read_parquet(path)
        if path.suffix == ".parquet"
        else pl.read_csv(path, schema_overrides={"note_id": pl.String})
    )
    missing = sorted(set(ENTITY_TABLE_SCHEMA.names) - set(frame.columns))
    if missing:
        raise EhrDataError(
            f"`entities` must have the columns {', '.join(ENTITY_TABLE_SCHEMA.names)}, lacks {missing}."
        )
    return frame.select(ENTITY_TABLE_SCHEMA.names).to_arrow().cast(ENTITY_TABLE_SCHEMA)


@dataclass
class EntityTrainArguments:
    """Which tagger is trained."""

    encoder: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a text encoder, or of a MedM-PLM, whose own is taken; else words."},
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "Leave the text encoder as it is."})
    preset: str = field(default="base", metadata={"help": "Sizes of the LSTM and the word embeddings: base or tiny."})
    model_options: str = field(default="{}", metadata={"help": "Further fields of EhrTaggerConfig as JSON."})
    min_patients: int = field(default=11, metadata={"help": "Words of fewer training patients are unknown."})

    def __post_init__(self) -> None:
        if self.preset not in ("base", "tiny"):
            raise ValueError(f"`preset` must be base or tiny, got {self.preset!r}.")
        if self.freeze_encoder and self.encoder is None:
            raise ValueError("`freeze_encoder` must be left out without `encoder`: words have none.")


def train_tagger(data: EntityArguments, options: EntityTrainArguments, training: TrainingArguments) -> Path:
    """Trains a tagger; the folder holds model, tokenizer, splits and how it was made.

    The epoch with the best strict F1 on validation notes is kept, counted within windows: an entity that a border
    between windows cuts counts as its parts.

    Raises:
        LeakageError: A patient held out here was seen when the encoder was trained.
        EhrDataError: There are no entities, or `output_dir` holds another run.
        ValueError: An option is not known, or the encoder reads fewer tokens than `max_length`.
    """
    manifest = data.manifest()
    if options.encoder is not None:
        check_earlier_stage(options.encoder, manifest)
    output, run = output_of(training), Run(training, FINETUNE_FILE, data, options)
    if run.finished:
        return output
    splits = data.splits()
    notes, entities = data.part(splits["train"])
    tags = tag_names(entities["type"].to_pylist())
    if len(tags) < 2:
        raise EhrDataError("The training notes must hold an entity, got none. Check `data`, or take another seed.")
    tokenizer = tagger_tokenizer(notes, options, data.max_length)
    model = new_tagger(options, tokenizer, tags, data.max_length, training.seed)
    parts = {
        name: tagged_notes(data, splits[name], tokenizer, tags, output / "examples" / name)
        for name in ("train", "validation")
    }
    fit_tagger(model, parts["train"], parts["validation"], tokenizer, training)
    if training.process_index == 0:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        manifest.save(output / SPLITS_FILE)
        settings = {name: getattr(training, name) for name in FINETUNE_SETTINGS}
        run.finish({"data": asdict(data), "options": asdict(options), "training": settings})
    return output


def tagger_tokenizer(notes: pa.Table, options: EntityTrainArguments, max_length: int) -> Any:
    """That of the encoder; without one the words of the training notes `notes`."""
    if options.encoder is None:
        return fit_word_tokenizer(
            notes, subject_ids=np.unique(notes["subject_id"].to_numpy()), cleaning="none",
            min_patients=options.min_patients, max_length=max_length,
        )  # fmt: skip
    if _is_medmplm(options.encoder):
        tokenizer = MedMPLMProcessor.from_pretrained(options.encoder).note_tokenizer
        if tokenizer is None:
            raise ValueError("`encoder` must be a MedM-PLM that reads notes, got one that does not.")
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    tokenizer.model_max_length = max_length
    return tokenizer


def new_tagger(
    options: EntityTrainArguments, tokenizer: Any, tags: list[str], max_length: int, seed: int
) -> EhrTaggerForTokenClassification:
    """A tagger on word embeddings, or on the text encoder that `options` name.

    Raises:
        ValueError: An option is not known, or the encoder reads fewer tokens than `max_length`.
    """
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"id2label": dict(enumerate(tags)), "label2id": {tag: n for n, tag in enumerate(tags)}}
    if options.preset == "tiny":
        fields |= {"embedding_size": 32, "hidden_size": 32, "hidden_dropout_prob": 0.1}
    fields |= config_options(options.model_options, EhrTaggerConfig)
    if options.encoder is None:
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return EhrTaggerForTokenClassification(EhrTaggerConfig(**(sizes | fields)))
    encoder: Any = options.encoder
    if _is_medmplm(options.encoder):
        encoder = MedMPLMModel.from_pretrained(options.encoder).note_encoder
        encoder.requires_grad_(True)  # which layers its own pre-training left alone is not asked here
    model = EhrTaggerForTokenClassification.from_note_encoder(
        encoder, freeze_note_encoder=options.freeze_encoder, **fields
    )
    room = table_positions(model.model.note_encoder)
    if room is not None and room < max_length:
        raise ValueError(f"`max_length` must be at most the text encoder's {room}, got {max_length}.")
    return model


def tagged_notes(
    data: EntityArguments, note_ids: pa.Array, tokenizer: Any, tags: list[str], cache: Path | None = None
) -> datasets.Dataset:
    """Examples of some notes; entities of types that the training notes do not have are left out."""
    notes, entities = data.part(note_ids)
    known = entities.filter(pc.is_in(entities["type"], pa.array([tag[2:] for tag in tags[1:]])))
    return build_entity_examples(notes, tokenizer, tags, entities=known, max_length=data.max_length, cache_dir=cache)


def fit_tagger(
    model: Any, train: datasets.Dataset, validation: datasets.Dataset, tokenizer: Any, training: TrainingArguments,
    patience: int | None = None,
) -> None:  # fmt: skip
    """Trains a tagger in place and keeps the epoch with the best strict F1 on validation notes.

    Args:
        model: The tagger.
        train: Examples.
        validation: Examples, to choose the epoch.
        tokenizer: Theirs.
        training: Settings.
        patience: Epochs without a better F1 after which to stop; never if ``None``.
    """
    names = model.config.id2label
    trainer = Trainer(
        model,
        run_arguments(
            training, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="f1", greater_is_better=True, save_total_limit=1, remove_unused_columns=False,
        ),
        EntityCollator(tokenizer),
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=lambda prediction: {"f1": _window_f1(prediction.label_ids, prediction.predictions, names)},
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )  # fmt: skip
    train_from_last_checkpoint(trainer)


def _window_f1(labels: Any, tags: Any, names: dict[int, str]) -> float:
    """Strict micro F1 of the entities of windows, (windows, length) both; 0 where nothing is right."""
    found = tags[0] if isinstance(tags, tuple) else tags
    true, predicted = (
        [_entities(row[place >= 0], names) for row, place in zip(side, labels, strict=True)]
        for side in (labels, found)
    )
    counts = EntityCounts.of(true, predicted)
    whole = counts.predicted.sum() + counts.present.sum()
    return float(2 * counts.hits.sum() / whole) if whole else 0.0


def _entities(row: np.ndarray, names: dict[int, str]) -> list[Entity]:
    return entities_of_tags([names[int(index)] for index in row])


def tag_notes(model: Any, examples: datasets.Dataset, tokenizer: Any) -> list[list[Entity]]:
    """The entities of notes in characters; labels are not read."""
    return predicted_entities(model, examples, EntityCollator(tokenizer))


def _is_medmplm(encoder: str) -> bool:
    return PreTrainedConfig.get_config_dict(encoder)[0].get("model_type") == MedMPLMConfig.model_type


__all__ = [
    "ENTITY_RECIPE", "EntityArguments", "EntityTrainArguments", "fit_tagger", "new_tagger", "tag_notes",
    "tagged_notes", "tagger_tokenizer", "train_tagger",
]  # fmt: skip

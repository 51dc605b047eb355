"""A tagger of named entities beside a dictionary on the test notes: strict scores by type, model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForTokenClassification, AutoTokenizer

from . import training
from .cards import evaluation_card, figures_of
from .entity_datasets import entities_by_note
from .entity_tags import Entity, entities_of_tags, tags_of_entities, words_of
from .evaluation import EvaluateArguments, written_by_finetune
from .intervals import Interval, verdict
from .named_entities import DictionaryMatcher, EntityCounts, entity_intervals
from .reports import csv_text, finite
from .schema import EhrDataError, atomic_path
from .tasks.audit import OneShotTest, SplitManifest
from .training import SPLITS_FILE
from .training._runs import arguments_from
from .training.entities import EntityArguments, tag_notes, tagged_notes

NAME, DICTIONARY = "BiLSTM-CRF", "Dictionary"
FEWEST = 50
"""Patients (or, where nobody knows whose they are, notes) that a conclusion needs."""
CARD = """---
{meta}
---

# Named entities of clinical notes ({types})

> Research software, **not a medical device**: no decision about a patient may rest on it.

A BiLSTM with a CRF (Lample et al., NAACL 2016, without characters) over {reads}. The input is a note of any
length, the output its entities.

```python
import hf_ehr
from transformers import AutoModelForTokenClassification, AutoTokenizer
from hf_ehr.entity_datasets import EntityCollator, build_entity_examples, predicted_entities

model = AutoModelForTokenClassification.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
tags = [model.config.id2label[number] for number in range(model.num_labels)]
examples = build_entity_examples(notes, tokenizer, tags, max_length={length})
entities = predicted_entities(model, examples, EntityCollator(tokenizer))
```

Splits are by patient.

## Figures

{table}

{notes}
"""


def evaluate(arguments: EvaluateArguments) -> Path:
    """Compares a tagger with the dictionary of its training notes; writes tables, a card and `evaluation.json`.

    Returns:
        Path of the Markdown table.

    Raises:
        EhrDataError: The folder was not written by `hf-ehr finetune ehrtagger`, or the notes are another preparation.
        LeakageError: A test patient was in an earlier training stage.
    """
    made = written_by_finetune(arguments.model)
    data = arguments_from(EntityArguments, made["data"])
    data = data if arguments.data is None else replace(data, data=arguments.data)
    manifest = data.manifest()
    if manifest.salt_check != SplitManifest.load(Path(arguments.model) / SPLITS_FILE).salt_check:
        raise EhrDataError("`data` must be the notes of training, perhaps moved, got another preparation.")
    training.check_earlier_stage(arguments.model, manifest)
    model: Any = AutoModelForTokenClassification.from_pretrained(arguments.model)
    splits = data.splits()
    notes, entities = data.part(splits["test"])
    rows = {DICTIONARY: _dictionary(data, notes), NAME: _tagged(model, arguments.model, data)}
    truth = OneShotTest(entities_by_note(notes, entities)).read()
    patients = notes["subject_id"].to_numpy()
    lines = _notes(data, notes, truth)
    table, own = write_entity_table(rows, truth, patients, Path(arguments.output), f"{data.source}: test notes", lines)
    types = sorted({tag[2:] for tag in model.config.id2label.values() if tag != "O"})
    counts = {"test_rows": len(truth), "test_events": sum(map(len, truth)), "test_patients": len(np.unique(patients))}
    encoder = (
        "words" if model.config.note_config is None else f"a text encoder ({model.config.note_config.model_type})"
    )
    evaluation_card(
        Path(arguments.model), "named entities", table.read_text(encoding="utf-8"), lines, template=CARD, model=NAME,
        figures=figures_of(own, {name: name for name in own}, **counts), tags=["named-entity-recognition"],
        types=", ".join(types), reads=encoder, length=str(data.max_length),
    )  # fmt: skip
    return table


def _dictionary(data: EntityArguments, test: Any) -> list[list[Entity]]:
    """What the training notes name, found again in the test notes."""
    known, entities = data.part(data.splits()["train"])
    matcher = DictionaryMatcher.fit(known["text"].to_pylist(), entities_by_note(known, entities))
    return matcher.predict(test["text"].to_pylist())


def _tagged(model: Any, folder: str, data: EntityArguments) -> list[list[Entity]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tags = [model.config.id2label[place] for place in range(model.num_labels)]
    examples = tagged_notes(data, data.splits()["test"], tokenizer, tags).remove_columns("labels")
    return tag_notes(model, examples, tokenizer)


def _notes(data: EntityArguments, notes: Any, truth: Sequence[Sequence[Entity]]) -> list[str]:
    """What a reader must know: whose notes, and what no tagger can find."""
    lines = [f"{notes.num_rows:,} test notes of {data.source}."]
    lost = sum(
        len(set(given) - _nameable(text, given)) for text, given in zip(notes["text"].to_pylist(), truth, strict=True)
    )
    if lost:
        lines.append(
            f"{lost:,} of {sum(map(len, truth)):,} entities lie in others or end within a word: tags of words cannot "
            "name them, and they count as missed."
        )
    return lines


def _nameable(text: str, given: Sequence[Entity]) -> set[Entity]:
    """The entities that the tags of a text's words say."""
    words = words_of(text)
    found = entities_of_tags(tags_of_entities(given, words))
    return {Entity(words[one.start][0], words[one.end - 1][1], one.type) for one in found}


def write_entity_table(
    rows: dict[str, list[list[Entity]]],
    truth: list[list[Entity]],
    patients: np.ndarray,
    output: Path,
    title: str,
    notes: list[str],
) -> tuple[Path, dict[str, Interval]]:
    """Writes `table.{md,csv,json}` into `output`; returns the Markdown and the figures of the last row.

    Args:
        rows: Model → entities of each note; the last is compared with the first.
        truth: Of each note.
        patients: Of each note.
        output: Folder.
        title: Of the table.
        notes: What a reader must know; a warning is added where there are few patients.
    """
    figures = {name: entity_intervals(truth, found, clusters=patients) for name, found in rows.items()}
    first, last = next(iter(rows)), list(rows)[-1]
    difference = entity_intervals(truth, rows[last], rival=rows[first], clusters=patients)["f1"]
    enough = len(np.unique(patients)) >= FEWEST
    if not enough:
        notes.append(f"Fewer than {FEWEST} test patients: these figures prove nothing about any model.")
    shown = verdict(difference) if enough else "no difference shown"
    present = EntityCounts.of(truth, truth)
    types = ["", *(f" ({kind})" for kind in present.types)]
    lines = [f"# {title}", ""]
    lines += ["| Model | Entities | Precision | Recall | F1 |", "|---|---|---|---|---|"]
    records = []
    for name, own in figures.items():
        for suffix, count in zip(types, [present.present.sum(), *present.present.sum(axis=0)], strict=True):
            cells = [str(own[f"{figure}{suffix}"]) for figure in ("precision", "recall", "f1")]
            lines.append(f"| {' | '.join([name + suffix, f'{count:,}', *cells])} |")
            record: dict[str, Any] = {"model": name, "type": suffix[2:-1] or "all", "entities": int(count)}
            for figure in ("precision", "recall", "f1"):
                one = own[f"{figure}{suffix}"]
                record |= {figure: one.value, f"{figure}_low": one.low, f"{figure}_high": one.high}
            records.append(dict(finite(record)))
    lines += [
        "", f"F1 of {last} minus that of {first}: {difference.value:+.3f} ({difference.low:+.3f} to "
        f"{difference.high:+.3f}): {shown}.", "",
        "An entity counts as found where start, end and type are right. Brackets: 95% bootstrap intervals over "
        "patients with all their notes. The dictionary knows what the training notes name.", "",
        *(f"- {note}" for note in notes),
    ]  # fmt: skip
    content = {
        "title": title, "notes": notes, "difference": asdict(difference), "verdict": shown,
        "rows": [{"model": name, "metrics": {k: asdict(v) for k, v in own.items()}} for name, own in figures.items()],
    }  # fmt: skip
    texts = {
        "table.md": "\n".join(lines) + "\n",
        "table.json": json.dumps(finite(content), indent=2, allow_nan=False) + "\n",
        "table.csv": csv_text(records),
    }
    for name, text in texts.items():
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return output / "table.md", figures[last]


__all__ = ["evaluate", "write_entity_table"]

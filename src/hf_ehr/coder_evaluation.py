"""A coder of notes beside its rivals on the test notes: one table with intervals, a histogram, a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from . import note_baselines
from .cards import evaluation_card, figures_of
from .coding_report import DEFINITIONS, HEADINGS, CodedRow, CodingTest, adjusted, compare_rows, score_row
from .coding_tables import difference_lines, sections, stored_lines, write_coding_tables
from .evidence_report import evidence_report
from .explanations import code_descriptions
from .multilabel_predictions import MultilabelPredictions
from .note_datasets import build_coding_examples
from .notes import imputed_cells
from .schema import EhrDataError, atomic_path
from .training import CODER_FILE, NoteArguments, check_earlier_stage, predict_codes, training_notes
from .training._runs import arguments_from
from .training.icd_coding import CoderArguments

COMPARED = ("auroc_micro", "auroc_macro", "map", "f1_micro")
RIVALS = ("Frequency", "String match", "TF-IDF LR")

CARD = """---
{meta}
---

# Coder of clinical notes ({labels} codes)

> Research software, **not a medical device**: codes it assigns must be checked by a coder.

BERT-XML (Zhang, Liu & Razavian, Clinical NLP 2020) in an independent implementation; not the authors' weights.
The input is the text of a note, the output the probability of each code of `config.id2label`.

```python
import hf_ehr  # not needed where the folder was published: it then carries the code
from transformers import pipeline

coder = pipeline("icd-coding", model=folder, trust_remote_code=True)
coder("Admitted with dyspnea, known heart failure.")
```

The thresholds in the configuration were tuned on validation notes. What they do to test notes is under "As stored in
the configuration"; every other F1 and routing is at one threshold for all codes, tuned the same way for each row
(`config.common_threshold` is the coder's), so that rows can be compared. Only the codes listed are ever assigned: a
rarer one is missed, and counts as missed under "all codes".

{table}
"""


@dataclass
class CoderEvaluateArguments:
    """Arguments of `hf-ehr evaluate-coder`."""

    model: str = field(metadata={"help": "Folder that `hf-ehr finetune ehrbert` wrote."})
    output: str = field(metadata={"help": "Folder for the tables, the figures and the card."})
    data: str | None = field(default=None, metadata={"help": "Folder of notes; the one of training when left out."})


def evaluate_coder(arguments: CoderEvaluateArguments) -> Path:
    """Compares a trained coder with its rivals on the test notes; writes `table.*` and the coder's `README.md`.

    The rivals are TF-IDF with logistic regression, matching of descriptions, and the frequency of codes, fitted on the
    coder's training notes.

    Returns:
        Path of the Markdown table.

    Raises:
        EhrDataError: The folder was not written by `hf-ehr finetune ehrbert`.
        LeakageError: A test patient was in an earlier training stage.
    """
    test, rows = coded_rows(arguments.model, *_made(arguments.model, arguments.data))
    results = [score_row(test, row) for row in rows]
    ours = rows[-1]
    differences = adjusted([one for rival in rows[:-1] for one in compare_rows(test, ours, rival, COMPARED)])
    lines = [
        *sections(test, results, ours.name),
        "### As stored in the configuration",
        "",
        *stored_lines(AutoConfig.from_pretrained(arguments.model), test, ours.test[0]),
        "",
        "### Differences",
        "",
        *difference_lines(differences),
        "",
        DEFINITIONS,
    ]
    table = Path(arguments.output) / "table"
    title = f"# {ours.name} on {len(test.patients):,} test notes"
    paths = write_coding_tables(
        table, "\n".join([title, "", *lines]), [(test, results)], differences, {"model": ours.name}, ours.name
    )
    figures = figures_of(
        results[-1].figures, HEADINGS, test_rows=len(test.patients), test_patients=len(np.unique(test.patients)),
        true_codes=int(results[-1].positives.sum()),
    )  # fmt: skip
    write_coder_card(Path(arguments.model), len(test.codes), "\n".join(["## Figures", "", *lines]), figures)
    return paths[0]


@dataclass
class EvidenceArguments:
    """Arguments of `hf-ehr evaluate-evidence`."""

    model: str = field(metadata={"help": "Folder that `hf-ehr finetune ehrbert` wrote."})
    output: str = field(metadata={"help": "Folder for the table."})
    data: str | None = field(default=None, metadata={"help": "Folder of notes; the one of training when left out."})
    notes: int = field(default=100, metadata={"help": "Most notes of validation and of test that are explained."})
    seed: int = field(default=0, metadata={"help": "Which notes, where there are more."})


def evaluate_evidence(arguments: EvidenceArguments) -> Path:
    """Scores a coder's evidence against the spans of the test notes, beside random spans and string match.

    Thresholds are tuned on validation notes. Explaining a code takes about ten passes over its note.

    Returns:
        Path of `evidence.md`.

    Raises:
        EhrDataError: The folder was not written by `hf-ehr finetune ehrbert`, or no span marks a code it knows.
        LeakageError: A test patient was in an earlier training stage.
    """
    data, _ = _made(arguments.model, arguments.data)
    model: Any = AutoModelForSequenceClassification.from_pretrained(arguments.model)
    spans = data.folder.spans()
    if not spans.num_rows:
        raise EhrDataError(
            "SPANS must mark evidence in the notes, and this folder has none. Prepare notes with spans."
        )
    marked = pc.unique(spans.filter(pc.is_in(spans["code"], pa.array(list(model.config.label2id))))["note_id"])
    parts = {}
    for name in ("validation", "test"):
        ids = sampled(data.splits[name].filter(pc.is_in(data.splits[name], marked)), arguments.notes, arguments.seed)
        parts[name] = pa.concat_tables(data.folder.notes(ids)), spans.filter(pc.is_in(spans["note_id"], ids))
    report = evidence_report(
        model, AutoTokenizer.from_pretrained(arguments.model), *parts["test"], validation_notes=parts["validation"][0],
        validation_spans=parts["validation"][1], max_length=data.max_length,
    )  # fmt: skip
    path = Path(arguments.output) / "evidence.md"
    with atomic_path(path) as temporary:
        temporary.write_text(f"# Evidence of {Path(arguments.model).name}\n\n{report.markdown()}\n", encoding="utf-8")
    return path


def sampled(note_ids: pa.Array, most: int, seed: int) -> pa.Array:
    """Some of the notes, drawn at random: those at the front of a folder may be of one time or one ward."""
    return note_ids.take(pa.array(np.random.default_rng(seed).permutation(len(note_ids))[:most]))


def coded_rows(model: str | Path, data: NoteArguments, options: CoderArguments) -> tuple[CodingTest, list[CodedRow]]:
    """Scores of the rivals and, last, of a trained coder on validation and test notes.

    Args:
        model: Folder of the coder.
        data: The notes and their split.
        options: How it was trained.
    """
    coder: Any = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    codes = [coder.config.id2label[index] for index in range(coder.num_labels)]
    ids = {"train": training_notes(data, options)} | {name: data.splits[name] for name in ("validation", "test")}
    examples = {
        name: build_coding_examples(
            data.folder, tokenizer, codes, note_ids=part, max_length=data.max_length,
            max_segments=options.max_segments,
        )
        for name, part in ids.items()
    }  # fmt: skip
    truth = {name: _matrix(part["labels"][:], len(codes)) for name, part in examples.items()}
    names = code_descriptions(coder, codes)
    rows = _rivals(data, ids, truth, names)
    validation = predict_codes(coder, examples["validation"], tokenizer)
    blind = predict_codes(coder, examples["test"].remove_columns("labels"), tokenizer)
    rows.append(CodedRow(type(coder).__name__, [validation], [MultilabelPredictions.of(blind.dense(), truth["test"])]))
    subjects = np.asarray(examples["test"]["subject_id"][:])
    notes = [f"{len(examples[name]):,} {name} notes" for name in examples]
    counts = np.asarray(truth["train"].sum(axis=0)).ravel()
    beyond = _out_of_scope(data, examples["test"]["note_id"][:], codes)
    test = CodingTest(
        "test notes", codes, names, counts, subjects, beyond, notes=[", ".join(notes) + "."],
        imputed=imputed_cells(data.folder.labels(), examples["test"]["note_id"][:], codes),
    )  # fmt: skip
    return test, rows


def write_coder_card(folder: Path, labels: int, table: str, figures: dict[str, Any]) -> None:
    """Writes the model card `README.md` of a coder: what it is for, what it is not, and its figures.

    Args:
        folder: Of the coder.
        labels: Codes that it assigns.
        table: Markdown with its figures.
        figures: Of :func:`hf_ehr.cards.figures_of`.
    """
    evaluation_card(
        folder, "icd_coding", table, [], template=CARD, model="Coder of clinical notes", figures=figures,
        tags=["icd-coding"], labels=f"{labels:,}",
    )  # fmt: skip


def _rivals(data: NoteArguments, ids: Any, truth: Any, names: list[str | None]) -> list[CodedRow]:
    texts = {
        name: [text for table in data.folder.notes(part, ["text"]) for text in table["text"].to_pylist()]
        for name, part in ids.items()
    }
    matrices = {name: matrix for name, matrix in truth.items() if name != "test"}
    matrices["test"] = sparse.csr_array(truth["test"].shape, dtype=np.int8)  # rivals are shown no test code
    parts = [note_baselines.CodedTexts.of(texts[name], matrices[name], len(names)) for name in texts]
    scores = (
        note_baselines.frequency(*parts),
        [note_baselines.string_match(texts[name], names) for name in ("validation", "test")],
        note_baselines.tfidf_logistic_regression(*parts),
    )
    return [
        CodedRow(
            rival,
            [MultilabelPredictions.of(validation, truth["validation"])],
            [MultilabelPredictions.of(test, truth["test"])],
            trained=False,
        )
        for rival, (validation, test) in zip(RIVALS, scores, strict=True)
    ]


def _matrix(lists: Any, n_labels: int) -> sparse.csr_array:
    """Lists of label ids as 0/1, (notes, labels)."""
    flat = np.array([label for row in lists for label in row], np.int64)
    ends = np.cumsum([0, *(len(row) for row in lists)])
    return sparse.csr_array((np.ones(len(flat), np.int8), flat, ends), (len(lists), n_labels))


def _out_of_scope(data: NoteArguments, note_ids: list[str], codes: list[str]) -> np.ndarray:
    """Codes of each note that the coder does not know."""
    import polars as pl

    labels = pl.DataFrame(data.folder.labels().select(["note_id", "code"])).unique()
    counts = labels.filter(~pl.col("code").is_in(codes)).group_by("note_id").agg(pl.len().cast(pl.Int64))
    notes = pl.DataFrame(pa.table({"note_id": note_ids}))
    return notes.join(counts, on="note_id", how="left", maintain_order="left")["len"].fill_null(0).to_numpy()


def _made(model: str, other_data: str | None) -> tuple[NoteArguments, CoderArguments]:
    """The notes of a coder and how it was trained; its test patients must be strangers to it."""
    path = Path(model) / CODER_FILE
    if not path.is_file():
        raise EhrDataError(f"{path} is missing. `model` must be a folder that `hf-ehr finetune ehrbert` wrote.")
    made = json.loads(path.read_text())
    data = arguments_from(NoteArguments, made["data"])
    data = data if other_data is None else replace(data, data=other_data)
    check_earlier_stage(model, data.manifest())
    return data, arguments_from(CoderArguments, made["options"])

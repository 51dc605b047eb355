"""The commands that draw what a model holds and looks at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, pipeline

import hf_ehr
from hf_ehr.attention_maps import attention_map, attention_of, bare_code
from hf_ehr.attention_page import attention_page
from hf_ehr.cli._arguments import parse
from hf_ehr.cross_attention_maps import cross_attention_map, cross_attention_of
from hf_ehr.cross_attention_page import cross_attention_page
from hf_ehr.embedding_map import code_vectors, embedding_figure, embedding_table, write_embedding_table
from hf_ehr.models.pipeline_patient_tasks import RiskPredictionPipeline
from hf_ehr.risk_explanations import Contribution, explain_risk, patient_from, write_contributions
from hf_ehr.schema import EhrDataError, shard_paths
from hf_ehr.visualization import contribution_plot

CROSS_MODAL = "ehr_medmplm"
OF_VISITS = (CROSS_MODAL, "ehr_gbert")
"""Model types that read diagnoses and medications through a processor."""
LEAST_CHANGE = 1e-5
"""Of the log-odds; less is rounding."""
METHOD_NAMES = {"pca": "PCA", "tsne": "t-SNE"}


@dataclass
class AttentionArguments:
    """Arguments of `hf-ehr attention`."""

    model: str = field(metadata={"help": "Folder or Hub id of a Med-BERT or a MedM-PLM."})
    data: str = field(metadata={"help": "Prepared folder."})
    output: str = field(metadata={"help": "Folder for attention.png and attention.html: patient data, keep it so."})
    row: int = field(default=0, metadata={"help": "Which patient: row of the records, counted from 0."})
    layer: int | None = field(
        default=None, metadata={"help": "Med-BERT: layer of the figure, from 1; layer means by default."}
    )
    head: int | None = field(default=None, metadata={"help": "Med-BERT: head of that layer, from 1; all by default."})
    visit: int | None = field(
        default=None, metadata={"help": "MedM-PLM: which visit, counted from 1; the newest with a note by default."}
    )


@dataclass
class EmbeddingMapArguments:
    """Arguments of `hf-ehr embedding-map`."""

    model: str = field(metadata={"help": "Folder or Hub id of a Med-BERT, G-BERT or MedM-PLM with its vocabulary."})
    output: str = field(metadata={"help": "Folder for embedding_map.csv and embedding_map.png."})
    method: str = field(default="pca", metadata={"help": "`pca`, or `tsne`."})
    seed: int = field(default=0, metadata={"help": "Seed of `tsne`."})


@dataclass
class ExplainArguments:
    """Arguments of `hf-ehr explain`."""

    model: str = field(metadata={"help": "Folder or Hub id of a classifier with what reads its patients."})
    output: str = field(metadata={"help": "Folder for a figure and a table: patient data, keep it so."})
    patient: str | None = field(
        default=None, metadata={"help": 'JSON file of one patient, as the pipelines take it: {"visits": [...]}.'}
    )
    data: str | None = field(
        default=None, metadata={"help": "Prepared folder, in place of `patient`, for models of histories of codes."}
    )
    row: int = field(default=0, metadata={"help": "With `data`: which patient, row of the records from 0."})
    visits: int | None = field(
        default=None, metadata={"help": "Only the first of the patient's visits: what was known after them."}
    )
    label: str | None = field(default=None, metadata={"help": "Which outcome, of models of several."})
    top_k: int = field(default=15, metadata={"help": "Parts in the figure; the CSV holds all."})


def attention(words: list[str]) -> None:
    """``hf-ehr attention --model DIR --data DIR --output DIR``."""
    example = "hf-ehr attention --model classifier/ --data data/ --output attention/"
    (arguments,) = parse("attention", example, words, AttentionArguments)
    output, record = Path(arguments.output), _record(arguments.data, arguments.row)
    if AutoConfig.from_pretrained(arguments.model).model_type == CROSS_MODAL:
        _refuse(arguments, "MedM-PLM", "layer", "head")
        shown = _visit(record, arguments.visit)
        view = cross_attention_of(_open(arguments.model), AutoProcessor.from_pretrained(arguments.model), shown)
        cross_attention_map(view, output / "attention.png")
        cross_attention_page(view, output / "attention.html")
    else:
        _refuse(arguments, "this model", "visit")
        model, tokenizer = _open(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
        patient = attention_of(model, tokenizer, record)
        attention_map(patient, output / "attention.png", layer=arguments.layer, head=arguments.head)
        attention_page(patient, output / "attention.html")
    print(f"Written: {output / 'attention.png'}, {output / 'attention.html'}. Both show a patient: keep them as such.")


def embedding_map(words: list[str]) -> None:
    """``hf-ehr embedding-map --model DIR --output DIR``."""
    example = "hf-ehr embedding-map --model model/ --output map/ --method tsne"
    (arguments,) = parse("embedding-map", example, words, EmbeddingMapArguments)
    if AutoConfig.from_pretrained(arguments.model).model_type in OF_VISITS:
        tokenizers = AutoProcessor.from_pretrained(arguments.model).code_tokenizers
    else:
        tokenizers = {"codes": AutoTokenizer.from_pretrained(arguments.model)}
    vectors = code_vectors(_open(arguments.model), tokenizers)
    table = embedding_table(vectors, method=cast(Any, arguments.method), seed=arguments.seed)
    output = Path(arguments.output)
    write_embedding_table(table, output / "embedding_map.csv")
    title = f"Code embeddings by chapter, {METHOD_NAMES[arguments.method]}"
    embedding_figure(table, output / "embedding_map.png", title=title)
    counts = ", ".join(f"{len(codes):,} of {kind}" for kind, (codes, _) in vectors.items())
    print(f"Codes: {counts}. Written: {output / 'embedding_map.csv'}, {output / 'embedding_map.png'}.")


def explain(words: list[str]) -> None:
    """``hf-ehr explain --model DIR --patient FILE --output DIR``."""
    example = "hf-ehr explain --model classifier/ --data data/ --row 3 --output explanation/"
    (arguments,) = parse("explain", example, words, ExplainArguments)
    if arguments.top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {arguments.top_k}.")
    architecture = (AutoConfig.from_pretrained(arguments.model).architectures or [""])[0]
    if architecture.endswith("ForICDCoding"):
        raise ValueError(f"`model` must be a classifier of patients, got {architecture}. Use: hf-ehr highlight")
    # Named by class: by task name alone the library asks to trust the copy of it in a published folder.
    kind: Any = RiskPredictionPipeline
    predictor = pipeline("risk-prediction", model=arguments.model, pipeline_class=kind)  # type: ignore[call-overload]
    found = explain_risk(predictor, _patient(arguments, predictor), label=arguments.label)
    output = Path(arguments.output)
    write_contributions(found, output / "contributions.csv")
    moving = [one for one in found.contributions if abs(one.log_odds) >= LEAST_CHANGE]
    shown = [(_title(one), one.log_odds) for one in moving[: arguments.top_k]]
    decision = "" if found.threshold is None else f", threshold {found.threshold:.1%}"
    heading = f"{found.label}: {found.probability:.1%}{decision}"
    print(heading)
    for name, change in shown:
        print(f"{change:+7.3f}  {name}")
    if still := len(found.contributions) - len(moving):
        print(f"{still} of {len(found.contributions)} parts change nothing.")
    if not shown:
        raise EhrDataError(
            "Nothing that can be left out changes the risk. Choose a patient whose codes the model knows."
        )
    contribution_plot(shown, output / "explanation.png", course=found.course, threshold=found.threshold, title=heading)
    print("Change of the log-odds by what is left out: what the model rests on, not why the patient is ill.")
    paths = f"{output / 'explanation.png'}, {output / 'contributions.csv'}"
    print(f"Written: {paths}. Both show a patient: keep them as such.")


def _patient(arguments: ExplainArguments, predictor: Any) -> dict:
    """The patient of a file, or of a row of the records, up to the visit that is asked for."""
    if (arguments.patient is None) == (arguments.data is None):
        raise ValueError("`patient` or `data` must be given, and one of them alone. Name a JSON file or a folder.")
    if arguments.patient is not None:
        path = Path(arguments.patient)
        try:
            patient = patient_from(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            raise EhrDataError(f"`patient` must be a JSON file of one patient, and {path} is none.") from None
    elif not predictor.reads_histories or predictor.reads_visits:
        raise ValueError("`data` must be left out for this model, which reads more than codes. Give a `patient` file.")
    else:
        patient = _record(str(arguments.data), arguments.row)
    if arguments.visits is None:
        return patient
    known = patient.get("visits") or []
    if not 1 <= arguments.visits <= len(known):
        raise ValueError(f"`visits` must be 1 to {len(known)} of this patient, got {arguments.visits}.")
    return patient | {"visits": known[: arguments.visits]}


def _title(one: Contribution) -> str:
    where = "" if one.visit is None else f"visit {one.visit}: "
    return f"{where}{bare_code(one.name)}{'' if one.description is None else ' ' + one.description}"


def _open(folder: str) -> Any:
    """The model as it was saved; of a class of another package its base model."""
    architectures = AutoConfig.from_pretrained(folder).architectures or [""]
    return getattr(hf_ehr, architectures[0], AutoModel).from_pretrained(folder)


def _refuse(arguments: AttentionArguments, model: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise ValueError(f"`{name}` must be left out for {model}, got {getattr(arguments, name)}.")


def _record(data: str, row: int) -> dict:
    """One record by its place."""
    for path in shard_paths(data, "records"):
        rows = pq.read_metadata(path).num_rows
        if 0 <= row < rows:
            return pq.read_table(path).slice(row, 1).to_pylist()[0]
        row -= rows
    raise ValueError("`row` must be a row of the records, from 0. Choose a smaller one.")


def _visit(record: dict, number: int | None) -> dict:
    """A visit of a record with its last note."""
    visits = record["visits"]
    noted = [place for place, visit in enumerate(visits, 1) if any(note["text"] for note in visit["notes"])]
    chosen = noted[-1] if number is None and noted else number
    if chosen not in noted:
        raise EhrDataError(
            f"`visit` must be one of the {len(visits)} visits of the patient, with a note, got {number}. "
            "Choose another `visit` or `row`."
        )
    visit = visits[chosen - 1]
    return visit | {"note": [note["text"] for note in visit["notes"] if note["text"]][-1]}

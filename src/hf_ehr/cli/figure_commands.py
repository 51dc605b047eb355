"""The commands that draw what a model holds and looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

import hf_ehr
from hf_ehr.attention_maps import attention_map, attention_of
from hf_ehr.attention_page import attention_page
from hf_ehr.cli._arguments import parse
from hf_ehr.cross_attention_maps import cross_attention_map, cross_attention_of
from hf_ehr.cross_attention_page import cross_attention_page
from hf_ehr.embedding_map import code_vectors, embedding_figure, embedding_table, write_embedding_table
from hf_ehr.schema import EhrDataError, shard_paths

CROSS_MODAL = "ehr_medmplm"
OF_VISITS = (CROSS_MODAL, "ehr_gbert")
"""Model types that read diagnoses and medications through a processor."""


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

"""The commands that read notes: parse, call the library, print what a person wants to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from transformers import TrainingArguments

from hf_ehr import coder_evaluation
from hf_ehr.cli._arguments import parse, positional
from hf_ehr.notes import format_notes_summary, note_leakage, oov_per_note
from hf_ehr.notes import prepare_notes as prepare
from hf_ehr.pipelines import highlight_note, open_coder
from hf_ehr.schema import EhrDataError, shard_paths, write_parquet
from hf_ehr.training import (
    CODER_RECIPE,
    NOTE_RECIPE,
    VOCABULARIES,
    CoderArguments,
    NoteArguments,
    NotePretrainArguments,
    pretrain_notes,
    train_coder,
)
from hf_ehr.training._runs import json_options


@dataclass
class PrepareNotesArguments:
    """Arguments of `hf-ehr prepare-notes`."""

    output: str = field(metadata={"help": "Folder to write; it appears when it is whole."})
    input: str | None = field(default=None, metadata={"help": "Raw notes (not for `synthetic`)."})
    shards: int | None = field(default=None, metadata={"help": "Number of shards; by input size when left out."})
    min_characters: int = field(default=50, metadata={"help": "Shorter notes are left out."})
    exclude_categories: list[str] = field(default_factory=list, metadata={"help": "Note types to leave out."})
    imputation: str = field(
        default="none", metadata={"help": "Chronic codes carried to a patient's other notes: none, as_of or paper."}
    )
    options: str = field(default="{}", metadata={"help": "The source's own options as JSON."})


@dataclass
class TextTokenizerArguments:
    """Arguments of `hf-ehr fit-text-tokenizer`, beside the notes."""

    output: str = field(metadata={"help": "Folder to write."})
    vocabulary: str = field(default="wordpiece", metadata={"help": "`wordpiece`, or `word` (BERT-XML's)."})
    vocab_size: int = field(default=20_000, metadata={"help": "Size of the vocabulary."})
    min_patients: int = field(default=11, metadata={"help": "Fewest patients of a word: a rare word may be a name."})
    cleaning: str | None = field(
        default=None, metadata={"help": "none, bert_xml, caml or edin; that of the vocabulary when left out."}
    )


@dataclass
class CheckNotesArguments:
    """Arguments of `hf-ehr check-notes`, beside the notes."""

    threshold: float = field(
        default=0.8, metadata={"help": "Overlap of runs of five words from which on two notes are copies."}
    )


@dataclass
class HighlightArguments:
    """Arguments of `hf-ehr highlight`."""

    model: str = field(metadata={"help": "Folder or Hub id of a coder."})
    note: str = field(metadata={"help": "Text file with one note."})
    output: str = field(metadata={"help": "HTML page to write: patient data, keep it so."})
    evidence: str | None = field(
        default=None, metadata={"help": "What marks text: label_attention, attention_gradient or gradient."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a window; as in training if left out."})


def prepare_notes(words: list[str]) -> None:
    """``hf-ehr prepare-notes SOURCE --input DIR --output DIR``."""
    example = "hf-ehr prepare-notes table --input notes/ --output prepared-notes/"
    source, words = positional(words, "SOURCE", example)
    (arguments,) = parse("prepare-notes SOURCE", example, words, PrepareNotesArguments)
    folder = prepare(
        cast(Any, source), arguments.input, arguments.output, shards=arguments.shards,
        min_characters=arguments.min_characters, exclude_categories=arguments.exclude_categories,
        imputation=arguments.imputation, options=json_options(arguments.options, "options"),
    )  # fmt: skip
    print(format_notes_summary(folder))
    print(f"\nNext: hf-ehr pretrain ehrbert --data {arguments.output} --output_dir encoder/")


def check_notes(words: list[str]) -> None:
    """``hf-ehr check-notes --data DIR``: copies across splits, and sections that give codes or outcomes away (L7)."""
    example = "hf-ehr check-notes --data prepared-notes/"
    data, arguments = parse("check-notes", example, words, NoteArguments, CheckNotesArguments)
    ids = dict(data.splits)
    ids["train"] = pa.concat_arrays([ids["train"], ids.pop("unlabelled", pa.array([], pa.string()))])
    found = note_leakage(
        {name: data.folder.notes(part, ["note_id", "text"]) for name, part in ids.items()}, arguments.threshold
    )
    print(found.summary())
    if found.copies.num_rows:
        path = Path(data.data) / "near_copies.parquet"
        write_parquet(found.copies, path)
        print(f"\nPairs: {path}. A figure on test notes that are copies says little: report it without them, too.")


def fit_text_tokenizer(words: list[str]) -> None:
    """``hf-ehr fit-text-tokenizer --data DIR --output DIR``."""
    example = "hf-ehr fit-text-tokenizer --data prepared-notes/ --output tokenizer/ --vocabulary word"
    data, arguments = parse("fit-text-tokenizer", example, words, NoteArguments, TextTokenizerArguments)
    if arguments.vocabulary not in VOCABULARIES:
        known = ", ".join(VOCABULARIES)
        raise ValueError(f"`vocabulary` must be one of {known}, got {arguments.vocabulary!r}.")
    options: dict[str, Any] = {} if arguments.cleaning is None else {"cleaning": arguments.cleaning}
    tokenizer = VOCABULARIES[arguments.vocabulary](
        shard_paths(data.folder.path, "notes"), subject_ids=data.subjects("train", "unlabelled"),
        vocab_size=arguments.vocab_size, min_patients=arguments.min_patients, max_length=data.max_length, **options,
    )  # fmt: skip
    tokenizer.save_pretrained(arguments.output)
    seen = [oov_per_note(tokenizer, table) for table in data.folder.notes(data.splits["validation"]) if table.num_rows]
    notes, out = (sum(getattr(part, name) for part in seen) for name in ("notes", "out_of_vocabulary"))
    rate = f"{out / notes:.2f} words of a validation note are no single token" if notes else "no validation notes"
    print(f"{len(tokenizer):,} tokens in {arguments.output}; {rate}.")


def pretrain_ehrbert(words: list[str]) -> None:
    """``hf-ehr pretrain ehrbert --data DIR --output_dir DIR``."""
    example = "hf-ehr pretrain ehrbert --data prepared-notes/ --output_dir encoder/ --preset tiny --learning_rate 1e-3"
    kinds = (NoteArguments, NotePretrainArguments, TrainingArguments)
    data, options, arguments = parse("pretrain ehrbert", example, words, *kinds, defaults=NOTE_RECIPE)
    figures = pretrain_notes(data, options, arguments)
    if arguments.process_index == 0:
        gain = figures["unigram_loss"] - figures["token_loss"]
        verdict = f"{abs(gain):.3f} {'better' if gain >= 0 else 'worse'}"
        pairs = f" Pairs of halves told apart: {figures['pair_accuracy']:.1%}." if "pair_accuracy" in figures else ""
        print(
            f"Hidden tokens of validation notes: {figures['token_loss']:.3f} nats, {verdict} than guessing "
            f"by frequency ({figures['unigram_loss']:.3f}).{pairs}\n"
            f"Next: hf-ehr finetune ehrbert --data {data.data} --model {arguments.output_dir} --output_dir coder/"
        )


def finetune_ehrbert(words: list[str]) -> None:
    """``hf-ehr finetune ehrbert --data DIR --model DIR --output_dir DIR``."""
    example = "hf-ehr finetune ehrbert --data prepared-notes/ --model encoder/ --output_dir coder/"
    kinds = (NoteArguments, CoderArguments, TrainingArguments)
    data, options, arguments = parse("finetune ehrbert", example, words, *kinds, defaults=CODER_RECIPE)
    folder = train_coder(data, options, arguments)
    if arguments.process_index == 0:
        print(f"Next: hf-ehr evaluate-coder --model {folder} --output {folder}/evaluation")


def evaluate_coder(words: list[str]) -> None:
    """``hf-ehr evaluate-coder --model DIR --output DIR``."""
    example = "hf-ehr evaluate-coder --model coder/ --output coder/evaluation"
    (arguments,) = parse("evaluate-coder", example, words, coder_evaluation.CoderEvaluateArguments)
    print(coder_evaluation.evaluate_coder(arguments).read_text())


def evaluate_evidence(words: list[str]) -> None:
    """``hf-ehr evaluate-evidence --model DIR --output DIR``."""
    example = "hf-ehr evaluate-evidence --model coder/ --output coder/evaluation"
    (arguments,) = parse("evaluate-evidence", example, words, coder_evaluation.EvidenceArguments)
    print(coder_evaluation.evaluate_evidence(arguments).read_text())


def highlight(words: list[str]) -> None:
    """``hf-ehr highlight --model DIR --note FILE --output FILE.html``."""
    example = "hf-ehr highlight --model coder/ --note note.txt --output note.html"
    (arguments,) = parse("highlight", example, words, HighlightArguments)
    note = Path(arguments.note)
    if not note.is_file():
        raise EhrDataError(f"`note` must be a text file, and {note} is none. Save the note as UTF-8 text.")
    coder = open_coder(arguments.model)
    try:
        text = note.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise EhrDataError(f"`note` must be UTF-8 text, and {note} is not. Save the note as UTF-8.") from None
    options = {name: value for name in ("evidence", "max_length") if (value := getattr(arguments, name)) is not None}
    if not text.strip():
        print("The note holds no text: these are the scores of a note that says nothing.")
    codes = highlight_note(coder, text, arguments.output, **options)
    for code in codes[:10]:
        print(f"{code['probability']:6.1%}  {code['decision']:9}  {code['code']}  {code['description'] or ''}")
    print(f"Written: {arguments.output}. It shows a patient's note: keep it as such.")

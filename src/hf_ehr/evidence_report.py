"""How good the evidence of a coding model is: plausibility and faithfulness beside what needs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from hf_ehr._scores import Array
from hf_ehr.evidence import (
    faithfulness,
    first_words,
    plausibility,
    plausibility_ceiling,
    random_spans,
    string_match,
    tune_relative_threshold,
    word_spans,
)
from hf_ehr.explanations import code_descriptions
from hf_ehr.intervals import Interval, patient_bootstrap
from hf_ehr.models.any_encoder import evaluating
from hf_ehr.models.evidence_spans import Span, top_spans
from hf_ehr.models.note_evidence import SEGMENTS_AT_A_TIME, EncodedNotes, segment_texts
from hf_ehr.schema import EhrDataError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

RANDOM_DRAWS = 20
"""Random spans of a pair that are averaged."""
COLUMNS = {
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "iou": "IoU",
    "spans_found": "Spans found",
    "comprehensiveness": "Comprehensiveness ↑",
    "sufficiency": "Sufficiency ↓",
}


@dataclass(frozen=True)
class EvidenceReport:
    """How good the evidence of a model is, beside what needs no model.

    Attributes:
        rows: Method or baseline → figure → mean over (note, code) pairs, with its interval over patients. Figures are
            those of :class:`hf_ehr.evidence.Plausibility` and :class:`hf_ehr.evidence.Faithfulness`; NaN where a row
            has none.
        thresholds: Relative threshold of each method, tuned on validation.
        notes: Notes with evidence.
        pairs: (note, code) pairs with evidence.
        unknown: Pairs left out because the model does not have the code.
    """

    rows: dict[str, dict[str, Interval]]
    thresholds: dict[str, float]
    notes: int
    pairs: int
    unknown: int

    def markdown(self) -> str:
        """The table, and under it what it rests on."""
        lines = ["| Evidence | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name, figures in self.rows.items():
            lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(str(figures[key]) for key in COLUMNS) + " |")
        tuned = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in self.thresholds.items())
        notes = [
            f"Means over {self.pairs} (note, code) pairs of {self.notes} notes, intervals over patients; "
            f"{self.unknown} pairs of codes that the model does not have are left out.",
            f"Relative thresholds, tuned on validation: {tuned}.",
            "Attention alone is no evidence: read every row beside the baselines, and faithfulness beside random.",
        ]
        return "\n".join([*lines, "", " ".join(notes)])


class _Case(NamedTuple):
    """One of a note's codes that has evidence."""

    note_id: str
    subject_id: int
    text: str
    code: str
    label_id: int
    truth: list[Span]


def evidence_report(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    notes: pa.Table,
    spans: pa.Table,
    *,
    validation_notes: pa.Table,
    validation_spans: pa.Table,
    descriptions: Mapping[str, str] | None = None,
    max_spans: int | None = None,
    max_length: int | None = None,
    batch_size: int = SEGMENTS_AT_A_TIME,
    n_resamples: int = 1000,
    seed: int = 0,
) -> EvidenceReport:
    """Plausibility and faithfulness of every kind of evidence, beside random spans, first words and string match.

    Random spans and first words are as long as the spans of the model's first method; faithfulness of ``random`` is
    that of random weights. ``ceiling`` is the best that any choice among the tokens that were read could reach.

    Args:
        model: An ``EhrBertForICDCoding``.
        tokenizer: Its fast tokenizer.
        notes: NOTES to report on.
        spans: SPANS of these notes; those of distractors are not used.
        validation_notes: Other NOTES: the thresholds are tuned on them alone.
        validation_spans: Their SPANS.
        descriptions: As in :func:`code_descriptions`, for string match.
        max_spans: Spans of a code, all by default.
        max_length: Tokens of a segment; the tokenizer's ``model_max_length`` by default, which is that of training.
        batch_size: Segments that are encoded at a time.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap and of the random rows.

    Raises:
        ValueError: A note is in both parts.
        EhrDataError: A part marks no evidence of a code that the model has.
    """
    if set(notes["note_id"].to_pylist()) & set(validation_notes["note_id"].to_pylist()):
        raise ValueError("`validation_notes` must be other notes than `notes`, got some that are in both.")
    cases, unknown = _cases(notes, spans, model.config.label2id)
    validation, _ = _cases(validation_notes, validation_spans, model.config.label2id)

    def encode(texts: list[str]) -> EncodedNotes:
        return EncodedNotes(model, segment_texts(model, tokenizer, texts, max_length), batch_size)

    codes = sorted({case.code for case in cases})
    names = dict(zip(codes, code_descriptions(model, codes, descriptions), strict=True))
    rng, scored = np.random.default_rng(seed), []
    with evaluating(model):
        thresholds = _tuned(encode, validation, max_spans)
        for case, offsets, weights in _explained(encode, cases):
            marked = {
                name: top_spans(values, offsets, relative_threshold=thresholds[name], k=max_spans)
                for name, values in weights.items()
            }
            marked |= _baselines(case, next(iter(marked.values())), names[case.code], max_spans)
            figures = {name: plausibility(found, case.truth, case.text)._asdict() for name, found in marked.items()}
            figures["random"] = _chance(case, marked["random"], rng)
            figures["ceiling"] = plausibility_ceiling(case.truth, offsets, case.text)._asdict()
            for name, values in {**weights, "random": rng.random(len(offsets))}.items():
                figures[name] |= _faithful(encode, case, values, offsets)
            scored.append(figures)
    rows = _means(scored, [case.subject_id for case in cases], n_resamples, seed)
    return EvidenceReport(rows, thresholds, len({case.note_id for case in cases}), len(cases), unknown)


def _cases(notes: pa.Table, spans: pa.Table, label2id: Mapping[str, int]) -> tuple[list[_Case], int]:
    """The (note, code) pairs with evidence that the model can find, by note, and how many others there are."""
    from hf_ehr.notes import EVIDENCE_KINDS

    columns = (notes[name].to_pylist() for name in ("note_id", "subject_id", "text"))
    found_in = {note: (subject, text) for note, subject, text in zip(*columns, strict=True)}
    true: dict[tuple[str, str], list[Span]] = {}
    for row in spans.select(["note_id", "code", "start", "end", "kind"]).to_pylist():
        if row["note_id"] in found_in and row["kind"] in EVIDENCE_KINDS:
            true.setdefault((row["note_id"], row["code"]), []).append(Span(row["start"], row["end"]))
    cases = [
        _Case(note, *found_in[note], code, label2id[code], found)
        for (note, code), found in sorted(true.items())
        if code in label2id
    ]
    if not cases:
        raise EhrDataError(
            f"`spans` must mark evidence of a code that the model has, got {len(true)} codes of notes with evidence "
            "and none of them. Compare the names in `config.label2id` with the column `code`."
        )
    return cases, len(true) - len(cases)


def _explained(
    encode: Callable[[list[str]], EncodedNotes], cases: Sequence[_Case]
) -> Iterator[tuple[_Case, Array, dict[str, Array]]]:
    """Each case with the offsets of its tokens and their weights by method; a note is encoded once."""
    progress = tqdm(total=len(cases), desc="Explaining", unit="code")
    for _, group in groupby(cases, key=lambda case: case.note_id):
        own = list(group)
        encoded, label_ids = encode([own[0].text]), [case.label_id for case in own]
        weights = {"gradient": encoded.evidence("gradient", label_ids).weights}
        if encoded.model.config.head == "xml":
            attention = encoded.evidence("label_attention", label_ids).weights
            product = attention * weights["gradient"]
            weights = {"label_attention": attention, "attention_gradient": product, **weights}
        for row, case in enumerate(own):
            yield case, encoded.segments.offsets, {name: values[row] for name, values in weights.items()}
            progress.update()
    progress.close()


def _tuned(
    encode: Callable[[list[str]], EncodedNotes], cases: Sequence[_Case], max_spans: int | None
) -> dict[str, float]:
    """The relative threshold of each method."""
    examples: dict[str, list] = {}
    for case, offsets, weights in _explained(encode, cases):
        for name, values in weights.items():
            examples.setdefault(name, []).append((values, offsets, case.truth, case.text))
    return {name: float(tune_relative_threshold(rows, k=max_spans)) for name, rows in examples.items()}


def _baselines(case: _Case, like: Sequence[Span], name: str | None, max_spans: int | None) -> dict[str, list[Span]]:
    """What needs no model."""
    words = sum(len(word_spans(case.text[start:end])) for start, end, _ in like)
    return {
        "random": list(like),  # only as long as these
        "first words": first_words(case.text, words),
        "string match": string_match(case.text, name or "", k=max_spans),
    }


def _chance(case: _Case, like: Sequence[Span], rng: np.random.Generator) -> dict[str, float]:
    """Plausibility of random spans, the mean of ``RANDOM_DRAWS``: a single draw of short spans mostly hits nothing."""
    draws = [plausibility(random_spans(case.text, like, rng), case.truth, case.text) for _ in range(RANDOM_DRAWS)]
    return {name: float(np.mean([getattr(draw, name) for draw in draws])) for name in draws[0]._fields}


def _faithful(
    encode: Callable[[list[str]], EncodedNotes], case: _Case, weights: Array, offsets: Array
) -> dict[str, float]:
    def score(texts: list[str]) -> Array:
        return encode(texts).probabilities([case.label_id])[:, 0]

    found = faithfulness(score, case.text, weights, offsets)
    return {"comprehensiveness": found.comprehensiveness, "sufficiency": found.sufficiency}


def _means(
    scored: Sequence[dict[str, dict[str, float]]], patients: Sequence[int], n_resamples: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """Row → figure → mean over the cases that have one, with its interval over patients."""

    def interval(row: str, figure: str) -> Interval:
        values = np.array([case[row].get(figure, np.nan) for case in scored])
        return patient_bootstrap(_mean, values, values, patients, n_resamples=n_resamples, seed=seed)

    return {row: {figure: interval(row, figure) for figure in COLUMNS} for row in scored[0]}


def _mean(values: Array, _: Array, weight: Array) -> float:
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=weight[known])) if weight[known].any() else float("nan")

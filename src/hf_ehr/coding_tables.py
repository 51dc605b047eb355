"""The figures of ``coding_report.py`` as Markdown, CSV, JSON and PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hf_ehr.code_thresholds import MIN_POSITIVES, routing_scores
from hf_ehr.coding_report import (
    AUTO_CODE_PRECISION,
    HEADINGS,
    CodingDifference,
    CodingResult,
    CodingTest,
)
from hf_ehr.intervals import Interval
from hf_ehr.models.code_decisions import DECISIONS, stored_thresholds
from hf_ehr.multilabel_intervals import multilabel_intervals
from hf_ehr.multilabel_predictions import MultilabelPredictions
from hf_ehr.reports import csv_text, finite
from hf_ehr.schema import atomic_path
from hf_ehr.visualization import forest_plot, label_auroc_histogram

MOST_FREQUENT = 45
"""Codes of the table of frequent codes, as many as BERT-XML's Table 4 has."""

Tested = tuple[CodingTest, Sequence[CodingResult]]
"""A data set and its rows."""


def sections(test: CodingTest, results: Sequence[CodingResult], detailed: str | None = None) -> list[str]:
    """The tables of one data set as lines of Markdown.

    Args:
        test: What was scored on.
        results: The rows.
        detailed: Row of the table of frequent codes; the last by default.
    """
    shown = next((one for one in results if one.row == detailed), results[-1])
    lines = [*_main(results), "", *(f"- {note}" for note in [*test.notes, _dropped(shown)]), ""]
    lines += ["### Macro AUROC by training notes of a code", "", *_groups(test.bands(), results), ""]
    if test.groups:
        lines += ["### Macro AUROC by kind of code", "", *_groups(test.groups, results), ""]
    chapters = test.chapters()
    if chapters:
        lines += ["### Macro AUROC by chapter", "", *_groups(chapters, results, intervals=False), ""]
    if any("category_f1_counts" in one.points for one in results):
        lines += ["### Agreement on three-character categories", "", *_categories(results), ""]
    if any("recall_imputed" in one.points for one in results):
        lines += ["### Codes of the note itself, and codes carried over", "", *_provenances(results), ""]
    lines += ["### Routing", "", *_routing(results), ""]
    if any(one.draws > 1 for one in results):
        lines += ["### Between seeds", "", *_seeds(test, results), ""]
    return [*lines, f"### The most frequent codes: {shown.row}", "", *_frequent(test, shown), ""]


def stored_lines(config: Any, test: CodingTest, predictions: MultilabelPredictions) -> list[str]:
    """What the thresholds in a coder's configuration do to the test notes, as ``pipeline("icd-coding")`` decides.

    Args:
        config: Of the coder.
        test: What is scored on.
        predictions: Of the coder, on the test notes.
    """
    review, auto = stored_thresholds(config, test.codes)
    rows = []
    for name, limits in (("`thresholds`", review), ("`auto_code_thresholds`", auto)):
        found = multilabel_intervals(
            predictions, threshold=np.array(limits), documents=test.patients, metrics=["f1_micro", "f1_macro"]
        )
        hits, predicted, present = (int(count.sum()) for count in predictions.confusion(limits)[1])
        shares = [math.nan if not whole else hits / whole for whole in (predicted, present)]
        mean = predicted / predictions.n_documents
        rows.append([name, *map(str, found.values()), *map(_number, [*shares, mean])])
    routed = routing_scores(predictions, review=review, auto_code=auto)
    shown = ("per_document", "precision", "share_of_codes")
    decided = [[name, *(_number(routed[name][figure]) for figure in shown)] for name in reversed(DECISIONS)]
    return [
        "The coder's own thresholds, one a code where it had enough validation notes, as `pipeline` applies them.", "",
        *_table(["Codes from", "F1 micro", "F1 macro", "Precision", "Recall", "Codes a note"], rows), "",
        *_table(["Decision", "Codes a note", "Precision", "Share of true codes"], decided),
    ]  # fmt: skip


def difference_lines(differences: Sequence[CodingDifference]) -> list[str]:
    """The comparisons as a table."""
    if not differences:
        return ["Nothing is compared."]
    rows = [
        [one.data, one.row, one.reference, _heading(one.metric), _signed(one.difference), f"{one.p_adjusted:.3f}",
         one.verdict]
        for one in differences
    ]  # fmt: skip
    return _table(["Data", "Row", "against", "by", "Δ", "p (Holm)", "verdict"], rows)


def write_coding_tables(
    stem: str | Path,
    text: str,
    tested: Sequence[Tested],
    differences: Sequence[CodingDifference],
    content: Mapping[str, Any],
    detailed: str | None = None,
) -> list[Path]:
    """Writes ``.md``, ``.csv``, ``-differences.csv``, ``-codes.csv``, ``.json``, ``.png`` and ``-codes.png``.

    Args:
        stem: Path without a suffix.
        text: The Markdown.
        tested: Data sets with their rows.
        differences: Of :func:`hf_ehr.coding_report.adjusted`.
        content: What else the JSON says.
        detailed: Row whose histogram is drawn; the last of each data set by default.

    Returns:
        The files, the Markdown first; figures only where there is a row.
    """
    results = [one for _, rows in tested for one in rows]
    texts = {
        ".md": text,
        ".csv": _csv([_record(one) for one in results]),
        "-differences.csv": _csv([_difference_record(one) for one in differences]),
        "-codes.csv": _csv([record for test, rows in tested for one in rows for record in code_records(test, one)]),
        ".json": _json(results, differences, content),
    }
    paths = [Path(f"{stem}{suffix}") for suffix in texts]
    for path, written in zip(paths, texts.values(), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(written.rstrip("\n") + "\n", encoding="utf-8")
    return paths + (_figures(stem, tested, detailed) if results else [])


def code_records(test: CodingTest, result: CodingResult) -> list[dict[str, Any]]:
    """One record a code: name, notes that carry it, its AUROC and average precision."""
    columns = (test.codes, test.descriptions, test.train_counts, result.positives, result.auroc)
    return [
        {
            "data": test.name, "row": result.row, "code": code, "description": name, "train_notes": int(train),
            "test_notes": int(held), "auroc": float(area), "average_precision": float(precision),
        }
        for code, name, train, held, area, precision in zip(*columns, result.average_precision, strict=True)
    ]  # fmt: skip


def _figures(stem: str | Path, tested: Sequence[Tested], detailed: str | None) -> list[Path]:
    rows: dict[str, dict[str, Interval]] = {}
    for test, results in tested:
        for one in results:
            rows.setdefault(one.row, {})[f"macro, {test.name}"] = one.figures["auroc_macro"]
    paths = [Path(f"{stem}.png"), Path(f"{stem}-codes.png")]
    forest_plot(rows, paths[0])
    shown = {
        f"{test.name}: {one.row}": one.auroc
        for test, results in tested
        for one in (next((r for r in results if r.row == detailed), results[-1]),)
    }
    if all(np.isnan(values).all() for values in shown.values()):
        return paths[:1]
    label_auroc_histogram(shown, paths[1])
    return paths


def _main(results: Sequence[CodingResult]) -> list[str]:
    names = [name for name in HEADINGS if any(name in one.figures for one in results)]
    rows = [[one.row, str(one.draws), *(str(one.figures[name]) for name in names)] for one in results]
    return _table(["Row", "Seeds", *(HEADINGS[name] for name in names)], rows)


def _dropped(one: CodingResult) -> str:
    evaluated, dropped = (int(one.points[name]) for name in ("labels_evaluated", "labels_dropped"))
    return f"Macro AUROC and AP are over {evaluated} codes; {dropped} are left out: no test note has them, or all do."


def _groups(groups: Mapping[str, Any], results: Sequence[CodingResult], intervals: bool = True) -> list[str]:
    def cell(figure: Interval) -> str:
        return str(figure) if intervals or math.isnan(figure.value) else f"{figure.value:.3f}"

    header = [f"{name} ({int(np.sum(members))} codes)" for name, members in groups.items()]
    rows = [[one.row, *(cell(one.figures[f"auroc_macro ({name})"]) for name in groups)] for one in results]
    return _table(["Row", *header], rows)


def _categories(results: Sequence[CodingResult]) -> list[str]:
    names = [f"category_{part}_{kind}" for kind in ("counts", "sets") for part in ("precision", "recall", "f1")]
    header = [name.removeprefix("category_").replace("_", " (") + ")" for name in names]
    rows = [[one.row, *(_number(one.points[name]) for name in names)] for one in results]
    return _table(["Row", *header], rows)


def _provenances(results: Sequence[CodingResult]) -> list[str]:
    counts = results[0].points
    note = (
        f"{counts['codes_native']:,.0f} codes were given for the test notes; {counts['codes_imputed']:,.0f} are "
        "imputed, carried over from elsewhere, and may have no evidence in the text. Recall is at the threshold of "
        "F1; AP leaves out the true codes of the other kind."
    )
    names = [f"{figure}_{kind}" for kind in ("native", "imputed") for figure in ("recall", "average_precision_micro")]
    header = ["Row", "Recall, native", "AP micro, native", "Recall, imputed", "AP micro, imputed"]
    rows = [[one.row, *(_number(one.points[name]) for name in names)] for one in results]
    return [note, "", *_table(header, rows)]


def _routing(results: Sequence[CodingResult]) -> list[str]:
    lines = [
        "Codes are put before a coder from the common threshold on, and are assigned alone from the one on that "
        f"reaches a precision of {AUTO_CODE_PRECISION:.0%} on validation notes: the code's own where it has "
        f"{MIN_POSITIVES} of them, else that of all codes together, never below the first.", "",
    ]  # fmt: skip
    header = ["Row"]
    for decision in reversed(DECISIONS[1:]):
        header += [f"{decision}: codes a note", "precision", "share of true codes"]
    header += ["true codes ignored"]
    rows = []
    for one in results:
        parts = [one.routing[decision] for decision in reversed(DECISIONS)]
        cells = [
            _number(part[name]) for part in parts[:-1] for name in ("per_document", "precision", "share_of_codes")
        ]
        rows.append([one.row, *cells, _number(parts[-1]["share_of_codes"])])
    return lines + _table(header, rows)


def _seeds(test: CodingTest, results: Sequence[CodingResult]) -> list[str]:
    """What differs from seed to seed: the claim of label descriptions is about this table."""
    rare = next(iter(test.bands()))
    header = [
        "Row", "Seeds", "SD of AUROC micro", "SD of AUROC macro", "Epochs to 90 % of the best",
        f"AUROC macro ({rare})", "its SD", "Collapsed runs",
    ]  # fmt: skip
    rows = [
        [
            one.row, str(one.draws), _number(one.sd["auroc_micro"], 4), _number(one.sd["auroc_macro"], 4),
            f"{np.mean(one.epochs):.1f}" if len(one.epochs) else "–", str(one.figures[f"auroc_macro ({rare})"]),
            _number(one.sd[f"auroc_macro ({rare})"], 4), str(one.collapsed),
        ]
        for one in results
    ]  # fmt: skip
    note = (
        "Epochs: the first whose validation figure, above chance, is at least 90 % of the best one's. Collapsed: "
        "scores that depend on the note or on the code by less than 0.0001, or nearly all codes assigned to all notes."
    )
    return [*_table(header, rows), "", note]


def _frequent(test: CodingTest, result: CodingResult) -> list[str]:
    order = np.argsort(-np.asarray(result.positives), kind="stable")[:MOST_FREQUENT]
    records = code_records(test, result)
    rows = [
        [one["code"], one["description"] or "–", str(one["test_notes"]), _number(one["auroc"])]
        for one in (records[place] for place in order)
    ]
    return _table(["Code", "Description", "Test notes", "AUROC"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(header)}", *lines[1:]]


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _signed(figure: Interval) -> str:
    return "–" if math.isnan(figure.value) else f"{figure.value:+.3f} ({figure.low:+.3f} to {figure.high:+.3f})"


def _heading(metric: str) -> str:
    return HEADINGS.get(metric, metric.replace("auroc_macro", "AUROC macro"))


def _ends(name: str, figure: Interval) -> dict[str, float]:
    return {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}


def _record(one: CodingResult) -> dict[str, Any]:
    """A flat row of the CSV file."""
    record: dict[str, Any] = {"data": one.data, "row": one.row, "seeds": one.draws, "seconds": one.seconds}
    for name, figure in one.figures.items():
        record |= _ends(name, figure) | {f"{name}_sd": one.sd[name]}
    record |= one.points
    for decision, figures in one.routing.items():
        record |= {f"{decision}_{name}": value for name, value in figures.items()}
    epochs = float(np.mean(one.epochs)) if len(one.epochs) else math.nan
    return record | {"epochs_to_90_percent": epochs, "collapsed": one.collapsed}


def _difference_record(one: CodingDifference) -> dict[str, Any]:
    record = {name: getattr(one, name) for name in ("data", "row", "reference", "metric")}
    record |= _ends("difference", one.difference)
    return record | {"p_value": one.difference.p_value, "p_adjusted": one.p_adjusted, "verdict": one.verdict}


def _csv(records: Sequence[dict[str, Any]]) -> str:
    """Records whose keys may differ, as those of data sets with other chapters do."""
    names = dict.fromkeys(name for record in records for name in record)
    return csv_text([{name: finite(record.get(name)) for name in names} for record in records]) if records else ""


def _json(results: Sequence[CodingResult], differences: Sequence[CodingDifference], content: Mapping[str, Any]) -> str:
    records = []
    for one in results:  # figures of single codes are in their own file
        record = {name: value for name, value in vars(one).items() if not isinstance(value, np.ndarray)}
        records.append(record | {"figures": {name: asdict(figure) for name, figure in one.figures.items()}})
    whole = {"results": records, "differences": [asdict(one) for one in differences], **content}
    return json.dumps(finite(whole), indent=1, allow_nan=False)

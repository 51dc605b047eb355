"""The cells of a coding report as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from hf_ehr.coding_report import DEFINITIONS, CodedRow, CodingTest, adjusted, compare_rows, score_row
from hf_ehr.coding_tables import difference_lines, sections, write_coding_tables
from hf_ehr.experiments.coding.cells import CodingBench, CodingCell
from hf_ehr.experiments.coding.materials import CodedNotes, Scope
from hf_ehr.experiments.coding.spec import CodingData, CodingSpec
from hf_ehr.intervals import resamples_for
from hf_ehr.multilabel_predictions import MultilabelPredictions

SYNTHETIC = (
    "**Synthetic notes**: what is shown is that the software works and finds planted evidence. Nothing clinical "
    "follows, and no figure here stands beside a figure of a paper."
)


def write(bench: CodingBench, failures: Mapping[str, str], folder: Path) -> list[Path]:
    """Scores all cells that are there on the test notes and writes the tables; returns the files, Markdown first."""
    spec, tested, differences, missing = bench.spec, [], [], []
    n_resamples = resamples_for(len(spec.comparisons) * len(spec.compared) * len(spec.datasets))
    for data in spec.datasets:
        test, rows, absent = read_rows(bench, data)
        missing += absent
        tested.append((test, [score_row(test, row) for row in tqdm(rows.values(), data.name)]))
        for name, reference in spec.comparisons:
            if name in rows and reference in rows:
                pair = (rows[name], rows[reference])
                differences += compare_rows(test, *pair, spec.compared, n_resamples=n_resamples)
    differences = adjusted(differences)
    tested = [(test, results) for test, results in tested if results]
    lines = [f"# {spec.title}", "", f"`hf-ehr report {spec.name}`", ""]
    if any(data.source == "synthetic" for data in spec.datasets):
        lines += [SYNTHETIC, ""]
    for test, results in tested:
        lines += [f"## {test.name}", "", *sections(test, results, spec.detailed)]
    lines += ["## Differences", "", *difference_lines(differences), "", f"![]({spec.name}.png)"]
    lines += ["", f"![]({spec.name}-codes.png)", "", DEFINITIONS, ""]
    seconds = sum(one.seconds * one.draws for _, results in tested for one in results)
    lines += [f"- {note}" for note in [*spec.notes, *_run_notes(spec, missing, failures, seconds)]]
    content = {"spec": asdict(spec), "failures": dict(failures), "missing": missing}
    return write_coding_tables(
        folder / spec.name, "\n".join(lines), tested, differences, content, spec.detailed
    )  # fmt: skip


def read_rows(bench: CodingBench, data: CodingData) -> tuple[CodingTest, dict[str, CodedRow], list[str]]:
    """The test set of a data set, its rows that are whole, and the names of those that are not."""
    notes = bench.notes(data)
    scope, rows, missing = notes.scope, {}, []
    for row in bench.spec.rows_of(data):
        paths = [bench.path(CodingCell(data, row, draw)) for draw in range(bench.spec.draws_of(row))]
        if not all(path.is_file() for path in paths):
            missing.append(f"{row.name}, {data.name}")
            continue
        kept = [np.load(path) for path in paths]
        rows[row.name] = CodedRow(
            row.name,
            [MultilabelPredictions.of(one["validation"], scope.truth["validation"]) for one in kept],
            [MultilabelPredictions.of(one["test"], scope.truth["test"]) for one in kept],
            float(np.mean([one["seconds"] for one in kept])),
            [int(one["epochs"]) for one in kept] if row.neural else (),
            trained=row.neural,
        )
    return _test(notes, scope), rows, missing


def _test(notes: CodedNotes, scope: Scope) -> CodingTest:
    data = notes.data
    return CodingTest(
        data.name, scope.codes, scope.descriptions, scope.train_counts, scope.subjects["test"],
        scope.out_of_scope["test"], data.band_edges, _kinds(data, scope.codes), scope_notes(notes, scope),
        scope.imputed["test"],
    )  # fmt: skip


def scope_notes(notes: CodedNotes, scope: Scope) -> list[str]:
    """What a reader must know of the labels: sizes, codes out of scope, and codes that are no valid item."""
    sizes = {split: (len(scope.note_ids[split]), len(np.unique(scope.subjects[split]))) for split in scope.truth}
    found = [
        "Notes (patients): " + ", ".join(f"{split} {n:,} ({p:,})" for split, (n, p) in sizes.items()) + "; "
        f"{len(scope.codes):,} codes in scope."
    ]
    beyond, never = (int(part["test"].sum()) for part in (scope.out_of_scope, scope.never_seen))
    if beyond:
        total = beyond + int(scope.truth["test"].nnz)
        found.append(
            f"{beyond:,} of {total:,} codes of the test notes ({beyond / total:.1%}) are out of scope, {never:,} of "
            'them in no training note: under "all codes" each counts as missed, and nothing is left out.'
        )
    status = notes.arguments.folder.info.summary.get("codes_by_status", {})
    wrong = ", ".join(f"{number:,} {name}" for name, number in status.items() if name in ("unknown", "truncated"))
    return found + ([f"Of the distinct codes of the source, all kept: {wrong} (ICD-10 of 2024)."] if wrong else [])


def _kinds(data: CodingData, codes: list[str]) -> dict[str, np.ndarray]:
    """In the synthetic world: codes whose mentions share no word with their description, and the others."""
    if data.source != "synthetic" or data.level != "full":
        return {}
    from hf_ehr.sources.synthetic_notes import SyntheticNotesConfig, code_table

    table = code_table(SyntheticNotesConfig(**data.options))
    hidden = dict(zip(table["code"].to_pylist(), table["opaque"].to_pylist(), strict=True))
    opaque = np.array([hidden[code] for code in codes])
    return {"opaque": opaque, "not opaque": ~opaque} if opaque.any() else {}


def _run_notes(spec: CodingSpec, missing: list[str], failures: Mapping[str, str], seconds: float) -> list[str]:
    chosen = any(len(row.learning_rates) > 1 for row in spec.rows)
    rates = "; so are learning rates, with a seed that is not shown" if chosen else ""
    notes = [
        f"{spec.pretraining.seeds} pre-training seeds; epochs, penalties and thresholds are chosen on validation "
        f"notes{rates}.",
        f"The rows took {seconds / 60:.0f} minutes of computing in one process each, pre-training aside.",
    ]
    notes += [f"Not run: {row.name}: {row.unset()}." for row in spec.rows if row.unset()]
    notes += [f"Not there: {name}." for name in missing]
    return notes + [f"Failed: {name}: {error}" for name, error in failures.items()]

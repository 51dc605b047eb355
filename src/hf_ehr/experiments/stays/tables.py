"""The cells of a report of stays as tables, figures and curves."""

from __future__ import annotations

from pathlib import Path

from hf_ehr.experiments.stays.cells import StayBench
from hf_ehr.experiments.stays.convergence import write_curves
from hf_ehr.experiments.tables import Report, collect_from, write


def write_stays(
    bench: StayBench, failures: dict[str, str], folder: Path, n_resamples: int | None = None
) -> list[Path]:
    """Scores the cells on the test patients and writes the tables; returns the files, the Markdown first."""
    report = collect_from(bench, failures, n_resamples)
    curves = write_curves(bench, folder)
    return [*write(report, folder, [*precision_lines(report), *curve_lines(curves)]), *curves]


def precision_lines(report: Report) -> list[str]:
    """Average precision of the rows, the paper's second figure: means over the draws, without intervals."""
    places = list(dict.fromkeys((entry.data, entry.task, entry.size) for entry in report.entries))
    by_place = {(e.row, e.data, e.task, e.size): e.average_precision for e in report.entries}
    titles = [f"{task} ({data}), {size}" for data, task, size in places]
    lines = ["## Average precision × 100", "", f"| Row | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for row in dict.fromkeys(entry.row for entry in report.entries):
        found = [by_place.get((row, *place)) for place in places]
        lines.append(f"| {row} | {' | '.join('–' if x is None else f'{100 * x:.1f}' for x in found)} |")
    shares = {(e.data, e.task, e.size): e.positives / e.n_test for e in report.entries}
    lines.append(f"| *positive test rows* | {' | '.join(f'{100 * shares[place]:.1f} %' for place in places)} |")
    return [*lines, "", "Means over the draws; compared nowhere.", ""]


def curve_lines(paths: list[Path]) -> list[str]:
    """The section of the curves by epoch."""
    if not paths:
        return []
    figures = [f"![{path.name}]({path.name})" for path in paths if path.suffix == ".png"]
    text = "Figures of validation patients at the start and after each epoch, none chosen; means over the draws."
    return ["## Convergence", "", text, "", *figures, ""]

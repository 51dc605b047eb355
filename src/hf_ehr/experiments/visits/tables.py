"""The cells of a report of visits as CSV, Markdown, JSON and PNG."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_ehr.experiments.tables import size_label
from hf_ehr.experiments.visits.cells import VisitBench, VisitCell
from hf_ehr.experiments.visits.scores import SHOWN, Asked, resampled, said_by
from hf_ehr.experiments.visits.spec import ENTITIES, PRIMARY, VisitData, VisitRow, VisitSpec, setting_of
from hf_ehr.intervals import Interval, ResampledDraws, holm, resamples_for, verdict
from hf_ehr.reports import FEW_POSITIVES, finite
from hf_ehr.schema import atomic_path
from hf_ehr.training import task_name
from hf_ehr.visualization import forest_plot, label_efficiency_curve

FEW_PATIENTS = 50
LEVEL_NOTE = (
    "Figures × 100: means over the draws, (standard deviation over them); in brackets a 95 % interval of a crossed "
    "bootstrap over test patients × draws. A draw is a labelled subset, a pre-training seed and a fine-tuning seed, "
    "the same for all rows. The first figure of each table is the one that is compared: Δ is paired by patient and "
    "draw, and counts as a difference when its interval excludes 0, it is at least 1 point, and its p-value stays "
    "below 5 % after Holm's correction over all comparisons of this report. The others are compared nowhere. F1 and "
    "Jaccard are at one threshold, that of the best F1 over the cells of validation visits."
)
UNSOUND = f"nothing concluded (fewer than {FEW_POSITIVES} positives or {FEW_PATIENTS} patients in the test)"
SYNTHETIC = (
    "**Synthetic patients{where}**: what is shown is that the software works and finds planted structure. Nothing "
    "clinical follows, and no figure here stands beside a figure of the paper."
)


@dataclass(frozen=True)
class Entry:
    """A row in a column at a size, over its draws; ``sd`` has the names of ``figures``."""

    data: str
    task: str
    size: int | str
    row: str
    figures: dict[str, Interval]
    sd: dict[str, float]
    draws: int
    n_train: float
    n_test: int
    patients: int
    positives: int
    seconds: float


@dataclass(frozen=True)
class Difference:
    """One comparison at one place of the tables."""

    data: str
    task: str
    size: int | str
    row: str
    reference: str
    metric: str
    difference: Interval
    p_adjusted: float
    verdict: str


@dataclass
class VisitReport:
    """All figures of a report."""

    spec: VisitSpec
    entries: list[Entry]
    differences: list[Difference]
    failures: dict[str, str]
    missing: list[str]


@dataclass(frozen=True)
class _Pair:
    place: tuple[str, str, int | str, str, str, str]
    interval: Interval
    sound: bool


def collect(bench: VisitBench, failures: dict[str, str], n_resamples: int | None = None) -> VisitReport:
    """Reads the cells, scores them on the test visits and compares what the specification compares."""
    spec, report = bench.spec, VisitReport(bench.spec, [], [], failures, [])
    places = [(data, task, size) for data, task in spec.columns() for size in spec.sizes]
    n_resamples = n_resamples or resamples_for(len(spec.comparisons) * len(places))
    pairs: list[_Pair] = []
    for place in tqdm(places, desc="Intervals", unit="column"):
        pairs += _collect_place(bench, report, place, n_resamples)
    adjusted = holm([pair.interval.p_value for pair in pairs])
    for pair, p in zip(pairs, adjusted, strict=True):
        said = verdict(pair.interval, p_adjusted=p) if pair.sound else UNSOUND
        report.differences.append(Difference(*pair.place, pair.interval, p, said))
    return report


def _collect_place(
    bench: VisitBench, report: VisitReport, place: tuple[VisitData, str, int | str], n_resamples: int
) -> list[_Pair]:
    """Adds the entries of one column at one size; returns its comparisons."""
    (data, task, size), setting = place, setting_of(place[1])
    rows = {row.name: row for row in bench.spec.rows_of(data, task)}
    kept = {name: _cells(bench, data, task, row, size) for name, row in rows.items()}
    report.missing += [f"{name}, {data.name}, {task}, {size} patients" for name, found in kept.items() if not found]
    there = {name: found for name, found in kept.items() if found}
    if not there:
        return []
    some = VisitCell(data, task, next(iter(rows.values())), size, 0)
    asked = bench.asked(some, "test")
    validation = None if setting == ENTITIES else bench.asked(some, "validation")
    n_draws, scored = max(map(len, there.values())), {}
    for name, found in there.items():
        draws = [said_by(setting, validation, cell) for cell in found]
        scored[name] = resampled(setting, asked, draws, n_draws, n_resamples)
        report.entries.append(_entry(place, name, found, asked, scored[name]))
    metric, entry = PRIMARY[setting], report.entries[-1]
    sound = entry.positives >= FEW_POSITIVES and entry.patients >= FEW_PATIENTS
    return [
        _Pair(
            (data.name, task_name(task), size, name, reference, metric),
            scored[name][metric].interval(scored[reference][metric]), sound,
        )
        for name, reference in bench.spec.comparisons
        if name in scored and reference in scored
    ]  # fmt: skip


def _cells(bench: VisitBench, data: VisitData, task: str, row: VisitRow, size: int | str) -> list[dict[str, Any]]:
    """The draws of a row; none while one is absent."""
    paths = [bench.path(VisitCell(data, task, row, size, draw)) for draw in range(bench.spec.draws_of(row, size))]
    if not all(path.is_file() for path in paths):
        return []
    found = []
    for path in paths:
        with np.load(path) as file:
            found.append(dict(file))
    return found


def _entry(
    place: tuple[VisitData, str, int | str], name: str, found: list[dict[str, Any]], asked: Asked,
    scored: Mapping[str, ResampledDraws],
) -> Entry:  # fmt: skip
    data, task, size = place
    draws = len(found)
    positives = sum(map(len, asked.truth)) if isinstance(asked.truth, list) else int(np.sum(asked.truth))
    return Entry(
        data=data.name, task=task_name(task), size=size, row=name,
        figures={metric: part.interval() for metric, part in scored.items()},
        sd={
            metric: float(part.values.std(ddof=1)) if draws > 1 else math.nan for metric, part in scored.items()
        },
        draws=draws, n_train=float(np.mean([cell["n_train"] for cell in found])), n_test=len(asked.patients),
        patients=len(np.unique(asked.patients)), positives=positives,
        seconds=float(np.mean([cell["seconds"] for cell in found])),
    )  # fmt: skip


def write(report: VisitReport, folder: Path) -> list[Path]:
    """Writes ``<name>.md``, ``.csv``, ``-differences.csv``, ``.json`` and figures; returns their paths."""
    stem = folder / report.spec.name
    figures = _figures(report, stem)
    content = {name: asdict(report)[name] for name in ("spec", "entries", "differences", "failures", "missing")}
    texts = {
        ".md": _markdown(report, [path.name for path in figures]),
        ".csv": _csv(list(_figure_rows(report.entries))),
        "-differences.csv": _csv([_flat(difference) for difference in report.differences]),
        ".json": json.dumps(finite(content), indent=1, allow_nan=False),
    }
    paths = [Path(f"{stem}{suffix}") for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return [*paths, *figures]


def _figures(report: VisitReport, stem: Path) -> list[Path]:
    """Curves over the sizes for each column, or one plot of all rows."""
    places = list(dict.fromkeys((entry.data, entry.task) for entry in report.entries))
    if len(report.spec.sizes) == 1:
        rows: dict[str, dict[str, Interval]] = {}
        for entry in report.entries:
            metric, title = _compared(entry.task)
            rows.setdefault(entry.row, {})[f"{entry.task}\n({entry.data})\n{title}"] = entry.figures[metric]
        if rows:
            forest_plot(rows, Path(f"{stem}.png"), metric="", title=report.spec.title)
        return [Path(f"{stem}.png")] if rows else []
    paths = []
    for number, (data, task) in enumerate(places):
        metric, title = _compared(task)
        paths.append(Path(f"{stem}-{number + 1}.png" if len(places) > 1 else f"{stem}.png"))
        curves: dict[str, dict[int, Interval]] = {}
        for entry in report.entries:
            if (entry.data, entry.task) == (data, task):
                curves.setdefault(entry.row, {})[round(entry.n_train)] = entry.figures[metric]
        label_efficiency_curve(curves, paths[-1], metric=title, title=f"{task} ({data})")
    return paths


def _compared(task: str) -> tuple[str, str]:
    """The figure of a task that is compared, and its name."""
    metric = PRIMARY[setting_of(task)]
    return metric, SHOWN[setting_of(task)][metric]


def _markdown(report: VisitReport, figures: list[str]) -> str:
    spec = report.spec
    lines = [f"# {spec.title}", "", f"`hf-ehr report {spec.name}`", ""]
    made = [data.name for data in spec.datasets if (data.source or data.corpus or "").startswith("synthetic")]
    if made:
        where = "" if len(made) == len(spec.datasets) else f" in {', '.join(made)}"
        lines += [SYNTHETIC.format(where=where), ""]
    for data, task in dict.fromkeys((entry.data, entry.task) for entry in report.entries):
        mine = [entry for entry in report.entries if (entry.data, entry.task) == (data, task)]
        lines += [f"## {task} ({data})", "", *(_by_size if len(spec.sizes) > 1 else _by_figure)(mine), ""]
    lines += ["## Differences", "", *_difference_lines(report), "", *(f"![{name}]({name})" for name in figures)]
    lines += ["", LEVEL_NOTE, "", *(f"- {note}" for note in [*spec.notes, *_run_notes(report)])]
    return "\n".join(lines)


def _by_figure(entries: Sequence[Entry]) -> list[str]:
    """Rows × figures, at the one size."""
    shown = SHOWN[setting_of(entries[0].task)]
    lines = [f"| Row | {' | '.join(shown.values())} |", f"|---|{'---|' * len(shown)}"]
    for entry in entries:
        cells = [_text(entry, metric, place == 0) for place, metric in enumerate(shown)]
        lines.append(f"| {entry.row} | {' | '.join(cells)} |")
    return [*lines, "", _sizes(entries)]


def _by_size(entries: Sequence[Entry]) -> list[str]:
    """Rows × sizes, the figure that is compared."""
    metric, title = _compared(entries[0].task)
    sizes = list(dict.fromkeys(entry.size for entry in entries))
    lines = [f"{title} × 100", "", f"| Row | {' | '.join(map(size_label, sizes))} |", f"|---|{'---|' * len(sizes)}"]
    by_place = {(entry.row, entry.size): entry for entry in entries}
    for row in dict.fromkeys(entry.row for entry in entries):
        found = [by_place.get((row, size)) for size in sizes]
        cells = ["–" if entry is None else _text(entry, metric, True) for entry in found]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, "", _sizes(entries)]


def _text(entry: Entry, metric: str, interval: bool) -> str:
    figure = entry.figures.get(metric)
    if figure is None or math.isnan(figure.value):
        return "–"
    sd = "" if math.isnan(entry.sd[metric]) else f" ({100 * entry.sd[metric]:.1f})"
    ends = f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]" if interval else ""
    return f"{100 * figure.value:.1f}{sd}{ends}"


def _sizes(entries: Sequence[Entry]) -> str:
    one, draws = entries[0], max(entry.draws for entry in entries)
    what = {ENTITIES: "notes", "admission": "rows"}.get(setting_of(one.task), "visits")
    return (
        f"Test: {one.n_test:,} {what} of {one.patients:,} patients, {one.positives:,} positives; {draws} draws of "
        "rows that seeds or subsets make differ."
    )


def _difference_lines(report: VisitReport) -> list[str]:
    lines = ["| Row | against | where | Δ × 100 | p (Holm) | verdict |", "|---|---|---|---|---|---|"]
    for d in report.differences:
        where = f"{SHOWN[setting_of(d.task)][d.metric]}, {d.task} ({d.data}), {size_label(d.size)}"
        delta = f"{100 * d.difference.value:+.1f} [{100 * d.difference.low:+.1f}, {100 * d.difference.high:+.1f}]"
        lines.append(f"| {d.row} | {d.reference} | {where} | {delta} | {d.p_adjusted:.3f} | {d.verdict} |")
    return lines


def _run_notes(report: VisitReport) -> list[str]:
    spec = report.spec
    chosen = any(len(row.learning_rates) > 1 for row in spec.rows)
    rates = "; learning rates too, on a draw that is not shown" if chosen else ""
    minutes = sum(entry.seconds * entry.draws for entry in report.entries) / 60
    notes = [
        f"{spec.pretraining.seeds} pre-training seeds; epochs, penalties and thresholds chosen on at most "
        f"{spec.validation_patients:,} validation patients{rates}.",
        f"{len(report.entries)} places of the tables took {minutes:.0f} minutes of computing in one process each, "
        "pre-training aside.",
    ]
    notes += [f"Not there: {name}." for name in report.missing]
    return notes + [f"Failed: {name}: {error}" for name, error in report.failures.items()]


def _figure_rows(entries: Sequence[Entry]) -> Any:
    """A line for each figure of each entry."""
    for entry in entries:
        place = {name: value for name, value in asdict(entry).items() if name not in ("figures", "sd")}
        for metric, figure in entry.figures.items():
            yield place | {"metric": metric} | _ends(figure) | {"sd": entry.sd[metric]}


def _flat(difference: Difference) -> dict[str, Any]:
    record = {name: value for name, value in asdict(difference).items() if name != "difference"}
    return record | _ends(difference.difference)


def _ends(figure: Interval) -> dict[str, float]:
    return {"value": figure.value, "low": figure.low, "high": figure.high}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()

"""The cells of a report as CSV, Markdown, JSON and PNG."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_ehr.experiments.cells import Bench, Cell
from hf_ehr.experiments.spec import ALL, ReportSpec
from hf_ehr.intervals import Interval, ResampledDraws, holm, resamples_for, verdict
from hf_ehr.metrics import auroc, average_precision
from hf_ehr.reports import FEW_POSITIVES, finite
from hf_ehr.schema import atomic_path
from hf_ehr.training import task_name
from hf_ehr.visualization import forest_plot, label_efficiency_curve

LEVEL_NOTE = (
    "Figures: mean AUROC × 100 over the draws, (standard deviation over them), [95 % interval of a crossed bootstrap "
    "over test patients × draws]. A draw is a labelled subset, a pre-training seed and a fine-tuning seed, the same "
    "for all rows. Δ is paired by patient and draw; it counts as a difference when its interval excludes 0, it is at "
    "least 1 point, and its p-value stays below 5 % after Holm's correction over all comparisons of this report."
)
UNSOUND = f"nothing concluded (fewer than {FEW_POSITIVES} positive test rows)"


@dataclass(frozen=True)
class Entry:
    """One cell of the table: a row in a column at a size, over its draws."""

    data: str
    task: str
    size: int | str
    row: str
    auroc: Interval
    sd: float
    average_precision: float
    n_train: float
    n_test: int
    positives: int
    draws: int
    oracle_fraction: float | None
    seconds: float


@dataclass(frozen=True)
class Difference:
    """One comparison at one place of the table."""

    data: str
    task: str
    size: int | str
    row: str
    reference: str
    auroc: Interval
    p_adjusted: float
    verdict: str


@dataclass
class Report:
    """All figures of a report."""

    spec: ReportSpec
    entries: list[Entry]
    differences: list[Difference]
    failures: dict[str, str]
    missing: list[str]


def collect(spec: ReportSpec, work: Path, failures: dict[str, str], n_resamples: int | None = None) -> Report:
    """Reads the cells, scores them on the test patients and compares what the specification compares."""
    return collect_from(Bench(spec, work), failures, n_resamples)


def collect_from(bench: Any, failures: dict[str, str], n_resamples: int | None = None) -> Report:
    """:func:`collect` of the cells of a bench: what says where they lie, and of whom they are."""
    spec = bench.spec
    entries, missing, pairs = [], [], []
    places = [(data, task, size) for data, task in spec.columns() for size in spec.sizes]
    n_resamples = n_resamples or resamples_for(len(spec.comparisons) * len(places))
    for data, task, size in tqdm(places, desc="Intervals", unit="column"):
        try:
            truth, patients, oracle = bench.test(data, task)
        except FileNotFoundError:  # the examples could not be made: the failure is named with the others
            missing += [f"{row.name}, {data.name}, {task}, {size} patients" for row in spec.rows]
            continue
        draws = {row.name: _draws(bench, data, task, row, size) for row in spec.rows}
        missing += [f"{name}, {data.name}, {task}, {size} patients" for name, cells in draws.items() if cells is None]
        there = {name: cells for name, cells in draws.items() if cells is not None}
        n_draws = max((len(cells["test"]) for cells in there.values()), default=1)
        scored = {
            name: ResampledDraws.of(
                auroc, truth, cells["test"], patients, n_draws=n_draws, n_resamples=n_resamples
            )
            for name, cells in there.items()
        }  # fmt: skip
        for name, cells in there.items():
            entries.append(_entry(data, task, size, name, cells, truth, scored[name].interval(), oracle))
        for name, reference in spec.comparisons:
            if name in scored and reference in scored:
                interval = scored[name].interval(scored[reference])
                pairs.append(((data.name, task_name(task), size, name, reference), interval, int(truth.sum())))
    adjusted = holm([interval.p_value for _, interval, _ in pairs])
    differences = [
        Difference(*place, interval, p, _verdict(interval, p, positives))
        for (place, interval, positives), p in zip(pairs, adjusted, strict=True)
    ]
    return Report(spec, entries, differences, failures, missing)


def write(report: Report, folder: Path, further: Sequence[str] = ()) -> list[Path]:
    """Writes ``<name>.md``, ``.csv``, ``-differences.csv``, ``.json`` and ``.png``; returns their paths.

    Args:
        report: All figures.
        folder: Where to.
        further: Lines of Markdown that go before the figures.
    """
    stem = folder / report.spec.name
    figures = _figures(report, stem)
    texts = {
        ".md": _markdown(report, [path.name for path in figures], further),
        ".csv": _csv(report.entries),
        "-differences.csv": _csv(report.differences),
        ".json": json.dumps(_json(report), indent=1, allow_nan=False),
    }
    paths = [Path(f"{stem}{suffix}") for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return [*paths, *figures]


def _draws(bench: Any, data: Any, task: str, row: Any, size: int | str) -> dict[str, np.ndarray] | None:
    """The stacked draws of a row, or None while one is absent."""
    paths = [bench.path(Cell(data, task, row, size, draw)) for draw in range(bench.spec.draws_at(size))]
    if not all(path.is_file() for path in paths):
        return None
    cells = [np.load(path) for path in paths]
    return {name: np.stack([cell[name] for cell in cells]) for name in ("test", "n_train", "seconds")}


def _entry(data, task, size, row, cells, truth, interval: Interval, oracle) -> Entry:
    scores = np.array([auroc(truth, draw) for draw in cells["test"]])
    return Entry(
        data=data.name,
        task=task_name(task),
        size=size,
        row=row,
        auroc=interval,
        sd=float(scores.std(ddof=1)) if len(scores) > 1 else math.nan,
        average_precision=float(np.mean([average_precision(truth, draw) for draw in cells["test"]])),
        n_train=float(cells["n_train"].mean()),
        n_test=len(truth),
        positives=int(truth.sum()),
        draws=len(scores),
        oracle_fraction=None if oracle is None else float((scores.mean() - 0.5) / (oracle - 0.5)),
        seconds=float(cells["seconds"].mean()),
    )


def _verdict(interval: Interval, p_adjusted: float, positives: int) -> str:
    return verdict(interval, p_adjusted=p_adjusted) if positives >= FEW_POSITIVES else UNSOUND


def _figures(report: Report, stem: Path) -> list[Path]:
    """Curves over the sizes for each column, or one plot of all rows."""
    spec, paths = report.spec, []
    places = dict.fromkeys((entry.data, entry.task) for entry in report.entries)
    for number, (data, task) in enumerate(places):
        mine = [entry for entry in report.entries if (entry.data, entry.task) == (data, task)]
        if len(spec.sizes) > 1:
            path = Path(f"{stem}-{number + 1}.png" if len(places) > 1 else f"{stem}.png")
            curves: dict[str, dict[int, Interval]] = {}
            for entry in mine:
                curves.setdefault(entry.row, {})[round(entry.n_train)] = entry.auroc
            label_efficiency_curve(curves, path, title=f"{task} ({data})")
            paths.append(path)
    if places and not paths:
        rows: dict[str, dict[str, Interval]] = {}
        for entry in report.entries:
            rows.setdefault(entry.row, {})[f"{entry.task} ({entry.data})"] = entry.auroc
        paths.append(Path(f"{stem}.png"))
        forest_plot(rows, paths[0], title=spec.title)
    return paths


def _markdown(report: Report, figures: list[str], further: Sequence[str] = ()) -> str:
    spec = report.spec
    lines = [f"# {spec.title}", "", f"`hf-ehr report {spec.name}`", ""]
    if any((data.source or "").startswith("synthetic") for data in spec.datasets):
        lines += ["**Synthetic patients**: what is shown is that the software works and finds planted structure. "
                  "Nothing clinical follows, and no figure here stands beside a figure of the paper.", ""]  # fmt: skip
    for heading, entries in _tables(report):
        lines += [f"## {heading}", "", *_table(spec, entries), ""]
    lines += ["## Differences", "", *_difference_lines(report), "", *further]
    lines += [f"![{name}]({name})" for name in figures]
    lines += ["", LEVEL_NOTE, "", *(f"- {note}" for note in [*spec.notes, *_run_notes(report)])]
    return "\n".join(lines)


def _tables(report: Report) -> list[tuple[str, list[Entry]]]:
    """One table, or one per column where there are several sizes."""
    if len(report.spec.sizes) == 1:
        return [(f"AUROC on test patients, {size_label(report.spec.sizes[0])}", report.entries)]
    places = dict.fromkeys((entry.data, entry.task) for entry in report.entries)
    return [
        (
            f"{task} ({data}): AUROC by labelled patients",
            [e for e in report.entries if (e.data, e.task) == (data, task)],
        )
        for data, task in places
    ]


def _table(spec: ReportSpec, entries: list[Entry]) -> list[str]:
    columns = dict.fromkeys((entry.data, entry.task, entry.size) for entry in entries)
    many = len(spec.sizes) > 1
    names = [size_label(size) if many else f"{task} ({data})" for data, task, size in columns]
    lines = [f"| Row | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    by_place = {(e.row, e.data, e.task, e.size): e for e in entries}
    for row in dict.fromkeys(entry.row for entry in entries):
        cells = [by_place.get((row, *column)) for column in columns]
        lines.append(f"| {row} | {' | '.join('–' if e is None else _figure(e) for e in cells)} |")
    tested = [next(e for e in entries if (e.data, e.task, e.size) == column) for column in columns]
    lines.append(f"| *test rows (positive)* | {' | '.join(f'{e.n_test:,} ({e.positives:,})' for e in tested)} |")
    lines.append(f"| *draws* | {' | '.join(str(e.draws) for e in tested)} |")
    return lines


def _figure(entry: Entry) -> str:
    value, sd, low, high = (100 * x for x in (entry.auroc.value, entry.sd, entry.auroc.low, entry.auroc.high))
    text = f"{value:.1f} ({sd:.1f}) [{low:.1f}, {high:.1f}]"
    return text if entry.oracle_fraction is None else f"{text}, {entry.oracle_fraction:.0%} of the oracle's"


def _difference_lines(report: Report) -> list[str]:
    lines = ["| Row | against | where | Δ AUROC × 100 | p (Holm) | verdict |", "|---|---|---|---|---|---|"]
    for d in report.differences:
        where = f"{d.task} ({d.data}), {size_label(d.size)}"
        delta = f"{100 * d.auroc.value:+.1f} [{100 * d.auroc.low:+.1f}, {100 * d.auroc.high:+.1f}]"
        lines.append(f"| {d.row} | {d.reference} | {where} | {delta} | {d.p_adjusted:.3f} | {d.verdict} |")
    return lines


def _run_notes(report: Report) -> list[str]:
    spec = report.spec
    notes = [
        f"{spec.pretraining.seeds} pre-training seeds; learning rates, epochs and penalties chosen on at most "
        f"{spec.validation_patients:,} validation patients; learning rates on a draw that is not shown.",
        f"{len(report.entries)} places of the table took {_hours(report)} of computing in one process each.",
    ]
    notes += [f"Not there: {name}." for name in report.missing]
    return notes + [f"Failed: {name}: {error}" for name, error in report.failures.items()]


def _hours(report: Report) -> str:
    seconds = sum(entry.seconds * entry.draws for entry in report.entries)
    return f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.0f} minutes"


def size_label(size: int | str) -> str:
    """A size of a specification in words."""
    if isinstance(size, str):
        return "all labelled patients" if size == ALL else f"{size} of the labelled patients"
    return f"{size:,} labelled patients"


def _csv(items: list[Any]) -> str:
    rows = [_flat(item) for item in items]
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _flat(item: Any) -> dict[str, Any]:
    """A record with its interval as three columns."""
    record = asdict(item)
    ends = {
        f"auroc{suffix}": record["auroc"][name] for suffix, name in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return {
        name: value
        for key, value in record.items()
        for name, value in (ends if key == "auroc" else {key: value}).items()
    }


def _json(report: Report) -> dict[str, Any]:
    content = asdict(report)
    return {name: finite(content[name]) for name in ("spec", "entries", "differences", "failures", "missing")}

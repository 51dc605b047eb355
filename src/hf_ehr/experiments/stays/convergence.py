"""Validation figures by epoch of some rows (MedHMP, Fig. 6): how soon a pre-trained model is as good as it gets."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainingArguments

from hf_ehr.experiments.spec import digest
from hf_ehr.experiments.stays.cells import StayBench, StayCell
from hf_ehr.experiments.stays.spec import CurveSpec
from hf_ehr.metrics import auroc, average_precision, best_f1_threshold, f1_at
from hf_ehr.schema import atomic_path
from hf_ehr.training._runs import quiet, run_arguments
from hf_ehr.training.finetuning import positive
from hf_ehr.visualization import decorate_axes, legend_beside, saved_figure, style_of

FIGURES = ("auroc", "average_precision", "f1", "best_f1")


def curve_cells(bench: StayBench) -> list[StayCell]:
    """The cells whose training is followed."""
    spec, curve = bench.spec, bench.spec.convergence
    if curve is None:
        return []
    return [
        StayCell(data, task, spec.row(name), curve.size, draw)
        for data, task in spec.columns()
        for name in curve.rows
        for draw in range(curve.draws)
    ]


def curve_path(bench: StayBench, cell: StayCell) -> Path:
    """Where the figures of a cell by epoch lie."""
    return bench.work / "stay-curves" / f"{digest(bench.key(cell), _curve(bench).epochs)}.json"


def run_curve(bench: StayBench, cell: StayCell) -> None:
    """Trains a cell for all epochs and writes the validation figures of each, the start being epoch 0."""
    parts, collate = {split: bench.examples(cell, split) for split in ("train", "validation")}, bench.collator(cell)
    model = bench.start(cell, parts, collate)
    settings: dict[str, Any] = bench.settings(cell) | {"num_train_epochs": _curve(bench).epochs}
    settings.pop("patience", None)
    with tempfile.TemporaryDirectory(dir=bench.work, prefix=".run-") as folder:
        arguments = TrainingArguments(output_dir=folder, seed=cell.draw, learning_rate=bench.rate(cell), **settings)
        trainer = Trainer(
            model,
            run_arguments(
                arguments, eval_strategy="epoch", eval_on_start=True, save_strategy="no", remove_unused_columns=False
            ),
            collate,
            train_dataset=parts["train"].with_format("numpy"),
            eval_dataset=parts["validation"].with_format("numpy"),
            compute_metrics=lambda prediction: figures_of(prediction.label_ids, positive(prediction.predictions)),
        )
        quiet(trainer).train()
    records = [entry for entry in trainer.state.log_history if "eval_auroc" in entry]
    rows = [{"epoch": round(r["epoch"]), **{name: r[f"eval_{name}"] for name in FIGURES}} for r in records]
    with atomic_path(curve_path(bench, cell)) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


def figures_of(labels: Any, scores: np.ndarray) -> dict[str, float]:
    """AUROC, average precision, F1 at a probability of one half and at the best threshold of these very patients."""
    truth = np.asarray(labels)
    at_half, best = (f1_at(truth, scores, threshold) for threshold in (0.5, best_f1_threshold(truth, scores)))
    found = (auroc(truth, scores), average_precision(truth, scores), at_half, best)
    return {name: float(value) for name, value in zip(FIGURES, found, strict=True)}


def write_curves(bench: StayBench, folder: Path) -> list[Path]:
    """Writes ``<name>-convergence.csv`` and a figure for each column; only rows whose draws are all there."""
    lines, drawn = [], {}
    for data, task in bench.spec.columns() if bench.spec.convergence else ():
        curves: dict[str, dict[str, np.ndarray]] = {}
        for name in _curve(bench).rows:
            mine = [c for c in curve_cells(bench) if (c.data, c.task, c.row.name) == (data, task, name)]
            if all(curve_path(bench, cell).is_file() for cell in mine):
                found = [json.loads(curve_path(bench, cell).read_text()) for cell in mine]
                curves[name] = {key: np.mean([[row[key] for row in one] for one in found], 0) for key in found[0][0]}
                place = {"data": data.name, "task": task, "row": name, "draws": len(mine)}
                for epoch, *values in zip(*curves[name].values(), strict=True):
                    lines.append(place | {"epoch": round(epoch)} | dict(zip(FIGURES, values, strict=True)))
        if curves:
            drawn[f"{task} ({data.name})"] = curves
    if not drawn:
        return []
    table, stem = folder / f"{bench.spec.name}-convergence.csv", folder / f"{bench.spec.name}-convergence"
    with atomic_path(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["data", "task", "row", "draws", "epoch", *FIGURES], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    paths = [Path(f"{stem}-{n + 1}.png" if len(drawn) > 1 else f"{stem}.png") for n in range(len(drawn))]
    for path, (title, curves) in zip(paths, drawn.items(), strict=True):
        convergence_curve(curves, path, title=title)
    return [table, *paths]


def convergence_curve(curves: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, title: str) -> None:
    """Draws best F1 and AUROC of validation patients by epoch.

    Args:
        curves: Row → ``epoch``, ``best_f1`` and ``auroc``, each (epochs + 1,).
        path: The PNG to write.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with saved_figure(path, (9.0, 3.6)) as figure:
        panels = figure.subplots(1, 2)
        for axes, (name, label) in zip(
            panels, {"best_f1": "F1, best threshold", "auroc": "AUROC"}.items(), strict=True
        ):
            for index, (row, values) in enumerate(curves.items()):
                axes.plot(values["epoch"], values[name], label=row, markersize=4, linewidth=1.4, **style_of(index))
            axes.set(xlabel="Epoch", ylabel=label)
            decorate_axes(axes)
        legend_beside(panels[-1])
        figure.suptitle(title)
        figure.tight_layout()


def _curve(bench: StayBench) -> CurveSpec:
    curve = bench.spec.convergence
    if curve is None:
        raise ValueError("`convergence` must be in the specification, and is not.")
    return curve

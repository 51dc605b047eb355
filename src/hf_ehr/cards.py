"""Model cards: the README of a trained model, with its figures, and what every card of the package says alike.

    table and its JSON ─┐
    how it was trained ─┼─ evaluation_card ─▶ README.md (front matter with model-index) + evaluation.json + figures
    card of its kind ───┘

The evaluations write what is their own (what the model reads, how to load it, their tables); the sections on use,
data, cohort, splits, leakage, privacy, licence and citation are written here, from the records of the folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from .intervals import Interval
from .reports import HEADINGS
from .schema import EhrDataError, atomic_path
from .tasks.audit import SplitManifest
from .tasks.library import get_task
from .tasks.spec import TaskSpec
from .training import CODER_FILE, FINETUNE_FILE, SPLITS_FILE

FIGURES_FILE = "evaluation.json"
LICENSE = "apache-2.0"
FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
METRIC_TYPES = {"auroc": "roc_auc", "average_precision": "average_precision", "brier": "brier_score", "f1": "f1"}
"""Our names → those that the Hub knows; others keep ours."""
PIPELINE_TAGS = {
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "Model": "feature-extraction",
}
"""Ends of the names of classes → the Hub's tag; of all others `text-classification`."""
FIGURES = {
    "calibration.png": "Calibration on the test rows: observed share by predicted probability.",
    "decisions.png": "Net benefit by decision threshold.",
    "subgroups.png": "Figures by subgroup.",
}

SYNTHETIC = "Trained and judged on **synthetic patients** with planted structure: nothing clinical follows from it."

USE = """## Intended use and misuse

For research: to compare methods, and to study whether such a model could help. No decision about a patient, their
treatment, their bill or their insurance may rest on it. It has been judged on the test rows below and nowhere else;
elsewhere (another hospital, country, coding practice or year) it has to be evaluated again first. A probability is not
a reason, and what the model looks at is no cause."""

PRIVACY = """## Privacy

{bound}The folder that `hf-ehr publish` makes holds no rows of data, no ids and no record of who was in which split.
The weights were fitted to patients all the same: nobody has tested here what they remember, and whether they may leave
the institution is for the institution to say."""

LICENCE = """## Licence

The code that comes with the weights is under the Apache licence 2.0. The weights are bound by the agreement of the
data they were trained on as well."""

LEAKAGE = """## Leakage audit

An evaluation stops where one of these checks fails; the figures above were made after they had passed. No patient is
in two splits (L1). Test patients were in no training or validation split of the runs that this model was made from, as
far as their manifests can be compared (L1, L6). What was fitted (vocabularies, thresholds) was fitted without the test
split (L5). Test labels were read once, after all choices were made (L8)."""

TRIPOD = (
    ("1, 2", "title and abstract", "title, first lines"),
    ("3, 4", "background, objectives", "Intended use and misuse"),
    ("5, 6, 20", "data, participants", "Data; Cohort and label; Splits"),
    ("7, 9, 11", "preparation, predictors, missing data", "first lines; the tokenizer or processor in this folder"),
    ("8", "outcome", "Cohort and label"),
    ("10", "sample size", "Splits: what there was, no calculation"),
    ("12, 13, 15, 16", "methods, class imbalance, output, training versus evaluation", "first lines; Figures; Splits"),
    ("14, 23", "fairness, performance", "Figures, with subgroups where they are there"),
    ("17, 19", "ethical approval, patient involvement", "not known to the software: to be added by who publishes"),
    ("18", "open science", "Licence; the code is in this folder"),
    ("21, 22", "development, full specification", "`config.json` and the weights"),
    ("24", "updating", "none"),
    ("25, 26", "interpretation, limitations", "Known differences; Privacy; the notes below the table"),
    ("27", "usability", "Intended use and misuse; the example above"),
)
"""Items of TRIPOD+AI (Collins et al., BMJ 2024;385:e078378) → where a card answers them."""

MINIMAL = """---
{meta}
---

# {name}

> Research software, **not a medical device**: no decision about a patient may rest on it.

A model of this package that has not been evaluated: `hf-ehr evaluate` writes figures, cohort and splits here.

```python
from transformers import {loader}

model = {loader}.from_pretrained(folder, trust_remote_code=True)
```
"""


def evaluation_card(
    folder: Path,
    task: str,
    table: str,
    notes: Sequence[str],
    *,
    template: str,
    model: str,
    figures: Mapping[str, Any],
    tags: Sequence[str] = (),
    plots: Path | None = None,
    **fields: str,
) -> Path:
    """Writes the `README.md` of an evaluated model and `evaluation.json` beside it; returns the card.

    Args:
        folder: Of the model, with the records of its training (`splits.json`, what `hf-ehr finetune` wrote).
        task: What it predicts.
        table: Markdown with its figures, subgroups, and all else that the evaluation found.
        notes: What a reader must know to read them.
        template: What is this model's own, with places for `meta` (front matter), `task`, `table`, `notes` and the
            `fields`. The sections that all cards share follow it.
        model: Name of the architecture, and of the model's row.
        figures: Of :func:`figures_of_rows` or :func:`figures_of`.
        tags: For the front matter, beside those of all models.
        plots: Folder whose calibration, decision and subgroup plots are copied.
        **fields: Further places of the template.

    Raises:
        ValueError: The front matter is not what the Hub's own parser takes.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    made = _records(folder)
    manifest = SplitManifest.load(folder / SPLITS_FILE) if (folder / SPLITS_FILE).is_file() else None
    source = manifest.source if manifest else "unknown"
    content = {"model": model, "architecture": (config.architectures or [""])[0], "task": task, "source": source}
    content |= figures
    synthetic = source.startswith("synthetic")
    named = [model.lower(), *tags, *(["synthetic"] if synthetic else [])]
    meta = front_matter(f"{model}, {task}", named, content["architecture"], content)
    listed = "\n".join(f"- {note}" for note in notes if note not in table)
    text = template.format(meta=meta, task=task, table=table.rstrip("\n") + "\n", notes=listed, **fields)
    if synthetic:
        text = text.replace("\n> ", f"\n> {SYNTHETIC}\n>\n> ", 1)
    shown = _plots(folder, plots)
    sections = [
        *shown, USE, _data(source, made), _cohort(made, task), _splits(manifest, content), LEAKAGE,
        _differences(config), PRIVACY.format(bound=_bound(made)), LICENCE, _citation(config), _tripod(),
    ]  # fmt: skip
    with atomic_path(folder / FIGURES_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return write_readme(folder, "\n\n".join([text.rstrip(), *sections]) + "\n")


def write_readme(folder: Path, text: str) -> Path:
    """Writes a card whole, after the Hub's own parser has read its front matter.

    Raises:
        ValueError: The parser does not take it.
    """
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    with atomic_path(folder / "README.md") as temporary:
        card.save(temporary)
    return folder / "README.md"


def front_matter(name: str, tags: Sequence[str], architecture: str, figures: Mapping[str, Any] | None = None) -> str:
    """YAML of a card, with the figures of an evaluation as the Hub's `model-index`.

    Args:
        name: Of the model.
        tags: Beside `ehr` and `transformers-ehr`.
        architecture: Name of its class.
        figures: Content of `evaluation.json`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    kind = next((tag for end, tag in PIPELINE_TAGS.items() if architecture.endswith(end)), "text-classification")
    results = None
    if figures and figures.get("metrics"):
        shared = {
            "task_type": kind,
            "task_name": figures["task"],
            "dataset_type": figures["source"],
            "dataset_name": f"{figures['source']}, test split",
        }
        results = [
            EvalResult(
                metric_type=METRIC_TYPES.get(one["type"], one["type"]), metric_name=one["name"],
                metric_value=one["value"], **shared,
            )
            for one in figures["metrics"]
        ]  # fmt: skip
    meta = ModelCardData(
        library_name="transformers", license=LICENSE, pipeline_tag=kind, model_name=name,
        tags=list(dict.fromkeys(["ehr", *tags, "transformers-ehr"])), eval_results=results,
    )  # fmt: skip
    return meta.to_yaml()


def figures_of_rows(table: Path, model: str) -> dict[str, Any]:
    """What `evaluation.json` says, from the JSON that stands beside a written table.

    Args:
        table: Its Markdown.
        model: Name of the model's row.

    Raises:
        EhrDataError: There is no such row.
    """
    rows = json.loads(table.with_suffix(".json").read_text())["rows"]
    row = next((row for row in rows if row["model"] == model), None)
    if row is None:
        raise EhrDataError(f"{table} must have a row {model!r}, got {[row['model'] for row in rows]}.")
    counts = {"test_rows": row["n"], "test_events": row["positives"], "test_patients": row["patients"]}
    values = {name: (one["value"], one["low"], one["high"]) for name, one in row["metrics"].items()}
    return {**counts, "train_rows": row["n_train"], "metrics": _metrics(values, HEADINGS)}


def figures_of(metrics: Mapping[str, Interval], headings: Mapping[str, str], **counts: int) -> dict[str, Any]:
    """What `evaluation.json` says, from figures with their intervals.

    Args:
        metrics: Name → figure.
        headings: Name → how it is called.
        **counts: `test_rows`, `test_events` or `true_codes`, `test_patients`, `train_rows`, as far as they are known.
    """
    values = {name: (one.value, one.low, one.high) for name, one in metrics.items() if name in headings}
    return {**counts, "metrics": _metrics(values, headings)}


def with_figures(card: str, figures: Mapping[str, Any] | None) -> str:
    """A card whose front matter has a `model-index`: its own, or else that of the figures of an evaluation.

    Args:
        card: Text of the card.
        figures: Content of `evaluation.json`, or None.

    Raises:
        ValueError: The front matter is not what the Hub's own parser takes.
    """
    from huggingface_hub import ModelCard

    data: Any = ModelCard(card).data
    if not figures or not {"model", "task", "source", "metrics"} <= set(figures) or data.eval_results:
        return card
    name = data.model_name or f"{figures['model']}, {figures['task']}"
    made = front_matter(name, data.tags or [], str(figures.get("architecture")), figures)
    return f"---\n{made}\n---\n{FRONT.sub('', card)}"


def minimal_card(config: Any) -> str:
    """The card of a model that nobody has evaluated.

    Args:
        config: Of the model; its `architectures` name the class.
    """
    name = (config.architectures or [config.model_type])[0]
    loaders = [key for key, value in (config.auto_map or {}).items() if str(value).endswith(f".{name}")]
    card = MINIMAL.format(meta=front_matter(name, [], name), name=name, loader=(loaders or ["AutoModel"])[0])
    sections = [USE, _differences(config), PRIVACY.format(bound=""), LICENCE, _citation(config)]
    return "\n\n".join([card.rstrip(), *sections]) + "\n"


def architecture_card(config: Any) -> str | None:
    """The card of a model's kind (`model_cards/` of the repository), or None where there is none.

    Args:
        config: Of the model; the name of its module is that of the card.
    """
    name = type(config).__module__.rpartition("configuration_")[2]
    path = resources.files("hf_ehr") / "model_cards" / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _metrics(values: Mapping[str, tuple[Any, Any, Any]], headings: Mapping[str, str]) -> list[dict[str, Any]]:
    """Figures in the order they have, those that are not defined left out; an end that is not there is None."""
    return [
        {"type": name, "name": headings.get(name, name), "value": value, "low": _number(low), "high": _number(high)}
        for name, (value, low, high) in values.items()
        if _number(value) is not None
    ]


def _number(value: Any) -> Any:
    return None if value is None or value != value else value


def _records(folder: Path) -> dict[str, Any]:
    """What the last training run wrote of itself: its data and its options."""
    for name in (FINETUNE_FILE, CODER_FILE):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return {}


def _bound(made: Mapping[str, Any]) -> str:
    known = {**made.get("data", {}), **made.get("options", {})}
    least = known.get("min_patients")
    return f"No entry of a vocabulary or list of labels is of fewer than {least} training patients. " if least else ""


def _data(source: str, made: Mapping[str, Any]) -> str:
    lines = ["## Data", "", f"Source: `{source}`."]
    if source.startswith("synthetic"):
        lines.append(SYNTHETIC)
    settings = {name: value for name, value in made.get("data", {}).items() if name != "data" and _plain(value)}
    if settings:
        lines.append("Read with " + ", ".join(f"`{name}` {value}" for name, value in settings.items()) + ".")
    return "\n".join([*lines[:2], " ".join(lines[2:])])


def _plain(value: Any) -> bool:
    """Numbers and switches; texts may be places on somebody's disk."""
    return isinstance(value, (int, float)) and value is not None


def _cohort(made: Mapping[str, Any], task: str) -> str:
    """The definition of the task as it is run: who is asked, when, about what, and what censors."""
    named = str(made.get("options", {}).get("task", task))
    lines = ["## Cohort and label", ""]
    try:
        spec = TaskSpec.from_yaml(named) if named.endswith((".yaml", ".yml")) else get_task(named)
    except (ValueError, OSError):
        known = f"`{task}`: labels of this name, of which no definition is known here but the code that made them."
        return "\n".join([*lines, known])
    lines += ["Who is asked, when and about what, as `hf_ehr.tasks` runs it:", ""]
    return "\n".join([*lines, "```yaml", spec.to_yaml().strip(), "```"])


def _splits(manifest: SplitManifest | None, content: Mapping[str, Any]) -> str:
    lines = ["## Splits", "", "By patient, never by row.", ""]
    if manifest is not None:
        lines += ["| split | patients |", "|---|---|"]
        lines += [f"| {name} | {len(ids):,} |" for name, ids in manifest.splits.items()]
        lines.append("")
    known = {
        "train_rows": "labelled training rows", "test_rows": "test rows", "test_events": "of them with the event",
        "true_codes": "true codes of theirs", "test_patients": "test patients with a row",
    }  # fmt: skip
    counts = [f"{content[name]:,} {what}" for name, what in known.items() if content.get(name) is not None]
    return "\n".join([*lines, "; ".join(counts) + "." if counts else ""]).rstrip()


def _plots(folder: Path, plots: Path | None) -> list[str]:
    """Copies the figures over all patients into the folder and shows them."""
    lines = []
    for name, what in FIGURES.items():
        if plots is not None and (plots / name).is_file():
            shutil.copyfile(plots / name, folder / name)
            lines.append(f"![{what}]({name})")
    return ["\n\n".join(["## Plots", *lines])] if lines else []


def _differences(config: Any) -> str:
    """The section of the card of this kind."""
    card = architecture_card(config) or ""
    found = re.search(r"^## Known differences.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return "## Known differences from the paper\n\nARCHITECTURE.md of the repository and the code name them."
    return found.group().strip()


def _citation(config: Any) -> str:
    """Whose model it is, as the card of this kind says it in its first lines."""
    quoted = re.search(r"^> .*(?:\n> .*)*", FRONT.sub("", architecture_card(config) or ""), re.MULTILINE)
    lines = ["## Citation", "", "Cite the paper of the model, and the software (CITATION.cff of the repository)."]
    return "\n".join([*lines, *(["", quoted.group()] if quoted else [])])


def _tripod() -> str:
    rows = [f"| {number} | {what} | {where} |" for number, what, where in TRIPOD]
    return "\n".join(["## TRIPOD+AI", "", "| item | about | where |", "|---|---|---|", *rows])


__all__ = [
    "architecture_card", "evaluation_card", "figures_of", "figures_of_rows", "front_matter", "minimal_card",
    "with_figures", "write_readme",
]  # fmt: skip

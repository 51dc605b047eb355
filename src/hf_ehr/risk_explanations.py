"""What a patient's risk rests on: one thing after the other is left out, and the model is asked again.

    patient ─ parts (codes, note, variables, demographics) ─▶ patient without each part ─ model ─▶ change of log-odds

Leaving out is what a model of any family can be asked; it needs no gradients and no baseline to compare with. It says
what the model would answer were the part not recorded: neither why the patient is ill nor what would happen if it were
treated. Changes do not add up to the risk, and of two codes that say the same each may seem to matter little.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from hf_ehr.ontology import nearest_name
from hf_ehr.schema import EhrDataError, atomic_path

COLUMNS = ("part", "visit", "name", "description", "log_odds")


@dataclass(frozen=True)
class Contribution:
    """What one part of a patient changes.

    Attributes:
        part: `code`, `note`, `variable` or `demographic`.
        visit: Which visit it is of, counted from 1; ``None`` where the model reads one stay alone.
        name: The code, the variable or the field; `note` of a note.
        description: Of a code of a public vocabulary.
        log_odds: Log-odds of the outcome with the part less those without it: above 0 it raises the risk.
    """

    part: str
    visit: int | None
    name: str
    description: str | None
    log_odds: float


@dataclass(frozen=True)
class RiskExplanation:
    """The risk of a patient and what it rests on.

    Attributes:
        label: The outcome.
        probability: Of that outcome.
        threshold: From which on the model says yes.
        contributions: The greatest change first.
        course: The probability after each visit, of models that read whole histories; else empty.
    """

    label: str
    probability: float
    threshold: float | None
    contributions: tuple[Contribution, ...]
    course: tuple[float, ...]


def explain_risk(
    predictor: Any, patient: Mapping[str, Any], *, label: str | None = None, batch_size: int = 32
) -> RiskExplanation:
    """Leaves out one part of a patient after the other.

    Parts are every code of every visit (of models of one admission: of the last visit), the note, every variable that
    was measured with all its values, and every demographic field. What cannot be left out, since nothing would be
    left to predict from, is not among the contributions.

    Args:
        predictor: A `risk-prediction` pipeline.
        patient: As that pipeline takes it.
        label: The outcome, for models of several; the second class of two by default.
        batch_size: Patients that the model reads at a time.

    Returns:
        The risk and its parts.

    Raises:
        ValueError: The patient is none, or `label` is not among the model's outcomes.

    Example:
    ```python
    import hf_ehr
    from hf_ehr.risk_explanations import explain_risk
    from transformers import pipeline

    risk = pipeline("risk-prediction", model="folder of a classifier")
    found = explain_risk(risk, {"visits": [["ICD10CM/E11.9", "ICD10CM/I10"], ["ICD10CM/I50.9"]]})
    ```
    """
    answer = predictor(patient)  # refuses what is no patient, in the pipeline's words
    place, name = _outcome(predictor.model.config, label)
    parts = list(_parts(predictor, patient))
    earlier = _earlier(predictor, patient)
    asked = [patient, *(without for _, without in parts), *earlier]
    logits = torch.cat([_logits(predictor, asked[i : i + batch_size]) for i in range(0, len(asked), batch_size)])
    odds = _log_odds(predictor.model.config, logits, place)
    changes = (odds[0] - odds[1 : len(parts) + 1]).tolist()
    codes = nearest_name([part["name"] if part["part"] == "code" else "" for part, _ in parts])
    found = [
        Contribution(description=description, log_odds=change, **part)
        for (part, _), description, change in zip(parts, codes, changes, strict=True)
    ]
    course = (*odds[len(parts) + 1 :].sigmoid().tolist(), odds[0].sigmoid().item()) if earlier else ()
    ordered = tuple(sorted(found, key=lambda one: -abs(one.log_odds)))
    return RiskExplanation(name, odds[0].sigmoid().item(), answer.get("threshold"), ordered, course)


def write_contributions(explanation: RiskExplanation, path: str | Path) -> None:
    """Writes the contributions as CSV: `part`, `visit`, `name`, `description`, `log_odds`."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(one, name) for name in COLUMNS] for one in explanation.contributions)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(lines.getvalue(), encoding="utf-8")


def _outcome(config: Any, label: str | None) -> tuple[int, str]:
    names = [config.id2label[place] for place in range(len(config.id2label))]
    if label is None and len(names) == 2 and config.problem_type != "multi_label_classification":
        return 1, names[1]
    if label is None or label not in names:
        shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        raise ValueError(f"`label` must be an outcome of the model ({shown}), got {label!r}. Name one of them.")
    return names.index(label), label


def _logits(predictor: Any, patients: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    return predictor.forward(predictor.preprocess(patients))["logits"].double()


def _log_odds(config: Any, logits: torch.Tensor, place: int) -> torch.Tensor:
    """(patients, labels) → (patients,): of a softmax against all other classes together."""
    if config.problem_type == "multi_label_classification":
        return logits[:, place]
    others = [other for other in range(logits.shape[-1]) if other != place]
    return logits[:, place] - logits[:, others].logsumexp(dim=-1)


def _earlier(predictor: Any, patient: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A patient of a model of histories as it was after each visit but the last."""
    if not predictor.reads_histories or predictor.reads_visits:
        return []
    visits = patient["visits"]
    cut = [{**patient, "visits": visits[:number]} for number in range(1, len(visits))]
    return [one for one in cut if _codes_left(predictor.tokenizer.kinds, one["visits"])]


def _parts(predictor: Any, patient: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each part as the fields of a contribution, with the patient who lacks it."""
    if predictor.reads_visits:
        kinds = [kind for one in predictor.processor.code_tokenizers.values() for kind in one.kinds]
        yield from _parts_of_admission(patient, list(dict.fromkeys(kinds)))
    elif predictor.reads_stays:
        yield from ((part, stays[0]) for part, stays in _parts_of_stays([dict(patient)], None))
    else:
        yield from _parts_of_history(patient, predictor.tokenizer.kinds)


def _parts_of_history(patient: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[tuple[dict, dict]]:
    visits = list(patient["visits"])
    for number, visit in enumerate(visits):
        for code, without in _codes_of(visit, kinds):
            rest = [*visits[:number], without, *visits[number + 1 :]]
            if _codes_left(kinds, rest):
                yield {"part": "code", "visit": number + 1, "name": code}, {**patient, "visits": rest}


def _parts_of_admission(patient: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[tuple[dict, dict]]:
    *history, last = patient["visits"]
    visit = len(history) + 1

    def put(changed: dict[str, Any]) -> dict[str, Any]:
        return {**patient, "visits": [*history, changed]}

    for code, without in _codes_of(last, kinds):
        if _codes_left(kinds, [without]) or last.get("note") or last.get("stays"):
            yield {"part": "code", "visit": visit, "name": code}, put(without)
    if last.get("note") and (_codes_left(kinds, [last]) or last.get("stays")):
        rest = {name: value for name, value in last.items() if name != "note"}
        yield {"part": "note", "visit": visit, "name": "note"}, put(rest)
    for part, stays in _parts_of_stays(list(last.get("stays") or []), visit):
        yield part, put({**last, "stays": stays})


def _parts_of_stays(stays: list[dict[str, Any]], visit: int | None) -> Iterator[tuple[dict, list[dict]]]:
    """Variables and demographics of all stays of an admission together, with the stays that lack them."""
    measured = [list(stay.get("measurements") or ()) for stay in stays]
    for name in dict.fromkeys(row["name"] for rows in measured for row in rows):
        kept = [[row for row in rows if row["name"] != name] for rows in measured]
        changed = [{**stay, "measurements": rows} for stay, rows in zip(stays, kept, strict=True)]
        yield {"part": "variable", "visit": visit, "name": name}, changed
    known = [dict(stay.get("demographics") or {}) for stay in stays]
    for field in dict.fromkeys(field for fields in known for field in fields):
        others = [{name: value for name, value in fields.items() if name != field} for fields in known]
        changed = [{**stay, "demographics": fields} for stay, fields in zip(stays, others, strict=True)]
        yield {"part": "demographic", "visit": visit, "name": field}, changed


def _codes_of(visit: Any, kinds: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each distinct code of a visit, with the visit that lacks it."""
    if not isinstance(visit, Mapping):
        for code in dict.fromkeys(visit):
            yield code, [other for other in visit if other != code]
        return
    for kind in kinds:
        for code in dict.fromkeys(visit.get(kind) or ()):
            yield code, {**visit, kind: [other for other in visit[kind] if other != code]}


def _codes_left(kinds: Sequence[str], visits: Sequence[Any]) -> bool:
    return any(
        any(visit.get(kind) for kind in kinds) if isinstance(visit, Mapping) else bool(len(visit)) for visit in visits
    )


def patient_from(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A patient of a JSON file: times become times.

    Raises:
        EhrDataError: The content is no patient, or a time is none.
    """
    if not isinstance(fields, Mapping):
        raise EhrDataError(
            f'A patient must be a JSON object as {{"visits": [...]}}, got {type(fields).__name__}. Write one object.'
        )

    def read(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: read(key, each) for key, each in value.items()}
        if isinstance(value, list):
            return [read(name, each) for each in value]
        if name not in ("birth_time", "start", "end") or not isinstance(value, str):
            return value
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise EhrDataError(f"`{name}` must be a time as 2020-01-31T08:30. Correct it.") from None

    return {name: read(name, value) for name, value in fields.items()}

"""Exchange with ACES (Xu et al. 2024, arXiv 2406.19653): task files in and out, for what both languages can say.

ACES names codes of an event stream; our records have visits. Four codes stand for what a record holds otherwise:
``ADMISSION`` and ``DISCHARGE`` (start and end of an inpatient visit), ``MEDS_BIRTH`` and ``MEDS_DEATH``. An event
stream that ACES is to run on must carry them under these names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from hf_ehr.schema import BIRTH_CODE, DEATH_CODE
from hf_ehr.tasks.definition import Censoring, Outcome, Predicate, Rule, Window
from hf_ehr.tasks.events import code_regex
from hf_ehr.tasks.spec import TaskSpec
from hf_ehr.tasks.windows import parse_bound

_NAMED = {
    "ADMISSION": Predicate(kind="admission", visit_kinds=("inpatient",)),
    "DISCHARGE": Predicate(kind="discharge", visit_kinds=("inpatient",)),
    BIRTH_CODE: Predicate(kind="birth"),
    DEATH_CODE: Predicate(kind="death"),
}
_RECORD_ENDS = ("_RECORD_START", "_RECORD_END")
_PLAIN_FIELDS = ("code", "value_min", "value_max", "value_min_inclusive", "value_max_inclusive")
_WINDOW_FIELDS = ("start", "end", "start_inclusive", "end_inclusive", "has", "label", "index_timestamp")


def from_aces(text: str, *, name: str = "aces_task") -> TaskSpec:
    """A task from the text of an ACES file.

    Two things differ by design. A predicate counts once per visit and time, where ACES counts rows; and the prediction
    time of a window that excludes its end lies 1 µs before it, so that «up to the prediction time» is the window.

    Args:
        text: YAML.
        name: The task's name, unless the file's ``metadata`` has one.

    Raises:
        ValueError: The file uses a feature that the records cannot answer, or breaks the rules of a prospective task.
    """
    plain = yaml.safe_load(text)
    if not isinstance(plain, dict):
        raise ValueError("An ACES task must be a YAML mapping with predicates, trigger and windows.")
    _refuse(plain, ("predicates", "trigger", "windows", "description", "metadata"), "task")
    predicates = _import_predicates(plain.get("predicates") or {})
    windows, rules, outcome, prediction = _import_windows(plain.get("windows") or {})
    return TaskSpec(
        name=(plain.get("metadata") or {}).get("name", name),
        description=plain.get("description") or "Imported from ACES.",
        predicates=predicates,
        trigger=plain.get("trigger", ""),
        windows=windows,
        rules=tuple(rules),
        outcome=outcome,
        prediction=prediction,
    )


def to_aces(spec: TaskSpec) -> str:
    """The task as the text of an ACES file.

    Raises:
        ValueError: The task uses what ACES cannot say; the message names it.
    """
    if spec.design != "prospective":
        raise _inexpressible(spec.design, "it has no index that depends on the outcome, and no label within the input")
    if spec.index != "every":
        raise _inexpressible(f"index: {spec.index}", "every trigger counts")
    if spec.censoring != Censoring():
        raise _inexpressible("censoring", "it has no competing events and no «followed or with the outcome»")
    windows = {name: _export_window(name, window) for name, window in spec.windows.items()}
    for rule in spec.rules:
        if rule.scope != "patient" or rule.clock != "time":
            raise _inexpressible(f"rules[{rule.reason}].scope/clock", "it counts in the patient's record, by time")
        has = windows[rule.window].setdefault("has", {})
        if rule.predicate in has:
            raise _inexpressible(f"rules[{rule.reason}]", f"`{rule.predicate}` has a rule in `{rule.window}` already")
        has[rule.predicate] = f"({rule.min}, {rule.max})"
    if spec.outcome.scope != "patient":
        raise _inexpressible("outcome.scope", "it counts in the patient's record")
    windows[spec.outcome.window]["label"] = spec.outcome.predicate
    window, _, side = spec.prediction.partition(".")
    windows[window]["index_timestamp"] = side
    plain = {
        "description": spec.description,
        "metadata": {"name": spec.name},
        "predicates": {name: _export_predicate(name, predicate) for name, predicate in spec.predicates.items()},
        "trigger": spec.trigger,
        "windows": windows,
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)


def _import_predicates(plain: Mapping[str, Any]) -> dict[str, Predicate]:
    """Plain predicates first, then each `or()` after what it is made of."""
    made = {name: _import_plain(name, item) for name, item in plain.items() if "expr" not in item}
    waiting = {name: _parts_of_or(name, item) for name, item in plain.items() if "expr" in item}
    while waiting:
        ready = [name for name, parts in waiting.items() if set(parts) <= set(made)]
        if not ready:
            raise ValueError(f"ACES predicates {list(waiting)} must be made of defined predicates, in no circle.")
        made |= {name: Predicate(any_of=waiting.pop(name)) for name in ready}
    return made


def _import_plain(name: str, item: Mapping[str, Any]) -> Predicate:
    _refuse(item, _PLAIN_FIELDS, f"predicates.{name}")
    code = item.get("code")
    if isinstance(code, str) and code in _NAMED:
        _refuse(item, ("code",), f"predicates.{name} ({code})")
        return _NAMED[code]
    codes = _import_codes(name, code)
    low, high = item.get("value_min"), item.get("value_max")
    if low is None and high is None:
        return Predicate(codes=codes)
    return Predicate(
        kind="measurement",
        codes=codes,
        value_min=low,
        value_max=high,
        value_min_inclusive=low is None or bool(item.get("value_min_inclusive")),
        value_max_inclusive=high is None or bool(item.get("value_max_inclusive")),
    )


def _import_codes(name: str, code: Any) -> tuple[str, ...]:
    if isinstance(code, str):
        return (_exactly(code),)
    if isinstance(code, Mapping) and set(code) == {"any"}:
        return tuple(_exactly(item) for item in code["any"])
    if isinstance(code, Mapping) and set(code) == {"regex"}:
        regex = code["regex"]
        return (regex if regex.startswith("^") else f"^.*(?:{regex})",)
    raise ValueError(f"`predicates.{name}.code` must be a code, `{{any: [...]}}` or `{{regex: ...}}`, got {code!r}.")


def _exactly(code: str) -> str:
    """A pattern for this code alone: a character that is a wildcard for us makes it a regular expression."""
    return f"^{re.escape(code)}$" if re.search(r"[*?\[]", code) else code


def _parts_of_or(name: str, item: Mapping[str, Any]) -> tuple[str, ...]:
    match = re.fullmatch(r"\s*or\((.+)\)\s*", item["expr"])
    if not match or set(item) != {"expr"}:
        raise ValueError(
            f"`predicates.{name}` must be or(A, B, ...) of predicates, got {dict(item)}: nothing else is read."
        )
    return tuple(part.strip() for part in match[1].split(","))


def _import_windows(plain: Mapping[str, Any]) -> tuple[dict[str, Window], list[Rule], Outcome, str]:
    windows, rules, outcomes, predictions = {}, [], [], []
    for name, item in plain.items():
        _refuse(item, _WINDOW_FIELDS, f"windows.{name}")
        bounds = (_import_bound(item.get("start")), _import_bound(item.get("end")))
        windows[name] = Window(*bounds, item.get("start_inclusive", True), item.get("end_inclusive", True))
        for predicate, limits in (item.get("has") or {}).items():
            low, high = _import_limits(name, limits)
            if (low, high) != (None, None):
                rules.append(Rule(f"{name}_{predicate}", name, predicate, min=low, max=high))
        if item.get("label"):
            outcomes.append(Outcome(name, item["label"]))
        if item.get("index_timestamp"):
            predictions.append(f"{name}.{item['index_timestamp']}")
    if len(outcomes) != 1 or len(predictions) != 1:
        raise ValueError(
            "An ACES task must have one `label` (what to predict) and one `index_timestamp` (when), got "
            f"{len(outcomes)} and {len(predictions)}."
        )
    return windows, rules, outcomes[0], predictions[0]


def _import_bound(text: str | None) -> str | None:
    """ACES's words are ours; the ends of the record are null."""
    return None if text is None or any(end in text for end in _RECORD_ENDS) else text


def _import_limits(window: str, limits: Any) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"\(\s*(None|\d*)\s*,\s*(None|\d*)\s*\)", str(limits))
    if not match:
        raise ValueError(
            f"`windows.{window}.has` must be (min, max) in quotes, got {limits!r}: unquoted in braces YAML splits it."
        )
    low, high = (None if part in ("None", "") else int(part) for part in match.groups())
    return low, high


def _export_predicate(name: str, predicate: Predicate) -> dict[str, Any]:
    for code, named in _NAMED.items():
        if predicate == named:
            return {"code": code}
    _check_expressible(name, predicate)
    if predicate.any_of:
        parts = predicate.any_of if len(predicate.any_of) > 1 else predicate.any_of * 2
        return {"expr": f"or({', '.join(parts)})"}
    plain: dict[str, Any] = {"code": _export_codes(predicate.codes)}
    for side in ("value_min", "value_max"):
        if getattr(predicate, side) is not None:
            plain |= {side: getattr(predicate, side), f"{side}_inclusive": getattr(predicate, f"{side}_inclusive")}
    return plain


def _check_expressible(name: str, predicate: Predicate) -> None:
    wanted = (
        "visit_kinds",
        "discharged_to",
        "unplanned",
        "longer_than_days",
        "except_codes",
        "principal",
        "when_known",
    )
    for field in (*wanted, "min_age", "below_age", "confirmed_by"):
        if getattr(predicate, field) not in ((), False, None):
            raise _inexpressible(
                f"predicates.{name}.{field}", "it knows codes and values only; make it a code beforehand"
            )
    if not predicate.codes and not predicate.any_of:
        raise _inexpressible(
            f"predicates.{name}.kind", f"only {', '.join(_NAMED)} stand for visits, births and deaths"
        )


def _export_codes(codes: tuple[str, ...]) -> Any:
    if not any(re.search(r"[*?\[]|^\^", code) for code in codes):
        return codes[0] if len(codes) == 1 else {"any": list(codes)}
    return {"regex": codes[0] if len(codes) == 1 and codes[0].startswith("^") else _any_regex(codes)}


def _any_regex(codes: tuple[str, ...]) -> str:
    return "^(?:" + "|".join(f"(?:{code_regex(code)})" for code in codes) + ")"


def _export_window(name: str, window: Window) -> dict[str, Any]:
    """In ACES exactly one bound is said by the other, so a shared anchor becomes `start`."""
    start, end = window.start, window.end
    for text in (start, end):
        if text is not None and parse_bound(text).clock is not None:
            raise _inexpressible(f"windows.{name}: {text}", "it has no time of day")
    if start is None and end is None:
        raise _inexpressible(f"windows.{name}", "a window cannot be the whole record")
    own_start = start is not None and parse_bound(start).anchor == "end"
    own_end = end is not None and parse_bound(end).anchor == "start"
    if start is not None and end is not None and not own_start and not own_end:
        if not end.startswith(start) or end == start:
            raise _inexpressible(f"windows.{name}", "one bound is said by the other, and they differ")
        end = "start" + end.removeprefix(start)
    inclusive = {"start_inclusive": window.start_inclusive, "end_inclusive": window.end_inclusive}
    return {"start": start, "end": end, **inclusive}


def _refuse(item: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in item if key not in known]
    if unknown:
        raise ValueError(
            f"ACES `{where}` uses {', '.join(unknown)}, which records cannot answer. Known here: {', '.join(known)}."
        )


def _inexpressible(feature: str, reason: str) -> ValueError:
    return ValueError(f"ACES cannot express `{feature}`: {reason}. Export a task without it.")

"""Windows in time around a trigger. Nothing here can see an outcome or a label (leakage rule L4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hf_ehr.tasks.definition import Window
from hf_ehr.tasks.events import DAY, HOUR, MISSING, Timeline

BEFORE_ALL = -(2**62)  # far from the ends of int64, so that an offset may still be added
AFTER_ALL = 2**62

_BOUND = re.compile(
    r"(?P<anchor>\w+(\.(start|end))?)\s*"
    r"((?P<sign>[+-])\s*(?P<offset>[^+>-].*)|@\s*(?P<clock>\d\d?:\d\d)|(?P<arrow>->|<-)\s*(?P<predicate>\w+))?"
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)[\s,]*")
_UNITS = {"w": 7 * DAY, "d": DAY, "h": HOUR, "m": HOUR // 60, "s": HOUR // 3600}
_UNIT_NAMES = re.compile(r"w(eeks?)?|d(ays?)?|h(rs?|ours?)?|m(ins?|inutes?)?|s(ecs?|econds?)?")


@dataclass(frozen=True)
class Bound:
    """One end of a window, parsed: an anchor and at most one of offset, time of day, next or previous predicate.

    Attributes:
        anchor: ``trigger``, ``start``, ``end``, ``WINDOW.start`` or ``WINDOW.end``.
        offset: µs, with its sign.
        clock: µs since midnight.
        predicate: Name of the predicate whose moment is looked for.
        forward: Whether the next moment of `predicate` is meant; else the previous one.
    """

    anchor: str
    offset: int = 0
    clock: int | None = None
    predicate: str | None = None
    forward: bool = False


@dataclass(frozen=True)
class Span:
    """A window of every candidate, µs, as the bounds were named; MISSING where a bound's event does not exist.

    Attributes:
        start: (candidates,) int64.
        end: (candidates,) int64.
        first: (candidates,) int64, the first moment inside.
        last: (candidates,) int64, the last moment inside.
    """

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @property
    def exists(self) -> np.ndarray:
        """(candidates,) bool: both bounds were found."""
        return (self.start != MISSING) & (self.end != MISSING)


def parse_duration(text: str) -> int:
    """Microseconds of ``30d``, ``1 day 2 hours``, ``24h``.

    Raises:
        ValueError: The text is no duration.
    """
    parts = _DURATION.findall(text.strip().lower())
    if (
        not parts
        or _DURATION.sub("", text.strip().lower())
        or any(not _UNIT_NAMES.fullmatch(unit) for _, unit in parts)
    ):
        raise ValueError(f"A duration must be numbers with w, d, h, m or s (`30d`, `1 day 2 hours`), got {text!r}.")
    return round(sum(float(number) * _UNITS[unit[0]] for number, unit in parts))


def parse_bound(text: str) -> Bound:
    """One end of a window from its words (see `Window`).

    Raises:
        ValueError: The words are not of the language.
    """
    match = _BOUND.fullmatch(text.strip())
    if not match:
        raise ValueError(
            "A window bound must be ANCHOR, ANCHOR + DURATION, ANCHOR - DURATION, ANCHOR @ HH:MM, "
            f"ANCHOR -> PREDICATE or ANCHOR <- PREDICATE, got {text!r}."
        )
    part = match.groupdict()
    if part["offset"]:
        return Bound(part["anchor"], offset=int(part["sign"] + "1") * parse_duration(part["offset"]))
    if part["clock"]:
        hours, minutes = part["clock"].split(":")
        return Bound(part["anchor"], clock=int(hours) * HOUR + int(minutes) * HOUR // 60)
    return Bound(part["anchor"], predicate=part["predicate"], forward=part["arrow"] == "->")


def bounds_behind(windows: Mapping[str, Window], reference: str) -> list[tuple[str, Bound | None]]:
    """The chain of bounds that decides ``WINDOW.start`` or ``WINDOW.end``, from there to the trigger (or to null).

    Raises:
        ValueError: A window is unknown, or the chain is a circle.
    """
    chain: list[tuple[str, Bound | None]] = []
    while reference != "trigger":
        name, _, side = reference.partition(".")
        if name not in windows or not side:
            raise ValueError(f"`{reference}` must be trigger or WINDOW.start/.end with a window of {list(windows)}.")
        if any(reference == earlier for earlier, _ in chain):
            raise ValueError(f"The windows must not be defined in a circle, `{reference}` is.")
        text = getattr(windows[name], side)
        bound = None if text is None else parse_bound(text)
        chain.append((reference, bound))
        if bound is None:
            return chain
        reference = _absolute(bound.anchor, name)
    return chain


def resolve_windows(
    windows: Mapping[str, Window],
    names: list[str],
    patient: np.ndarray,
    trigger: np.ndarray,
    boundaries: Mapping[str, Timeline],
) -> dict[str, Span]:
    """Where the windows `names` lie for every candidate.

    Args:
        windows: All windows of the task, by name.
        names: Those to resolve.
        patient: (candidates,) int64, the patient's row.
        trigger: (candidates,) int64, µs.
        boundaries: Timelines, grouped by patient, of the predicates that bound a window.
    """
    known: dict[str, np.ndarray] = {"trigger": trigger}

    def value(reference: str) -> np.ndarray:
        if reference not in known:
            name, _, side = reference.partition(".")
            text = getattr(windows[name], side)
            if text is None:
                known[reference] = np.full(len(trigger), BEFORE_ALL if side == "start" else AFTER_ALL)
            else:
                bound = parse_bound(text)
                base = value(_absolute(bound.anchor, name))
                moved = _move(bound, base, _may_touch(bound.anchor, windows[name]), patient, boundaries)
                known[reference] = np.where(base == MISSING, MISSING, moved)
        return known[reference]

    return {name: _span(windows[name], value(f"{name}.start"), value(f"{name}.end")) for name in names}


def _absolute(anchor: str, window: str) -> str:
    return f"{window}.{anchor}" if anchor in ("start", "end") else anchor


def _may_touch(anchor: str, window: Window) -> bool:
    """Whether the anchor's own moment may be the event looked for: only if it lies inside the window (as in ACES)."""
    return (anchor == "start" and window.start_inclusive) or (anchor == "end" and window.end_inclusive)


def _move(
    bound: Bound, base: np.ndarray, touch: bool, patient: np.ndarray, boundaries: Mapping[str, Timeline]
) -> np.ndarray:
    if bound.predicate is not None:
        events, step = boundaries[bound.predicate], 0 if touch else 1
        return events.next(patient, base + step) if bound.forward else events.previous(patient, base - step)
    if bound.clock is not None:
        return np.maximum(base, base - base % DAY + bound.clock)
    return base + bound.offset


def _span(window: Window, start: np.ndarray, end: np.ndarray) -> Span:
    return Span(start, end, start + (not window.start_inclusive), end - (not window.end_inclusive))

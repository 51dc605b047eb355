"""The course of a stay: three states, hour by hour, into ventilation, vasopressors, death or discharge; its oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_ehr.sources._synthetic_icu_world import Stream, Streams
from hf_ehr.sources._synthetic_process import sigmoid

STABLE, DETERIORATING, RECOVERING, DEAD, DISCHARGED = range(5)
LONGEST = 336
"""Hours; who is still there is discharged."""
OBSERVED = 48
"""Hours with measurements, as in the PhysioNet/CinC Challenge 2012."""
ASKED = (4, 12, 48)
"""Hours at which onsets are asked; death is asked at the last."""
ONSETS = {"arf": (0.0005, 0.0105, 0.001), "shock": (0.00035, 0.0085, 0.0007)}
"""Hazard per hour of ventilation and of a vasopressor in the three states."""
_TREATMENTS: dict[str, Stream] = {"arf": "ventilation", "shock": "vasopressor"}
_EARLIEST = 20  # hours before which nobody is discharged
_COUNTER = 1 << 12  # draws set aside for each stay


@dataclass
class Course:
    """R stays, hour by hour.

    Attributes:
        state: ``(R, LONGEST + 1)`` at the beginning of each hour; absorbing states stay.
        hours: ``(R,)`` length in hours.
        died: ``(R,)`` in the stay.
        onset: Hour of the first ventilation (``arf``) and vasopressor (``shock``), ``(R,)`` each, NaN without.
        death: ``(R,)`` P(death in the hospital visit | state at hour 48, severity).
        from_start: ``(R,)`` the same when the stay begins, the state not known.
        risk: (outcome, hour) → P(onset later in the stay | state at that hour, severity, no onset before).
    """

    state: np.ndarray
    hours: np.ndarray
    died: np.ndarray
    onset: dict[str, np.ndarray]
    death: np.ndarray
    from_start: np.ndarray
    risk: dict[tuple[str, int], np.ndarray]


def run_course(
    streams: Streams, patient: np.ndarray, number: np.ndarray, severity: np.ndarray, factors: np.ndarray,
    after: np.ndarray,
) -> Course:  # fmt: skip
    """Draws R stays and solves their probabilities backwards.

    Args:
        streams: Random numbers.
        patient: ``(R,)`` row of each stay's patient.
        number: ``(R,)`` number of the stay among those of the patient.
        severity: ``(R,)``.
        factors: ``(R, 4)``; perfusion and respiration raise the hazards of the two treatments.
        after: ``(R,)`` P(death later in the visit | the stay is survived).
    """
    early, late = _transitions(severity, discharge=False), _transitions(severity, discharge=True)
    worse_start = sigmoid(-1.5 + 0.8 * severity)
    start = np.where(streams.at("start_state", patient, number) < worse_start, DETERIORATING, STABLE)
    state = _walk(streams, patient, number, start, early, late)
    gone = (state >= DEAD).argmax(1)
    there = np.arange(LONGEST + 1)[None] < gone[:, None]
    onset, risk = {}, {}
    for column, (name, stream) in enumerate(_TREATMENTS.items()):
        vulnerable = 0.6 * factors[:, 1 - column] + 0.4 * severity
        hazard = _hazard(name, vulnerable)
        uniform = streams.at(stream, patient[:, None], number[:, None] * _COUNTER + np.arange(LONGEST))
        begins = there[:, :-1] & (uniform < np.take_along_axis(hazard, state[:, :-1].clip(max=2), 1) * _wane())
        onset[name] = _first(streams, patient, number, begins, column)
        for hour, chance in _onset_risk(hazard, early, late).items():
            risk[name, hour] = _pick(chance, state[:, hour])
    values = _death_risk(after, early, late)
    return Course(
        state=state,
        hours=gone - 1 + 0.55 + 0.4 * streams.at("fraction", patient, number * 4 + 2),  # behind an onset of that hour
        died=state[:, -1] == DEAD,
        onset=onset,
        death=_pick(values[OBSERVED], state[:, OBSERVED]),
        from_start=worse_start * values[0][:, DETERIORATING] + (1 - worse_start) * values[0][:, STABLE],
        risk=risk,
    )


def _transitions(severity: np.ndarray, discharge: bool) -> np.ndarray:
    """``(R, 3, 5)`` probabilities of the next hour's state."""
    rates = np.zeros((len(severity), 3, 5))
    rates[:, STABLE, DETERIORATING] = 0.0032 * np.exp(0.6 * severity)
    rates[:, STABLE, DEAD] = 0.0001 * np.exp(0.6 * severity)
    rates[:, STABLE, DISCHARGED] = 0.018 * np.exp(-0.3 * severity)
    rates[:, DETERIORATING, RECOVERING] = 0.03 * np.exp(-0.2 * severity)
    rates[:, DETERIORATING, DEAD] = 0.0075 * np.exp(0.5 * severity)
    rates[:, RECOVERING, STABLE] = 0.03
    rates[:, RECOVERING, DETERIORATING] = 0.004 * np.exp(0.5 * severity)
    rates[:, RECOVERING, DEAD] = 0.0004 * np.exp(0.6 * severity)
    rates[:, RECOVERING, DISCHARGED] = 0.006 * np.exp(-0.3 * severity)
    rates[:, :, DISCHARGED] *= discharge
    total = rates.sum(-1, keepdims=True)
    chances = rates / total * -np.expm1(-total)
    for state in range(3):
        chances[:, state, state] = 1 - chances[:, state].sum(-1)
    return chances


def _walk(
    streams: Streams, patient: np.ndarray, number: np.ndarray, start: np.ndarray, early: np.ndarray, late: np.ndarray
) -> np.ndarray:
    uniform = streams.at("chain", patient[:, None], number[:, None] * _COUNTER + np.arange(LONGEST))
    steps = [np.zeros((len(start), 5, 4)) for _ in range(2)]
    for cumulative, chances in zip(steps, (early, late), strict=True):
        cumulative[:, :3] = chances.cumsum(-1)[..., :4]
        cumulative[:, DEAD, 3] = 2  # dead: never beyond
        cumulative[:, DISCHARGED, :] = -1
    rows = np.arange(len(start))
    state = np.empty((len(start), LONGEST + 1), np.int64)
    state[:, 0] = start
    for hour in range(LONGEST - 1):
        cumulative = steps[hour >= _EARLIEST][rows, state[:, hour]]
        state[:, hour + 1] = (uniform[:, hour, None] >= cumulative).sum(1)
    state[:, -1] = np.where(state[:, -2] < DEAD, DISCHARGED, state[:, -2])
    return state


def _hazard(name: str, vulnerable: np.ndarray) -> np.ndarray:
    return np.array(ONSETS[name]) * np.exp(0.7 * vulnerable)[:, None]


def _wane() -> np.ndarray:
    """``(LONGEST,)``: most treatments start in the first hours of a stay."""
    return 1 + 20 * np.exp(-np.arange(LONGEST) / 5)


def _first(streams: Streams, patient: np.ndarray, number: np.ndarray, begins: np.ndarray, column: int) -> np.ndarray:
    """Hour of the first onset, in the first half of its hour, NaN without one."""
    minute = 0.05 + 0.4 * streams.at("fraction", patient, number * 4 + column)
    return np.where(begins.any(1), begins.argmax(1) + minute, np.nan)


def _onset_risk(hazard: np.ndarray, early: np.ndarray, late: np.ndarray) -> dict[int, np.ndarray]:
    """Hour → ``(R, 3)`` P(onset at that hour or later | state)."""
    value, kept, wane = np.zeros_like(hazard), {}, _wane()
    for hour in reversed(range(min(ASKED), LONGEST)):
        now = (hazard * wane[hour]).clip(max=1)
        value = now + (1 - now) * np.einsum("rst,rt->rs", (late if hour >= _EARLIEST else early)[:, :, :3], value)
        if hour in ASKED:
            kept[hour] = value
    return kept


def _death_risk(after: np.ndarray, early: np.ndarray, late: np.ndarray) -> dict[int, np.ndarray]:
    """Hour → ``(R, 3)`` P(death in the visit | state): in the stay, or behind it with probability ``after``."""
    value, kept = np.repeat(after[:, None], 3, 1), {}
    for hour in reversed(range(LONGEST - 1)):
        step = late if hour >= _EARLIEST else early
        value = (
            np.einsum("rst,rt->rs", step[:, :, :3], value) + step[:, :, DEAD] + step[:, :, DISCHARGED] * after[:, None]
        )
        if hour in (0, OBSERVED):
            kept[hour] = value
    return kept


def _pick(values: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Values of each row's state; NaN for the dead and the discharged."""
    there = state < DEAD
    return np.where(there, values[np.arange(len(state)), np.where(there, state, 0)], np.nan)

"""What is measured in the stays of a block of patients: 36 series of the first 48 hours, and the body at their start.

A value is a set-point that age and sex move, the stay's deviation from it, the pull of a deterioration, AR(1) noise
from hour to hour, and the effect of a treatment, all in spreads of the variable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_ehr.sources._synthetic_icu_course import DETERIORATING, OBSERVED, RECOVERING
from hf_ehr.sources._synthetic_icu_patients import HOUR, MAX_VISITS, People, Severity, Stays
from hf_ehr.sources._synthetic_icu_variables import (
    ICU_VARIABLES,
    LABORATORY,
    LOADINGS,
    ON_VASOPRESSOR,
    ON_VENTILATOR,
    PANELS,
    ROW,
    SPREAD,
)
from hf_ehr.sources._synthetic_icu_world import FACTORS, Stream, Streams, SyntheticIcuConfig
from hf_ehr.sources._synthetic_process import normal, sigmoid

BETWEEN, WITHIN, PULL = 0.8, 0.6, 1.0
"""Spreads of a stay's deviation, of the noise of an hour, and of the pull of a deterioration."""
PERSISTENCE = 0.9
"""Of the noise from one hour to the next."""
_COUNTER = 1 << 13  # draws set aside for each stay
_UNIT = LOADINGS / np.sqrt((LOADINGS**2).sum(1, keepdims=True))


@dataclass
class Measurements:
    """One entry each, by stay and hour: row of the stay, index into ``ICU_VARIABLES``, seconds since 1900, value."""

    stay: np.ndarray
    variable: np.ndarray
    second: np.ndarray
    value: np.ndarray


def measure(
    config: SyntheticIcuConfig, streams: Streams, people: People, severity: Severity, stays: Stays
) -> Measurements:
    """Draws what is measured in each stay, and the values.

    Returns:
        Measurements of the first 48 hours, none behind the end of the stay.
    """
    level = _levels(stays.state[:, : OBSERVED + 1])[:, :OBSERVED]
    draw = _number(stays) * _COUNTER
    taken = _sampled(config, streams, people, severity, stays, level, draw)
    stay, hour, variable = np.nonzero(taken)
    panel = np.array([PANELS.index(part.panel) for part in ICU_VARIABLES])[variable]
    minute = 60 * streams.at("minute", stays.patient[stay], draw[stay] + hour * len(PANELS) + panel)
    second = stays.start[stay] + hour * HOUR + minute.astype(np.int64) * 60
    inside = second < stays.end[stay]
    deviation = _deviations(config, streams, people, severity, stays, level, draw)[stay, hour, variable]
    value = _written(deviation, variable)
    return Measurements(stay[inside], variable[inside], second[inside], value[inside])


def ventilator_hours(stays: Stays) -> tuple[np.ndarray, np.ndarray]:
    """(row of the stay, second) of each hour of the first 48 in which ventilation is noted: MechVent is 1."""
    hour = np.arange(OBSERVED) + 0.99  # at the end of the hour
    onset = stays.onset["arf"]
    stay, number = np.nonzero((hour >= onset[:, None]) & (hour < stays.hours[:, None]))
    return stay, stays.start[stay] + (hour[number] * HOUR).astype(np.int64)


def _number(stays: Stays) -> np.ndarray:
    return stays.visit * 2 + stays.number


def _levels(state: np.ndarray) -> np.ndarray:
    """``(R, hours)`` how far a deterioration has moved the variables: it comes and goes within hours."""
    target = np.select([state == DETERIORATING, state == RECOVERING], [1.0, 0.35], 0.0)
    level = np.empty(state.shape)
    level[:, 0] = 0.7 * target[:, 0]
    for hour in range(1, state.shape[1]):
        level[:, hour] = 0.8 * level[:, hour - 1] + 0.2 * target[:, hour]
    return level


def _sampled(
    config: SyntheticIcuConfig, streams: Streams, people: People, severity: Severity, stays: Stays, level: np.ndarray,
    draw: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """``(R, hours, variables)`` what is measured; the variables of a panel share its draw."""
    panel = np.array([PANELS.index(variable.panel) for variable in ICU_VARIABLES])
    rate = np.array([variable.rate for variable in ICU_VARIABLES])
    ill = severity.severity[stays.patient, stays.visit]
    older = (people.age[stays.patient] - 63) / 16
    urgency = 0.6 * level + (0.12 * ill + 0.1 * older)[:, None] if config.informative_sampling else 0 * level
    counter = draw[:, None] + np.arange(OBSERVED * len(PANELS))
    uniform = streams.at("sampled", stays.patient[:, None], counter).reshape(len(draw), OBSERVED, len(PANELS))
    chance = np.repeat(rate[None, None], OBSERVED, 1)
    chance[:, 0, np.isin(panel, [PANELS.index(name) for name in LABORATORY])] = 0.85
    taken = uniform[:, :, panel] < (chance * np.exp(urgency)[..., None]).clip(max=0.97)
    line = sigmoid(0.8 * ill * config.informative_sampling)  # who has no arterial line has the cuff only
    taken[:, :, panel == PANELS.index("arterial line")] &= (
        streams.at("panel", stays.patient, draw) < line
    )[:, None, None]  # fmt: skip
    return taken


def _deviations(
    config: SyntheticIcuConfig, streams: Streams, people: People, severity: Severity, stays: Stays, level: np.ndarray,
    draw: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """``(R, hours, variables)`` in spreads from the mean."""
    noise = _autoregression(_normals(streams, "hourly", stays, draw, len(ICU_VARIABLES)))
    if config.low_rank:
        shared = _autoregression(_normals(streams, "hourly_factors", stays, draw, len(FACTORS)))
        noise = np.sqrt(SPREAD) * np.einsum("rhk,jk->rhj", shared, _UNIT) + np.sqrt(1 - SPREAD) * noise
    total = WITHIN * noise + BETWEEN * severity.deviation[stays.patient, stays.visit][:, None]
    if config.low_rank:
        total += PULL * level[..., None] * _UNIT.sum(1) / np.sqrt(len(FACTORS))
    if config.moving_setpoints:
        total += _setpoints(people)[stays.patient][:, None]
    if config.treatment_feedback:
        total += _treated(stays.onset["shock"], ON_VASOPRESSOR) + _treated(stays.onset["arf"], ON_VENTILATOR)
    return total


def _normals(streams: Streams, stream: Stream, stays: Stays, draw: np.ndarray, width: int) -> np.ndarray:
    counter = draw[:, None] + np.arange(2 * OBSERVED * width)
    return normal(streams.at(stream, stays.patient[:, None], counter)).reshape(len(draw), OBSERVED, width)


def _autoregression(noise: np.ndarray) -> np.ndarray:
    """AR(1) along the hours in place, of variance 1 from the first hour on."""
    for hour in range(1, noise.shape[1]):
        noise[:, hour] *= np.sqrt(1 - PERSISTENCE**2)
        noise[:, hour] += PERSISTENCE * noise[:, hour - 1]
    return noise


def _setpoints(people: People) -> np.ndarray:
    """``(N, variables)`` shift by age and sex, in spreads."""
    age, male = (np.array([getattr(variable, name) for variable in ICU_VARIABLES]) for name in ("age", "male"))
    return ((people.age - 63) / 16)[:, None] * age + (people.male - 0.5)[:, None] * male


def _treated(onset: np.ndarray, effects: dict[str, float]) -> np.ndarray:
    """``(R, hours, variables)`` effect of a treatment from the hour behind its onset on."""
    size = np.zeros(len(ICU_VARIABLES))
    size[[ROW[name] for name in effects]] = list(effects.values())
    on = np.arange(OBSERVED) >= np.ceil(onset)[:, None]  # never where the onset is NaN
    return on[..., None] * size


def _written(deviation: np.ndarray, variable: np.ndarray) -> np.ndarray:
    """Values in their units, within their limits, with the decimals that a chart has."""
    table = {
        name: np.array([getattr(row, name) for row in ICU_VARIABLES], float)[variable]
        for name in ("mean", "spread", "logarithmic", "decimals", "low", "high")
    }
    step = table["spread"] * deviation
    value = np.where(table["logarithmic"], table["mean"] * np.exp(step.clip(-5, 5)), table["mean"] + step)
    scale = 10.0 ** table["decimals"]
    return np.rint(value.clip(table["low"], table["high"]) * scale) / scale


def body(streams: Streams, people: People, stays: Stays) -> tuple[np.ndarray, np.ndarray]:
    """``(R,)`` height in cm and weight in kg; the height is the patient's, the weight varies by visit."""
    drawn = streams.normal("body", 1 + MAX_VISITS)
    male = people.male[stays.patient]
    height = np.rint(163 + 13 * male + 7 * drawn[stays.patient, 0]).clip(130, 210)
    weight = 72 + 12 * male + 0.6 * (height - 170) + 15 * drawn[stays.patient, 1 + stays.visit]
    return height, np.round(weight.clip(35, 220), 1)

"""One block of synthetic patients: random numbers, latents, codes, outcome, timeline."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import numpy as np

from hf_ehr.sources._synthetic_worlds import (
    NOISE_PER_PATIENT,
    ORDER_PAIRS,
    OUTCOME_ROWS,
    PARENT_LOG_ODDS,
    PROGRESSION,
    SyntheticConfig,
    World,
    WorldName,
    draw_world,
)

MAX_VISITS = 16
DAY = 86_400
INPATIENT, EMERGENCY, OUTPATIENT = range(3)
DISCHARGES = ("home", "facility", "transfer", "hospice", "against_advice", "died")

Stream = Literal[
    "z", "condition", "onset", "visits", "severity", "los", "label", "count", "synonym", "visit", "shared", "noise",
    "noise_code", "noise_visit", "repeat", "position", "promote", "drug", "test", "test_value", "follow_up", "kind",
    "readmit", "gap", "stay", "planned", "disposition", "calendar", "age", "sex", "static", "death", "death_time",
]  # fmt: skip
_STREAMS = {name: np.uint64(index << 40) for index, name in enumerate(get_args(Stream))}
_WORLDS = {name: index for index, name in enumerate(get_args(WorldName))}
_WEYL = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Counter-based random numbers of the given patients (SplitMix64: Steele, Lea & Flood 2014)."""

    def __init__(self, config: SyntheticConfig, subjects: np.ndarray, purpose: int = 0) -> None:
        words = np.array([config.seed, _WORLDS[config.world], purpose], np.uint64)
        key = np.zeros(1, np.uint64)
        for word in words:
            key = _mix(key + _WEYL + word)
        self.size = len(subjects)
        self._keys = _mix(key + subjects.astype(np.uint64) * _WEYL)

    def uniform(self, stream: Stream, count: int) -> np.ndarray:
        """``(patients, count)`` in (0, 1)."""
        counters = (_STREAMS[stream] + np.arange(count, dtype=np.uint64)) * _WEYL
        return _to_unit(_mix(self._keys[:, None] + counters))

    def at(self, stream: Stream, patient: np.ndarray, index: np.ndarray) -> np.ndarray:
        """``(events,)`` in (0, 1): number ``index`` of the stream of each event's patient."""
        return _to_unit(_mix(self._keys[patient] + (_STREAMS[stream] + index.astype(np.uint64)) * _WEYL))

    def normal(self, stream: Stream, count: int) -> np.ndarray:
        """``(patients, count)`` standard normal."""
        return normal(self.uniform(stream, 2 * count))


class NamedDraws:
    """The random numbers of a block of patients by what they are for: functions of (seed, patient, stream, index).

    Args:
        seed: Of the world.
        subjects: The patients.
    """

    purposes: ClassVar[dict[str, int]]
    """Stream → its number among those of all worlds; new streams leave the others as they are."""

    def __init__(self, seed: int, subjects: np.ndarray) -> None:
        self.subjects = subjects
        self.size = len(subjects)
        self._config = SyntheticConfig(seed=seed)

    def _of(self, stream: str) -> Draws:
        return Draws(self._config, self.subjects, purpose=self.purposes[stream])

    def uniform(self, stream: str, *shape: int) -> np.ndarray:
        """``(patients, *shape)`` in (0, 1)."""
        return self._of(stream).uniform("z", math.prod(shape)).reshape(self.size, *shape)

    def normal(self, stream: str, *shape: int) -> np.ndarray:
        """``(patients, *shape)`` standard normal."""
        return self._of(stream).normal("z", math.prod(shape)).reshape(self.size, *shape)

    def at(self, stream: str, patient: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Numbers ``index`` of the stream of ``patient``, in (0, 1), in the shape that the two have together."""
        return self._of(stream).at("z", patient, index)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _to_unit(bits: np.ndarray) -> np.ndarray:
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(uniform: np.ndarray) -> np.ndarray:
    """Box–Muller: 2n uniforms in the last axis → n normals."""
    half = uniform.shape[-1] // 2
    return np.sqrt(-2 * np.log(uniform[..., :half])) * np.cos(2 * np.pi * uniform[..., half:])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _dot(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``rows @ weights.T`` without BLAS, whose last bit depends on how many rows are multiplied at once."""
    return np.einsum("nk,...k->n...", rows, weights)


def _poisson(uniform: np.ndarray, rate: float) -> np.ndarray:
    terms = np.concatenate([[1.0], np.cumprod(rate / np.arange(1, 64))])
    return np.searchsorted(np.exp(-rate) * terms.cumsum(), uniform).clip(max=63)


def choice(uniform: np.ndarray, *probabilities: float) -> np.ndarray:
    """Index of a category; the last one takes what is left."""
    return np.searchsorted(np.cumsum(probabilities), uniform)


@dataclass
class Latents:
    """``z (N, 5)``, ``present`` and ``onset (N, K)``, number of ``visits (N,)`` before the prediction time, …"""

    z: np.ndarray
    present: np.ndarray
    onset: np.ndarray
    visits: np.ndarray
    severity: np.ndarray
    los: np.ndarray


@dataclass
class Codes:
    """Diagnoses, one entry each: patient (row), visit number, index into ``World.codes``, condition (-1: noise)."""

    patient: np.ndarray
    visit: np.ndarray
    code: np.ndarray
    condition: np.ndarray

    def take(self, rows: np.ndarray) -> Codes:
        return Codes(self.patient[rows], self.visit[rows], self.code[rows], self.condition[rows])

    def extend(self, other: Codes) -> Codes:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("patient", "visit", "code", "condition"))
        return Codes(*(np.concatenate(pair) for pair in pairs))


def draw_latents(config: SyntheticConfig, world: World, draws: Draws, burden: tuple[float, float]) -> Latents:
    z = draws.normal("z", 5)
    logit = _dot(z, world.loadings) + world.bias
    uniform = draws.uniform("condition", config.conditions)
    present = uniform < sigmoid(logit)
    for child in dict.fromkeys(child for _, child in PROGRESSION):
        parents = [parent for parent, other in PROGRESSION if other == child]
        push = (present[:, parents] - world.prevalence[parents]).sum(1) * PARENT_LOG_ODDS
        present[:, child] = uniform[:, child] < sigmoid(logit[:, child] + push)
    mean, deviation = burden
    own = draws.normal("severity", 1)[:, 0]
    severity = 0.6 * (_dot(present, world.burden) - mean) / deviation + 0.8 * own
    los = draws.normal("los", 1)[:, 0] if config.los_independent else severity
    onset, visits = _draw_onsets(draws, present)
    return Latents(z, present, onset, visits, severity, los)


def _draw_onsets(draws: Draws, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Visit of each condition's onset, a child's behind those of its present ancestors, and the number of visits."""
    before, behind, earliest = (np.zeros(present.shape, np.int64) for _ in range(3))
    for parent, child in PROGRESSION:
        before[:, child] = np.maximum(before[:, child], before[:, parent] + present[:, parent])
    for parent, child in reversed(PROGRESSION):
        behind[:, parent] = np.maximum(behind[:, parent], behind[:, child] + present[:, child])
    needed = ((before + behind + 1) * present).max(1)  # the longest progression wants one visit a step
    visits = np.maximum(2 + _poisson(draws.uniform("visits", 1)[:, 0], 2.5), needed).clip(max=MAX_VISITS - 1)
    uniform = draws.uniform("onset", present.shape[1])
    latest = visits[:, None] - behind
    onset = (uniform * latest).astype(np.int64)
    for parent, child in PROGRESSION:
        after = np.where(present[:, parent], onset[:, parent] + 1, earliest[:, parent])
        first = earliest[:, child] = np.maximum(earliest[:, child], after)
        onset[:, child] = first + (uniform[:, child] * (latest[:, child] - first)).astype(np.int64)
    return onset, visits


def emit_codes(config: SyntheticConfig, world: World, draws: Draws, latents: Latents) -> Codes:
    """The diagnoses before the prediction time, without repeats within a visit."""
    rows = config.conditions
    counts = (_poisson(draws.uniform("count", rows), world.rate) * latents.present).ravel()
    cell = np.repeat(np.arange(len(counts)), counts)
    ordinal = np.arange(len(cell)) - np.repeat(counts.cumsum() - counts, counts)
    patient, condition = np.divmod(cell, rows)
    index = condition * 64 + ordinal
    synonym = draws.at("synonym", patient, index) + condition
    code = np.searchsorted(world.synonym.ravel(), synonym).clip(max=rows * config.synonyms - 1)
    if world.effects["polysemy"]:
        shared = world.shared[condition]
        code = np.where((shared >= 0) & (draws.at("shared", patient, index) < world.effects["polysemy"]), shared, code)
    onset, visits = latents.onset.ravel()[cell], latents.visits[patient]
    later = onset + (draws.at("visit", patient, index) * (visits - onset)).astype(np.int64)
    codes = Codes(patient, np.where(ordinal == 0, onset, later), code, condition)
    return _without_repeats(codes.extend(_emit_noise(config, world, draws, latents)))


def _emit_noise(config: SyntheticConfig, world: World, draws: Draws, latents: Latents) -> Codes:
    counts = _poisson(draws.uniform("noise", 1)[:, 0], NOISE_PER_PATIENT)
    patient = np.repeat(np.arange(draws.size), counts)
    ordinal = np.arange(len(patient)) - np.repeat(counts.cumsum() - counts, counts)
    code = np.searchsorted(world.noise, draws.at("noise_code", patient, ordinal)) + config.conditions * config.synonyms
    visit = (draws.at("noise_visit", patient, ordinal) * latents.visits[patient]).astype(np.int64)
    return Codes(patient, visit, code, np.full(len(patient), -1))


def _without_repeats(codes: Codes) -> Codes:
    key = ((codes.patient * MAX_VISITS + codes.visit) << 16) | codes.code
    return codes.take(np.unique(key, return_index=True)[1])


def log_odds(world: World, latents: Latents, codes: Codes) -> np.ndarray:
    """``(N,)`` log odds of the outcome but for the intercept."""
    if world.code_weights.any():
        seen = np.unique(codes.patient << 16 | codes.code)
        return np.bincount(seen >> 16, world.code_weights[seen & 0xFFFF], len(latents.visits))
    effects = world.effects
    odds = _dot(latents.present, world.weights) + (effects["severity"] + effects["principal"]) * latents.severity
    for first, second in ORDER_PAIRS if effects["order"] else ():
        both = latents.present[:, first] & latents.present[:, second]
        odds += effects["order"] * both * np.sign(latents.onset[:, second] - latents.onset[:, first])
    return odds


def calibrate(config: SyntheticConfig) -> tuple[tuple[float, float], float]:
    """(mean and sd of the burden behind severity, intercept of the outcome), from patients drawn for this alone."""
    world: WorldName = "C" if config.world == "site_b" else config.world  # another population under the same law
    return _calibrate(replace(config, world=world, patients=1, los_independent=False))


@lru_cache(maxsize=16)
def _calibrate(config: SyntheticConfig) -> tuple[tuple[float, float], float]:
    world, draws = draw_world(config), Draws(config, np.arange(16_384), purpose=1)
    burden = _dot(draw_latents(config, world, draws, (0.0, 1.0)).present, world.burden)
    scale = (float(burden.mean()), float(burden.std()))
    latents = draw_latents(config, world, draws, scale)
    odds = log_odds(world, latents, emit_codes(config, world, draws, latents))
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sigmoid(odds + middle).mean() > config.prevalence else (middle, high)
    return scale, middle


@dataclass
class Timeline:
    """``(N, 16)`` visits, the last of which may lie behind the prediction time; seconds since 1900."""

    exists: np.ndarray
    start: np.ndarray
    end: np.ndarray
    kind: np.ndarray
    planned: np.ndarray
    disposition: np.ndarray
    birth: np.ndarray
    death: np.ndarray  # (N,), 0 for the living
    age: np.ndarray


def draw_timeline(draws: Draws, latents: Latents) -> Timeline:
    number, visits = np.arange(MAX_VISITS), latents.visits
    follow_up = draws.uniform("follow_up", 1)[:, 0] < 0.5
    exists = number < (visits + follow_up)[:, None]
    age = (52 + 14 * (0.4 * latents.z[:, 0] + 0.92 * draws.normal("age", 1)[:, 0])).clip(18, 92)
    dies = draws.uniform("death", 1)[:, 0] < sigmoid(-3.2 + 0.6 * latents.severity + (age - 52) / 30)
    dies_inside = dies & follow_up  # so that no one dies before the prediction time
    kind = choice(draws.uniform("kind", MAX_VISITS), 0.30, 0.12)
    kind[np.arange(draws.size)[dies_inside], visits[dies_inside]] = INPATIENT
    readmit = draws.uniform("readmit", MAX_VISITS) < sigmoid(-1.75 + 0.5 * latents.los)[:, None]
    readmit[:, 0] = False
    for visit in range(1, MAX_VISITS):
        readmit[:, visit] &= kind[:, visit - 1] == INPATIENT
        kind[readmit[:, visit], visit] = INPATIENT
    gap = draws.uniform("gap", MAX_VISITS)
    days = np.where(readmit, 2 + 27 * gap, 31 - 200 * np.log(gap))
    length = _draw_lengths(draws, kind, latents.los)
    wait, length = (days * DAY).astype(np.int64), (length * DAY).astype(np.int64)
    first = ((103 + 8 * draws.uniform("calendar", 1)) * 365.25 * DAY).astype(np.int64)  # 2003 to 2010
    wait[:, 0] = 0
    end = first + np.cumsum(wait + length, axis=1)
    planned = np.where(kind == INPATIENT, draws.uniform("planned", MAX_VISITS) < 0.35, kind == OUTPATIENT) & ~readmit
    last = end[np.arange(draws.size), visits + follow_up - 1]
    after = (DAY * (1 - 120 * np.log(draws.uniform("death_time", 1)[:, 0]))).astype(np.int64)
    death = np.where(dies, last + np.where(dies_inside, 0, after), 0)
    disposition = choice(draws.uniform("disposition", MAX_VISITS), 0.82, 0.12, 0.03, 0.01)
    disposition[kind != INPATIENT] = 0
    disposition[np.arange(draws.size)[dies_inside], visits[dies_inside]] = DISCHARGES.index("died")
    birth = first[:, 0] - (age * 365.25 * DAY).astype(np.int64)
    return Timeline(exists, end - length, end, kind, planned, disposition, birth, death, age)


def _draw_lengths(draws: Draws, kind: np.ndarray, los: np.ndarray) -> np.ndarray:
    """Days of each visit: log-normal around 3 days for inpatients, hours for the others."""
    noise = draws.normal("stay", MAX_VISITS)
    inpatient = np.exp(np.log(3.2) + 0.4 * los[:, None] + 0.5 * noise).clip(0.5, 120)
    return np.select([kind == INPATIENT, kind == EMERGENCY], [inpatient, 0.25 * np.exp(0.4 * noise)], 0.06)


def repeat_after(draws: Draws, latents: Latents, time: Timeline, codes: Codes) -> Codes:
    """A quarter of the known codes again at the visit behind the prediction time: nothing new is learnt there."""
    follow_up = time.exists[np.arange(draws.size), latents.visits]
    counter = (codes.visit << 16) | codes.code
    again = codes.take(np.flatnonzero(follow_up[codes.patient] & (draws.at("repeat", codes.patient, counter) < 0.25)))
    again.visit = latents.visits[again.patient]
    return codes.extend(_without_repeats(again))


def rank_codes(world: World, draws: Draws, latents: Latents, codes: Codes) -> tuple[Codes, np.ndarray]:
    """The codes sorted by visit and priority, and their positions within the visit from 1 on."""
    counter = (codes.visit << 16) | codes.code
    priority = draws.at("position", codes.patient, counter) * 0.5 + 0.5
    if world.effects["principal"]:
        outcome = np.isin(codes.condition, OUTCOME_ROWS)
        severe = sigmoid(4 * world.effects["principal"] * latents.severity)[codes.patient]
        priority[outcome & (draws.at("promote", codes.patient, counter) < severe)] -= 0.5
    visit = codes.patient * MAX_VISITS + codes.visit
    order = np.argsort((visit << 32) | (priority * 2**32).astype(np.int64))
    visit = visit[order]
    is_first = np.diff(visit, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(is_first, np.arange(len(visit)), 0))
    return codes.take(order), np.arange(len(visit)) - start + 1

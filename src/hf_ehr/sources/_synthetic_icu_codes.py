"""Diagnoses and drugs of the visits of a block of patients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_ehr.sources._synthetic_icu_patients import HOUR, MAX_VISITS, People, Visits
from hf_ehr.sources._synthetic_icu_world import ACUTE, NOISE_CODES, TARGETS, IcuWorld, Streams
from hf_ehr.sources._synthetic_process import INPATIENT, choice

_NEAR_FLAT = 1 / 0.7
"""Inverse of the distribution function of a density x^-.3: synonyms are nearly equally frequent."""


@dataclass
class Coded:
    """One entry each: patient (row), visit, index into ``IcuWorld.codes`` or ``.drugs``, position from 1, time."""

    patient: np.ndarray
    visit: np.ndarray
    code: np.ndarray
    position: np.ndarray
    second: np.ndarray


def present_conditions(people: People, visits: Visits) -> np.ndarray:
    """``(N, V, conditions)`` what a patient has at each visit that takes place."""
    chronic = people.onset[:, None] <= np.arange(MAX_VISITS)[:, None]
    return np.concatenate([chronic, visits.acute], 2) & visits.exists[..., None]


def draw_diagnoses(streams: Streams, world: IcuWorld, people: People, visits: Visits, present: np.ndarray) -> Coded:
    """Codes that become known at the end of each visit.

    A target is coded at the visit where it starts and at most later ones, an acute condition always, a chronic one at
    about half of the visits; one or two codes each, and up to three that mean nothing.
    """
    coded = present & _is_coded(streams, people, present)
    patient, visit, condition = np.nonzero(coded)
    index = (visit * present.shape[2] + condition) * 4
    second = streams.at("code_count", patient, index) < 0.4
    patient, visit, condition, index = (
        np.concatenate([part, part[second]]) for part in (patient, visit, condition, index)
    )
    index[len(second) :] += 1
    size = np.diff(world.first)[condition]
    uniform = streams.at("code", patient, index)
    code = world.first[condition] + np.floor(size * uniform**_NEAR_FLAT).astype(np.int64)
    noise = _noise(streams, world, visits)
    return _ranked(
        streams, visits, *(np.concatenate(pair) for pair in zip((patient, visit, code), noise, strict=True))
    )


def _is_coded(streams: Streams, people: People, present: np.ndarray) -> np.ndarray:
    chance = np.full(present.shape, 0.5)
    chance[..., -len(ACUTE) :] = 1
    chance[..., : len(TARGETS)] = 0.8
    starts = people.onset[:, None] == np.arange(MAX_VISITS)[:, None]
    chance[..., : len(TARGETS)][starts[..., : len(TARGETS)]] = 1
    return streams.uniform("coded", present[0].size).reshape(present.shape) < chance


def _noise(streams: Streams, world: IcuWorld, visits: Visits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = choice(streams.uniform("noise_count", MAX_VISITS), 0.4, 0.3, 0.2) * visits.exists
    patient, visit, ordinal = np.nonzero(np.arange(3) < count[..., None])
    chosen = np.floor(streams.at("noise", patient, visit * 3 + ordinal) * NOISE_CODES).astype(np.int64)
    return patient, visit, world.first[-1] + chosen


def _ranked(streams: Streams, visits: Visits, patient: np.ndarray, visit: np.ndarray, code: np.ndarray) -> Coded:
    """Each code of a visit once, in an order that means nothing."""
    key = np.unique((patient * MAX_VISITS + visit) << 16 | code)
    place, code = key >> 16, key & 0xFFFF
    lot = streams.at("position", place // MAX_VISITS, (place % MAX_VISITS) << 16 | code)
    order = np.lexsort((lot, place))
    place, code = place[order], code[order]
    first = np.searchsorted(place, place)
    patient, visit = np.divmod(place, MAX_VISITS)
    return Coded(patient, visit, code, np.arange(len(place)) - first + 1, visits.end[patient, visit])


def draw_drugs(streams: Streams, world: IcuWorld, visits: Visits, present: np.ndarray) -> Coded:
    """Drugs of the first day of each visit; outpatients get fewer."""
    width = max(map(len, world.drugs_of))
    table = np.array([np.pad(row, (0, width - len(row)), constant_values=-1) for row in world.drugs_of])
    patient, visit, condition, slot = np.nonzero(present[..., None] & (table >= 0))
    index = (visit * len(table) + condition) * width + slot
    chance = np.where(visits.kind[patient, visit] == INPATIENT, 0.55, 0.3)
    given = streams.at("drug", patient, index) < chance
    key = np.unique((patient * MAX_VISITS + visit)[given] << 16 | table[condition, slot][given])
    place, drug = key >> 16, key & 0xFFFF
    patient, visit = np.divmod(place, MAX_VISITS)
    day = np.minimum(24 * HOUR, visits.end[patient, visit] - visits.start[patient, visit])
    later = streams.at("drug_time", patient, visit << 16 | drug) * day
    second = visits.start[patient, visit] + later.astype(np.int64)
    return Coded(patient, visit, drug, np.arange(len(place)) - np.searchsorted(place, place) + 1, second)

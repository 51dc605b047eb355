"""The notes of inpatient visits: an admission note and a discharge summary whose wording follows the severity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.sources._synthetic_icu_patients import HOUR, Severity, Visits
from hf_ehr.sources._synthetic_icu_world import ACUTE, FACTORS, IcuWorld, Streams
from hf_ehr.sources._synthetic_process import INPATIENT, normal

CATEGORIES = ("Admission note", "Discharge summary")
_HEARD = (0.8, 0.5)
"""Standard deviation of what a writer gets wrong, by category."""
_OPENINGS = (
    ("Looks comfortable, talking in full sentences.", "In no distress, sitting up in bed.", "Well on arrival."),
    ("Slightly tired, otherwise well.", "Mild distress only.", "Comfortable at rest."),
    ("Moderately ill.", "Unwell, in some distress.", "Needs close observation."),
    ("Looks sick, unsettled.", "Clearly worse than yesterday.", "Ill, with rising support."),
    ("Critically ill.", "In extremis, all teams at the bedside.", "Gravely unwell, family informed."),
)
_SIGNS = {
    "perfusion": (
        ("Hands warm, capillary refill brisk.", "Pulses full."),
        ("Peripheries cool.", "Pressures on the low side."),
        ("Mottled knees, thready pulse.", "Cold and clammy, refill over five seconds."),
    ),
    "respiration": (
        ("Lungs clear on room air.", "Breathing quietly."),
        ("Some crackles, on nasal cannula.", "Mild work of breathing."),
        ("Using accessory muscles, on high flow.", "Tiring, saturations falling."),
    ),
    "kidney": (
        ("Passing good volumes of urine.", "Fluid balance even."),
        ("Urine concentrated.", "Balance drifting positive."),
        ("Oliguric, swollen.", "Hardly any urine since morning."),
    ),
    "inflammation": (
        ("Afebrile.", "No source of infection in sight."),
        ("Low grade fevers.", "Cultures sent."),
        ("Rigors, skin flushed.", "Spiking fevers, lines changed."),
    ),
}
_ACUTE = ("Treated for {}.", "Course marked by {}.", "Work-up confirmed {}.")
_CHRONIC = ("Known {}.", "Past history of {}.", "Background of {}.")
_FILLERS = (
    "Family updated.", "Medications reconciled.", "Diet as tolerated.", "Mobilised with physiotherapy.",
    "Allergies reviewed, none known.", "Lives with spouse.", "Discussed on rounds.", "Skin intact.",
    "Social work aware.", "Sleep poor, lights dimmed.",
)  # fmt: skip
_SLOTS = 64  # draws set aside for each note


class Notes(NamedTuple):
    """One entry each: row of the patient, visit, index into ``CATEGORIES``, seconds since 1900, and the text."""

    patient: np.ndarray
    visit: np.ndarray
    category: np.ndarray
    second: np.ndarray
    text: pa.Array


def write_notes(streams: Streams, world: IcuWorld, severity: Severity, visits: Visits, present: np.ndarray) -> Notes:
    """Two notes for each inpatient visit.

    Args:
        streams: Random numbers.
        world: Names of the conditions.
        severity: What the wording follows.
        visits: The timeline; an admission note is of the first hours, a discharge summary of the visit's end.
        present: ``(N, V, conditions)``; only the discharge summary names acute ones.
    """
    patient, visit, category = np.nonzero(
        np.repeat((visits.exists & (visits.kind == INPATIENT))[..., None], len(CATEGORIES), 2)
    )
    draw = (visit * len(CATEGORIES) + category) * _SLOTS
    uniform = streams.at("note", patient[:, None], draw[:, None] + np.arange(_SLOTS))
    error = normal(streams.at("note_noise", patient[:, None], draw[:, None] + np.arange(2 * len(FACTORS) + 2)))
    error *= np.array(_HEARD)[category][:, None]
    said = severity.severity[patient, visit] + error[:, 0]
    parts = [_choose(_OPENINGS, np.searchsorted([-1.3, -0.4, 0.4, 1.3], said), uniform[:, 0])]
    for number, name in enumerate(FACTORS):
        felt = severity.factors[patient, visit, number] + error[:, 1 + number]
        parts.append(_choose(_SIGNS[name], np.searchsorted([-0.2, 1.0], felt), uniform[:, 1 + number]))
    parts += [_choose((_FILLERS,), np.zeros(len(patient), np.int64), uniform[:, 5 + number]) for number in range(3)]
    acute = len(world.names) - len(ACUTE)
    for number, name in enumerate(world.names):
        phrases = tuple(phrase.format(name) for phrase in (_CHRONIC if number < acute else _ACUTE))
        named = present[patient, visit, number] & ((number < acute) | (category == 1))
        parts.append(_choose((phrases,), np.where(named, 0, -1), uniform[:, 8 + number]))
    length = visits.end[patient, visit] - visits.start[patient, visit]
    second = visits.start[patient, visit] + np.where(category == 1, length, np.minimum(2 * HOUR, length // 2))
    return Notes(patient, visit, category, second, pc.binary_join_element_wise(*parts, " ", null_handling="skip"))


def _choose(bank: tuple[tuple[str, ...], ...], level: np.ndarray, uniform: np.ndarray) -> pa.Array:
    """One sentence of the row ``level`` of the bank for each entry, nothing where the level is -1."""
    size = np.array([len(row) for row in bank])
    start = np.cumsum(size) - size
    index = start[level] + (uniform * size[level]).astype(np.int64)
    return pa.array([sentence for row in bank for sentence in row]).take(pa.array(index, mask=level < 0))

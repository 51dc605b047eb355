"""What the worlds of text and codes are made of: their settings, conditions, codes, drugs and random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np

from hf_ehr.ontology import billable_codes, with_dots
from hf_ehr.sources._synthetic_process import NamedDraws, sigmoid

LEVELS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Values of the factors of codes and of text (four coins, less two) and of what each modality tells of the shared."""
EDGES = (-1.5, -0.5, 0.5, 1.5)
READING_NOISE = 0.6
"""Standard deviation of what a modality gets wrong about the shared factor, of variance 1, before it is rounded."""


class Condition(NamedTuple):
    """A condition of a patient: the category of its ICD-10-CM codes, and one drug for either type of disease."""

    category: str
    drugs: tuple[str, str]
    chronic: float
    """Share of the patients who have it."""


MARKERS = (
    Condition("E11", ("A10BA", "A10AB"), 0.7),
    Condition("I50", ("C03CA", "C09AA"), 0.7),
    Condition("J44", ("R03BB", "R03AC"), 0.7),
    Condition("N18", ("V03AE", "B03XA"), 0.7),
)
"""Chronic conditions whose number among a visit's diagnoses, less two, is the factor of codes."""
COMORBIDITIES = (
    Condition("I48", ("C01BD", "C07AB"), 0.35),
    Condition("J45", ("R03BA", "R03DC"), 0.35),
    Condition("F32", ("N06AB", "N06AX"), 0.35),
    Condition("G40", ("N03AX", "N03AG"), 0.35),
)
"""Chronic conditions that matter to drugs alone."""
CONDITIONS = (*MARKERS, *COMORBIDITIES)
CODED = 0.5 / 0.7
"""Share of the visits in which a chronic condition is coded: a marker is in every second visit."""
ACUTE = ("J18", "A41", "N17", "J96", "G93", "K92")
"""Categories of acute illness: a visit has codes of none to four of them, by what codes tell of the shared factor."""
NOISE_CATEGORIES = ("S52", "M17", "H25", "K40", "L03", "R07", "Z87", "M54", "D50", "N40")
NOISE_CODES = 60
NOISE_PER_VISIT = 2
OTHER_DRUGS = ("A02BC", "A06AD", "B01AC", "C10AA", "N02BE", "H03AA", "M04AA", "N05CF")
DRUGS = tuple(f"ATC/{code}" for code in (*(drug for row in CONDITIONS for drug in row.drugs), *OTHER_DRUGS))
"""Drugs 2k and 2k + 1 belong to condition k; the last eight to none."""

FINDINGS = ("duration", "dose", "smoking", "adherence")
"""What a note says of each visit; the number of unfavourable ones, less two, is the factor of text."""
LASTING = (True, False, True, False)
"""Which of the findings are the same at all visits of a patient."""
MAX_VISITS = 6

Stream = Literal[
    "visits", "shared", "reading", "chronic", "coded", "finding", "type", "readmitted", "gap", "stay", "planned",
    "synonym", "acute", "noise", "position", "drug", "age", "sex", "calendar", "note", "note_order",
]  # fmt: skip


@dataclass(frozen=True)
class SyntheticTextCodesConfig:
    """A world of text and codes.

    Attributes:
        patients: Number of patients; ids are 1 … patients.
        seed: Draws the patients.
        ct: What codes and text say together and neither says alone: the log odds of readmission per unit of the
            product of their factors, and how far the type of disease, which the text names, decides which drug a
            diagnosis gets. With 0 the log odds of everything are sums of what codes say and of what text says.
        shared: Log odds of readmission per unit of the shared factor.
        code: The same of the factor of codes.
        text: The same of the factor of text.
        prevalence: Share of the visits that are followed by a readmission.
        text_noise: Chance that a finding is also said of a relative, that an earlier note's is copied, and that it
            is said by denying its opposite; each of the three by itself.
        synonyms: Codes of a condition, of equal frequency; fewer where its category has fewer.

    Raises:
        ValueError: A value is out of its range.
    """

    patients: int = 10_000
    seed: int = 0
    ct: float = 0.6
    shared: float = 0.6
    code: float = 0.5
    text: float = 0.5
    prevalence: float = 0.15
    text_noise: float = 0.25
    synonyms: int = 4

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "patients": (1, 10**12), "seed": (0, 2**63), "ct": (0, 2), "shared": (0, 2), "code": (0, 2),
            "text": (0, 2), "prevalence": (0.01, 0.9), "text_noise": (0, 1), "synonyms": (1, 20),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must be between {low} and {high}, got {getattr(self, name)}.")


class Streams(NamedDraws):
    """The random numbers of this world."""

    purposes: ClassVar = {name: 2_000 + index for index, name in enumerate(get_args(Stream))}


@dataclass(frozen=True)
class CodeBook:
    """The diagnoses of a world.

    Attributes:
        codes: ``ICD10CM/…``: those of every group in turn.
        group: For each code the row of its group: conditions, then acute categories, then noise.
        first: ``(groups + 1,)`` where the codes of each group start.
    """

    codes: tuple[str, ...]
    group: np.ndarray
    first: np.ndarray


@lru_cache(maxsize=8)
def code_book(synonyms: int) -> CodeBook:
    """The codes of the conditions and of what means nothing; the least specific ones first."""
    groups = [_members(category)[:synonyms] for category in (*(row.category for row in CONDITIONS), *ACUTE)]
    each = NOISE_CODES // len(NOISE_CATEGORIES)
    groups.append([code for category in NOISE_CATEGORIES for code in _members(category)[:each]])
    sizes = [len(group) for group in groups]
    codes = with_dots([code for group in groups for code in group])
    return CodeBook(tuple(codes), np.repeat(np.arange(len(groups)), sizes), np.concatenate([[0], np.cumsum(sizes)]))


def _members(category: str) -> list[str]:
    """Billable codes of a category."""
    names = {code: name for code, name in billable_codes("ICD10CM").items() if code.startswith(category)}
    ordered = sorted(names, key=lambda code: (len(code), "unspecified" not in names[code], code))
    return [f"ICD10CM/{code}" for code in ordered]


@lru_cache(maxsize=64)
def intercept(shared: float, code: float, text: float, ct: float, prevalence: float) -> float:
    """The log odds at 0 of all factors that make ``prevalence`` of the visits a readmission."""
    weights = np.outer(_COINS, _COINS).ravel()
    c, t = (grid.ravel() for grid in np.meshgrid(LEVELS, LEVELS, indexing="ij"))
    nodes, mass = np.polynomial.hermite_e.hermegauss(41)
    odds = shared * nodes[:, None] + code * c + text * t + ct * c * t
    joint = mass[:, None] / mass.sum() * weights
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (joint * sigmoid(odds + middle)).sum() > prevalence else (middle, high)
    return middle


_COINS = np.array([1, 4, 6, 4, 1]) / 16

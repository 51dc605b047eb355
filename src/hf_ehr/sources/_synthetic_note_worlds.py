"""What a synthetic note world is made of, drawn once per seed: codes, how notes name them, frequencies, lengths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, zip_longest
from statistics import NormalDist

import numpy as np

from hf_ehr.ontology import describe
from hf_ehr.sources._synthetic_note_phrases import DISTRACTORS, MENTIONS, SIGNS, draw_fillers, words
from hf_ehr.sources._synthetic_worlds import icd_codes

WINDOW = 512
NOTES_PER_PATIENT = (0.6, 0.3, 0.1)  # of 1, 2, 3 notes
MENTIONS_PER_CODE = (0.5, 0.3, 0.2)  # of 1, 2, 3 mentions where there is evidence
FORMS = ("term", "synonym", "abbreviation", "misspelling", "sign")
HIGHEST_RATE = 0.3  # no code is on more than this share of notes

_LETTERS = "ABCDEFGHIJKLMNOQR"  # chapters whose codes need no seventh character
_VAGUE = re.compile(r"unspecified|other|elsewhere|not\b|\d|[^a-z, ]")
_SMALL_WORDS = frozenset(("of", "the", "in", "due", "to", "and", "by", "or", "on", "for", "a", "an", "at"))
_SHORT = {"right": "R", "left": "L", "bilateral": "BL", "with": "w/", "without": "w/o"}
_SYLLABLES = tuple(re.findall("...", "braceldovfengrijalkorlummevnarpliquoreztovstivexwimzul"))


@dataclass(frozen=True)
class SyntheticNotesConfig:
    """A world of notes whose evidence is known.

    Attributes:
        patients: Number of patients; ids are 1 … patients. They have 1.5 notes each on average.
        seed: Draws the world and its notes.
        codes: Number of ICD-10-CM codes, in families of two to four siblings that differ in a word or two.
        codes_per_note: Expected positive codes of a note.
        zipf: Exponent of the codes' frequencies, none above .3 (at the default size the rarest have some 20 notes).
        unsupported: Share of positives that the text says nothing about; their labels are ``imputed``.
        opaque: Share of families whose mentions share no word with the codes' descriptions: the control set, on which
            starting labels from descriptions must not help.
        missed: Share of the supported positives all of whose evidence lies behind the first 512 words and punctuation
            marks; it sets the median length of a note.
        length_sigma: Standard deviation of the logarithm of a note's length.
        distractors: Expected mentions that support nothing: negated, family, ruled out, historical, a sibling.

    Raises:
        ValueError: A value is out of its range.
    """

    patients: int = 3_000
    seed: int = 0
    codes: int = 200
    codes_per_note: float = 5.0
    zipf: float = 1.0
    unsupported: float = 0.125
    opaque: float = 0.15
    missed: float = 0.35
    length_sigma: float = 0.6
    distractors: float = 3.0

    def __post_init__(self) -> None:
        ranges = {
            "patients": (1, 10**12), "seed": (0, 2**63), "codes": (4, 1_000), "codes_per_note": (0.1, 50),
            "zipf": (0, 3), "unsupported": (0, 1), "opaque": (0, 1), "missed": (0.02, 0.9), "length_sigma": (0.05, 2),
            "distractors": (0, 50),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must be between {low} and {high}, got {getattr(self, name)}.")
        if self.codes_per_note > HIGHEST_RATE * self.codes:
            raise ValueError(
                f"`codes_per_note` must be at most {HIGHEST_RATE} × `codes` ({HIGHEST_RATE * self.codes:g}), "
                f"got {self.codes_per_note}."
            )


@dataclass(frozen=True)
class NoteWorld:
    """The fixed part of a world of C codes.

    Attributes:
        codes: ``ICD10CM/…``, C of them.
        descriptions: Their official names.
        family: ``(C,)`` number of the group of siblings.
        opaque: ``(C,)`` whether mentions share no word with the description.
        forms: For each code what it is called, in the order of ``FORMS``.
        probability: ``(C,)`` that a note has the code.
        fillers: Sentences that say nothing about any code.
        filler_words: Their numbers of words.
        median_words: Median length of a note.
    """

    codes: tuple[str, ...]
    descriptions: tuple[str, ...]
    family: np.ndarray
    opaque: np.ndarray
    forms: tuple[tuple[str, ...], ...]
    probability: np.ndarray
    fillers: tuple[str, ...]
    filler_words: np.ndarray
    median_words: float


@lru_cache(maxsize=8)
def draw_note_world(config: SyntheticNotesConfig) -> NoteWorld:
    """The world of ``config``: a function of everything but the number of patients."""
    rng = np.random.default_rng([config.seed, 0x4E07E5])
    fillers = draw_fillers(rng)
    members = _draw_codes(config, rng, fillers)
    rank = rng.permutation(config.codes) + 1
    return NoteWorld(
        codes=tuple(member.code for member in members),
        descriptions=tuple(member.description for member in members),
        family=np.array([member.family for member in members]),
        opaque=np.array([member.opaque for member in members]),
        forms=tuple(member.forms for member in members),
        probability=_rates(rank.astype(float) ** -config.zipf, config.codes_per_note),
        fillers=fillers,
        filler_words=np.array([len(words(filler)) for filler in fillers]),
        median_words=_bisect(lambda median: _missed(median, config.length_sigma, WINDOW) - config.missed, 10, 1e6),
    )


def missed_share(config: SyntheticNotesConfig, window: int = WINDOW) -> float:
    """Expected share of the supported positives without evidence in the first ``window`` words.

    A note has L words, log-normal, and each of the k mentions of a code a uniform place: E[(1 - window / L)₊ᵏ].

    Raises:
        ValueError: ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"`window` must be at least 1, got {window}.")
    return _missed(draw_note_world(config).median_words, config.length_sigma, window)


@dataclass(frozen=True)
class _Member:
    code: str
    description: str
    family: int
    opaque: bool
    forms: tuple[str, ...]


def _missed(median: float, sigma: float, window: int) -> float:
    quantiles = np.array([NormalDist().inv_cdf((step + 0.5) / 2_000) for step in range(2_000)])
    behind = np.clip(1 - window / (median * np.exp(sigma * quantiles)), 0, None)
    return float(sum(share * (behind ** (count + 1)).mean() for count, share in enumerate(MENTIONS_PER_CODE)))


def _rates(weights: np.ndarray, total: float) -> np.ndarray:
    """Probabilities in proportion to ``weights``, none above ``HIGHEST_RATE``, that add up to ``total``."""
    scale = _bisect(lambda c: np.minimum(HIGHEST_RATE, c * weights).sum() - total, 1e-9, HIGHEST_RATE / weights.min())
    return np.minimum(HIGHEST_RATE, scale * weights)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of an increasing function, to nine digits."""
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def _draw_codes(config: SyntheticNotesConfig, rng: np.random.Generator, fillers: tuple[str, ...]) -> list[_Member]:
    """Families until there are ``config.codes`` codes; no name of a code occurs in another one or in other text."""
    templates = [sentence for group in (MENTIONS, DISTRACTORS) for part in group.values() for sentence in part]
    text = "|".join(map(_spaced, (*fillers, *templates, *SIGNS)))
    coined = _coin_words(rng)
    members: list[_Member] = []
    names: list[str] = []
    for number, family in enumerate(_families(rng)):
        opaque = bool(rng.random() < config.opaque)
        named = _name_family(family, opaque, coined, rng)
        own = [_spaced(form) for _, forms in named for form in forms]
        if _clash(own, names, text):
            continue
        names += own
        members += [_Member(*pair, number, opaque, forms) for pair, forms in named]
        if len(members) >= config.codes:
            return members[: config.codes]
    raise ValueError(f"`codes` must be at most {len(members)} for this seed, got {config.codes}.")


def _clash(own: list[str], names: list[str], text: str) -> bool:
    """Whether a name of a family occurs in the text, in another of its own or one given before, or holds one."""
    before = "|".join(names)
    within = sum(one in other for one in own for other in own)
    return (
        within > len(own)
        or any(name in text or name in before for name in own)
        or any(name in one for one in own for name in names)
    )


@lru_cache(maxsize=1)
def _sibling_groups() -> dict[str, list[list[tuple[str, str]]]]:
    """Chapter letter → groups of ICD-10-CM leaves under one subcategory, each with (code, name)."""
    codes = [f"ICD10CM/{code}" for code in icd_codes()[0] if len(code) in (6, 7) and code[0] in _LETTERS]
    clear = [
        (code, name)
        for code, name in zip(codes, describe(codes), strict=True)
        if name and 3 <= len(name.split()) <= 8 and not _VAGUE.search(name.lower())
    ]
    groups: dict[str, list[list[tuple[str, str]]]] = {}
    for stem, members in groupby(clear, key=lambda pair: pair[0][:-1]):
        siblings = list(members)[:4]
        if len(siblings) > 1 and _parts(siblings):
            groups.setdefault(stem.removeprefix("ICD10CM/")[0], []).append(siblings)
    return groups


def _families(rng: np.random.Generator) -> Iterator[list[tuple[str, str]]]:
    """Sibling groups, the chapters in turn."""
    shuffled = [[groups[index] for index in rng.permutation(len(groups))] for groups in _sibling_groups().values()]
    for row in zip_longest(*shuffled):
        yield from (family for family in row if family)


def _parts(siblings: list[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
    """For each sibling the words that all share and its own; an empty list where one has none of its own."""
    split = [re.findall("[a-z]+", name.lower()) for _, name in siblings]
    common = set.intersection(*map(set, split))
    stems = [[word for word in name if word in common and word not in _SMALL_WORDS] for name in split]
    own = [[word for word in name if word not in common and word not in _SMALL_WORDS] for name in split]
    return list(zip(stems, own, strict=True)) if all(stems) and all(own) else []


def _name_family(
    siblings: list[tuple[str, str]], opaque: bool, coined: Iterator[str], rng: np.random.Generator
) -> list[tuple[tuple[str, str], tuple[str, ...]]]:
    """((code, name), forms) of each sibling."""
    parts = _parts(siblings)
    terms = [name.lower() for _, name in siblings]
    if opaque:
        stem = [next(coined), next(coined)]
        parts = [(stem, [next(coined)]) for _ in siblings]
        terms = [" ".join(shared + own) for shared, own in parts]
    named: list[tuple[tuple[str, str], tuple[str, ...]]] = []
    for pair, term, (shared, own) in zip(siblings, terms, parts, strict=True):
        synonym = " ".join(own + shared)
        if synonym == term.replace(",", ""):
            synonym = " ".join(shared + own)
        initials = "".join(word[0] for word in shared) if len(shared) > 1 else shared[0][:3]
        short = " ".join([initials.upper(), *(_SHORT.get(word, word[:4]) for word in own)])
        named.append((pair, (term, synonym, short, _misspell(term, rng), next(coined))))
    return named


def _misspell(term: str, rng: np.random.Generator) -> str:
    """Two neighbouring letters inside of the longest word change places, or one is lost where they are equal."""
    word = max(re.findall("[a-z]+", term), key=len)
    at = int(rng.integers(1, len(word) - 2))
    pair = word[at : at + 2]
    swapped = pair[::-1] if pair[0] != pair[1] else pair[0]
    return term.replace(word, word[:at] + swapped + word[at + 2 :], 1)


def _coin_words(rng: np.random.Generator) -> Iterator[str]:
    """Words of three syllables that no language has, no word twice."""
    size = len(_SYLLABLES)
    for number in rng.permutation(size**3):
        yield "".join(_SYLLABLES[number // size**place % size] for place in range(3))


def _spaced(text: str) -> str:
    """The words of a text in lower case between spaces, so that ``in`` compares whole words."""
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "

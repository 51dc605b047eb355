"""The notes of the worlds of text and codes: at most 128 words in no fixed order, of which no diagnosis is part."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.sources._synthetic_text_codes_world import FINDINGS, Streams

_OPENINGS = (
    ("Looks well and walks the ward.", "In good shape at discharge."),
    ("Nearly back to usual.", "Comfortable, mild weakness only."),
    ("Moderately unwell this week.", "Needs some help with stairs."),
    ("Frail, slow to recover.", "Clearly weaker than before."),
    ("Gravely ill for most of the stay.", "Bedbound, exhausted by any effort."),
)
"""By what text tells of the shared factor, from best to worst."""
_TYPES = (
    ("Course fits the late onset type.", "Picture of the adult form.", "Type two pattern as before."),
    ("Course fits the early onset type.", "Picture of the juvenile form.", "Type one pattern as before."),
)
_PHRASES = {
    # finding: favourable, unfavourable
    "duration": (
        ("illness of recent onset", "disease found this year", "a new diagnosis"),
        ("illness of over twenty years", "long standing disease", "a diagnosis made decades ago"),
    ),
    "dose": (
        ("minimal doses", "low dose treatment", "doses at the lower limit"),
        ("maximum doses", "high dose treatment", "doses at the upper limit"),
    ),
    "smoking": (
        ("lifelong abstinence from tobacco", "a smoke free life", "never smoking"),
        ("daily smoking", "a pack a day", "ongoing tobacco use"),
    ),
    "adherence": (
        ("regular intake of tablets", "refills on time", "every dose taken"),
        ("missed doses", "skipped tablets", "unfilled prescriptions"),
    ),
}
_SAID = ("Reports {}.", "Chart shows {}.")
_DENIED = ("Denies {}.", "No sign of {}.")
_RELATIVES = ("Mother: {}.", "Brother known for {}.")
_COPIED = ("Copied from an earlier note: reports {}.", "Previous summary: {}.")
_FILLERS = (
    "Family updated.", "Diet as tolerated.", "Seen by physiotherapy.", "No known allergies.", "Lives with spouse.",
    "Slept poorly.", "Skin intact.", "Follow up in clinic.", "Labs reviewed.", "Questions answered.",
)  # fmt: skip
_NUMBER = len(FINDINGS)
_SLOTS = 2 + 3 * _NUMBER + 2
"""Sentences of a note: opening, type, the findings, those of relatives, copied ones, two that say nothing."""


class _Bank(NamedTuple):
    """Sentences in groups: ``(…)`` where each group starts and how many it has."""

    start: np.ndarray
    size: np.ndarray

    def pick(self, group: tuple[np.ndarray, ...], uniform: np.ndarray) -> np.ndarray:
        """A sentence of each group."""
        return self.start[group] + (uniform * self.size[group]).astype(np.int64)


def _bank(sentences: list[str], groups: list[tuple[str, ...]], shape: tuple[int, ...]) -> _Bank:
    """Adds groups to the list of all sentences."""
    size = np.array([len(group) for group in groups])
    start = len(sentences) + np.cumsum(size) - size
    sentences.extend(sentence for group in groups for sentence in group)
    return _Bank(start.reshape(shape), size.reshape(shape))


def _filled(templates: tuple[str, ...], turned: bool = False) -> list[tuple[str, ...]]:
    """For each finding and state the sentences; ``turned``: those of the opposite phrases."""
    return [
        tuple(template.format(phrase) for template in templates for phrase in states[state != turned])
        for states in _PHRASES.values()
        for state in (False, True)
    ]


_SENTENCES: list[str] = []
_OPENING = _bank(_SENTENCES, list(_OPENINGS), (len(_OPENINGS),))
_TYPE = _bank(_SENTENCES, list(_TYPES), (2,))
_OWN = _bank(_SENTENCES, _filled(_SAID), (_NUMBER, 2))
_OPPOSITE = _bank(_SENTENCES, _filled(_DENIED, turned=True), (_NUMBER, 2))
_OF_RELATIVES = _bank(_SENTENCES, _filled(_RELATIVES), (_NUMBER, 2))
_OF_EARLIER = _bank(_SENTENCES, _filled(_COPIED), (_NUMBER, 2))
_FILLER = _bank(_SENTENCES, [_FILLERS[:5], _FILLERS[5:]], (2,))


def write_notes(
    streams: Streams, reading: np.ndarray, early: np.ndarray, findings: np.ndarray, noise: float, exists: np.ndarray
) -> pa.Array:
    """One note for each visit.

    Args:
        streams: Random numbers.
        reading: ``(N, V)`` what text tells of the shared factor, 0 … 4.
        early: ``(N,)`` whether the disease is of the early type.
        findings: ``(N, V, 4)`` which findings are unfavourable.
        noise: Chance of each kind of disturbance, for each finding.
        exists: ``(N, V)`` the visits that there are.

    Returns:
        The notes of the visits that there are, patient by patient.
    """
    uniform = streams.uniform("note", findings.shape[1], 2 * _SLOTS + 2 * _NUMBER)[exists]
    choice, chance = uniform[:, :_SLOTS], uniform[:, _SLOTS:]
    earlier = np.concatenate([findings[:, :1], findings[:, :-1]], axis=1)[exists].astype(np.int64)
    first = np.broadcast_to(np.arange(findings.shape[1]) == 0, exists.shape)[exists]
    own, number = findings[exists].astype(np.int64), np.arange(_NUMBER)
    denied, relative, copied, state = (chance[:, place * _NUMBER : (place + 1) * _NUMBER] for place in range(4))
    parts = [choice[:, 2 + place * _NUMBER : 2 + (place + 1) * _NUMBER] for place in range(3)]
    early = np.broadcast_to(early[:, None], exists.shape)[exists].astype(np.int64)
    said = np.where(denied < noise, _OPPOSITE.pick((number, own), parts[0]), _OWN.pick((number, own), parts[0]))
    kin = _OF_RELATIVES.pick((number, (state < 0.5).astype(np.int64)), parts[1])
    again = _OF_EARLIER.pick((number, earlier), parts[2])
    columns = [
        _OPENING.pick((reading[exists],), choice[:, 0])[:, None],
        _TYPE.pick((early,), choice[:, 1])[:, None],
        said,
        np.where(relative < noise, kin, -1),
        np.where((copied < noise) & ~first[:, None], again, -1),
        _FILLER.pick((np.arange(2),), choice[:, -2:]),
    ]
    order = streams.uniform("note_order", findings.shape[1], _SLOTS)[exists].argsort(axis=1)
    return _joined(np.take_along_axis(np.concatenate(columns, axis=1), order, axis=1))


def _joined(sentence: np.ndarray) -> pa.Array:
    """The texts of rows of sentences, -1 for none."""
    there = sentence >= 0
    offsets = np.concatenate([[0], there.sum(axis=1).cumsum()]).astype(np.int32)
    flat = pa.array(_SENTENCES).take(pa.array(sentence[there]))
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), flat), " ")

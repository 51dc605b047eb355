"""The grammar of synthetic notes: sections, sentences around a mention, sentences about nothing."""

from __future__ import annotations

import re

import numpy as np

SECTIONS = (
    # heading, share of the note where it starts
    ("HISTORY OF PRESENT ILLNESS:", 0.0),
    ("PAST MEDICAL HISTORY:", 0.35),
    ("MEDICATIONS:", 0.5),
    ("HOSPITAL COURSE:", 0.6),
    ("DIAGNOSES:", 0.9),
)
MENTIONS = {
    "HISTORY OF PRESENT ILLNESS:": ("Pt presents with {} .", "Here for evaluation of {} .", "Work-up showed {} ."),
    "PAST MEDICAL HISTORY:": ("Ongoing {} , followed in clinic.", "Known {} , still active."),
    "MEDICATIONS:": ("Regimen is for {} .", "Dose adjusted because of {} ."),
    "HOSPITAL COURSE:": ("Stay notable for {} .", "Team treated {} .", "{} was confirmed by the consult service."),
    "DIAGNOSES:": ("- {} .", "Final: {} ."),
}
"""Sentences that affirm what is put in; the place is parted by spaces, so that a mention is made of whole words."""
SIGNS = ("Started on {} 20 mg qd.", "Maintained on {} as outpt.", "Responded well to {} given IV.")
DISTRACTORS = {
    "negated": ("No evidence of {} .", "Pt denies {} ."),
    "family": ("Mother had {} .", "Family hx positive for {} in a brother."),
    "ruled_out": ("{} was considered and ruled out.", "Imaging excluded {} ."),
    "historical": ("Remote {} as a child, resolved long ago.", "Had {} decades ago, nothing since."),
    "sibling": ("Picture differs from {} , which does not apply here.", "Not to be confused with {} ."),
}

_FILLERS = (
    "BP {a}/{b}, HR {c}, temp {d}.",
    "Pt c/o {symptom} x {e} days, {course}.",
    "{organ} exam {finding}.",
    "Labs: Na {f}, K {g}, Cr {h}.",
    "Pt ambulating w/ {aid}, tolerating {diet} diet.",
    "Plan: {plan}, f/u w/ {service} in {e} wks.",
    "{service} consulted, recs appreciated.",
    "Discussed w/ {person}, who voiced understanding.",
    "CXR {finding}, EKG {finding}.",
    "Lives w/ {person}, works as {job}.",
    "Meds reviewed, {plan}.",
    "Overnight {course}, no acute events.",
)
_WORDS = {
    "symptom": ("nausea", "malaise", "poor appetite", "lightheadedness", "cough", "night sweats", "chills"),
    "course": ("slowly improving", "unchanged", "worse at night", "relieved by rest", "intermittent", "stable"),
    "organ": ("Cardiac", "Abd", "Neuro", "HEENT", "Resp", "Skin", "Ext"),
    "finding": ("WNL", "unremarkable", "at baseline", "grossly intact", "benign", "without change"),
    "aid": ("walker", "cane", "assistance", "no assistance"),
    "diet": ("regular", "cardiac", "full liquid", "soft"),
    "plan": ("cont current care", "repeat labs in am", "wean O2 as tolerated", "PT eval", "IVF overnight"),
    "service": ("cardiology", "surgery", "neurology", "PCP", "renal", "wound care"),
    "person": ("spouse", "daughter", "son", "sister", "caregiver"),
    "job": ("teacher", "driver", "clerk", "farmer", "nurse", "cook"),
}
_NUMBERS = {"a": (95, 170), "b": (50, 100), "c": (55, 115), "d": (97, 103), "e": (2, 12), "f": (130, 148),
            "g": (3, 6), "h": (1, 4)}  # fmt: skip
_BANK = 1_500


def draw_fillers(rng: np.random.Generator) -> tuple[str, ...]:
    """A bank of sentences to draw from, with a few hundred distinct words."""
    sentences = []
    for template in rng.choice(_FILLERS, _BANK):
        slots = {name: rng.choice(choices) for name, choices in _WORDS.items()}
        slots |= {name: rng.integers(low, high) for name, (low, high) in _NUMBERS.items()}
        sentences.append(str(template).format(**slots))
    return tuple(sentences)


def words(text: str) -> list[str]:
    """Words and punctuation marks, each mark by itself: what BERT splits text into before its pieces."""
    return re.findall(r"\w+|[^\w\s]", text)

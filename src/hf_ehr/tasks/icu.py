"""The named tasks of intensive care stays, and of health risks six months ahead, as MedHMP uses them.

A name says what is predicted, from how many hours of the stay, and after which gap: ``arf_onset_after_t12_gap6`` is
asked 12 hours after the start of a stay, and onsets of the first 18 hours are left out. Definitions: FIDDLE (Tang et
al. 2020) for the stays; Wang et al. 2023 (MedHMP), section 4.4 and appendix, for the risks.
"""

from __future__ import annotations

import re

from hf_ehr.tasks.definition import Matching, Outcome, Predicate, Rule, Window
from hf_ehr.tasks.spec import TaskSpec

RESPIRATORY_FAILURE_ITEMS = (
    "MIMIC_ITEM/220339",  # PEEP set
    "MIMIC_ITEM/225792",  # invasive ventilation
    "MIMIC_ITEM/225794",  # non-invasive ventilation
    "ICU/ventilation",
)
"""FIDDLE's acute respiratory failure is its treatment, in MetaVision's items; ``ICU/…`` is the synthetic world."""
SHOCK_ITEMS = (
    "MIMIC_ITEM/221906",  # norepinephrine
    "MIMIC_ITEM/221289",  # epinephrine
    "MIMIC_ITEM/221662",  # dopamine
    "MIMIC_ITEM/222315",  # vasopressin
    "MIMIC_ITEM/221749",  # phenylephrine
    "ICU/vasopressor",
)
"""FIDDLE's five vasopressors."""
CAREVUE = ("^MIMIC_ITEM/[0-9]{1,5}$",)
"""Items of CareVue and of the laboratory. A stay of MIMIC-III that has no others was charted in CareVue, where these
treatments have other items: it would pass for a negative. FIDDLE takes the stays of MetaVision for the same reason."""
SEPSIS_CODES = ("CINC2019/Sepsis",)
"""The onset that PhysioNet 2019 labels by Sepsis-3; billed codes of sepsis have no hour and are none."""
# The paper names the diseases and no codes; these are our readings.
COPD_CODES = ("ICD9CM/491*", "ICD9CM/492*", "ICD9CM/496*", "ICD10CM/J4[134]*")
AMNESIA_CODES = (
    "ICD9CM/780.93", "ICD9CM/294.0", "ICD9CM/437.7",
    "ICD10CM/R41.[123]", "ICD10CM/F04*", "ICD10CM/G45.4",
)  # fmt: skip

_NAME = re.compile(
    r"(?P<task>icu_mortality|arf_onset_after|shock_onset_after|sepsis_onset_after)_t(?P<hours>\d+)"
    r"(?:_gap(?P<gap>\d+))?(?:_within(?P<horizon>\d+))?"
)
_STAY = {
    "stay": Predicate(kind="stay"),
    "adult_stay": Predicate(kind="stay", min_age=18),
    "stay_end": Predicate(kind="stay_end"),
    "birth": Predicate(kind="birth"),
    "death": Predicate(kind="death"),
}


def icu_task(name: str) -> TaskSpec | None:
    """The task that the name spells, or None: ``icu_mortality_t48``, ``shock_onset_after_t4_gap2_within24``."""
    match = _NAME.fullmatch(name)
    if match is None or (match["task"] == "icu_mortality" and (match["gap"] or match["horizon"])):
        return None
    hours = int(match["hours"])
    if match["task"] == "icu_mortality":
        return icu_mortality(hours)
    gap, horizon = int(match["gap"] or 0), None if match["horizon"] is None else int(match["horizon"])
    if match["task"] == "sepsis_onset_after":
        return sepsis_onset(hours, gap, horizon)
    return stay_onset(match["task"].removesuffix("_onset_after"), hours, gap, horizon)


def icu_mortality(hours: int = 48) -> TaskSpec:
    """Death in hospital, asked ``hours`` after the start of an intensive care stay that lasts longer."""
    return TaskSpec(
        name=f"icu_mortality_t{hours}",
        description=f"Will the patient die in hospital? Asked {hours} hours after the start of each intensive care "
        "stay of an adult that lasts longer; the rest of the hospital visit is the horizon.",
        predicates={
            **_STAY,
            "visit_end": Predicate(kind="discharge"),
            "died": Predicate(kind="discharge", discharged_to=("died",)),
        },
        trigger="stay",
        windows=_windows(hours) | {"target": Window("input.end", None, start_inclusive=False)},
        rules=(
            *_asked_in_the_stay(hours),
            Rule("end_of_visit_unknown", "target", "visit_end", min=1, scope="visit"),
        ),
        outcome=Outcome("target", "died", scope="visit"),
        expected_prevalence=(0.02, 0.4),
        leaks=("severity scores made after discharge", "codes billed at discharge", "orders to withdraw treatment"),
    )


def stay_onset(outcome: str, hours: int, gap_hours: int = 0, horizon_hours: int | None = None) -> TaskSpec:
    """First ventilation (``arf``) or vasopressor (``shock``) later in an intensive care stay.

    Args:
        outcome: ``arf`` or ``shock``.
        hours: Hours of the stay that are seen.
        gap_hours: Hours behind them in which an onset leaves the stay out: orders and sedation just before a treatment
            give it away.
        horizon_hours: Hours behind the gap in which the onset must lie; None: the rest of the stay, as FIDDLE has it.
            A stay that ends before without an onset is a negative.

    Raises:
        ValueError: There is no such outcome.
    """
    items = {"arf": RESPIRATORY_FAILURE_ITEMS, "shock": SHOCK_ITEMS}
    if outcome not in items:
        raise ValueError(f"`outcome` must be one of {', '.join(items)}, got {outcome!r}.")
    waited = f"trigger + {hours + gap_hours}h"
    end = "trigger -> stay_end" if horizon_hours is None else f"trigger + {hours + gap_hours + horizon_hours}h"
    within = "the rest of the stay" if horizon_hours is None else f"the {horizon_hours} hours behind the gap"
    return TaskSpec(
        name=_onset_name(outcome, hours, gap_hours, horizon_hours),
        description=f"First treatment of {'respiratory failure' if outcome == 'arf' else 'shock'} (FIDDLE) in "
        f"{within}, asked {hours} hours after the start of an adult's intensive care stay, gap {gap_hours} hours. "
        "Stays that are over, in which nothing was charted by then (or in CareVue only), or with an onset until the "
        "end of the gap, are left out.",
        predicates={
            **_STAY,
            "charted": Predicate(kind="measurement", codes=("*/*",), except_codes=CAREVUE),
            "onset": Predicate(kind="measurement", codes=items[outcome]),
        },
        trigger="stay",
        windows=_windows(hours)
        | {"until_gap": Window("trigger", waited), "target": Window(waited, end, start_inclusive=False)},
        rules=(
            *_asked_in_the_stay(hours),
            Rule("treatments_not_charted", "seen", "charted", min=1, scope="visit"),
            Rule("onset_before", "until_gap", "onset", max=0, scope="visit"),
        ),
        outcome=Outcome("target", "onset", scope="visit"),
        expected_prevalence=(0.01, 0.5),
        leaks=(
            "the items that define the outcome, and their settings, doses and orders",
            "codes billed at discharge",
        ),
    )


def sepsis_onset(hours: int, gap_hours: int = 0, horizon_hours: int | None = None) -> TaskSpec:
    """Onset of sepsis later in an intensive care stay, as PhysioNet 2019 labels it (Reyna et al. 2020).

    The challenge asks at every hour; this asks once a stay. Records of the challenge end soon after an onset, some
    before it, so that without a horizon the end of the stay does not bound it.

    Args:
        hours: Hours of the stay that are seen.
        gap_hours: As of :func:`stay_onset`: early signs and orders just before an onset give it away.
        horizon_hours: Hours behind the gap in which the onset must lie; None: any later time.
    """
    waited = f"trigger + {hours + gap_hours}h"
    end = None if horizon_hours is None else f"trigger + {hours + gap_hours + horizon_hours}h"
    within = "at any later time" if horizon_hours is None else f"in the {horizon_hours} hours behind the gap"
    return TaskSpec(
        name=_onset_name("sepsis", hours, gap_hours, horizon_hours),
        description=f"Onset of sepsis (Sepsis-3, as labelled by PhysioNet 2019) {within}, asked {hours} hours after "
        f"the start of an adult's intensive care stay, gap {gap_hours} hours. Stays that are over, of unknown end, or "
        "with an onset until the end of the gap, are left out.",
        predicates={**_STAY, "onset": Predicate(kind="diagnosis", codes=SEPSIS_CODES, when_known=True)},
        trigger="stay",
        windows=_windows(hours)
        | {
            "until_gap": Window("trigger", waited),
            "later": Window("input.end", None, start_inclusive=False),
            "target": Window(waited, end, start_inclusive=False),
        },
        rules=(
            *_asked_in_the_stay(hours),
            Rule("end_of_stay_unknown", "later", "stay_end", min=1, scope="visit"),
            Rule("onset_before", "until_gap", "onset", max=0, scope="visit"),
        ),
        outcome=Outcome("target", "onset", scope="visit"),
        expected_prevalence=(0.005, 0.3),
        leaks=("cultures and antibiotics, which define the time of the onset", "the length of the record"),
    )


def _onset_name(outcome: str, hours: int, gap_hours: int, horizon_hours: int | None) -> str:
    gap, within = f"_gap{gap_hours}", f"_within{horizon_hours}"
    return f"{outcome}_onset_after_t{hours}{gap if gap_hours else ''}{'' if horizon_hours is None else within}"


def _windows(hours: int) -> dict[str, Window]:
    asked = f"trigger + {hours}h"
    return {
        "input": Window(None, asked),
        "index": Window("trigger", "trigger"),
        "seen": Window("trigger", asked, start_inclusive=False),
    }


def _asked_in_the_stay(hours: int) -> tuple[Rule, ...]:
    return (
        Rule("birth_unknown", "input", "birth", min=1),
        Rule("below_18", "index", "adult_stay", min=1, scope="visit"),
        Rule("dead_by_then", "input", "death", max=0),
        Rule(f"left_within_{hours}h", "seen", "stay_end", max=0, scope="visit"),
    )


def risk_six_months_ahead(name: str, title: str, codes: tuple[str, ...]) -> TaskSpec:
    """Case-control: what was known half a year before the first diagnosis, beside matched controls.

    The paper cuts the last six months off the histories of cases only; controls lose the same here, else the length
    of the silence tells them apart.
    """
    return TaskSpec(
        name=name,
        description=f"MedHMP's risk of {title}: asked 180 days before the first encounter with it, of controls 180 "
        "days before their last encounter. Three controls a case, matched by sex, race and age.",
        unit="patient",
        design="case_control",
        predicates={
            "encounter": Predicate(kind="admission"),
            "birth": Predicate(kind="birth"),
            "disease": Predicate(kind="diagnosis", codes=codes),
        },
        trigger="disease",
        index="event_or_last",
        fallback="encounter",
        windows={"input": Window(None, "trigger - 180d"), "index": Window("trigger", "trigger")},
        rules=(
            Rule("birth_unknown", "input", "birth", min=1),
            Rule("no_history", "input", "encounter", min=1),
        ),
        outcome=Outcome("index", "disease", scope="visit"),
        matching=Matching(ratio=3, fields=("sex", "race"), age_years=5),
        expected_prevalence=(0.2, 0.6),
        leaks=("the number of visits, the length of history and the age at the index (L9)",),
    )

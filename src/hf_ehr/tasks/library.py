"""The named tasks: prolonged stay, heart failure in diabetes, pancreatic cancer, readmission, risks; see also ``icu``.

Sources: Med-BERT (Rasmy et al. 2021, npj Digital Medicine 4:86) for the first three and their code lists; the CMS
hospital-wide readmission measure for the rules of the fourth. Where the paper gives a name and no codes, the codes are
our reading and the comment says so.
"""

from __future__ import annotations

from dataclasses import replace

from hf_ehr.tasks.definition import Censoring, Outcome, Predicate, Rule, Window
from hf_ehr.tasks.icu import AMNESIA_CODES, COPD_CODES, icu_mortality, icu_task, risk_six_months_ahead, stay_onset
from hf_ehr.tasks.spec import TaskSpec

HEART_FAILURE_CODES = (
    "ICD9CM/428*", "ICD9CM/398.91",
    "ICD9CM/402.01", "ICD9CM/402.11", "ICD9CM/402.91",
    "ICD9CM/404.01", "ICD9CM/404.03", "ICD9CM/404.11", "ICD9CM/404.13", "ICD9CM/404.91", "ICD9CM/404.93",
    "ICD10CM/I50*", "ICD10CM/I11.0", "ICD10CM/I09.81", "ICD10CM/I13.0", "ICD10CM/I13.2",
    "ICD10CM/I97.13", "ICD10CM/I97.130", "ICD10CM/I97.131",
)  # fmt: skip
"""Heart failure, as listed in Med-BERT's cohort definition."""

TYPE_1_CODES = ("ICD9CM/250.?1", "ICD9CM/250.?3", "ICD10CM/E10*")

ANTIDIABETIC_AGENTS = (
    "metformin", "chlorpropamide", "glimepiride", "glyburide", "glipizide", "tolbutamide", "tolazamide",
    "pioglitazone", "rosiglitazone", "sitagliptin", "saxagliptin", "alogliptin", "linagliptin", "repaglinide",
    "nateglinide", "miglitol", "acarbose", "insulin",
)  # fmt: skip
"""Med-BERT's list of agents that confirm type 2 diabetes."""

DIURETICS = (
    "furosemide", "bumetanide", "torsemide", "ethacryn", "hydrochlorothiazide", "chlorothiazide", "chlorthalidone",
    "metolazone", "indapamide", "spironolactone", "eplerenone", "amiloride", "triamterene",
)  # fmt: skip
"""Our reading of the paper's «diuretic»."""

HEART_FAILURE_PROCEDURES = (
    "ICD9Proc/39.95", "ICD9Proc/54.98", "ICD10PCS/5A1D*", "ICD10PCS/3E1M39Z", "CPT4/9093[57]", "CPT4/9094[57]",
    "ICD9Proc/37.5[2-5]", "ICD9Proc/37.6[0-8]", "ICD10PCS/02RK0J*", "ICD10PCS/02RL0J*", "ICD10PCS/02HA*",
    "CPT4/3392[789]", "CPT4/3397[569]",
)  # fmt: skip
"""Our reading of the paper's «dialysis, artificial heart»: both kinds of dialysis, hearts and assist devices."""

PANCREATIC_CANCER_CODES = ("ICD9CM/157*", "ICD10CM/C25*")


def get_task(name: str) -> TaskSpec:
    """The named task: one of ``TASKS``, or one whose name :func:`hf_ehr.tasks.icu.icu_task` reads.

    Raises:
        ValueError: There is none of this name; the message lists the names.
    """
    task = TASKS.get(name) or icu_task(name)
    if task is None:
        raise ValueError(
            f"`name` must be one of {', '.join(TASKS)}, or of other hours such as arf_onset_after_t4_gap2_within24, "
            f"got {name!r}. Other tasks are written as YAML: TaskSpec.from_yaml(path)."
        )
    return task


def _drugs(atc: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns of drugs by ATC group, and by ingredient where a source codes drugs by name."""
    return (*(f"ATC/{group}" for group in atc), *(f"*/*{name}*" for name in names))


_EVIDENCE = {
    "a1c_high": Predicate(kind="measurement", codes=("LOINC/4548-4",), value_min=6.5),
    "antidiabetic_agent": Predicate(kind="medication", codes=_drugs(("A10*",), ANTIDIABETIC_AGENTS)),
    "diuretic": Predicate(kind="medication", codes=_drugs(("C03*",), DIURETICS)),
    # The paper says «high BNP»: we take the usual rule-out limits, BNP 100 pg/mL and NT-proBNP 300 pg/mL.
    "bnp_100": Predicate(kind="measurement", codes=("LOINC/30934-9",), value_min=100),
    "nt_probnp_300": Predicate(kind="measurement", codes=("LOINC/33762-6",), value_min=300),
    "bnp_high": Predicate(any_of=("bnp_100", "nt_probnp_300")),
    "heart_failure_procedure": Predicate(kind="procedure", codes=HEART_FAILURE_PROCEDURES),
}

_DIABETES = {
    "birth": Predicate(kind="birth"),
    "death": Predicate(kind="death"),
    "encounter": Predicate(kind="admission"),
    "diabetes": Predicate(
        kind="diagnosis", codes=("ICD9CM/249*", "ICD9CM/250*", "ICD10CM/E0[89]*", "ICD10CM/E1[0-3]*")
    ),
    "type_2_diabetes": Predicate(
        kind="diagnosis", codes=("ICD9CM/250*", "ICD10CM/E11*"), except_codes=("ICD9CM/250.?1", "ICD9CM/250.?3")
    ),
    "diabetes_below_18": Predicate(any_of=("diabetes",), below_age=18),
    # The paper names these five exclusions without codes.
    "diabetes_insipidus": Predicate(
        kind="diagnosis", codes=("ICD9CM/253.5", "ICD9CM/588.1", "ICD10CM/E23.2", "ICD10CM/N25.1")
    ),
    "gestational_diabetes": Predicate(kind="diagnosis", codes=("ICD9CM/648.8*", "ICD10CM/O24.4*")),
    "secondary_diabetes": Predicate(kind="diagnosis", codes=("ICD9CM/249*", "ICD10CM/E0[89]*", "ICD10CM/E13*")),
    "neonatal_diabetes": Predicate(kind="diagnosis", codes=("ICD9CM/775.1", "ICD10CM/P70.2")),
    "type_1_diabetes": Predicate(kind="diagnosis", codes=TYPE_1_CODES),
    "heart_failure": Predicate(kind="diagnosis", codes=HEART_FAILURE_CODES),
    **_EVIDENCE,
}
_OTHER_DIABETES = (
    "diabetes_insipidus", "gestational_diabetes", "secondary_diabetes", "neonatal_diabetes", "type_1_diabetes",
)  # fmt: skip
_DIABETES_CONFIRMED = Predicate(any_of=("type_2_diabetes",), confirmed_by=("a1c_high", "antidiabetic_agent"))
_HEART_FAILURE_CONFIRMED = Predicate(
    any_of=("heart_failure",), confirmed_by=("diuretic", "bnp_high", "heart_failure_procedure")
)

_INPATIENT = {
    "admission": Predicate(kind="admission", visit_kinds=("inpatient",)),
    "discharge": Predicate(kind="discharge", visit_kinds=("inpatient",)),
}
_CASE_CONTROL_WINDOWS = {
    "input": Window(None, "trigger", end_inclusive=False),
    "index": Window("trigger", "trigger"),
    "record": Window(None, None),
}
_UNTIL_NOW = Window(None, "trigger")
_NEXT_YEAR = Window("trigger", "trigger + 365d", start_inclusive=False)
_OBSERVED = Censoring(death="exclude", follow_up=True)

PROLONGED_STAY = TaskSpec(
    name="prolonged_stay",
    description="Med-BERT's second pre-training label: any stay of more than 7 days (strict) in the whole history, "
    "every visit counted (an outpatient visit lasts 0 days). Predicted at the end of the last visit, so the outcome "
    "lies in the input: it teaches a model, it is no forecast.",
    unit="patient",
    design="retrospective",
    predicates={
        "visit_end": Predicate(kind="discharge"),
        "long_stay": Predicate(kind="discharge", longer_than_days=7),
    },
    trigger="visit_end",
    index="last",
    windows={"input": _UNTIL_NOW},
    outcome=Outcome("input", "long_stay"),
    expected_prevalence=(0.02, 0.6),  # the paper's 15 % are of all patients; a hospital's inpatients have more
    leaks=("the lengths, ends and discharge fields of the visits",),
)


def _prolonged_stay_at(name: str, when: str, end: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        description=f"Will this inpatient stay last more than 7 days (strict)? Asked {when}; stays already over are "
        "excluded. A death within 7 days ends the stay: it counts as not prolonged.",
        predicates={
            **_INPATIENT,
            "long_stay": Predicate(kind="discharge", visit_kinds=("inpatient",), longer_than_days=7),
        },
        trigger="admission",
        windows={"input": Window(None, end), "target": Window("input.end", None, start_inclusive=False)},
        rules=(
            Rule("stay_already_over", "input", "discharge", max=0, scope="visit"),
            Rule("end_of_stay_unknown", "target", "discharge", min=1, scope="visit"),
        ),
        outcome=Outcome("target", "long_stay", scope="visit"),
        expected_prevalence=(0.05, 0.6),
        leaks=("codes billed at discharge", "the end of the stay and its disposition", "the discharge summary"),
    )


DIABETES_HEART_FAILURE = TaskSpec(
    name="diabetes_heart_failure",
    description="Med-BERT's DHF: heart failure in patients with type 2 diabetes. Case-control: cases are asked before "
    "their first heart failure encounter, controls before their last encounter; the encounter itself is not visible.",
    unit="patient",
    design="case_control",
    predicates={
        **_DIABETES,
        "diabetes_confirmed": _DIABETES_CONFIRMED,
        "heart_failure_confirmed": _HEART_FAILURE_CONFIRMED,
    },
    trigger="heart_failure",
    index="event_or_last",
    fallback="encounter",
    windows={**_CASE_CONTROL_WINDOWS, "until_30_days_before": Window(None, "trigger - 30d")},
    rules=(
        Rule("no_diabetes", "record", "diabetes", min=1),
        Rule("one_diabetes_encounter", "record", "diabetes", min=2),
        *(Rule(name, "record", name, max=0) for name in _OTHER_DIABETES),
        Rule("diabetes_unconfirmed", "record", "diabetes_confirmed", min=1),
        Rule("birth_unknown", "record", "birth", min=1),
        Rule("below_18_at_first_diabetes", "record", "diabetes_below_18", max=0),
        Rule("died_before_index", "input", "death", max=0),
        Rule("one_heart_failure_encounter", "record", "heart_failure", min=2, cases_only=True),
        Rule("heart_failure_unconfirmed", "record", "heart_failure_confirmed", min=1, cases_only=True),
        Rule("heart_failure_within_30_days", "until_30_days_before", "type_2_diabetes", min=1, cases_only=True),
        Rule("no_history", "input", "encounter", min=1),
    ),
    outcome=Outcome("index", "heart_failure", scope="visit"),
    expected_prevalence=(0.01, 0.3),  # 39,727 of 672,647 in Cerner
    leaks=("the number of visits, the length of history and the age at the index (L9)",),
)

DIABETES_HEART_FAILURE_PROSPECTIVE = TaskSpec(
    name="diabetes_heart_failure_prospective",
    description="First heart failure within a year of an encounter of a patient with type 2 diabetes known for at "
    "least 30 days. Asked at the end of every such encounter; everything that decides eligibility was known by then.",
    predicates={
        **_DIABETES,
        "encounter_end": Predicate(kind="discharge"),
        "diabetes_confirmed": replace(_DIABETES_CONFIRMED, confirmed="so_far"),
        "heart_failure_confirmed": replace(_HEART_FAILURE_CONFIRMED, confirmed="so_far"),
    },
    trigger="encounter_end",
    windows={
        "input": _UNTIL_NOW,
        "until_30_days_before": Window(None, "trigger - 30d"),
        "target": _NEXT_YEAR,
    },
    rules=(
        Rule("no_diabetes_known_for_30_days", "until_30_days_before", "diabetes_confirmed", min=1, clock="known"),
        *(Rule(name, "input", name, max=0) for name in _OTHER_DIABETES),
        Rule("birth_unknown", "input", "birth", min=1),
        Rule("below_18_at_first_diabetes", "input", "diabetes_below_18", max=0),
        Rule("dead_by_then", "input", "death", max=0),
        Rule("heart_failure_before", "input", "heart_failure", max=0),
    ),
    outcome=Outcome("target", "heart_failure_confirmed"),
    censoring=_OBSERVED,
    expected_prevalence=(0.005, 0.25),
)

_CANCER = {
    "birth": Predicate(kind="birth"),
    "death": Predicate(kind="death"),
    "encounter": Predicate(kind="admission"),
    "pancreatic_cancer": Predicate(kind="diagnosis", codes=PANCREATIC_CANCER_CODES),
    # Every malignant neoplasm, secondary ones and those of the skin included: the paper says «no other cancer».
    "other_cancer": Predicate(
        kind="diagnosis",
        codes=("ICD9CM/1[4-9]?*", "ICD9CM/20[0-8]*", "ICD9CM/209.[0-3]*", "ICD10CM/C*"),
        except_codes=PANCREATIC_CANCER_CODES,
    ),
}

PANCREATIC_CANCER = TaskSpec(
    name="pancreatic_cancer",
    description="Med-BERT's PaCa: pancreatic cancer as the first cancer, at 45 years or older. Case-control: cases "
    "are asked before the first encounter with it, controls before their last encounter, which is not visible.",
    unit="patient",
    design="case_control",
    predicates={**_CANCER, "encounter_at_45": Predicate(kind="admission", min_age=45)},
    trigger="pancreatic_cancer",
    index="event_or_last",
    fallback="encounter",
    windows=_CASE_CONTROL_WINDOWS,
    rules=(
        Rule("birth_unknown", "record", "birth", min=1),
        Rule("below_45", "index", "encounter_at_45", min=1, scope="visit"),
        Rule("cancer_before", "input", "other_cancer", max=0),
        Rule("died_before_index", "input", "death", max=0),
        Rule("no_history", "input", "encounter", min=1),
    ),
    outcome=Outcome("index", "pancreatic_cancer", scope="visit"),
    expected_prevalence=(0.0002, 0.5),
    leaks=("the number of visits, the length of history and the age at the index (L9)",),
)

PANCREATIC_CANCER_PROSPECTIVE = TaskSpec(
    name="pancreatic_cancer_prospective",
    description="First pancreatic cancer within a year of an inpatient discharge, at 45 years or older, without "
    "cancer before.",
    predicates={**_CANCER, **_INPATIENT, "discharge_at_45": Predicate(kind="discharge", min_age=45)},
    trigger="discharge",
    windows={"input": _UNTIL_NOW, "index": Window("trigger", "trigger"), "target": _NEXT_YEAR},
    rules=(
        Rule("birth_unknown", "input", "birth", min=1),
        Rule("below_45", "index", "discharge_at_45", min=1, scope="visit"),
        Rule("pancreatic_cancer_before", "input", "pancreatic_cancer", max=0),
        Rule("cancer_before", "input", "other_cancer", max=0),
        Rule("dead_by_then", "input", "death", max=0),
    ),
    outcome=Outcome("target", "pancreatic_cancer"),
    censoring=_OBSERVED,
    expected_prevalence=(0.0002, 0.05),
)

READMISSION_30D = TaskSpec(
    name="readmission_30d",
    description="Unplanned inpatient readmission within 30 days of an inpatient discharge (alive, not against advice, "
    "not to another hospital), asked at the discharge. Readmission on the day of discharge is excluded; planned "
    "admissions do not count, an admission of unknown planning counts as unplanned. Death within 30 days without "
    "readmission competes and is excluded (censoring.death: composite counts it); so is who has no later event.",
    predicates={
        **_INPATIENT,
        "unplanned_admission": Predicate(kind="admission", visit_kinds=("inpatient",), unplanned=True),
        "death": Predicate(kind="death"),
        "died": Predicate(kind="discharge", visit_kinds=("inpatient",), discharged_to=("died",)),
        "left_against_advice": Predicate(
            kind="discharge", visit_kinds=("inpatient",), discharged_to=("against_advice",)
        ),
        "transferred": Predicate(kind="discharge", visit_kinds=("inpatient",), discharged_to=("transfer",)),
    },
    trigger="discharge",
    windows={
        "input": _UNTIL_NOW,
        "index": Window("trigger", "trigger"),
        "same_day": Window("trigger", "trigger @ 23:59"),
        "target": Window("trigger", "trigger + 30d", start_inclusive=False),
    },
    rules=(
        Rule("died_in_hospital", "index", "died", max=0, scope="visit"),
        Rule("dead_by_discharge", "input", "death", max=0),
        Rule("left_against_advice", "index", "left_against_advice", max=0, scope="visit"),
        Rule("transferred", "index", "transferred", max=0, scope="visit"),
        Rule("same_day_readmission", "same_day", "admission", max=0, scope="other_visits"),
    ),
    outcome=Outcome("target", "unplanned_admission"),
    censoring=_OBSERVED,
    expected_prevalence=(0.03, 0.35),
    leaks=("disposition and follow-up sections of the discharge summary",),
)

TASKS = {
    task.name: task
    for task in (
        PROLONGED_STAY,
        _prolonged_stay_at("prolonged_stay_at_admission", "at 23:59 of the day of admission", "trigger @ 23:59"),
        _prolonged_stay_at("prolonged_stay_at_48h", "48 hours after admission", "trigger + 48h"),
        DIABETES_HEART_FAILURE,
        DIABETES_HEART_FAILURE_PROSPECTIVE,
        PANCREATIC_CANCER,
        PANCREATIC_CANCER_PROSPECTIVE,
        READMISSION_30D,
        *(stay_onset(outcome, hours) for outcome in ("arf", "shock") for hours in (4, 12, 48)),
        icu_mortality(48),
        risk_six_months_ahead("heart_failure_six_months_ahead", "heart failure", HEART_FAILURE_CODES),
        risk_six_months_ahead("copd_six_months_ahead", "chronic obstructive lung disease", COPD_CODES),
        risk_six_months_ahead("amnesia_six_months_ahead", "amnesia", AMNESIA_CODES),
    )
}
"""Every named task, by name."""

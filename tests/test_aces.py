"""Exchange with ACES: what both languages can say goes over and back, what one cannot is refused by name."""

from dataclasses import replace

import pytest

from hf_ehr.tasks import Censoring, Outcome, Predicate, Rule, TaskSpec, Window, from_aces, get_task, to_aces
from tests.builders import day, patient, records, visit

READMISSION = """
predicates: {admission: {code: ADMISSION}, discharge: {code: DISCHARGE}, death: {code: MEDS_DEATH}}
trigger: discharge
windows:
  input:    {start: null, end: trigger, start_inclusive: True, end_inclusive: True, index_timestamp: end, has: {death: "(None, 0)"}}
  same_day: {start: trigger, end: start + 24h, start_inclusive: False, end_inclusive: True, has: {admission: "(None, 0)"}}
  target:   {start: trigger, end: start + 30d, start_inclusive: False, end_inclusive: True, has: {death: "(None, 0)"}, label: admission}
  followed: {start: target.end, end: null, start_inclusive: False, end_inclusive: True, has: {_ANY_EVENT: "(1, None)"}}
"""  # noqa: E501 - as it is written elsewhere


def seven_patients():
    """In-hospital death, early death, censored, same-day, day 20, day 30, followed: their first stay ends on day 5."""
    late = visit(100, 101)
    return records(
        patient(1, [visit(0, 5, discharged_to="died")], death_time=day(5)),
        patient(2, [visit(0, 5)], death_time=day(15)),
        patient(3, [visit(0, 5)]),
        patient(4, [visit(0, 5), visit(5.5, 7), late]),
        patient(5, [visit(0, 5), visit(25, 26), late]),
        patient(6, [visit(0, 5), visit(35, 36), late]),
        patient(7, [visit(0, 5), late]),
    )


def labels_at_day_5(spec):
    labels, _ = spec.label(seven_patients())
    rows = labels.select(["subject_id", "prediction_time", "boolean_value"]).to_pylist()
    return {row["subject_id"]: row["boolean_value"] for row in rows if row["prediction_time"] == day(5)}


def test_the_readmission_task_of_aces_labels_seven_patients_as_aces_does():
    assert labels_at_day_5(from_aces(READMISSION)) == {5: True, 6: True, 7: False}


def test_each_of_the_seven_is_excluded_for_its_own_reason():
    _, excluded = from_aces(READMISSION).label(seven_patients().slice(0, 4))
    first_stays = {"input_death": 1, "target_death": 1, "same_day_admission": 1}
    assert {reason: excluded[reason] for reason in first_stays} == first_stays
    assert excluded["followed__ANY_EVENT"] == 2, "the censored one, and the last stay of the fourth"


def test_our_own_readmission_task_agrees_on_the_seven():
    assert labels_at_day_5(get_task("readmission_30d")) == {5: True, 6: True, 7: False}


def test_a_task_goes_to_aces_and_back_unchanged():
    spec = from_aces(READMISSION, name="readmission")
    assert from_aces(to_aces(spec)) == spec


def test_codes_patterns_values_and_alternatives_go_over_and_mean_the_same():
    text = """
description: Sepsis or shock within two days of a high lactate.
metadata: {name: sepsis}
predicates:
  sepsis: {code: {regex: "^ICD10CM/A4[01]"}}
  shock: {code: {any: [ICD10CM/R57.0, ICD10CM/R57.9]}}
  bad: {expr: "or(sepsis, either)"}
  either: {expr: "or(shock, death)"}
  death: {code: MEDS_DEATH}
  lactate: {code: LOINC/2524-7, value_min: 2.0, value_max: 9.0, value_max_inclusive: true}
trigger: lactate
windows:
  input: {start: null, end: trigger + 1 hour, start_inclusive: True, end_inclusive: True, index_timestamp: end}
  target: {start: input.end, end: start + 2 days, start_inclusive: False, end_inclusive: True, label: bad}
"""
    spec = from_aces(text)
    assert spec.name == "sepsis"
    assert spec.predicates["lactate"] == Predicate(
        kind="measurement", codes=("LOINC/2524-7",), value_min=2.0, value_max=9.0, value_min_inclusive=False
    )
    again = from_aces(to_aces(spec))
    assert again == spec

    def stay(value):
        rows = [{"hour": 0.0, "name": "LOINC/2524-7", "value": value, "text": None}]
        return [{"stay_id": 1, "start": day(0), "end": day(1), "measurements": rows}]

    sepsis, shock, neither = "ICD10CM/A41.9", "ICD10CM/R57.0", "ICD10CM/R57.1"
    for value, code, labels in (
        (2.0, sepsis, []),
        (2.1, sepsis, [True]),
        (9.0, shock, [True]),
        (3.0, neither, [False]),
        (9.1, shock, []),
    ):
        table = records(patient(1, [visit(0, 1, stays=stay(value)), visit(1.5, 2, diagnoses=[code])]))
        assert spec.label(table)[0]["boolean_value"].to_pylist() == labels, (value, code)
        assert again.label(table)[0].equals(spec.label(table)[0])


def test_our_wildcards_are_exported_as_regular_expressions_that_mean_the_same():
    spec = replace(
        from_aces(READMISSION),
        predicates={
            **from_aces(READMISSION).predicates,
            "admission": Predicate(codes=("ICD9CM/428*", "ICD10CM/I11.0")),
        },
    )
    table = records(
        patient(1, [visit(0, 5), visit(20, 21, diagnoses=["ICD9CM/428.0"]), visit(90)]),
        patient(2, [visit(0, 5), visit(20, 21, diagnoses=["ICD10CM/I1100"]), visit(90)]),
        patient(3, [visit(0, 5), visit(20, 21, diagnoses=["ICD10CM/I11.0"]), visit(90)]),
    )
    assert from_aces(to_aces(spec)).label(table)[0].equals(spec.label(table)[0])
    assert spec.label(table)[0].num_rows == 6


def test_an_exclusive_end_puts_the_prediction_time_just_before_it():
    spec = from_aces(
        READMISSION.replace("end_inclusive: True, index_timestamp", "end_inclusive: False, index_timestamp")
    )
    labels, _ = spec.label(seven_patients().slice(6, 1))
    gap = day(5) - labels["prediction_time"].to_pylist()[0]
    assert gap.total_seconds() == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{code: ADMISSION}", "{code: ADMISSION, static: true}", "static"),
        ("{code: ADMISSION}", "{code: ADMISSION, ward: icu}", "ward"),
        ("{code: ADMISSION}", '{expr: "and(discharge, death)"}', "and"),
        ("{code: ADMISSION}", '{expr: "or(discharge, birth)"}', "defined predicates"),
        ("{code: ADMISSION}", "{code: {like: x}}", "any"),
        ("{code: ADMISSION}", "{code: ADMISSION_ICU}", "VOCABULARY/CODE"),
        ("trigger: discharge", "trigger: discharge\npatient_demographics: {sex: {code: F}}", "patient_demographics"),
        ("trigger: discharge", "trigger: _RECORD_END", "_RECORD_END"),
        (", label: admission", "", "label"),
        ("index_timestamp: end, ", "", "index_timestamp"),
        ('"(1, None)"', "[1, 2]", "min, max"),
        ("end: start + 24h", "end: start + 1 fortnight", "duration"),
        ("start: target.end", "start: goal.end", "goal.end"),
        ("end: trigger, start_inclusive", "end: trigger -> death, start_inclusive", "looks ahead"),
    ],
)
def test_what_records_cannot_answer_is_refused_by_name(old, new, message):
    assert old in READMISSION
    with pytest.raises(ValueError, match=message):
        from_aces(READMISSION.replace(old, new))


def base(**changes):
    return replace(from_aces(READMISSION), **changes)


def with_admission(**fields):
    return base(predicates={**base().predicates, "admission": Predicate(**fields)})


@pytest.mark.parametrize(
    ("spec", "feature"),
    [
        (get_task("prolonged_stay"), "retrospective"),
        (get_task("diabetes_heart_failure"), "case_control"),
        (get_task("readmission_30d"), "censoring"),
        (base(index="first"), "index: first"),
        (base(censoring=Censoring(death="exclude")), "censoring"),
        (with_admission(kind="admission", unplanned=True), "admission.unplanned"),
        (with_admission(kind="admission", visit_kinds=("emergency",)), "admission.visit_kinds"),
        (with_admission(kind="admission"), "admission.kind"),
        (with_admission(codes=("A/1",), principal=True), "admission.principal"),
        (with_admission(codes=("A/1",), min_age=3), "admission.min_age"),
        (with_admission(codes=("A/*",), except_codes=("A/1",)), "admission.except_codes"),
        (base(rules=(Rule("x", "input", "death", max=0, scope="visit"),)), "scope"),
        (base(outcome=Outcome("target", "admission", scope="other_visits")), "outcome.scope"),
        (base(windows={**base().windows, "same_day": Window("trigger", "trigger @ 23:59")}), "@ 23:59"),
        (base(windows={**base().windows, "same_day": Window(None, None)}), "same_day"),
        (base(windows={**base().windows, "same_day": Window("trigger", "trigger")}), "same_day"),
    ],
)
def test_what_aces_cannot_say_is_refused_by_name(spec, feature):
    with pytest.raises(ValueError, match=f"ACES cannot express `.*{feature}"):
        to_aces(spec)


def test_a_window_whose_bounds_share_an_anchor_is_rewritten_as_aces_wants_it():
    shared = base(windows={**base().windows, "target": Window("trigger", "trigger + 30d", start_inclusive=False)})
    assert isinstance(shared, TaskSpec)
    again = from_aces(to_aces(shared))
    assert again.windows["target"] == base().windows["target"]

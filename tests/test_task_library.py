"""Trajectories with the label, or the reason to be left out, that the definitions of the named tasks give them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from hf_ehr.tasks import Censoring, TaskSpec, get_task
from hf_ehr.tasks.library import TASKS
from tests.builders import day, patient, records, visit

FAR = 500  # a visit this late says that everyone was followed


def ask(task, *visits_of_patients, **fields):
    """The outcome of each patient, in order: a label, or the reason for its exclusion (one candidate per patient)."""
    spec = get_task(task) if isinstance(task, str) else task
    outcomes = []
    for visits in visits_of_patients:
        labels, excluded = spec.label(records(patient(1, visits, **fields)))
        outcomes += labels["boolean_value"].to_pylist() or [reason for reason, count in excluded.items() if count]
    return outcomes


def by_time(task, *visits, **fields):
    """{day of prediction: label} of one patient."""
    labels, _ = (get_task(task) if isinstance(task, str) else task).label(records(patient(1, list(visits), **fields)))
    days = [round((time - day(0)).total_seconds() / 86400, 8) for time in labels["prediction_time"].to_pylist()]
    return dict(zip(days, labels["boolean_value"].to_pylist(), strict=True))


@pytest.mark.parametrize("name", list(TASKS))
def test_every_named_task_survives_yaml(name):
    assert TaskSpec.from_yaml(TASKS[name].to_yaml()) == TASKS[name]


def test_an_unknown_name_is_answered_with_the_names():
    with pytest.raises(ValueError, match=r"prolonged_stay, .*readmission_30d, .*, got 'readmision'"):
        get_task("readmision")


class TestProlongedStay:
    @pytest.mark.parametrize(("days", "label"), [(0, False), (7, False), (7.001, True), (8, True)])
    def test_only_more_than_seven_days_are_prolonged(self, days, label):
        assert ask("prolonged_stay", [visit(10, 10 + days)]) == [label]

    def test_one_long_stay_anywhere_in_the_history_is_enough(self):
        later = [visit(20), visit(30, 31, kind="outpatient")]
        assert by_time("prolonged_stay", visit(0, 9), *later) == {31: True}
        assert by_time("prolonged_stay", visit(0, 6), *later) == {31: False}

    def test_outpatient_visits_alone_are_labelled_and_patients_without_visits_are_not(self):
        table = records(patient(1, [visit(3, kind="outpatient")]), patient(2, []))
        labels, _ = get_task("prolonged_stay").label(table)
        assert labels["subject_id"].to_pylist() == [1]
        assert labels["boolean_value"].to_pylist() == [False]

    def test_the_prediction_time_is_the_latest_end_even_if_another_visit_began_later(self):
        assert by_time("prolonged_stay", visit(0, 20), visit(5, 6)) == {20: True}


class TestProlongedStayAtAdmission:
    def test_the_stay_is_asked_at_2359_of_the_admission_day(self):
        assert by_time("prolonged_stay_at_admission", visit(2.5, 12), visit(20.25, 24)) == {
            round(2 + 1439 / 1440, 8): True,
            round(20 + 1439 / 1440, 8): False,
        }

    def test_an_admission_in_the_last_minute_of_a_day_is_asked_at_once_and_never_before_it(self):
        minute = 1439.5 / 1440
        assert list(by_time("prolonged_stay_at_admission", visit(minute, 9))) == pytest.approx([minute])

    def test_this_stay_is_asked_about_and_not_an_earlier_or_later_one(self):
        assert list(by_time("prolonged_stay_at_admission", visit(0, 10), visit(20, 23), visit(30, 39)).values()) == [
            True, False, True,
        ]  # fmt: skip

    @pytest.mark.parametrize(("days", "label"), [(7, False), (8, True)])
    def test_seven_days_are_not_prolonged_and_eight_are(self, days, label):
        assert ask("prolonged_stay_at_admission", [visit(3, 3 + days)]) == [label]

    def test_a_stay_that_is_over_by_then_is_excluded(self):
        assert ask("prolonged_stay_at_admission", [visit(3, 3.5)]) == ["stay_already_over"]
        assert ask("prolonged_stay_at_48h", [visit(3, 4.5)]) == ["stay_already_over"]
        assert ask("prolonged_stay_at_48h", [visit(3, 5.5)]) == [False]

    def test_a_stay_without_an_end_and_an_outpatient_visit_get_no_label(self):
        assert ask("prolonged_stay_at_admission", [visit(3, 9) | {"end": None}]) == ["end_of_stay_unknown"]
        assert ask("prolonged_stay_at_admission", [visit(3, 9, kind="outpatient")]) == []


def diabetic(start, *more, **fields):
    return visit(start, start + 1, diagnoses=["ICD10CM/E11.9", *more], medications=["ATC/A10BA02"], **fields)


def failing(start, code="ICD10CM/I50.9", drugs=("ATC/C03CA01",)):
    return visit(start, start + 2, diagnoses=[code, "ICD10CM/E11.9"], medications=list(drugs))


DHF = "diabetes_heart_failure"
MED_BERT_HEART_FAILURE = [
    *(
        f"ICD9CM/{c}"
        for c in [
            "428.9",
            "404.03",
            "404.13",
            "402.11",
            "404.11",
            "402.01",
            "404.01",
            "402.91",
            "398.91",
            "404.93",
            "404.91",
        ]
    ),
    *(f"ICD10CM/{c}" for c in ["I50.9", "I11.0", "I09.81", "I13.2", "I97.13", "I97.131", "I13.0", "I97.130"]),
]
"""As the paper lists them, one child for each star."""


class TestDiabetesHeartFailure:
    def test_a_case_is_asked_just_before_its_first_heart_failure_encounter(self):
        table = records(patient(1, [diabetic(0), diabetic(50), failing(100), failing(200)]))
        labels, _ = get_task(DHF).label(table)
        assert labels["boolean_value"].to_pylist() == [True]
        before = day(100) - labels["prediction_time"].to_pylist()[0]
        assert before.total_seconds() == pytest.approx(1e-6)

    def test_a_control_is_asked_just_before_its_last_encounter(self):
        assert by_time(DHF, diabetic(0), diabetic(50), visit(80)) == {80: False}

    @pytest.mark.parametrize("code", MED_BERT_HEART_FAILURE)
    def test_every_listed_code_makes_a_case(self, code):
        assert ask(DHF, [diabetic(0), diabetic(5), failing(100, code), failing(200)]) == [True]

    @pytest.mark.parametrize("code", ["ICD9CM/428", "ICD9CM/428.0", "ICD9CM/428.43", "ICD10CM/I50", "ICD10CM/I50.23"])
    def test_a_starred_code_takes_its_descendants(self, code):
        assert ask(DHF, [diabetic(0), diabetic(5), failing(100, code), failing(200)]) == [True]

    @pytest.mark.parametrize(
        "code", ["ICD9CM/404.02", "ICD9CM/404.00", "ICD10CM/I97.1", "ICD10CM/I97.190", "ICD10CM/I11.9", "ICD9CM/I50.9"]
    )
    def test_a_neighbouring_code_makes_no_case(self, code):
        assert ask(DHF, [diabetic(0), diabetic(5), failing(100, code), failing(200, code)]) == [False]

    @pytest.mark.parametrize(("days", "outcome"), [(29, "heart_failure_within_30_days"), (30, True), (31, True)])
    def test_heart_failure_must_follow_the_first_type_2_code_by_thirty_days(self, days, outcome):
        assert ask(DHF, [diabetic(10), failing(10 + days), failing(300)]) == [outcome]

    def test_one_heart_failure_encounter_is_excluded_and_not_a_control(self):
        assert ask(DHF, [diabetic(0), diabetic(5), failing(100), visit(400)]) == ["one_heart_failure_encounter"]

    def test_two_codes_in_one_encounter_are_one_encounter(self):
        once = visit(100, diagnoses=["ICD10CM/I50.9", "ICD10CM/I11.0"], medications=["ATC/C03CA01"])
        assert ask(DHF, [diabetic(0), diabetic(5), once, visit(400)]) == ["one_heart_failure_encounter"]

    def test_heart_failure_needs_a_diuretic_a_high_bnp_or_a_procedure(self):
        def outcome(**evidence):
            bare = [diabetic(0), diabetic(5), failing(100, drugs=()), failing(200, drugs=()) | evidence]
            witness = patient(9, [visit(0, medications=["ATC/C03CA01"])])  # the data do hold diuretics
            labels, excluded = get_task(DHF).label(records(patient(1, bare), witness))
            return labels["boolean_value"].to_pylist() or excluded["heart_failure_unconfirmed"]

        def bnp(value):
            measurements = [{"hour": 3.0, "name": "LOINC/30934-9", "value": value, "text": None}]
            return [{"stay_id": 1, "start": day(200), "end": day(201), "measurements": measurements}]

        assert outcome() == 1
        assert outcome(medications=["ATC/C03CA01"], medications_at=[day(202)]) == [True]
        assert outcome(procedures=["ICD9Proc/39.95"], procedures_at=[day(202)]) == [True]
        assert outcome(stays=bnp(100.0)) == [True]
        assert outcome(stays=bnp(99.0)) == 1

    def test_diabetes_needs_an_agent_or_a_high_a1c_where_the_data_have_them(self):
        def outcome(agent, witness=("ATC/A10BA02",)):
            visits = [visit(d, diagnoses=["ICD10CM/E11.9"], medications=list(agent)) for d in (0, 5, 50)]
            table = records(patient(1, visits), patient(9, [visit(0, medications=list(witness))]))
            labels, excluded = get_task(DHF).label(table)
            return labels["boolean_value"].to_pylist() or excluded["diabetes_unconfirmed"]

        assert outcome(agent=()) == 1
        assert outcome(agent=("ATC/A10BA02",)) == [False]
        assert outcome(agent=("Drug/Metformin_XR_500mg",)) == [False], "ingredients are found in names"
        assert outcome(agent=(), witness=("NDC/0001",)) == [False], "no ATC codes, no names: not applied"

    def test_an_unapplied_confirmation_is_reported(self):
        spec = get_task(DHF)
        present = spec.confirming_data(records(patient(1, [visit(0, medications=["ATC/N02BE01"])])))
        assert present == {"antidiabetic_agent", "diuretic"}
        assert any("without bnp_high, heart_failure_procedure" in note for note in spec.warnings(present))
        assert any("`diabetes_confirmed` was not confirmed" in note for note in spec.warnings(frozenset()))
        assert any("index-leak (L9)" in note for note in spec.warnings(present))

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("ICD9CM/253.5", "diabetes_insipidus"),
            ("ICD10CM/O24.410", "gestational_diabetes"),
            ("ICD9CM/249.00", "secondary_diabetes"),
            ("ICD10CM/E09.9", "secondary_diabetes"),
            ("ICD10CM/P70.2", "neonatal_diabetes"),
            ("ICD10CM/E10.9", "type_1_diabetes"),
            ("ICD9CM/250.01", "type_1_diabetes"),
            ("ICD9CM/250.43", "type_1_diabetes"),
        ],
    )
    def test_other_kinds_of_diabetes_anywhere_exclude(self, code, reason):
        assert ask(DHF, [diabetic(0), diabetic(5), visit(50, diagnoses=[code]), failing(100), failing(200)]) == [
            reason
        ]

    @pytest.mark.parametrize("code", ["ICD9CM/250.00", "ICD9CM/250.42", "ICD9CM/648.01", "ICD10CM/E16.2"])
    def test_type_2_and_unrelated_codes_do_not_exclude(self, code):
        assert ask(DHF, [diabetic(0), diabetic(5), visit(50, diagnoses=[code]), visit(60)]) == [False]

    def test_no_or_one_diabetes_encounter_excludes(self):
        assert ask(DHF, [visit(0), visit(5)], [diabetic(0), visit(5)]) == ["no_diabetes", "one_diabetes_encounter"]

    @pytest.mark.parametrize(("age", "outcome"), [(17.99, "below_18_at_first_diabetes"), (18, False)])
    def test_the_first_diabetes_must_not_come_before_eighteen(self, age, outcome):
        born = day(0).replace(year=day(0).year - 18) if age == 18 else day(-age * 365.25)
        assert ask(DHF, [diabetic(0), diabetic(50), visit(900)], birth_time=born) == [outcome]

    def test_an_unknown_birth_is_a_reason_of_its_own(self):
        assert ask(DHF, [diabetic(0), diabetic(50)], birth_time=None) == ["birth_unknown"]

    def test_a_death_before_the_index_excludes(self):
        visits = [diabetic(0), diabetic(5), failing(100), failing(200)]
        assert ask(DHF, visits, death_time=day(90)) == ["died_before_index"]
        assert ask(DHF, visits, death_time=day(210)) == [True]


class TestDiabetesHeartFailureProspective:
    task = "diabetes_heart_failure_prospective"

    def test_each_encounter_thirty_days_after_known_diabetes_is_asked_until_the_failure(self):
        visits = [diabetic(0), diabetic(30), diabetic(40), visit(100), failing(300), visit(800)]
        # Diabetes is known at the end of the first visit, day 1; the visit of day 30 ends on day 31.
        assert by_time(self.task, *visits) == {31: True, 41: True, 100: True}

    def test_nobody_is_labelled_negative_without_a_year_of_follow_up(self):
        assert by_time(self.task, diabetic(0), visit(40), visit(300)) == {}
        assert by_time(self.task, diabetic(0), visit(40), visit(406)) == {40: False}

    def test_diabetes_confirmed_only_later_does_not_make_a_candidate(self):
        plain = [visit(d, diagnoses=["ICD10CM/E11.9"]) for d in (0, 40, 80)]
        treated = diabetic(120)
        assert by_time(self.task, *plain, treated, visit(130), visit(160), visit(900)) == {160: False}

    def test_diabetes_of_a_stay_still_in_progress_is_not_known_yet(self):
        long_stay = visit(0, 100, diagnoses=["ICD10CM/E11.9"], medications=["ATC/A10BA02"])
        assert by_time(self.task, long_stay, visit(60), visit(140), visit(900)) == {140: False}

    def test_a_death_within_the_year_competes(self):
        visits = [diabetic(0), visit(40), visit(60)]
        _, excluded = get_task(self.task).label(records(patient(1, visits, death_time=day(200))))
        assert excluded["died_without_outcome"] == 2


PACA = "pancreatic_cancer"


def turning(age, at=1000):
    """Birth of a patient who completes `age` years on day `at`."""
    return day(at).replace(year=day(at).year - age)


class TestPancreaticCancer:
    @pytest.mark.parametrize("code", ["ICD9CM/157", "ICD9CM/157.9", "ICD10CM/C25", "ICD10CM/C25.0"])
    def test_a_first_pancreatic_cancer_makes_a_case(self, code):
        assert by_time(PACA, visit(0), visit(100, diagnoses=[code]), visit(200)) == {100: True}

    def test_a_control_is_asked_before_its_last_encounter(self):
        assert by_time(PACA, visit(0), visit(100), visit(200)) == {200: False}

    @pytest.mark.parametrize(("born", "outcome"), [(turning(45), True), (turning(45, at=1001), "below_45")])
    def test_cases_are_at_least_45_at_the_index(self, born, outcome):
        assert ask(PACA, [visit(0), visit(1000, diagnoses=["ICD10CM/C25.9"])], birth_time=born) == [outcome]

    def test_controls_are_at_least_45_at_the_index(self):
        assert ask(PACA, [visit(0), visit(1000)], birth_time=turning(45)) == [False]
        assert ask(PACA, [visit(0), visit(1000)], birth_time=turning(45, at=1001)) == ["below_45"]

    @pytest.mark.parametrize(
        "code", ["ICD9CM/174.9", "ICD9CM/205.00", "ICD9CM/140.0", "ICD10CM/C50.911", "ICD10CM/C78.7"]
    )
    def test_another_cancer_before_excludes(self, code):
        visits = [visit(0), visit(50, diagnoses=[code]), visit(100, diagnoses=["ICD10CM/C25.9"])]
        assert ask(PACA, visits) == ["cancer_before"]

    @pytest.mark.parametrize("code", ["ICD9CM/211.6", "ICD10CM/D13.6", "ICD9CM/139.8", "ICD9CM/210.0"])
    def test_a_benign_tumour_before_does_not(self, code):
        assert ask(PACA, [visit(50, diagnoses=[code]), visit(100, diagnoses=["ICD10CM/C25.9"])]) == [True]

    def test_a_metastasis_coded_with_the_first_pancreatic_cancer_does_not_exclude(self):
        assert ask(PACA, [visit(0), visit(100, diagnoses=["ICD10CM/C25.9", "ICD10CM/C78.7"])]) == [True]

    def test_a_patient_without_earlier_encounters_has_nothing_to_predict_from(self):
        assert ask(PACA, [visit(100, diagnoses=["ICD10CM/C25.9"]), visit(200)]) == ["no_history"]

    def test_the_prospective_form_asks_at_each_discharge_until_the_cancer(self):
        visits = [
            visit(0, 2),
            visit(50, 55, kind="outpatient"),
            visit(300, 303, diagnoses=["ICD10CM/C25.9"]),
            visit(900),
        ]
        assert by_time("pancreatic_cancer_prospective", *visits) == {2: True}
        assert by_time("pancreatic_cancer_prospective", visit(0, 2), visit(900)) == {2: False}


READMISSION = "readmission_30d"


class TestReadmission:
    @pytest.mark.parametrize(("gap", "label"), [(20, True), (30, True), (30.01, False), (31, False)])
    def test_an_admission_within_thirty_days_of_the_discharge_counts(self, gap, label):
        assert by_time(READMISSION, visit(0, 5), visit(5 + gap, 40), visit(FAR))[5] is label

    def test_the_interval_runs_from_the_discharge_not_from_the_admission(self):
        assert by_time(READMISSION, visit(0, 25), visit(54, 56), visit(FAR))[25] is True

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"discharged_to": "died"}, "died_in_hospital"),
            ({"discharged_to": "against_advice"}, "left_against_advice"),
            ({"discharged_to": "transfer"}, "transferred"),
        ],
    )
    def test_discharges_that_cannot_be_readmitted_are_excluded(self, fields, reason):
        spec = get_task(READMISSION)
        labels, excluded = spec.label(records(patient(1, [visit(0, 5, **fields), visit(10, 12), visit(FAR)])))
        assert excluded[reason] == 1
        assert day(5) not in labels["prediction_time"].to_pylist()

    def test_a_recorded_death_by_the_discharge_excludes_even_without_a_disposition(self):
        assert ask(READMISSION, [visit(0, 5)], death_time=day(5)) == ["dead_by_discharge"]

    @pytest.mark.parametrize("start", [5.5, 5.75, 5.999])
    def test_a_readmission_on_the_day_of_discharge_excludes(self, start):
        _, excluded = get_task(READMISSION).label(records(patient(1, [visit(0, 5.5), visit(start, 20), visit(FAR)])))
        assert excluded["same_day_readmission"] == 1

    def test_a_readmission_on_the_next_day_counts(self):
        assert by_time(READMISSION, visit(0, 5.5), visit(6, 20), visit(FAR))[5.5] is True

    def test_a_stay_of_no_length_is_not_its_own_readmission(self):
        assert by_time(READMISSION, visit(5, 5), visit(FAR)) == {5: False}

    @pytest.mark.parametrize(("planned", "label"), [(True, False), (False, True), (None, True)])
    def test_a_planned_admission_does_not_count_and_an_unknown_one_does(self, planned, label):
        assert by_time(READMISSION, visit(0, 5), visit(10, 12, planned=planned), visit(FAR))[5] is label

    @pytest.mark.parametrize("kind", ["outpatient", "emergency"])
    def test_other_visits_are_no_readmission_but_they_are_follow_up(self, kind):
        assert by_time(READMISSION, visit(0, 5), visit(10, kind=kind), visit(36, kind=kind)) == {5: False}

    def test_a_death_within_thirty_days_competes_unless_readmitted_first(self):
        alone, readmitted = [visit(0, 5)], [visit(0, 5), visit(10, 12)]
        assert ask(READMISSION, alone, death_time=day(20)) == ["died_without_outcome"]
        assert by_time(READMISSION, *readmitted, death_time=day(20)) == {5: True}

    def test_a_death_counts_in_the_composite_form(self):
        composite = replace(get_task(READMISSION), censoring=Censoring(death="composite", follow_up=True))
        assert ask(composite, [visit(0, 5)], death_time=day(20)) == [True]
        assert ask(composite, [visit(0, 5)], death_time=day(36)) == [False]

    def test_who_is_not_followed_for_thirty_days_is_excluded_unless_readmitted(self):
        assert ask(READMISSION, [visit(0, 5)]) == ["not_followed_up"]
        assert ask(READMISSION, [visit(0, 5), visit(35, kind="outpatient")]) == ["not_followed_up"]
        assert by_time(READMISSION, visit(0, 5), visit(20, 21)) == {5: True}
        assert ask(READMISSION, [visit(0, 5)], death_time=day(36)) == [False], "a later death is follow-up too"
        careless = replace(get_task(READMISSION), censoring=Censoring(death="exclude"))
        assert ask(careless, [visit(0, 5)]) == [False]

    def test_candidates_are_the_labels_and_the_excluded(self):
        table = records(
            patient(1, [visit(0, 5), visit(10, 12), visit(FAR)]),
            patient(2, [visit(0, 5, discharged_to="died")], death_time=day(5)),
            patient(3, [visit(0, 5, kind="outpatient")]),
        )
        labels, excluded = get_task(READMISSION).label(table)
        assert labels.num_rows + sum(excluded.values()) == 4
        assert excluded["died_in_hospital"] == 1, "only the first broken rule counts"
        assert excluded["dead_by_discharge"] == 0


def test_labels_of_many_patients_equal_those_of_each_alone():
    rng = np.random.default_rng(0)
    codes = ["ICD10CM/E11.9", "ICD10CM/I50.9", "ICD10CM/C25.9", "ICD10CM/J44.9", "ICD10CM/R41.3"]
    patients = []
    for number in range(40):
        starts = np.sort(rng.integers(0, 900, rng.integers(0, 9)))
        visits = []
        for s in starts:
            end = int(s) + int(rng.integers(0, 12))
            item = {"hour": float(rng.integers(1, 90)), "name": "MIMIC_ITEM/225792", "value": 1.0, "text": None}
            rate = {"hour": 0.5, "name": "MIMIC_ITEM/220045", "value": 80.0, "text": None}
            stay = {"stay_id": int(s), "start": day(int(s)), "end": day(end), "measurements": [rate, item]}
            visits.append(
                visit(int(s), end, diagnoses=list(rng.choice(codes, 2, replace=False)), stays=[stay],
                      medications=["ATC/A10BA02", "ATC/C03CA01"], kind=str(rng.choice(["inpatient", "outpatient"])))
            )  # fmt: skip
        patients.append(patient(number, visits, death_time=day(950) if number % 5 == 0 else None))
    for spec in TASKS.values():
        present = frozenset(("a1c_high", "antidiabetic_agent", "diuretic", "bnp_high", "heart_failure_procedure"))
        together, excluded = spec.label(records(*patients), present=present)
        alone = [spec.label(records(one), present=present) for one in patients]
        assert together.equals(pa.concat_tables(labels for labels, _ in alone).combine_chunks()), spec.name
        assert excluded == {reason: sum(part[reason] for _, part in alone) for reason in excluded}
        assert together.num_rows > 0, spec.name

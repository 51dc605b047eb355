"""Intensive care stays with the label, or the reason to be left out, that hours, gap and horizon give them."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.schema import DatasetInfo, shard_name
from hf_ehr.tasks import Matching, TaskSpec, get_task, label_dataset, read_labels
from hf_ehr.tasks.matching import match_controls
from tests.builders import day, patient, records, visit

PULSE = (2.0, "MIMIC_ITEM/220045")
VENTILATION, VASOPRESSOR = "MIMIC_ITEM/225792", "MIMIC_ITEM/221906"


def stay(start: float, end: float | None, *events: tuple[float, str], stay_id: int = 1) -> dict:
    """A stay from day to day; events are (hour since its start, code)."""
    rows = [{"hour": hour, "name": name, "value": 1.0, "text": None} for hour, name in sorted(events)]
    end = None if end is None else day(end)
    return {"stay_id": stay_id, "start": day(start), "end": end, "measurements": rows}


def ask(task, *visits, **fields):
    """{hours after day 0 of the prediction: label} and the reasons for exclusion of one patient."""
    labels, excluded = get_task(task).label(records(patient(1, list(visits), **fields)))
    hours = [(time - day(0)) / timedelta(hours=1) for time in labels["prediction_time"].to_pylist()]
    found = dict(zip(hours, labels["boolean_value"].to_pylist(), strict=True))
    return found, [reason for reason, count in excluded.items() if count]


def icu(*events, end: float | None = 6, **fields):
    """A visit of ten days with one stay from its day 1 on."""
    return visit(0, 10, stays=[stay(1, end, *events)], **fields)


class TestMortality:
    def test_death_later_in_the_visit_is_asked_48_hours_into_the_stay(self):
        assert ask("icu_mortality_t48", icu(discharged_to="died"), death_time=day(10)) == ({72: True}, [])
        assert ask("icu_mortality_t48", icu()) == ({72: False}, [])
        assert ask("icu_mortality_t24", icu()) == ({48: False}, [])

    def test_stays_that_are_over_are_not_asked(self):
        assert ask("icu_mortality_t48", icu(end=3)) == ({}, ["left_within_48h"])
        assert ask("icu_mortality_t48", icu(end=3.01)) == ({72: False}, [])

    def test_a_stay_whose_end_nobody_wrote_down_is_asked(self):
        assert ask("icu_mortality_t48", icu(end=None)) == ({72: False}, [])

    def test_who_died_or_is_a_child_is_not_asked(self):
        died = visit(0, 2.5, stays=[stay(1, None)], discharged_to="died")
        assert ask("icu_mortality_t48", died, death_time=day(2.5)) == ({}, ["dead_by_then"])
        assert ask("icu_mortality_t48", icu(), birth_time=day(-17 * 365)) == ({}, ["below_18"])
        assert ask("icu_mortality_t48", icu(), birth_time=None) == ({}, ["birth_unknown"])

    def test_each_stay_of_a_visit_is_asked_and_death_in_a_later_visit_is_none(self):
        two = visit(0, 20, stays=[stay(1, 4), stay(10, 15, stay_id=2)])
        later = visit(30, 31, discharged_to="died")
        assert ask("icu_mortality_t48", two, later, death_time=day(31)) == ({72: False, 288: False}, [])


class TestOnset:
    @pytest.mark.parametrize(
        ("task", "hour", "label"),
        [
            ("arf_onset_after_t12", 12.0, "onset_before"),
            ("arf_onset_after_t12", 12.01, True),
            ("arf_onset_after_t12", 119.0, True),
            ("arf_onset_after_t12_gap6", 12.01, "onset_before"),
            ("arf_onset_after_t12_gap6", 18.0, "onset_before"),
            ("arf_onset_after_t12_gap6", 18.01, True),
            ("arf_onset_after_t12_within24", 36.0, True),
            ("arf_onset_after_t12_within24", 36.01, False),
            ("arf_onset_after_t12_gap6_within24", 42.0, True),
            ("arf_onset_after_t12_gap6_within24", 42.01, False),
            ("arf_onset_after_t12", None, False),
        ],
    )
    def test_hours_gap_and_horizon_decide_the_label(self, task, hour, label):
        events = [PULSE, *([] if hour is None else [(hour, VENTILATION)])]
        found, reasons = ask(task, icu(*events))
        assert (found, reasons) == (({}, [label]) if isinstance(label, str) else ({36: label}, []))

    def test_an_onset_in_the_next_stay_is_not_this_ones(self):
        two = visit(0, 20, stays=[stay(1, 4, PULSE), stay(10, 15, PULSE, (20.0, VENTILATION), stay_id=2)])
        assert ask("arf_onset_after_t12", two) == ({36: False, 252: True}, [])

    def test_vasopressors_are_shock_and_ventilation_is_not(self):
        assert ask("shock_onset_after_t4", icu(PULSE, (20.0, VASOPRESSOR))) == ({28: True}, [])
        assert ask("shock_onset_after_t4", icu(PULSE, (20.0, VENTILATION))) == ({28: False}, [])

    @pytest.mark.parametrize("events", [(), ((2.0, "MIMIC_ITEM/211"),), ((2.0, "MIMIC_ITEM/50868"),)])
    def test_a_stay_where_no_treatment_would_be_written_down_is_no_negative(self, events):
        # Nothing at all, CareVue's heart rate, a laboratory value.
        assert ask("arf_onset_after_t12", icu(*events)) == ({}, ["treatments_not_charted"])
        assert ask("shock_onset_after_t12", icu(*events, (2.0, "CINC2012/HR"))) == ({36: False}, [])

    def test_a_stay_without_an_end_has_no_rest_but_a_horizon(self):
        assert ask("arf_onset_after_t12", icu(PULSE, (20.0, VENTILATION), end=None)) == ({}, ["target_not_bounded"])
        assert ask("arf_onset_after_t12_within24", icu(PULSE, (20.0, VENTILATION), end=None)) == ({36: True}, [])


class TestSepsis:
    """Stays of five days from hour 24 on, in a visit with an onset so many hours after the stay's start."""

    @staticmethod
    def septic(hour, **fields):
        return icu(diagnoses=["CINC2019/Sepsis"], diagnoses_at=[day(1 + hour / 24)], **fields)

    @pytest.mark.parametrize(
        ("task", "hour", "label"),
        [
            ("sepsis_onset_after_t12", 12.0, "onset_before"),
            ("sepsis_onset_after_t12", 12.01, True),
            ("sepsis_onset_after_t12_gap6", 18.0, "onset_before"),
            ("sepsis_onset_after_t12_gap6", 18.01, True),
            ("sepsis_onset_after_t12_within24", 36.0, True),
            ("sepsis_onset_after_t12_within24", 36.01, False),
            ("sepsis_onset_after_t12", 125.0, True),  # the record may end before the onset that it warns of
        ],
    )
    def test_the_hour_of_the_onset_decides_the_label(self, task, hour, label):
        assert ask(task, self.septic(hour)) == (({}, [label]) if isinstance(label, str) else ({36: label}, []))

    def test_who_has_no_onset_is_a_negative_and_billed_sepsis_is_no_onset(self):
        assert ask("sepsis_onset_after_t12", icu()) == ({36: False}, [])
        billed = icu(diagnoses=["ICD10CM/A41.9"], diagnoses_at=[day(3)])
        assert ask("sepsis_onset_after_t12", billed) == ({36: False}, [])

    def test_a_stay_of_unknown_end_or_that_is_over_is_not_asked(self):
        assert ask("sepsis_onset_after_t12", self.septic(30, end=None)) == ({}, ["end_of_stay_unknown"])
        assert ask("sepsis_onset_after_t24", self.septic(30, end=2)) == ({}, ["left_within_24h"])


@pytest.mark.parametrize("name", ["icu_mortality_t48_gap6", "arf_onset_after_t", "icu_mortality_48"])
def test_names_that_spell_no_task_are_answered_with_an_example(name):
    with pytest.raises(ValueError, match="arf_onset_after_t4_gap2_within24"):
        get_task(name)


def test_spelled_tasks_survive_yaml():
    for name in ("shock_onset_after_t4_gap2_within24", "sepsis_onset_after_t6_within6", "copd_six_months_ahead"):
        task = get_task(name)
        assert task.name == name
        assert TaskSpec.from_yaml(task.to_yaml()) == task


class TestSixMonthsAhead:
    def test_cases_and_controls_lose_the_same_half_year(self):
        early = [visit(0), visit(100), visit(310)]
        case = visit(400, diagnoses=["ICD10CM/J44.9"])
        assert ask("copd_six_months_ahead", *early, case) == ({(400 - 180) * 24: True}, [])
        assert ask("copd_six_months_ahead", *early, visit(400)) == ({(400 - 180) * 24: False}, [])

    def test_who_has_no_history_by_then_is_left_out(self):
        case = visit(100, diagnoses=["ICD9CM/496"])
        assert ask("copd_six_months_ahead", visit(0), case) == ({}, ["no_history"])


def labelled(cases: int, controls: int, *, sex="F", years: float = 60, first: int = 0):
    """LABELS and people of one group."""
    ids = np.arange(first, first + cases + controls)
    labels = pa.table(
        {
            "subject_id": ids,
            "prediction_time": pa.array([day(0)] * len(ids), pa.timestamp("us")),
            "boolean_value": np.arange(len(ids)) < cases,
        }
    )
    birth = pa.array([day(-years * 365.25)] * len(ids), pa.timestamp("us"))
    races = pa.nulls(len(ids), pa.string())
    people = pa.table({"subject_id": ids, "birth_time": birth, "sex": pa.array([sex] * len(ids)), "race": races})
    return labels, people


class TestMatching:
    def test_each_case_gets_three_controls_of_its_group(self):
        groups = [labelled(5, 40), labelled(2, 4, sex="M", first=100), labelled(1, 0, years=80, first=200)]
        labels, people = (pa.concat_tables(tables) for tables in zip(*groups, strict=True))
        kept, left_out = match_controls(labels, people, Matching())
        ids, cases = kept["subject_id"].to_numpy(), kept["boolean_value"].to_numpy(zero_copy_only=False)
        women = ids < 100
        assert (cases[women].sum(), (~cases[women]).sum()) == (5, 15)
        assert (cases[~women].sum(), (~cases[~women]).sum()) == (2, 4)
        assert left_out == {"case_without_control": 1, "control_not_drawn": 25}

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.integers(0, 5))
    def test_the_draw_depends_on_the_patients_and_the_seed_alone(self, shuffle, seed):
        labels, people = labelled(3, 30)
        order = np.random.default_rng(shuffle).permutation(33)
        one, _ = match_controls(labels, people, Matching(ratio=2), seed=seed)
        other, _ = match_controls(labels.take(order), people.take(order[::-1]), Matching(ratio=2), seed=seed)
        assert sorted(one["subject_id"].to_pylist()) == sorted(other["subject_id"].to_pylist())
        assert one.num_rows == 3 + 6

    def test_controls_are_drawn_from_all_shards_and_counted(self, tmp_path):
        import pyarrow.parquet as pq

        def person(number, sick, sex):
            last = visit(400, diagnoses=["ICD9CM/496"] if sick else [])
            return patient(number, [visit(0), last], sex=sex)

        (tmp_path / "records").mkdir()
        first = records(*[person(n, sick=True, sex="F") for n in (2, 4)], person(6, sick=True, sex="M"))
        second = records(*[person(n, sick=False, sex="F") for n in range(1, 21, 2)])
        for index, table in enumerate((first, second)):
            pq.write_table(table, tmp_path / "records" / shard_name(index, 2))
        DatasetInfo("made", {}, 2, "calendar").save(tmp_path)
        labels = read_labels(label_dataset("copd_six_months_ahead", tmp_path, progress=False))
        assert labels["subject_id"].to_pylist()[:2] == [2, 4]
        assert sum(labels["boolean_value"].to_pylist()) == 2
        assert labels.num_rows == 2 + 6
        report = (tmp_path / "labels" / "copd_six_months_ahead.json").read_text()
        assert '"case_without_control": 1' in report
        assert '"control_not_drawn": 4' in report

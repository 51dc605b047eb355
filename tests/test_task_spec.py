"""The task language: patterns, windows, counts, what a definition may not say, and labelling a prepared folder."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, shard_name, write_parquet
from hf_ehr.tasks import Outcome, Predicate, Rule, TaskSpec, Window, get_task, label_dataset, read_labels
from hf_ehr.tasks.events import DAY, HOUR, MISSING, History, Timeline, birthday, micros, predicate_events
from hf_ehr.tasks.windows import parse_bound, parse_duration, resolve_windows
from tests.builders import day, patient, records, visit


def simple(**changes):
    """Death within 10 days of a discharge."""
    spec = TaskSpec(
        name="death_10d",
        description="For tests.",
        predicates={"discharge": Predicate(kind="discharge"), "death": Predicate(kind="death")},
        trigger="discharge",
        windows={
            "input": Window(None, "trigger"),
            "target": Window("input.end", "start + 10d", start_inclusive=False),
        },
        outcome=Outcome("target", "death"),
    )
    return replace(spec, **changes)


def moments(predicate, *visits, others=None, **fields):
    """Days at which `predicate` holds for one patient."""
    predicates = {**(others or {}), "it": predicate}
    present = frozenset(predicate.confirmed_by)
    events = predicate_events(History(records(patient(1, list(visits), **fields))), predicates, present)["it"]
    return [float((np.datetime64(int(t), "us") - np.datetime64(day(0))) / np.timedelta64(1, "D")) for t in events.time]


class TestPredicates:
    @pytest.mark.parametrize(
        ("pattern", "hits"),
        [
            ("ICD9CM/404.03", ["ICD9CM/404.03"]),
            ("ICD9CM/250.?1", ["ICD9CM/250.01", "ICD9CM/250.91"]),
            ("ICD10CM/I50*", ["ICD10CM/I50", "ICD10CM/I50.9"]),
            ("icd10cm/i50.9", ["ICD10CM/I50.9"]),
            ("ICD9CM/40[45].0*", ["ICD9CM/404.03", "ICD9CM/405.01"]),
            ("*/I50*", ["ICD10CM/I50", "ICD10CM/I50.9"]),
            ("^ICD9CM/4", ["ICD9CM/404.03", "ICD9CM/405.01"]),
        ],
    )
    def test_a_pattern_describes_whole_codes(self, pattern, hits):
        codes = [
            "ICD9CM/404.03",
            "ICD9CM/4041031",
            "ICD9CM/405.01",
            "ICD9CM/250.01",
            "ICD9CM/250.91",
            "ICD9CM/250.011",
        ]
        codes += ["ICD10CM/I50", "ICD10CM/I50.9", "ICD10CM/AI50"]
        visits = [visit(number, diagnoses=[code]) for number, code in enumerate(codes)]
        found = [codes[int(d)] for d in moments(Predicate(codes=(pattern,)), *visits)]
        assert [code for code in found if code != "ICD9CM/4041031"] == hits
        assert ("ICD9CM/4041031" in found) == (pattern == "^ICD9CM/4"), "a dot is a dot"

    def test_a_kind_narrows_codes_and_exceptions_are_left_out(self):
        visits = [visit(1, diagnoses=["A/1", "A/2"]), visit(2, procedures=["A/1"]), visit(3, diagnoses=["A/3"])]
        assert moments(Predicate(codes=("A/*",)), *visits) == [1, 2, 3]
        assert moments(Predicate(kind="diagnosis", codes=("A/*",)), *visits) == [1, 3]
        assert moments(Predicate(codes=("A/*",), except_codes=("A/1", "A/2")), *visits) == [3]
        assert moments(Predicate(kind="procedure"), *visits) == [2]

    def test_principal_is_the_first_code_of_the_visit(self):
        visits = [visit(1, diagnoses=["A/1", "A/2"]), visit(2, diagnoses=["A/2"]), visit(3, diagnoses=["A/1", "A/2"])]
        assert moments(Predicate(kind="diagnosis", codes=("A/2",), principal=True), *visits) == [2]

    def test_several_codes_of_one_visit_are_one_moment(self):
        assert moments(Predicate(codes=("A/*",)), visit(1, diagnoses=["A/1", "A/2"], procedures=["A/3"])) == [1]

    def test_a_measurement_has_its_own_time_and_value(self):
        rows = [
            {"hour": h, "name": "LOINC/4548-4", "value": v, "text": None} for h, v in ((0, 6.4), (12, 6.5), (36, 9))
        ]
        stay = visit(1, 9, stays=[{"stay_id": 1, "start": day(2), "end": day(9), "measurements": rows}])
        other = visit(20, 22, stays=[])
        a1c = {"kind": "measurement", "codes": ("LOINC/4548-4",)}
        assert moments(Predicate(**a1c), other, stay) == [2, 2.5, 3.5]
        assert moments(Predicate(**a1c, value_min=6.5), stay) == [2.5, 3.5]
        assert moments(Predicate(**a1c, value_min=6.5, value_min_inclusive=False), stay) == [3.5]
        assert moments(Predicate(**a1c, value_min=6, value_max=6.5), stay) == [2, 2.5]

    def test_visits_are_told_apart_by_kind_disposition_planning_and_length(self):
        visits = [
            visit(0, 8, planned=True),
            visit(20, 28.5, kind="emergency", planned=False),
            visit(40, 41, discharged_to="died"),
        ]
        assert moments(Predicate(kind="admission", visit_kinds=("inpatient",)), *visits) == [0, 40]
        assert moments(Predicate(kind="admission", unplanned=True), *visits) == [20, 40]
        assert moments(Predicate(kind="discharge", discharged_to=("died", "hospice")), *visits) == [41]
        assert moments(Predicate(kind="discharge", longer_than_days=8), *visits) == [28.5]
        assert moments(Predicate(kind="any"), visit(3, 4), death_time=day(9), birth_time=day(-1)) == [-1, 3, 4, 9]

    @pytest.mark.parametrize(("needed", "days"), [(1, [10, 20]), (2, [20]), (3, [])])
    def test_k_of_n_confirmations_are_counted_once_per_kind(self, needed, days):
        others = {name: Predicate(codes=(f"E/{name}",)) for name in "abc"}
        visits = [visit(0, medications=["E/a"]), visit(10, diagnoses=["D/1"]), visit(15, medications=["E/a", "E/b"])]
        backed = Predicate(codes=("D/1",), confirmed_by=("a", "b", "c"), at_least=needed, confirmed="so_far")
        assert moments(backed, *visits, visit(20, diagnoses=["D/1"]), others=others) == days

    def test_a_confirmation_counts_ever_so_far_or_in_the_visit(self):
        others = {"a": Predicate(codes=("E/a",))}
        visits = [visit(d, diagnoses=["D/1"], medications=["E/a"] if d == 10 else []) for d in (0, 10, 20)]

        def backed(confirmed):
            predicate = Predicate(codes=("D/1",), confirmed_by=("a",), confirmed=confirmed)
            return moments(predicate, *visits, others=others)

        assert backed("ever") == [0, 10, 20]
        assert backed("so_far") == [10, 20]
        assert backed("visit") == [10]

    def test_so_far_means_known_by_then(self):
        others = {"a": Predicate(codes=("E/a",))}
        late = visit(0, 2, medications=["E/a"], medications_at=[day(30)])
        predicate = Predicate(codes=("D/1",), confirmed_by=("a",), confirmed="so_far")
        assert moments(predicate, late, visit(10, diagnoses=["D/1"]), visit(30, diagnoses=["D/1"]), others=others) == [
            30
        ]

    def test_age_is_counted_in_completed_years_by_the_calendar(self):
        born = np.array([np.datetime64("1956-02-29T12:00", "us").astype(np.int64)])
        assert birthday(born, 64).astype("datetime64[us]")[0] == np.datetime64("2020-02-29T12:00")
        assert birthday(born, 45).astype("datetime64[us]")[0] == np.datetime64("2001-03-01T12:00")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "`kind` must be given"),
            ({"kind": "visit"}, "`kind` must be one of"),
            ({"codes": ("I50",)}, "VOCABULARY/CODE"),
            ({"kind": "admission", "codes": ("A/1",)}, "`codes` must be left out"),
            ({"kind": "admission", "discharged_to": ("home",)}, "`discharged_to` must be left out"),
            ({"kind": "discharge", "discharged_to": ("heaven",)}, "heaven"),
            ({"codes": ("A/1",), "value_min": 3}, "`value_min/value_max` must be left out"),
            ({"kind": "death", "visit_kinds": ("inpatient",)}, "`visit_kinds` must be left out"),
            ({"any_of": ("a",), "visit_kinds": ("inpatient",)}, "`visit_kinds` must be left out"),
            ({"any_of": ("a",), "codes": ("A/1",)}, "`any_of` must be alone"),
            ({"codes": ("A/1",), "confirmed_by": ("a",), "at_least": 2}, "`at_least` must be at most"),
            ({"codes": ("A/1",), "confirmed": "visit"}, "`confirmed` must be left out"),
        ],
    )
    def test_an_option_that_would_be_ignored_or_is_unknown_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            Predicate(**fields)


times = st.lists(st.tuples(st.integers(0, 3), st.integers(-20, 20)), max_size=30)


class TestWindows:
    @given(times, st.integers(0, 3), st.integers(-25, 25), st.integers(-5, 30))
    def test_counting_by_search_equals_counting_by_hand(self, events, group, start, length):
        groups, moments = (np.array([e[i] for e in events], dtype=np.int64) for i in (0, 1))
        timeline, end = Timeline(groups, moments), start + length
        query = [np.array([value]) for value in (group, start, end)]
        inside = [t for g, t in events if g == group and start <= t <= end]
        later = [t for g, t in events if g == group and t >= start]
        earlier = [t for g, t in events if g == group and t <= start]
        assert timeline.count(*query)[0] == len(inside)
        assert timeline.next(*query[:2])[0] == min(later, default=MISSING)
        assert timeline.previous(*query[:2])[0] == max(earlier, default=MISSING)

    @pytest.mark.parametrize(
        ("text", "days"),
        [("30d", 30), ("24h", 1), ("1 day 12 hours", 1.5), ("2 weeks", 14), ("1 day, 30 min", 1 + 1 / 48)],
    )
    def test_durations_are_read_as_aces_reads_them(self, text, days):
        assert parse_duration(text) == days * DAY

    @pytest.mark.parametrize("text", ["30", "d", "30 fortnights", "3d and more", ""])
    def test_anything_else_is_no_duration(self, text):
        with pytest.raises(ValueError, match="duration"):
            parse_duration(text)

    @pytest.mark.parametrize("text", ["trigger * 2", "a.b", "trigger +", "trigger @ noon", "trigger => death"])
    def test_a_bound_that_is_not_of_the_language_is_refused(self, text):
        with pytest.raises(ValueError, match=r"bound must be|duration must be"):
            parse_bound(text)

    def resolve(self, trigger, deaths=(), **windows):
        moments = np.array([round(d * DAY) for d in deaths], dtype=np.int64)
        death = Timeline(np.zeros(len(deaths), np.int64), moments)
        asked = (np.zeros(1, np.int64), np.array([round(trigger * DAY)]))
        spans = resolve_windows(windows, list(windows), *asked, {"death": death})
        return {name: (int(span.first[0]), int(span.last[0])) for name, span in spans.items()}

    def test_bounds_follow_anchors_offsets_and_inclusiveness(self):
        found = self.resolve(
            5,
            input=Window(None, "trigger - 1d", end_inclusive=False),
            gap=Window("input.end", "start + 12h"),
            target=Window("gap.end", "start + 30d", start_inclusive=False),
        )
        assert found["input"][1] == 4 * DAY - 1
        assert found["gap"] == (4 * DAY, 4 * DAY + 12 * HOUR)
        assert found["target"] == (4 * DAY + 12 * HOUR + 1, 34 * DAY + 12 * HOUR)

    def test_a_window_may_be_bounded_by_the_next_or_previous_event(self):
        window = Window("trigger", "start -> death")
        assert self.resolve(5, deaths=[3, 5, 8], w=window)["w"][1] == 5 * DAY
        assert self.resolve(5, deaths=[3, 5, 8], w=replace(window, start_inclusive=False))["w"][1] == 8 * DAY
        assert self.resolve(5, deaths=[3], w=Window("end <- death", "trigger"))["w"][0] == 3 * DAY

    def test_candidates_whose_bounding_event_never_comes_are_excluded(self):
        windows = {
            "input": Window(None, "trigger"),
            "target": Window("trigger", "start -> death", start_inclusive=False),
        }
        labels, excluded = simple(windows=windows).label(records(patient(1, [visit(0, 1)])))
        assert labels.num_rows == 0
        assert excluded == {"target_not_bounded": 1, "trigger_not_yet_known": 0}

    def test_a_window_that_ends_before_it_starts_counts_nothing(self):
        windows = {"input": Window(None, "trigger"), "target": Window("trigger + 9d", "trigger + 2d")}
        labels, _ = simple(windows=windows).label(records(patient(1, [visit(0, 1)], death_time=day(5))))
        assert labels["boolean_value"].to_pylist() == [False]


class TestDefinition:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "a b"}, "`name`"),
            ({"trigger": "birth"}, "`predicate` must be one of"),
            ({"outcome": Outcome("later", "death")}, "`window` must be one of"),
            ({"index": "last"}, "looks into the future"),
            ({"index": "event_or_last", "fallback": "discharge"}, "case_control only"),
            ({"design": "case_control"}, "case_control only"),
            ({"unit": "patient"}, "`unit`"),
            ({"prediction": "target.begin"}, "WINDOW.start"),
            (
                {"rules": (Rule("x", "input", "death", max=0), Rule("x", "input", "discharge", min=1))},
                "different reasons",
            ),
        ],
    )
    def test_contradictions_are_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            simple(**changes)

    @pytest.mark.parametrize("end", ["trigger -> death", "target.end", None])
    def test_a_prospective_input_may_not_be_bounded_by_the_future(self, end):
        windows = {"input": Window(None, end), "target": Window("trigger", "start -> death")}
        with pytest.raises(ValueError, match="must be"):
            simple(windows=windows)

    def test_windows_may_not_go_in_a_circle(self):
        with pytest.raises(ValueError, match="circle"):
            simple(windows={"input": Window(None, "target.start"), "target": Window("input.end", "input.end + 1d")})

    def test_a_target_that_opens_within_the_input_is_refused(self):
        windows = {"input": Window(None, "trigger"), "target": Window("trigger", "start + 10d")}
        with pytest.raises(EhrDataError, match="L4"):
            simple(windows=windows).label(records(patient(1, [visit(0, 1)])))

    def test_a_trigger_that_a_later_confirmation_decides_is_refused(self):
        predicates = {
            "drug": Predicate(codes=("ATC/*",)),
            "discharge": Predicate(kind="discharge", confirmed_by=("drug",)),
            "death": Predicate(kind="death"),
        }
        with pytest.raises(ValueError, match="so_far"):
            simple(predicates=predicates)

    def test_a_trigger_that_is_not_known_at_the_prediction_time_makes_no_label(self):
        predicates = {"discharge": Predicate(codes=("D/1",)), "death": Predicate(kind="death")}
        labels, excluded = simple(predicates=predicates).label(records(patient(1, [visit(0, 5, diagnoses=["D/1"])])))
        assert labels.num_rows == 0
        assert excluded == {"trigger_not_yet_known": 1}

    def test_a_rule_may_ask_by_when_something_was_known(self):
        late = visit(0, 2, diagnoses=["D/1"], diagnoses_at=[day(30)])
        predicates = {**simple().predicates, "code": Predicate(codes=("D/1",))}
        table = records(patient(1, [late, visit(10, 12), visit(40, 42)]))

        def asked(clock):
            spec = simple(predicates=predicates, rules=(Rule("unknown", "input", "code", min=1, clock=clock),))
            return spec.label(table)[0].num_rows

        assert asked("time") == 3
        assert asked("known") == 1

    def test_rules_count_in_the_patient_the_visit_or_the_other_visits(self):
        predicates = {**simple().predicates, "code": Predicate(codes=("D/1",))}
        table = records(patient(1, [visit(0, 2, diagnoses=["D/1"]), visit(10, 12, diagnoses=["D/1"]), visit(20, 22)]))

        def asked(scope):
            spec = simple(predicates=predicates, rules=(Rule("none", "input", "code", min=1, scope=scope),))
            return [(t - day(0)).days for t in spec.label(table)[0]["prediction_time"].to_pylist()]

        assert asked("patient") == [2, 12, 22]
        assert asked("visit") == [2, 12]
        assert asked("other_visits") == [12, 22]

    def test_the_prediction_time_is_the_last_moment_of_the_input(self):
        table = records(patient(1, [visit(0, 1)]))
        target = Window("trigger", "start + 10d", start_inclusive=False)
        ends = {True: 0, False: 1}
        for inclusive, early in ends.items():
            windows = {"input": Window(None, "trigger", end_inclusive=inclusive), "target": target}
            time = micros(simple(windows=windows).label(table)[0]["prediction_time"])[0]
            assert micros(pa.array([day(1)]))[0] - time == early

    def test_yaml_gives_an_equal_task_and_is_read_from_a_file_too(self, tmp_path):
        spec = simple(rules=(Rule("dead", "input", "death", max=0),), expected_prevalence=(0.1, 0.2), leaks=("x",))
        (tmp_path / "task.yaml").write_text(spec.to_yaml())
        assert TaskSpec.from_yaml(spec.to_yaml()) == TaskSpec.from_yaml(tmp_path / "task.yaml") == spec

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda t: t.replace("trigger: discharge", "triger: discharge"), "triger"),
            (lambda t: t.replace("kind: death", "kinds: death"), "kinds"),
            (lambda t: t.replace("name: death_10d\n", ""), "given name"),
            (lambda t: "- a\n- b\n", "a mapping"),
            (lambda t: "a: [\n", "YAML"),
            (lambda t: "no_such_file.yaml", "existing file"),
        ],
    )
    def test_a_wrong_definition_is_refused_with_the_field(self, edit, message):
        with pytest.raises(ValueError, match=message):
            TaskSpec.from_yaml(edit(simple().to_yaml()))


@pytest.fixture
def folder(tmp_path):
    """Two shards: 2 is readmitted and has a note, 1 is followed, 3 dies, 4 is empty."""
    notes = [{"time": day(1), "category": "Nursing", "text": "x"}]
    shards = [
        records(patient(2, [visit(0, 5, notes=notes), visit(10, 12), visit(90)]), patient(4, [])),
        records(patient(1, [visit(0, 5), visit(90)]), patient(3, [visit(0, 5)], death_time=day(20))),
    ]
    for number, shard in enumerate(shards):
        write_parquet(shard, tmp_path / "records" / shard_name(number, 2))
    DatasetInfo(source="test", shards=2).save(tmp_path)
    return tmp_path


class TestLabelDataset:
    def test_the_shards_are_labelled_with_their_cohort_flow(self, folder):
        path = label_dataset("readmission_30d", folder, progress=False)
        labels = read_labels(path)
        assert path == folder / "labels" / "readmission_30d.parquet"
        assert labels.schema.equals(LABEL_SCHEMA)
        assert labels.select(["subject_id", "boolean_value"]).to_pylist() == [
            {"subject_id": 2, "boolean_value": True},
            {"subject_id": 2, "boolean_value": False},
            {"subject_id": 1, "boolean_value": False},
        ]
        flow = json.loads(path.with_suffix(".json").read_text())
        assert (flow["candidates"], flow["labels"], flow["patients"], flow["positives"]) == (6, 3, 2, 1)
        assert flow["excluded"]["died_without_outcome"] == 1
        assert flow["excluded"]["not_followed_up"] == 2
        assert flow["candidates"] == flow["labels"] + sum(flow["excluded"].values())
        assert TaskSpec.from_yaml(flow["definition"]) == get_task("readmission_30d")

    def test_confirming_data_are_looked_for_in_all_shards(self, tmp_path):
        visits = [visit(d, diagnoses=["ICD10CM/E11.9"]) for d in (0, 40, 80)]
        write_parquet(records(patient(0, visits)), tmp_path / "records" / shard_name(0, 2))
        treated = patient(1, [visit(0, medications=["ATC/A10BA02"])])
        write_parquet(records(treated), tmp_path / "records" / shard_name(1, 2))
        DatasetInfo(source="test", shards=2).save(tmp_path)
        path = label_dataset("diabetes_heart_failure", tmp_path, progress=False)
        flow = json.loads(path.with_suffix(".json").read_text())
        assert flow["excluded"]["diabetes_unconfirmed"] == 1
        assert any("a1c_high" in warning for warning in flow["warnings"])
        assert any("index-leak" in warning for warning in flow["warnings"])

    def test_drugs_coded_as_bare_numbers_are_reported(self, tmp_path):
        drugs = ["DRUG/INSULIN", "NDC/00004200278", "NDC/0002-3235", "NDC/1"]
        table = records(patient(0, [visit(0, diagnoses=["ICD10CM/E11.9"], medications=drugs)]))
        write_parquet(table, tmp_path / "records" / shard_name(0, 1))
        DatasetInfo(source="test").save(tmp_path)
        path = label_dataset("diabetes_heart_failure", tmp_path, progress=False)
        warnings = json.loads(path.with_suffix(".json").read_text())["warnings"]
        assert any("`antidiabetic_agent` cannot read 75% of the medication codes" in warning for warning in warnings)
        assert not any("heart_failure_procedure` cannot" in warning for warning in warnings)

    def test_an_unbelievable_prevalence_is_reported(self, folder):
        spec = replace(get_task("readmission_30d"), expected_prevalence=(0.9, 1.0))
        flow = json.loads(label_dataset(spec, folder, progress=False).with_suffix(".json").read_text())
        assert flow["warnings"] == ["The prevalence 0.3333 lies outside the expected 0.9 to 1.0."]

    def test_an_outcome_that_never_holds_is_reported(self, folder):
        dialysis = Predicate(kind="procedure", codes=("ICD9Proc/39.95",))
        spec = simple(predicates=simple().predicates | {"dialysis": dialysis}, outcome=Outcome("target", "dialysis"))
        flow = json.loads(label_dataset(spec, folder, progress=False).with_suffix(".json").read_text())
        (warning,) = flow["warnings"]
        assert warning.startswith("No label is positive: `dialysis` may not be recorded")

    def test_data_without_intervals_are_refused(self, folder):
        DatasetInfo(source="uci", shards=2, time_axis="order").save(folder)
        with pytest.raises(EhrDataError, match=r"intervals are unknown.*label file that came with"):
            label_dataset("readmission_30d", folder, progress=False)

    def test_a_task_of_pure_order_is_not_refused(self, folder):
        DatasetInfo(source="uci", shards=2, time_axis="order").save(folder)
        spec = simple(
            windows={"input": Window(None, "trigger"), "target": Window("trigger", None, start_inclusive=False)}
        )
        assert read_labels(label_dataset(spec, folder, progress=False)).num_rows == 6

    @pytest.mark.parametrize("task", ["readmission_30d", "copd_six_months_ahead", "diabetes_heart_failure"])
    def test_tasks_that_compare_visits_are_refused_where_visits_have_no_dates(self, folder, task):
        DatasetInfo(source="eicu", shards=2, time_axis="visit").save(folder)
        with pytest.raises(EhrDataError, match=rf"`{task}` compares visits.*within a visit only.*icu_mortality_t48"):
            label_dataset(task, folder, progress=False)
        assert not (folder / "labels").exists()

    def test_tasks_of_one_visit_are_asked_where_visits_have_no_dates(self, folder):
        DatasetInfo(source="eicu", shards=2, time_axis="visit").save(folder)
        labels = read_labels(label_dataset("prolonged_stay_at_admission", folder, progress=False))
        assert labels.num_rows > 0

    def test_labels_that_came_with_the_source_have_no_definition(self, folder):
        label_dataset(simple(name="synthetic_outcome"), folder, progress=False)
        with pytest.raises(ValueError, match=r"came with the source.*read_labels"):
            label_dataset("synthetic_outcome", folder, progress=False)
        with pytest.raises(ValueError, match="must be one of prolonged_stay"):
            label_dataset("nothing", folder, progress=False)

    def test_a_trigger_that_never_holds_leaves_no_file_behind(self, folder):
        predicates = {
            "discharge": Predicate(kind="discharge", visit_kinds=("unknown",)),
            "death": Predicate(kind="death"),
        }
        with pytest.raises(EhrDataError, match="no candidate"):
            label_dataset(simple(predicates=predicates), folder, progress=False)
        assert list((folder / "labels").iterdir()) == []


class TestComparingVisits:
    @pytest.mark.parametrize(
        "name",
        ["icu_mortality_t48", "arf_onset_after_t12_gap6", "shock_onset_after_t4_within24", "prolonged_stay_at_48h"],
    )
    def test_tasks_within_a_visit_do_not(self, name):
        assert not get_task(name).compares_visits

    def test_outcomes_rules_and_the_moment_of_asking_can(self):
        within = get_task("prolonged_stay_at_48h")
        assert replace(within, outcome=replace(within.outcome, scope="patient")).compares_visits
        rules = (*within.rules, Rule("seen_before", "input", "admission", max=1))
        assert replace(within, rules=rules).compares_visits
        assert replace(within, rules=(*within.rules, Rule("alone", "all", "admission", max=1)),
                       windows={**within.windows, "all": Window(None, None)}).compares_visits is False  # fmt: skip
        earlier = {**within.windows, "input": Window(None, "trigger - 12h")}
        assert replace(within, windows=earlier).compares_visits
        assert replace(within, predicates=within.predicates | {"death": Predicate(kind="death")},
                       rules=(Rule("dead", "input", "death", max=0),)).compares_visits is False  # fmt: skip
        # A death after the discharge may lie in another visit, whose distance is made up.
        assert simple().compares_visits


class TestReadLabels:
    def test_files_of_aces_are_read_as_they_are(self, tmp_path):
        aces = pa.table(
            {
                "subject_id": pa.array([1, 2], pa.int64()),
                "prediction_time": pa.array([day(1), day(2)], pa.timestamp("us")),
                "boolean_value": [True, False],
                "float_value": pa.nulls(2, pa.float32()),
            }
        )
        for number in range(2):
            (tmp_path / "train").mkdir(exist_ok=True)
            pq.write_table(aces.slice(number, 1), tmp_path / "train" / f"{number}.parquet")
        labels = read_labels(tmp_path)
        assert labels.schema.equals(LABEL_SCHEMA)
        assert labels["boolean_value"].to_pylist() == [True, False]

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(EhrDataError, match="must be a Parquet file of labels"):
            read_labels(tmp_path / "none.parquet")

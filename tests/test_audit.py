"""The leakage audit: honest code passes, and each kind of leak is caught by the check that is there for it."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.schema import LABEL_SCHEMA, RECORD_SCHEMA, DatasetInfo
from hf_ehr.tasks import Outcome, Predicate, TaskSpec, Window, get_task
from hf_ehr.tasks.audit import (
    LeakageError,
    OneShotTest,
    SplitManifest,
    check_availability,
    check_calendar_split,
    check_disjoint,
    check_fitted_on,
    check_no_future,
    check_prevalence,
    check_windows_ignore_label,
    digest,
    fingerprint,
    index_leak_features,
    rounds,
)
from hf_ehr.tasks.future import scramble_future, truncate_future
from hf_ehr.tasks.library import TASKS
from tests.builders import day, patient, records, visit

PROSPECTIVE = [name for name, task in TASKS.items() if task.design == "prospective"]
CODES = ["ICD10CM/E11.9", "ICD10CM/I50.9", "ICD10CM/C25.9", "ICD10CM/C50.9", "ICD10CM/Z00.00"]
DRUGS = ["ATC/A10BA02", "ATC/C03CA01"]


def labels_at(*rows):
    """LABELS of (subject, day) pairs."""
    plain = [{"subject_id": s, "prediction_time": day(d), "boolean_value": False} for s, d in rows]
    return pa.Table.from_pylist(plain, schema=LABEL_SCHEMA)


def stay(start, end, *hours):
    rows = [{"hour": float(h), "name": "LOINC/30934-9", "value": 1.0, "text": None} for h in hours]
    return {"stay_id": 1, "start": day(start), "end": day(end), "measurements": rows}


@st.composite
def visits(draw):
    start = draw(st.integers(0, 900)) + draw(st.sampled_from([0, 0.4, 0.99]))
    end = start + draw(st.sampled_from([0, 0.2, 1, 3, 8, 30]))
    known = [day(start + (end - start) * draw(st.sampled_from([0, 0.5, 1, 1.2]))) for _ in range(2)]
    return visit(
        start,
        end,
        kind=draw(st.sampled_from(["inpatient", "inpatient", "outpatient", "emergency"])),
        planned=draw(st.sampled_from([None, True, False])),
        discharged_to=draw(st.sampled_from(["home", "died", "transfer"])),
        diagnoses=draw(st.lists(st.sampled_from(CODES), min_size=2, max_size=2, unique=True)),
        diagnoses_at=known,
        medications=DRUGS,
        notes=[{"time": day(end), "category": "Nursing", "text": "x"}],
        stays=[stay(start, end, 0, 5, 30)],
    )


@st.composite
def histories(draw):
    """RECORDS of up to four patients."""
    patients = []
    for number in range(draw(st.integers(1, 4))):
        rows = sorted(draw(st.lists(visits(), max_size=6)), key=lambda row: row["start"])
        death = draw(st.sampled_from([None, None, 500, 935]))
        patients.append(patient(number, rows, death_time=None if death is None else day(death)))
    return records(*patients)


def visible(table, labels):
    """An honest builder: codes by availability, of the patients in `labels`."""
    now = dict(zip(labels["subject_id"].to_pylist(), labels["prediction_time"].to_pylist(), strict=True))
    found = {}
    for row in table.to_pylist():
        if row["subject_id"] in now:
            known = [(v["visit_id"], v["diagnoses"], v["diagnoses_at"]) for v in row["visits"]]
            found[row["subject_id"]] = [
                [number, code]
                for number, codes, at in known
                for code, t in zip(codes, at, strict=True)
                if t <= now[row["subject_id"]]
            ]
    return found


class TestNoFuture:
    table = records(
        patient(
            1,
            [
                visit(0, 5, diagnoses=["A/1", "A/2"], notes=[{"time": day(3), "category": "N", "text": "n"}]),
                visit(40, 60, diagnoses=["B/1", "B/2"], diagnoses_at=[day(45), day(60)], stays=[stay(40, 60, 1, 300)]),
                visit(90, 95, diagnoses=["C/1"]),
            ],
            death_time=day(95),
        ),
        patient(2, [visit(0, 1), visit(200, 201)]),
    )
    labels = labels_at((1, 50))

    def test_an_honest_builder_passes(self):
        check_no_future(lambda table: visible(table, self.labels), self.table, self.labels)

    @pytest.mark.parametrize(
        "leak",
        [
            lambda row: len(row["visits"]),
            lambda row: row["death_time"] is not None,
            lambda row: [v["end"] is not None for v in row["visits"][:2]],
            lambda row: [v["discharged_to"] for v in row["visits"][:2]],
            lambda row: [code for v in row["visits"][:2] for code in v["diagnoses"]],
            lambda row: [len(v["procedures"]) for v in row["visits"][:2]],
            lambda row: [len(v["notes"]) for v in row["visits"][:2]],
            lambda row: [len(s["measurements"]) for v in row["visits"][:2] for s in v["stays"]],
            lambda row: [s["end"] is None for v in row["visits"][:2] for s in v["stays"]],
        ],
        ids=["visits", "death", "end", "disposition", "codes", "procedures", "notes", "measurements", "stay's end"],
    )
    def test_each_kind_of_leak_is_caught(self, leak):
        with pytest.raises(LeakageError, match="L2") as error:
            check_no_future(lambda table: [leak(row) for row in table.to_pylist()], self.table, self.labels)
        assert error.value.rule == "L2"

    def test_truncation_keeps_what_was_known_and_nothing_else(self):
        row, other = truncate_future(self.table, self.labels).to_pylist()
        assert [v["diagnoses"] for v in row["visits"]] == [["A/1", "A/2"], ["B/1"]]
        assert [(v["end"], v["discharged_to"]) for v in row["visits"]] == [(day(5), "home"), (None, None)]
        assert [m["hour"] for m in row["visits"][1]["stays"][0]["measurements"]] == [1.0]
        assert row["death_time"] is None
        assert other == self.table.to_pylist()[1], "a patient without a label stays as it is"

    def test_the_prediction_time_itself_is_known(self):
        row = truncate_future(self.table, labels_at((1, 60))).to_pylist()[0]
        assert row["visits"][1]["diagnoses"] == ["B/1", "B/2"]
        assert row["visits"][1]["end"] == day(60)

    def test_several_labels_of_a_patient_go_in_rounds(self):
        labels = labels_at((1, 50), (2, 10), (1, 92), (2, 300), (1, 99))
        with pytest.raises(ValueError, match=r"audit\.rounds"):
            truncate_future(self.table, labels)
        parts = list(rounds(labels))
        assert [part["subject_id"].to_pylist() for part in parts] == [[1, 2], [1, 2], [1]]
        assert parts[1]["prediction_time"].to_pylist() == [day(92), day(300)]
        assert list(rounds(labels.slice(0, 0))) == []

    @settings(max_examples=40, deadline=None)
    @given(histories(), st.integers(0, 900), st.integers(0, 5))
    def test_an_invented_future_leaves_what_was_known_to_the_byte(self, table, now, seed):
        labels = labels_at(*((subject, now) for subject in table["subject_id"].to_pylist()))
        scrambled = scramble_future(table, labels, seed)
        assert scrambled.schema.equals(RECORD_SCHEMA)
        assert truncate_future(scrambled, labels).equals(truncate_future(table, labels))
        check_no_future(lambda records: visible(records, labels), table, labels, seeds=[seed])

    def test_an_invented_future_differs_and_the_seed_decides_how(self):
        first, second = (scramble_future(self.table, self.labels, seed) for seed in (0, 1))
        assert not first.equals(second)
        assert first.equals(scramble_future(self.table, self.labels, 0))
        assert not first.equals(truncate_future(self.table, self.labels))


class TestDigest:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (np.array([1, 2]), np.array([1, 3])),
            (np.array([1, 2], np.int32), np.array([1, 2], np.int64)),
            (np.zeros((2, 3)), np.zeros((3, 2))),
            ({"a": [1]}, {"b": [1]}),
            ([[1], [2]], [[1, 2]]),
            ("1", 1),
            (True, 1),
            (pa.table({"a": [1, 2]}), pa.table({"a": [1, None]})),
            (np.arange(5000), np.where(np.arange(5000) == 2500, 0, np.arange(5000))),
        ],
    )
    def test_what_differs_has_another_digest(self, one, other):
        assert digest(one) != digest(other)

    def test_order_of_keys_does_not_matter_and_strange_things_are_refused(self):
        assert digest({"a": 1, "b": np.ones(2)}) == digest({"b": np.ones(2), "a": 1})
        with pytest.raises(TypeError, match="object"):
            digest([object()])

    def test_tensors_are_compared_by_their_bytes(self):
        torch = pytest.importorskip("torch")
        assert digest(torch.tensor([1, 2])) == digest(torch.tensor([1, 2]))
        assert digest(torch.tensor([1, 2])) != digest(torch.tensor([1, 3]))


class TestWindowsIgnoreLabel:
    @pytest.mark.parametrize("name", PROSPECTIVE)
    @settings(max_examples=15, deadline=None)
    @given(histories())
    def test_prospective_tasks_ask_the_same_whatever_comes(self, name, table):
        check_windows_ignore_label(get_task(name), table)

    def test_the_index_of_a_case_control_task_depends_on_the_outcome(self):
        visits = [visit(d, d + 1, diagnoses=["ICD10CM/E11.9"], medications=DRUGS) for d in (0, 40, 80, 120)]
        table = records(patient(1, visits))
        assert get_task("diabetes_heart_failure").label(table)[0].num_rows == 1
        with pytest.raises(LeakageError, match=r"L4.*case_control"):
            check_windows_ignore_label(get_task("diabetes_heart_failure"), table)

    def test_the_last_visit_is_not_known_to_be_the_last(self):
        table = records(patient(1, [visit(0, 1), visit(5, 6)]))
        with pytest.raises(LeakageError, match="L4"):
            check_windows_ignore_label(get_task("prolonged_stay"), table, seeds=range(5))

    def test_a_task_asked_just_before_its_trigger_passes(self):
        spec = TaskSpec(
            name="before_admission",
            description="Asked as the door opens.",
            predicates={"admission": Predicate(kind="admission"), "death": Predicate(kind="death")},
            trigger="admission",
            windows={"input": Window(None, "trigger", end_inclusive=False), "target": Window("trigger", "start + 9d")},
            outcome=Outcome("target", "death"),
        )
        check_windows_ignore_label(spec, records(patient(1, [visit(0, 9), visit(20, 22)], death_time=day(22))))

    @settings(max_examples=25, deadline=None)
    @given(histories(), st.sampled_from(PROSPECTIVE))
    def test_eligibility_of_a_trigger_needs_nothing_from_after_it(self, table, name):
        """What is not decided by the target window is the same with the future deleted."""
        spec = get_task(name)
        history_only = replace(
            spec,
            rules=tuple(r for r in spec.rules if r.window in ("input", "index", "seen", "until_30_days_before")),
            windows={**spec.windows, "target": replace(spec.windows["target"], end=None)},
            censoring=type(spec.censoring)(),
        )
        present = frozenset(("antidiabetic_agent", "diuretic"))
        labels, _ = history_only.label(table, present=present)
        for part in rounds(labels):
            cut, _ = history_only.label(truncate_future(table, part), present=present)
            asked = set(zip(cut["subject_id"].to_pylist(), cut["prediction_time"].to_pylist(), strict=True))
            assert asked >= set(zip(part["subject_id"].to_pylist(), part["prediction_time"].to_pylist(), strict=True))


class TestSplits:
    def test_a_shared_patient_is_counted_and_never_named(self):
        check_disjoint({"train": [1, 2], "validation": [3], "test": []})
        with pytest.raises(LeakageError, match="L1: `train` and `test` share 2 patients") as error:
            check_disjoint({"train": [90001, 90002, 90003], "test": np.array([90003, 90002, 90002])})
        assert "9000" not in str(error.value)

    def test_a_manifest_survives_its_file_and_holds_no_id(self, tmp_path):
        manifest = SplitManifest.of("mimic4", {"train": [70001, 70002], "test": [70003]})
        manifest.save(tmp_path / "splits.json")
        assert SplitManifest.load(tmp_path / "splits.json") == manifest
        assert "7000" not in (tmp_path / "splits.json").read_text()
        with pytest.raises(LeakageError, match="L1"):
            SplitManifest.of("mimic4", {"train": [1], "test": [1]})
        with pytest.raises(ValueError, match="train, validation, test"):
            SplitManifest.of("mimic4", {"dev": [1]})

    @pytest.mark.parametrize(
        ("now", "before", "allowed"),
        [
            ("test", "train", False),
            ("test", "validation", False),
            ("validation", "train", False),
            ("test", "test", True),
            ("validation", "validation", True),
            ("train", "train", True),
            ("train", "test", True),
        ],
    )
    def test_held_out_patients_may_not_have_been_nearer_to_training_before(self, now, before, allowed):
        later = SplitManifest.of("mimic4", {now: [1, 2]})
        earlier = SplitManifest.of("mimic4", {before: [2, 3]})
        if allowed:
            later.check(earlier)
        else:
            with pytest.raises(LeakageError, match=f"1 patients of `{now}` were in `{before}`"):
                later.check(earlier)

    @pytest.mark.parametrize(
        ("one", "other", "shared"),
        [
            ("mimic3", "mimic4", True),
            ("mimic3_carevue", "mimic4", False),
            ("physionet2012", "mimic3", True),
            ("physionet2012", "mimic3_carevue", True),
            ("physionet2012", "mimic4", True),
            ("physionet2012", "physionet2019", False),
            ("physionet2012", "eicu", False),
            ("physionet2012", "physionet2012", False),
        ],
    )
    def test_sources_that_share_people_under_other_ids_are_refused(self, one, other, shared):
        first, second = SplitManifest.of(one, {"train": [1]}), SplitManifest.of(other, {"test": [2]})
        for later, earlier in ((first, second), (second, first)):
            if shared:
                with pytest.raises(LeakageError, match=f"L1.*`{later.source}` and `{earlier.source}` share people"):
                    later.check(earlier)
            elif later is first:
                later.check(earlier)

    def test_manifests_of_different_salts_cannot_be_compared(self):
        one = SplitManifest.of("mimic4", {"train": [1]}, salt="secret")
        other = SplitManifest.of("mimic4", {"test": [1]})
        assert one.splits["train"].isdisjoint(other.splits["test"])
        with pytest.raises(ValueError, match="salt"):
            other.check(one)


class TestFittedOn:
    def test_the_fingerprint_is_of_the_set_of_patients(self):
        expected = fingerprint([3, 1, 2])
        assert (
            expected == fingerprint(np.array([1, 2, 3, 3], np.int32)) == fingerprint(pa.chunked_array([[1, 2], [3]]))
        )
        assert expected != fingerprint([1, 2, 4])
        assert fingerprint([1, 23]) != fingerprint([12, 3])

    def test_an_artefact_of_other_patients_is_refused(self):
        check_fitted_on(fingerprint([1, 2]), [2, 1])
        with pytest.raises(LeakageError, match="L5"):
            check_fitted_on(fingerprint([1, 2, 3]), [1, 2])


class TestAvailability:
    def test_billing_codes_known_before_the_discharge_are_refused(self):
        check_availability(records(patient(1, [visit(0, 5, diagnoses=["A/1"]), visit(9, 9, diagnoses=["A/2"])])))
        early = visit(0, 5, diagnoses=["A/1", "A/2"], diagnoses_at=[day(5), day(4)])
        with pytest.raises(LeakageError, match="L3: 1 of 2 `diagnoses`"):
            check_availability(records(patient(1, [early])))

    def test_unknown_availability_is_no_availability(self):
        with pytest.raises(LeakageError, match="L3"):
            check_availability(records(patient(1, [visit(0, 5, diagnoses=["A/1"], diagnoses_at=[None])])))

    def test_other_kinds_are_checked_on_request(self):
        table = records(patient(1, [visit(0, 5, medications=["ATC/A"], medications_at=[day(1)])]))
        check_availability(table)
        with pytest.raises(LeakageError, match="medications"):
            check_availability(table, kinds=["medications"])


class TestTheRest:
    def test_test_labels_are_read_once(self):
        held = OneShotTest(np.array([0, 1]))
        assert repr(held) == "OneShotTest(not read)"
        assert held.read().tolist() == [0, 1]
        assert repr(held) == "OneShotTest(read)"
        with pytest.raises(LeakageError, match="L8"):
            held.read()

    def test_the_index_alone_gives_visits_history_and_age(self):
        table = records(
            patient(7, [visit(0, 5), visit(30), visit(100)], birth_time=day(-40 * 365.25)),
            patient(3, [visit(50)], birth_time=None),
        )
        features = index_leak_features(table, labels_at((3, 60), (7, 30), (7, 99), (3, 10))).to_pylist()
        assert [row["visits"] for row in features] == [1, 2, 2, 0]
        assert [row["history_days"] for row in features] == [10, 30, 99, 0]
        ages = [row["age"] for row in features]
        assert ages[1:3] == pytest.approx([40 + 30 / 365.25, 40 + 99 / 365.25])
        assert ages[0] is ages[3] is None
        with pytest.raises(ValueError, match="1 are not"):
            index_leak_features(table, labels_at((5, 1)))

    def test_a_subsampled_test_set_must_say_so(self):
        population = np.arange(10_000) % 10 == 0
        check_prevalence(population[:1000], population)
        balanced = np.arange(200) % 2 == 0
        with pytest.raises(LeakageError, match=r"L11.*0\.5000 in the test set, 0\.1000"):
            check_prevalence(balanced, population)
        check_prevalence(balanced, population, flagged=True)

    @pytest.mark.parametrize("axis", ["shifted", "visit", "order"])
    def test_calendar_splits_need_true_dates(self, axis):
        check_calendar_split(DatasetInfo(source="x"))
        with pytest.raises(LeakageError, match="L12.*" + axis):
            check_calendar_split(DatasetInfo(source="mimic3", time_axis=axis))

"""The synthetic intensive care world: its tasks and their oracle, its order in time, and each switch alone."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import cache

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from hf_ehr.models.code_hierarchy import is_valid
from hf_ehr.prepare import prepare
from hf_ehr.schema import shard_paths, validate_events
from hf_ehr.sources import synthetic_icu
from hf_ehr.sources._measurements import POSSIBLE
from hf_ehr.sources._synthetic_icu_course import DEAD, DETERIORATING, DISCHARGED, LONGEST, _transitions, run_course
from hf_ehr.sources._synthetic_icu_patients import MAX_VISITS, NEVER, Severity, draw_people
from hf_ehr.sources._synthetic_icu_series import BETWEEN, WITHIN, _deviations
from hf_ehr.sources._synthetic_icu_variables import ON_VASOPRESSOR, ON_VENTILATOR
from hf_ehr.sources._synthetic_icu_world import (
    CONDITIONS,
    RISKS,
    SWITCHES,
    Streams,
    SyntheticIcuConfig,
    draw_icu_world,
)
from hf_ehr.sources.physionet2012 import VARIABLES
from hf_ehr.sources.synthetic_icu import generate_shard, icu_code_table
from hf_ehr.tasks import label_dataset, read_labels
from hf_ehr.tasks.icu import AMNESIA_CODES, COPD_CODES
from hf_ehr.tasks.library import HEART_FAILURE_CODES

PATIENTS = 300
STAY_TASKS = (
    "icu_mortality_t48", *(f"{name}_onset_after_t{hour}" for name in ("arf", "shock") for hour in (4, 12, 48)),
)  # fmt: skip
RANGES = {
    "icu_mortality_t48": (0.11, 0.16), "arf_onset_after_t4": (0.13, 0.20), "arf_onset_after_t12": (0.08, 0.13),
    "arf_onset_after_t48": (0.06, 0.13), "shock_onset_after_t4": (0.11, 0.17), "shock_onset_after_t12": (0.07, 0.11),
    "shock_onset_after_t48": (0.06, 0.11), "readmission_30d": (0.09, 0.14),
}  # fmt: skip
"""Around FIDDLE's shares of positives, and readmissions as hospitals report them."""


@cache
def world(**options) -> tuple[pl.DataFrame, pl.DataFrame]:
    """EVENTS and TRUTH."""
    events, truth = generate_shard(SyntheticIcuConfig(**{"patients": PATIENTS} | options), 0, 1)
    return pl.from_arrow(events), pl.from_arrow(truth)


@cache
def course(patients: int = 2_500, **options):
    """What happens to many patients, without the cost of measuring them, and the truth about it."""
    config = SyntheticIcuConfig(patients=patients, **options)
    subjects = np.arange(1, patients + 1)
    happened = synthetic_icu._happen(config, Streams(config.seed, subjects))
    return happened, pl.from_arrow(synthetic_icu._truth(subjects, happened))


def of_kind(events: pl.DataFrame, *kinds: str) -> pl.DataFrame:
    return events.filter(pl.col("kind").is_in(kinds))


def spans(events: pl.DataFrame, number: str) -> pl.DataFrame:
    """Start and end of visits (``visit_id``) or stays (``stay_id``)."""
    whose = pl.col("stay_id").is_null() if number == "visit_id" else pl.col("stay_id").is_not_null()
    start, end = (events.filter(whose & (pl.col("kind") == kind)) for kind in ("admission", "discharge"))
    start = start.select(number, "subject_id", visit="visit_id", start="time", how="code", planned="numeric_value")
    return start.join(end.select(number, end="time", gone="code"), on=number, validate="1:1")


# --- the road to labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("icu") / "prepared"
    prepare("synthetic_icu", None, path, shards=2, workers=1, progress=False, options={"patients": PATIENTS})
    return path


@pytest.mark.parametrize("task", [*STAY_TASKS, "readmission_30d"])
def test_the_named_tasks_ask_and_answer_what_the_truth_says(folder, task):
    """The truth is drawn, the labels are read off the events by the rules of the task."""
    labels = pl.from_arrow(read_labels(label_dataset(task, folder, progress=False)))
    found = labels.select("subject_id", "prediction_time", label="boolean_value")
    truth = pl.concat(pl.read_parquet(path) for path in shard_paths(folder, "truth")).filter(pl.col("task") == task)
    order = ["subject_id", "prediction_time"]
    assert len(truth) > 100
    assert found.sort(order).equals(truth.select(found.columns).sort(order))


@pytest.mark.parametrize("name", ["heart_failure", "copd", "amnesia"])
def test_risks_half_a_year_ahead_have_cases_and_three_controls_each(folder, name):
    labels = read_labels(label_dataset(f"{name}_six_months_ahead", folder, progress=False))["boolean_value"].to_numpy(
        zero_copy_only=False
    )
    assert labels.sum() >= 8
    assert 0.2 < labels.mean() < 0.4


# --- outcomes and their oracle


@pytest.mark.parametrize("task", RANGES)
@pytest.mark.parametrize("low_rank", [True, False])
def test_the_oracle_is_calibrated_and_outcomes_are_as_frequent_as_in_published_cohorts(task, low_rank):
    truth = course(low_rank=low_rank)[1].filter(pl.col("task") == task)
    label, p = truth["label"].to_numpy(), truth["oracle_probability"].to_numpy()
    for part in np.array_split(np.argsort(p), 5):
        assert abs(label[part].sum() - p[part].sum()) < 4.5 * np.sqrt((p[part] * (1 - p[part])).sum())
    low, high = RANGES[task]
    assert low < p.mean() < high
    assert 0.7 < roc_auc_score(label, p) < 0.87


def test_the_risk_of_death_is_that_of_the_chain_multiplied_out():
    """Against powers of 5 × 5 matrices for one stay, forwards."""
    streams = Streams(0, np.arange(1, 2_001))
    rows = np.arange(2_000)
    severity, after = np.full(2_000, 0.7), np.full(2_000, 0.05)
    made = run_course(streams, rows, rows * 0, severity, np.zeros((2_000, 4)), after)
    early, late = np.eye(5), np.eye(5)
    early[:3], late[:3] = (_transitions(np.array([0.7]), discharge=late)[0] for late in (False, True))

    def risk(hours: np.ndarray) -> np.ndarray:
        return hours[:3, DEAD] + 0.05 * (1 - hours[:3, DEAD])

    end = np.linalg.matrix_power(late, LONGEST - 1 - 48)
    state = made.state[:, 48]
    assert len(set(state)) == 5
    for here, expected in enumerate(risk(end)):
        assert made.death[state == here] == pytest.approx(expected, rel=1e-9)
    assert np.isnan(made.death[state >= DEAD]).all()
    stable, deteriorating, _ = risk(np.linalg.matrix_power(early, 20) @ np.linalg.matrix_power(late, 28) @ end)
    share = (made.from_start[0] - stable) / (deteriorating - stable)  # of those who arrive deteriorating
    assert (made.state[:, 0] == DETERIORATING).mean() == pytest.approx(share, abs=0.05)
    inside = (made.from_start[0] - 0.05) / 0.95  # the others die behind the stay
    assert made.died.mean() == pytest.approx(inside, abs=4.5 * np.sqrt(inside / 2_000))
    assert not (made.state[:, :21] == DISCHARGED).any()


def test_severity_and_the_outcomes_of_a_stay_know_nothing_of_age_and_sex():
    happened, truth = course()
    asked = truth.filter(pl.col("task") == "icu_mortality_t48")
    row = asked["subject_id"].to_numpy() - 1
    for fact in (happened.people.age[row], happened.people.male[row]):
        assert abs(np.corrcoef(fact, asked["severity"])[0, 1]) < 0.07
        assert abs(np.corrcoef(fact, asked["oracle_probability"])[0, 1]) < 0.07


def test_conditions_that_carry_a_risk_make_its_target_likelier_and_start_before_it():
    people = draw_people(Streams(0, np.arange(1, 8_001)))
    names = [row.name for row in CONDITIONS]
    ever = people.onset < NEVER
    for target, causes in RISKS.items():
        column = names.index(target)
        for cause, weight in causes.items():
            at_risk = ever[:, names.index(cause)]
            shares = ever[at_risk, column].mean(), ever[~at_risk, column].mean()
            assert shares[0] > shares[1] * (1.15 if weight < 1 else 1.6), (target, cause)
        both = ever[:, column] & ever[:, names.index(max(causes, key=causes.get))] & (people.visits > 2)
        first = people.onset[both, names.index(max(causes, key=causes.get))]
        assert (first < people.onset[both, column]).mean() > 0.55


# --- events


def test_shards_and_blocks_hold_the_same_patients_as_one_piece(monkeypatch):
    config = SyntheticIcuConfig(patients=60)
    whole = generate_shard(config, 0, 1)
    monkeypatch.setattr(synthetic_icu, "_CHUNK", 7)
    parts = [generate_shard(config, index, 3) for index in range(3)]
    for number, keys in enumerate((["subject_id"], ["task", "subject_id"])):
        together = pl.from_arrow(pa.concat_tables(part[number] for part in parts))
        assert together.sort(keys, maintain_order=True).equals(pl.from_arrow(whole[number]))


def test_further_patients_are_those_of_a_larger_world():
    whole, _ = generate_shard(SyntheticIcuConfig(patients=30), 0, 1)
    further = [generate_shard(SyntheticIcuConfig(patients=12, first_patient=19), index, 4)[0] for index in range(4)]
    found = pl.from_arrow(pa.concat_tables(further))
    expected = pl.from_arrow(whole).filter(pl.col("subject_id") >= 19)
    assert found["subject_id"].unique().sort().to_list() == list(range(19, 31))
    assert found.sort("subject_id", maintain_order=True).equals(expected)


def test_a_seed_is_a_world_of_its_own():
    assert not world(patients=20)[0].equals(world(patients=20, seed=1)[0])


def test_events_keep_the_contract_and_come_by_subject_and_time():
    frame = pl.from_arrow(validate_events(generate_shard(SyntheticIcuConfig(patients=40), 0, 1)[0]))
    assert frame.equals(frame.sort("subject_id", "time", nulls_last=False, maintain_order=True))


def test_visits_follow_each_other_and_stays_lie_within_them():
    events, _ = world()
    visits, stays = spans(events, "visit_id"), spans(events, "stay_id")
    gap = visits.sort("start").select(pl.col("start") - pl.col("end").shift(1).over("subject_id")).to_series()
    assert gap.drop_nulls().dt.total_hours().min() >= 36
    inside = stays.join(visits, left_on="visit", right_on="visit_id", suffix="_visit")
    assert len(inside) == len(stays) > PATIENTS
    assert (inside["start"] >= inside["start_visit"]).all()
    assert (inside["end"] <= inside["end_visit"]).all()
    assert inside["how_visit"].unique().to_list() == ["Visit/inpatient"]
    later = stays.sort("start").select(pl.col("start") - pl.col("end").shift(1).over("visit")).to_series().drop_nulls()
    assert len(later) > 5
    assert later.dt.total_hours().min() >= 8
    admitted = visits.filter(pl.col("how") == "Visit/inpatient")
    assert 0.4 < admitted["visit_id"].is_in(stays["visit"].implode()).mean() < 0.7
    assert stays["subject_id"].n_unique() > 0.7 * PATIENTS


def test_everything_of_a_visit_happens_in_it_and_everything_of_a_stay_in_that():
    events, _ = world()
    for number in ("visit_id", "stay_id"):
        placed = events.filter(pl.col(number).is_not_null()).join(spans(events, number), on=number)
        assert placed.select(pl.col("time").is_between("start", "end").all()).item()
    measured = of_kind(events, "measurement")
    assert measured["stay_id"].null_count() == 0


def test_death_is_the_end_of_everything_and_of_the_stay_that_it_happens_in():
    events, _ = world()
    death = of_kind(events, "death").select("subject_id", death="time")
    assert len(death) > 20
    rest = events.join(death, on="subject_id").filter(pl.col("time").is_not_null())
    assert rest.select((pl.col("time") <= pl.col("death")).all()).item()
    visits = spans(events, "visit_id").filter(pl.col("gone") == "Discharge/died").join(death, on="subject_id")
    assert len(visits) == len(death)
    assert visits.select((pl.col("end") == pl.col("death")).all()).item()
    happened, _ = course()
    stays, ends = happened.stays, happened.visits.end
    assert stays.died.sum() > 100
    assert (stays.end[stays.died] == ends[stays.patient, stays.visit][stays.died]).all()
    assert (stays.end[~stays.died] < ends[stays.patient, stays.visit][~stays.died]).all()


def test_a_treatment_starts_once_in_a_stay_and_ventilation_is_charted_only_behind_its_start():
    events, _ = world()
    onset = events.filter(pl.col("code").str.starts_with("ICU/"))
    assert set(onset["code"]) == {"ICU/ventilation", "ICU/vasopressor"}
    assert not onset.select("stay_id", "code").is_duplicated().any()
    charted = events.filter(pl.col("code") == "CINC2012/MechVent")
    first = onset.filter(pl.col("code") == "ICU/ventilation").select("stay_id", begun="time")
    joined = charted.join(first, on="stay_id", how="left")
    assert len(joined) > 200
    assert joined.select((pl.col("time") > pl.col("begun")).fill_null(False).all()).item()


def test_the_36_series_and_the_body_are_measured_in_the_first_two_days_and_are_possible():
    events, _ = world()
    values = of_kind(events, "measurement").filter(pl.col("code").str.starts_with("CINC2012/"))
    values = values.with_columns(name=pl.col("code").str.replace("CINC2012/", ""))
    assert set(values["name"]) == {*VARIABLES, "Height", "Weight", "ICUType"}
    hours = values.join(spans(events, "stay_id"), on="stay_id").select(pl.col("time") - pl.col("start")).to_series()
    assert hours.dt.total_minutes().max() < 48 * 60
    numbers = values.filter(pl.col("name") != "ICUType")
    assert numbers["numeric_value"].is_finite().all()
    for name, part in numbers.group_by("name"):
        low, high = POSSIBLE.get(name[0], (0, np.inf))
        assert low - 1e-6 <= part["numeric_value"].min() <= part["numeric_value"].max() <= high


def test_codes_are_real_and_only_those_of_a_target_are_what_its_task_asks_for():
    table = pl.from_arrow(icu_code_table(SyntheticIcuConfig()))
    assert table["code"].is_unique().all()
    assert all(map(is_valid, [*table["code"], *draw_icu_world(20).drugs]))
    patterns = {
        "heart failure": HEART_FAILURE_CODES, "chronic obstructive pulmonary disease": COPD_CODES,
        "amnesia": AMNESIA_CODES,
    }  # fmt: skip
    for name, wanted in patterns.items():
        asked = [code for code in table["code"] if any(fnmatch(code, pattern) for pattern in wanted)]
        assert set(asked) == set(table.filter(pl.col("condition") == name)["code"])
    events, _ = world()
    assert set(of_kind(events, "diagnosis")["code"]) <= set(table["code"])
    assert (
        events.filter(pl.col("kind").is_in(["diagnosis", "medication"])).select("visit_id", "code").is_unique().all()
    )


# --- switches: what each takes away, and that it takes nothing else


@pytest.mark.parametrize("switch", ["moving_setpoints", "treatment_feedback", "informative_sampling", "notes"])
def test_a_switch_of_what_is_seen_leaves_what_happens_alone(switch):
    off, on = world(**{switch: False}), world()
    assert off[1].equals(on[1])
    kinds = ["measurement", "note"]
    assert off[0].filter(~pl.col("kind").is_in(kinds)).equals(on[0].filter(~pl.col("kind").is_in(kinds)))
    if switch in ("moving_setpoints", "treatment_feedback"):
        assert off[0].drop("numeric_value").equals(on[0].drop("numeric_value"))
        assert not off[0].equals(on[0])


def test_without_notes_there_are_none_and_with_them_two_for_each_inpatient_visit():
    assert of_kind(world(notes=False)[0], "note").is_empty()
    assert of_kind(world(notes=False)[0], "measurement").equals(of_kind(world()[0], "measurement"))
    events, _ = world()
    notes = of_kind(events, "note")
    admitted = spans(events, "visit_id").filter(pl.col("how") == "Visit/inpatient")
    assert notes.group_by("visit_id").len()["len"].to_list() == [2] * len(admitted)
    assert notes["text_value"].str.len_chars().min() > 60


def means(**options) -> pl.DataFrame:
    """Mean of every variable in every stay."""
    values = of_kind(world(**options)[0], "measurement").filter(pl.col("numeric_value").is_not_null())
    return values.pivot("code", index="stay_id", values="numeric_value", aggregate_function="mean")


def correlations(**options) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of the variables of a stay: of its deviations, and of its noise from hour to hour."""
    config = SyntheticIcuConfig(moving_setpoints=False, treatment_feedback=False, **options)
    streams = Streams(0, np.arange(1, 401))
    people, severity, _, _, stays = synthetic_icu._happen(config, streams)
    between = np.corrcoef(severity.deviation.reshape(-1, severity.deviation.shape[-1]).T)
    level = np.zeros((len(stays.patient), 48))
    draw = (stays.visit * 2 + stays.number) << 13
    total = _deviations(config, streams, people, severity, stays, level, draw)
    steps = (total[:, 1:] - 0.9 * total[:, :-1]).reshape(-1, total.shape[-1])
    steps = steps - np.repeat(0.1 * BETWEEN * severity.deviation[stays.patient, stays.visit], 47, 0)
    assert steps.std(0) == pytest.approx(WITHIN * np.sqrt(1 - 0.9**2), rel=0.05)
    assert severity.deviation.std((0, 1)) == pytest.approx(1, abs=0.06)
    return between, np.corrcoef(steps.T)


def test_variables_share_four_factors_and_share_nothing_with_low_rank_off():
    for matrix in correlations():
        values = np.linalg.eigvalsh(matrix)
        assert values[-4:].sum() / values.sum() > 0.65
        assert values[-5] < 0.5
    for matrix in correlations(low_rank=False):
        off = matrix - np.eye(len(matrix))
        assert np.abs(off).max() < 0.1
    seen = [means(low_rank=on).select(pl.corr("CINC2012/MAP", "CINC2012/NISysABP")).item() for on in (True, False)]
    assert seen[0] > 0.6
    assert seen[1] < 0.35  # what age and treatments still move


def test_severity_is_standard_normal_and_a_sum_over_the_variables_with_low_rank_off():
    for on in (True, False):
        severity: Severity = course(low_rank=on)[0].severity
        assert severity.severity.mean() == pytest.approx(0, abs=0.03)
        assert severity.severity.std() == pytest.approx(1, abs=0.05)
    flat = severity.deviation.reshape(-1, severity.deviation.shape[-1])
    weights, *_ = np.linalg.lstsq(flat, severity.severity.ravel(), rcond=None)
    explained = np.corrcoef(flat @ weights, severity.severity.ravel())[0, 1] ** 2
    assert explained == pytest.approx(0.85**2, abs=0.05)
    assert (weights**2).max() < 0.35 * (weights**2).sum()  # no variable says it alone


def age_tells(**options) -> float:
    """Correlation of age with the urea of a stay."""
    events, _ = world(**options)
    birth = of_kind(events, "birth").select("subject_id", birth="time")
    stays = spans(events, "stay_id").join(birth, on="subject_id").join(means(**options), on="stay_id")
    return stays.select(pl.corr((pl.col("start") - pl.col("birth")).dt.total_days(), "CINC2012/BUN")).item()


def test_age_moves_normal_values_unless_setpoints_do_not_move():
    assert age_tells() > 0.35
    assert abs(age_tells(moving_setpoints=False)) < 0.15


def test_a_treatment_changes_its_variables_behind_its_start_and_nothing_when_feedback_is_off():
    events, off = world()[0], world(treatment_feedback=False)[0]
    changed = events.with_columns(was=off["numeric_value"]).filter(pl.col("numeric_value") != pl.col("was"))
    begun = events.filter(pl.col("code").str.starts_with("ICU/")).select("stay_id", begun="time", what="code")
    pairs = changed.join(begun, on="stay_id")
    effects = {"ICU/vasopressor": ON_VASOPRESSOR, "ICU/ventilation": ON_VENTILATOR}
    allowed = pl.lit(False)
    for what, variables in effects.items():
        named = pl.col("code").is_in([f"CINC2012/{name}" for name in variables])
        allowed |= (pl.col("what") == what) & named & (pl.col("time") >= pl.col("begun"))
    explained = pairs.filter(allowed).select("stay_id", "time", "code").unique()
    assert len(changed) == len(explained) > 1_000
    pressure = changed.filter(pl.col("code") == "CINC2012/NIMAP")
    assert (pressure["numeric_value"] > pressure["was"]).all()
    oxygen = changed.filter(pl.col("code") == "CINC2012/FiO2")
    assert (oxygen["numeric_value"] > oxygen["was"]).all()


def sampling_tells(**options) -> float:
    """Correlation of severity with the number of measurements per hour of the stay."""
    events, truth = world(**options)
    truth = truth.filter(pl.col("task") == "icu_mortality_t48")
    counts = of_kind(events, "measurement").filter(~pl.col("code").is_in(["CINC2012/MechVent"]))
    counts = counts.group_by("stay_id").len().join(truth, on="stay_id")  # two whole days each
    return counts.select(pl.corr("len", "severity")).item()


def test_the_sicker_are_measured_more_unless_sampling_is_uninformative():
    assert sampling_tells() > 0.5
    assert abs(sampling_tells(informative_sampling=False)) < 0.2


def seen_elsewhere(**options) -> list[float]:
    """Correlation of severity with the acute codes, the drugs and the gravest notes of a stay's visit."""
    events, truth = world(**options)
    visits = truth.filter(pl.col("task") == "icu_mortality_t48").unique("visit_id").select("visit_id", "severity")
    acute = [row.name for row in CONDITIONS[-11:]]
    table = pl.from_arrow(icu_code_table(SyntheticIcuConfig())).filter(pl.col("condition").is_in(acute))
    grave = pl.col("text_value").str.contains("Critically ill|In extremis|Gravely unwell")
    found = [
        events.filter(pl.col("code").is_in(table["code"].implode())),
        of_kind(events, "medication"),
        of_kind(events, "note").filter(grave),
    ]
    counts = [part.group_by("visit_id").len() for part in found]
    return [
        visits.join(part, on="visit_id", how="left").select(pl.corr(pl.col("len").fill_null(0), "severity")).item()
        for part in counts
    ]


def test_codes_drugs_and_notes_tell_of_severity_unless_they_are_not_aligned():
    aligned, apart = seen_elsewhere(), seen_elsewhere(aligned=False)
    assert min(aligned) > 0.3
    assert max(map(abs, apart)) < 0.2
    sizes = [len(of_kind(world(aligned=on)[0], "diagnosis")) for on in (True, False)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)  # the same distribution, drawn apart


# --- bad options


@pytest.mark.parametrize(
    ("options", "field"),
    [({"patients": 0}, "patients"), ({"seed": -1}, "seed"), ({"synonyms": 41}, "synonyms")]
    + [({switch: "false"}, switch) for switch in SWITCHES],
)
def test_a_configuration_that_exists_is_valid(options, field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        SyntheticIcuConfig(**options)


def test_a_shard_that_does_not_exist_is_refused_and_more_shards_than_patients_are_empty():
    with pytest.raises(ValueError, match="`index` must be between 0 and 2"):
        generate_shard(SyntheticIcuConfig(patients=5), 3, 3)
    events, truth = generate_shard(SyntheticIcuConfig(patients=2), 4, 5)
    assert (events.num_rows, truth.num_rows) == (0, 0)


def test_the_smallest_world_works():
    events, _ = generate_shard(SyntheticIcuConfig(patients=3, synonyms=1), 0, 1)
    codes = icu_code_table(SyntheticIcuConfig(synonyms=1)).to_pandas().dropna()
    assert codes["condition"].is_unique
    assert set(pl.from_arrow(events)["subject_id"]) == {1, 2, 3}
    assert of_kind(pl.from_arrow(events), "admission")["visit_id"].max() % 100 < MAX_VISITS

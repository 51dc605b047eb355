"""The synthetic cohort: its truth, its controls, and that a patient is the same however the work is cut."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from hf_ehr.models.code_hierarchy import is_valid
from hf_ehr.schema import BIRTH_CODE, validate_events, validate_labels
from hf_ehr.sources._synthetic_process import Draws
from hf_ehr.sources._synthetic_worlds import PROGRESSION, ROW, draw_world
from hf_ehr.sources.synthetic import SyntheticConfig, code_table, generate_shard, labels
from tests.cohorts import PATIENTS, WORLDS, cohort, diagnoses, make, onsets, present, stays


@pytest.mark.parametrize("world", WORLDS)
def test_shards_hold_the_same_patients_as_one_piece(world):
    config = SyntheticConfig(world=world, patients=700)
    whole_events, whole_truth = generate_shard(config, 0, 1)
    parts = [generate_shard(config, index, 3) for index in range(3)]
    for index, (events, truth) in enumerate(parts):
        assert set(np.asarray(events["subject_id"]) % 3) == {index}
        assert truth["subject_id"].to_pylist() == [i for i in range(1, 701) if i % 3 == index]
    for whole, pieces in ((whole_events, [p[0] for p in parts]), (whole_truth, [p[1] for p in parts])):
        together = pl.from_arrow(pa.concat_tables(pieces)).sort("subject_id", maintain_order=True)
        assert together.equals(pl.from_arrow(whole))


def test_a_patient_does_not_depend_on_how_many_there_are_or_on_the_chunk_they_fall_in():
    few, few_truth = make(patients=50)
    many, many_truth = make(patients=9_000)  # three chunks
    assert few.equals(many.filter(pl.col("subject_id") <= 50))
    assert few_truth.equals(many_truth.head(50))
    odd = SyntheticConfig(patients=9_000)
    last = pl.from_arrow(generate_shard(odd, 0, 4_500)[1])
    assert last["subject_id"].to_list() == [4_500, 9_000]
    assert last.equals(many_truth.filter(pl.col("subject_id").is_in([4_500, 9_000])))


def test_seeds_and_worlds_have_different_patients():
    drawn = [*((world, 0) for world in WORLDS), ("C", 1)]
    tables = [generate_shard(SyntheticConfig(world=w, seed=s, patients=20), 0, 1)[1] for w, s in drawn]
    latents = {tuple(table["z"].to_pylist()[0]) for table in tables}
    assert len(latents) == len(tables)


def test_more_shards_than_patients_leave_empty_shards():
    events, truth = generate_shard(SyntheticConfig(patients=2), 4, 5)
    assert (events.num_rows, truth.num_rows) == (0, 0)
    assert validate_events(events).num_rows == 0


def test_random_numbers_are_uniform_and_independent_between_patients_and_draws():
    draws = Draws(SyntheticConfig(), np.arange(1, 20_001))
    uniform = draws.uniform("z", 4)
    counts = np.histogram(uniform, bins=50, range=(0, 1))[0]
    expected = uniform.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 98  # χ² with 49 degrees of freedom, p = 5e-5
    columns = np.column_stack([uniform[1:], uniform[:-1], draws.uniform("condition", 2)[1:]])
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 4.5 / np.sqrt(20_000)
    rows = np.array([3, 3, 0])
    assert draws.at("z", rows, np.array([2, 0, 1])).tolist() == uniform[rows, [2, 0, 1]].tolist()


# --- events


@pytest.mark.parametrize("world", WORLDS)
def test_events_keep_the_contract_and_come_by_subject_and_time(world):
    events, truth = generate_shard(SyntheticConfig(world=world, patients=400), 0, 1)
    frame = pl.from_arrow(validate_events(events))
    assert frame.equals(frame.sort("subject_id", "time", nulls_last=False, maintain_order=True))
    validate_labels(labels(truth))
    assert labels(truth)["boolean_value"].equals(truth["label"])


def test_every_visit_has_one_beginning_and_one_end_around_its_events():
    events, _ = make()
    visits = stays(events)
    assert visits["visit_id"].is_unique().all()
    assert len(visits) == (events["kind"] == "admission").sum() == (events["kind"] == "discharge").sum()
    assert (visits["days"] > 0).all()
    gap = visits.select((pl.col("start") - pl.col("end").shift(1).over("subject_id")).dt.total_days()).drop_nulls()
    assert gap.to_series().min() >= 2
    inside = events.filter(pl.col("visit_id").is_not_null()).join(visits, on="visit_id")
    assert inside.select(pl.col("time").is_between(pl.col("start"), pl.col("end")).all()).item()


def test_positions_count_from_the_principal_code_on_and_no_code_repeats_in_a_visit():
    events, _ = make()
    codes = events.filter(pl.col("kind") == "diagnosis")
    assert not codes.select("visit_id", "code").is_duplicated().any()
    ranks = codes.group_by("visit_id", maintain_order=True).agg("position")["position"]
    assert all(row == list(range(1, len(row) + 1)) for row in ranks.head(5_000).to_list())


def test_no_one_outlives_death_and_death_in_hospital_ends_the_visit():
    events, truth = make()
    death = events.filter(pl.col("kind") == "death").select("subject_id", death="time")
    assert 0.03 < len(death) / PATIENTS < 0.08
    rest = events.join(death, on="subject_id").filter(pl.col("time").is_not_null())
    assert rest.select((pl.col("time") <= pl.col("death")).all()).item()
    died = stays(events).filter(pl.col("disposition") == "Discharge/died").join(death, on="subject_id")
    assert 0.2 < len(died) / len(death) < 0.8
    assert died.select((pl.col("end") == pl.col("death")).all()).item()
    assert death.join(truth, on="subject_id").select((pl.col("death") > pl.col("prediction_time")).all()).item()


def test_everyone_is_an_adult_with_one_birth_and_six_static_facts():
    events, _ = make()
    birth = events.filter(pl.col("code") == BIRTH_CODE).select("subject_id", birth="time")
    assert len(birth) == PATIENTS
    first = stays(events).group_by("subject_id").agg(pl.col("start").min()).join(birth, on="subject_id")
    years = first.select((pl.col("start") - pl.col("birth")).dt.total_days() / 365.25).to_series()
    assert years.min() > 17.9
    assert 45 < years.mean() < 60
    static = events.filter(pl.col("kind") == "static")
    assert static.group_by("subject_id").len()["len"].unique().to_list() == [6]
    assert set(static["code"].str.split("/").list.first()) == {
        "Sex", "Race", "Ethnicity", "Language", "Insurance", "MaritalStatus",
    }  # fmt: skip


def test_prolonged_stays_and_readmissions_have_plausible_rates():
    visits = stays(make()[0])
    assert 0.12 < visits.filter(pl.col("days") > 7)["subject_id"].n_unique() / PATIENTS < 0.18
    columns = ("start", "visit", "planned")
    following = [pl.col(name).shift(-1).over("subject_id").alias(f"next_{name}") for name in columns]
    index = visits.with_columns(following).filter(
        pl.col("visit").eq("Visit/inpatient") & pl.col("disposition").ne("Discharge/died")
    )
    soon = (pl.col("next_start") - pl.col("end")).dt.total_days() < 30
    again = soon & pl.col("next_visit").eq("Visit/inpatient") & pl.col("next_planned").eq(0)
    assert 0.10 < index.select(again.fill_null(False).mean()).item() < 0.15
    assert 0.2 < index["planned"].mean() < 0.45


def test_drugs_and_tests_point_to_their_condition():
    events, truth = make()
    ill = present(truth)
    heart, sugar = (
        truth["subject_id"].to_numpy()[ill[:, ROW[name]] == 1] for name in ("heart_failure", "type_2_diabetes")
    )
    furosemide = events.filter(pl.col("code") == "ATC/C03CA01")["subject_id"]
    assert set(furosemide) <= set(heart)
    assert len(set(furosemide)) > 0.3 * len(heart)
    a1c = events.filter(pl.col("code") == "LOINC/4548-4").with_columns(ill=pl.col("subject_id").is_in(sugar.tolist()))
    assert a1c.filter("ill")["numeric_value"].mean() == pytest.approx(7.6, abs=0.2)
    assert a1c.filter(~pl.col("ill"))["numeric_value"].mean() == pytest.approx(5.4, abs=0.1)
    bnp = events.filter(pl.col("code") == "LOINC/30934-9").with_columns(ill=pl.col("subject_id").is_in(heart.tolist()))
    assert bnp.filter("ill")["numeric_value"].mean() > 600 > 100 > bnp.filter(~pl.col("ill"))["numeric_value"].mean()


def test_named_conditions_use_the_codes_that_define_the_named_tasks():
    codes = pl.from_arrow(code_table(SyntheticConfig()))
    by_name = {name: part["code"] for (name,), part in codes.drop_nulls().group_by("name")}
    heart = by_name["heart_failure"]
    assert {"ICD10CM/I50.9", "ICD10CM/I11.0", "ICD9CM/428.0", "ICD9CM/404.03"} <= set(heart)
    listed = r"^ICD10CM/(I50|I11\.0|I13\.[02]|I09\.81|I97\.13)|^ICD9CM/(428|398\.91|402\..1|404\..[13])"
    assert heart.str.contains(listed).all()
    assert by_name["type_2_diabetes"].str.contains(r"^ICD10CM/E11|^ICD9CM/250\..[02]$").all()
    cancer = codes.filter(pl.col("code").str.contains(r"^ICD10CM/C|^ICD9CM/(1[4-9]|20)"))
    assert cancer["name"].unique().to_list() == ["pancreatic_cancer"]
    assert cancer["code"].str.contains(r"^ICD10CM/C25|^ICD9CM/157").all()
    excluded = r"ICD10CM/(E08|E09|E10|E13|E23\.2|N25\.1|O24|P70)|ICD9CM/(249|250\..[13]|253\.5|588\.1|648\.8|775)"
    assert not codes["code"].str.contains(excluded).any()


# --- codes and latents


@pytest.mark.parametrize(("world", "synonyms"), [("C", 40), ("C", 150), ("site_b", 40), ("A", 10)])
def test_the_vocabulary_has_m_real_codes_for_each_condition_and_the_noise(world, synonyms):
    config = SyntheticConfig(world=world, synonyms=synonyms)
    codes = pl.from_arrow(code_table(config))
    assert len(codes) == codes["code"].n_unique() == 40 * synonyms + 500
    assert codes.drop_nulls().group_by("condition").len()["len"].to_list() == [synonyms] * 40
    assert all(is_valid(code) for code in codes["code"])


def test_patients_have_the_promised_number_of_codes():
    config = SyntheticConfig(patients=PATIENTS)
    events, truth = cohort(config)
    known = diagnoses(events, truth, config).filter("known")
    assert known["code"].n_unique() == 2_100
    assert len(known) / PATIENTS == pytest.approx(22, abs=1.5)
    assert known["condition"].null_count() / PATIENTS == pytest.approx(3, abs=0.1)


def test_conditions_follow_their_latents():
    config = SyntheticConfig(patients=PATIENTS)
    world, truth = draw_world(config), cohort(config)[1]
    z = np.array(truth["z"].to_list())
    observed = present(truth)
    assert np.abs(observed.mean(0) - world.prevalence).max() < 0.03
    children = {child for _, child in PROGRESSION}
    for row in set(range(40)) - children:
        probability = expit(z @ world.loadings[row] + world.bias[row])
        deviation = (observed[:, row] - probability).sum() / np.sqrt((probability * (1 - probability)).sum())
        assert abs(deviation) < 4.5
        assert roc_auc_score(observed[:, row], probability) > 0.6


def test_codes_come_only_from_conditions_that_are_present_and_have_begun():
    config = SyntheticConfig(patients=3_000)
    events, truth = cohort(config)
    start = onsets(truth)
    codes = diagnoses(events, truth, config).drop_nulls("condition")
    begun = start[codes["subject_id"].to_numpy() - 1, codes["condition"].to_numpy()]
    assert (codes["visit_id"].to_numpy() % 100 >= begun).all()


def test_a_child_starts_at_a_later_visit_than_its_parent_and_is_commoner_with_it():
    config = SyntheticConfig(patients=PATIENTS)
    events, truth = cohort(config)
    ill = present(truth)
    first = diagnoses(events, truth, config).group_by("subject_id", "condition").agg(pl.col("time").min())
    for parent, child in PROGRESSION:
        times = first.filter(pl.col("condition") == parent).join(
            first.filter(pl.col("condition") == child), on="subject_id", suffix="_child"
        )
        assert len(times) > 20
        assert (times["time_child"] > times["time"]).all()
        assert ill[ill[:, parent] == 1, child].mean() > ill[ill[:, parent] == 0, child].mean()


def test_what_comes_after_the_prediction_time_only_repeats_known_codes():
    config = SyntheticConfig(patients=PATIENTS)
    events, truth = cohort(config)
    codes = diagnoses(events, truth, config)
    after, known = codes.filter(~pl.col("known")), codes.filter("known")
    assert len(after) > 1_000
    assert after.join(known, on=["subject_id", "code"], how="anti").is_empty()
    last = known.group_by("subject_id").agg(pl.col("time").max()).join(truth, on="subject_id")
    assert (last["time"] <= last["prediction_time"]).all()


# --- the outcome and its oracle

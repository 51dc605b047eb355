"""The worlds of text and codes: what codes say, what notes say, and what only both together say."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from hf_ehr.cli.main import main
from hf_ehr.records import assemble
from hf_ehr.schema import shard_paths, validate_events
from hf_ehr.sources.synthetic_text_codes import (
    DRUGS,
    TRUTH_SCHEMA,
    SyntheticTextCodesConfig,
    generate_shard,
    text_code_table,
)
from hf_ehr.tasks.labels import label_dataset, read_labels

PATIENTS = 600
MARKERS, COMORBIDITIES = ("E11", "I50", "J44", "N18"), ("I48", "J45", "F32", "G40")
ACUTE = ("J18", "A41", "N17", "J96", "G93", "K92")
FAVOURABLE = ("recent onset", "this year", "new diagnosis", "minimal", "low dose", "lower limit", "abstinence",
              "smoke free", "never smoking", "regular intake", "on time", "every dose")  # fmt: skip
UNFAVOURABLE = ("over twenty", "long standing", "decades", "maximum", "high dose", "upper limit", "daily smoking",
                "pack a day", "ongoing tobacco", "missed", "skipped", "unfilled")  # fmt: skip
OF_OTHERS = ("Mother", "Brother", "Copied", "Previous")
OPENINGS = (("walks the ward", "good shape"), ("Nearly back", "mild weakness"), ("Moderately", "help with stairs"),
            ("Frail", "weaker than before"), ("Gravely", "Bedbound"))  # fmt: skip


def make(**options):
    events, truth = generate_shard(SyntheticTextCodesConfig(**({"patients": PATIENTS} | options)), 0, 1)
    return pl.from_arrow(events), pl.from_arrow(truth)


@pytest.fixture(scope="module")
def world():
    return make()


def sentences(note: str) -> list[str]:
    return note.rstrip(".").split(". ")


def unfavourable(note: str) -> int:
    """How many findings of the patient a reader finds unfavourable."""
    own = [said for said in sentences(note) if not said.startswith(OF_OTHERS)]
    found = [said for said in own if any(phrase in said for phrase in FAVOURABLE + UNFAVOURABLE)]
    assert len(found) == 4
    return sum(is_bad(said) != said.startswith(("Denies", "No sign")) for said in found)


def is_bad(sentence: str) -> bool:
    return any(phrase in sentence for phrase in UNFAVOURABLE)


def categories(events: pl.DataFrame, wanted: tuple[str, ...]) -> pl.DataFrame:
    """visit_id → how many of the categories its diagnoses have."""
    category = pl.col("code").str.slice(len("ICD10CM/"), 3)
    return (
        events.filter(pl.col("kind") == "diagnosis")
        .group_by("visit_id")
        .agg(category.filter(category.is_in(wanted)).n_unique().alias("number"))
        .sort("visit_id")
    )


def test_events_keep_the_contract_and_records_hold_codes_drugs_and_a_note(world):
    events, truth = world
    frame = pl.from_arrow(validate_events(events.to_arrow()))
    assert frame.equals(frame.sort("subject_id", "time", nulls_last=False, maintain_order=True))
    records = assemble(events.to_arrow()).to_pylist()
    assert [row["subject_id"] for row in records] == list(range(1, PATIENTS + 1))
    counts = {len(row["visits"]) for row in records}
    assert counts == {2, 3, 4, 5, 6}
    visits = [visit for row in records for visit in row["visits"]]
    assert [visit["visit_id"] for visit in visits] == truth["visit_id"].to_list()
    assert all(len(visit["notes"]) == 1 and visit["diagnoses"] and visit["start"] < visit["end"] for visit in visits)
    assert {code.split("/")[0] for visit in visits for code in visit["diagnoses"]} == {"ICD10CM"}
    assert {code for visit in visits for code in visit["medications"]} == set(DRUGS)
    assert all(visit["notes"][0]["time"] == visit["end"] == visit["diagnoses_at"][0] for visit in visits)
    birth = {row["subject_id"]: row["birth_time"] for row in records}
    ages = [(row["visits"][0]["start"] - birth[row["subject_id"]]).days / 365.25 for row in records]
    assert 39.9 < min(ages) < max(ages) < 85.1


def test_shards_hold_the_same_patients_as_one_piece_and_few_the_same_as_many():
    config = SyntheticTextCodesConfig(patients=90)
    whole = generate_shard(config, 0, 1)
    parts = [generate_shard(config, index, 4) for index in range(4)]
    for place in range(2):
        together = pl.from_arrow(pa.concat_tables(part[place] for part in parts))
        assert together.sort("subject_id", maintain_order=True).equals(pl.from_arrow(whole[place]))
    more = pl.from_arrow(generate_shard(SyntheticTextCodesConfig(patients=5_000), 0, 1)[0])  # three chunks
    assert more.filter(pl.col("subject_id") <= 90).equals(pl.from_arrow(whole[0]))
    assert more["subject_id"].n_unique() == 5_000
    assert not pl.from_arrow(generate_shard(SyntheticTextCodesConfig(patients=90, seed=1), 0, 1)[1]).equals(
        pl.from_arrow(whole[1])
    )
    events, truth = generate_shard(SyntheticTextCodesConfig(patients=2), 4, 5)
    assert (events.num_rows, truth.num_rows) == (0, 0)
    assert truth.schema == TRUTH_SCHEMA


def test_codes_say_the_factor_of_codes_and_a_reading_of_the_shared_one(world):
    events, truth = world
    assert categories(events, MARKERS)["number"].to_list() == (truth["c"] + 2).to_list()
    assert categories(events, ACUTE)["number"].to_list() == (truth["code_reading"] + 2).to_list()
    diagnoses = events.filter(pl.col("kind") == "diagnosis")
    assert not diagnoses.select("visit_id", "code").is_duplicated().any()
    by_visit = diagnoses.sort("visit_id", "position").group_by("visit_id").agg("position")["position"]
    assert all(list(row) == list(range(1, len(row) + 1)) for row in by_visit)
    table = pl.from_arrow(text_code_table(SyntheticTextCodesConfig()))
    roles = {"marker": MARKERS, "comorbidity": COMORBIDITIES, "acute": ACUTE}
    for role, wanted in roles.items():
        assert set(table.filter(pl.col("role") == role)["code"].str.slice(8, 3)) == set(wanted)
    assert set(diagnoses["code"]) <= set(table["code"])
    assert table.filter(pl.col("code") == "ICD10CM/E11.9")["role"].item() == "marker"


def test_notes_say_the_factor_of_text_a_reading_of_the_shared_one_and_the_type(world):
    events, truth = world
    notes = events.filter(pl.col("kind") == "note").sort("visit_id")["text_value"].to_list()
    assert [unfavourable(note) for note in notes] == (truth["t"] + 2).to_list()
    level = [next(k for k, said in enumerate(OPENINGS) if any(phrase in note for phrase in said)) for note in notes]
    assert level == (truth["text_reading"] + 2).to_list()
    early = [any(phrase in note for phrase in ("early onset", "juvenile", "Type one")) for note in notes]
    assert early == truth["early_type"].to_list()


@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_notes_are_short_and_only_disturbed_as_much_as_asked(noise):
    events, truth = make(text_noise=noise, patients=200)
    notes = events.filter(pl.col("kind") == "note").sort("visit_id")["text_value"]
    assert notes.str.split(" ").list.len().max() <= 128
    assert [unfavourable(note) for note in notes] == (truth["t"] + 2).to_list()
    for disturbance, first_too in (("Mother|Brother", True), ("Copied|Previous", False), ("Denies|No sign", True)):
        found = notes.str.count_matches(disturbance)
        first = truth["visit_id"] % 10 == 0
        expected = pl.Series([4 * noise * (first_too or not start) for start in first])
        assert abs(found.mean() - expected.mean()) < 0.15
    if noise == 1.0:  # what is copied was true of the visit before
        for before, now in pairwise(notes):
            copied = [said for said in sentences(now) if said.startswith(("Copied", "Previous"))]
            assert not copied or sum(map(is_bad, copied)) == unfavourable(before)


def test_the_oracle_is_the_formula_and_its_rate_the_prevalence():
    for ct in (0.0, 0.6, 1.0):
        _, truth = make(ct=ct, patients=4_000)
        s, c, t = (truth[name].cast(pl.Float64).to_numpy() for name in ("s", "c", "t"))
        rest = logit(truth["oracle_probability"].to_numpy()) - (0.6 * s + 0.5 * c + 0.5 * t + ct * c * t)
        np.testing.assert_allclose(rest, rest[0], atol=1e-9)
        assert abs(truth["oracle_probability"].mean() - 0.15) < 0.006
        asked = truth.drop_nulls("label")
        assert asked.height == truth.height - 4_000
        pull = (asked["label"] - asked["oracle_probability"]).sum() / np.sqrt(
            (asked["oracle_probability"] * (1 - asked["oracle_probability"])).sum()
        )
        assert abs(pull) < 4


def test_worlds_of_other_interaction_have_the_same_factors_diagnoses_and_notes():
    plain, interacting = make(ct=0.0), make(ct=1.0)
    same = ["subject_id", "visit_id", "s", "code_reading", "text_reading", "c", "t", "early_type"]
    assert plain[1].select(same).equals(interacting[1].select(same))
    for kind in ("diagnosis", "note"):
        first, second = (
            events.filter(pl.col("kind") == kind).sort("visit_id", "position").select("visit_id", "code", "text_value")
            for events, _ in (plain, interacting)
        )
        assert first.equals(second)
    assert not plain[1]["label"].equals(interacting[1]["label"])


def drug_log_odds(ct: float):
    """Log odds of the drugs of conditions at first visits, (visits, 8, 2), and what they are to depend on."""
    events, truth = make(ct=ct, patients=1_500)
    first = truth.filter(pl.col("visit_id") % 10 == 0)
    odds = logit(np.stack(first["medication_probabilities"].to_numpy())[:, :16]).reshape(-1, 8, 2)
    category = pl.col("code").str.slice(8, 3)
    codes = events.filter(pl.col("kind") == "diagnosis").group_by("visit_id").agg(category.alias("found"))
    found = first.join(codes, on="visit_id", how="left", maintain_order="left")["found"].to_list()
    coded = np.array([[name in row for name in MARKERS + COMORBIDITIES] for row in found])
    return odds, coded, first["early_type"].to_numpy()


def test_without_interaction_text_moves_a_drug_alike_whatever_is_coded():
    effects = {}
    for ct in (0.0, 0.6, 1.0):
        odds, coded, early = drug_log_odds(ct)
        effects[ct] = [
            odds[early][coded[early] == there].mean(axis=0) - odds[~early][coded[~early] == there].mean(axis=0)
            for there in (False, True)
        ]
    np.testing.assert_allclose(effects[0.0][0], [-0.6, 0.6])
    np.testing.assert_allclose(effects[0.0][1], effects[0.0][0])
    for ct in (0.6, 1.0):
        np.testing.assert_allclose(effects[ct][0], effects[0.0][0])
        np.testing.assert_allclose(effects[ct][1] - effects[ct][0], [-3 * ct, 3 * ct])


def test_drugs_follow_their_probabilities_and_are_often_given_again(world):
    events, truth = world
    given = events.filter(pl.col("kind") == "medication").group_by("visit_id").agg("code")
    rows = truth.join(given, on="visit_id", how="left", maintain_order="left")
    taken = np.array([[drug in (codes or ()) for drug in DRUGS] for codes in rows["code"].to_list()])
    p = np.stack(truth["medication_probabilities"].to_numpy())
    pulls = (taken - p).sum(axis=0) / np.sqrt((p * (1 - p)).sum(axis=0))
    assert np.abs(pulls).max() < 4
    later = (truth["visit_id"] % 10 > 0).to_numpy()
    before = np.roll(taken, 1, axis=0)[later]
    lift = np.array([p[later][before[:, k], k].mean() - p[later][~before[:, k], k].mean() for k in range(len(DRUGS))])
    assert (lift > 0.1).all()


@pytest.mark.parametrize("ct", [0.0, 1.0])
def test_the_readmission_task_asks_every_visit_but_the_last_and_finds_the_truth(tmp_path, ct):
    options = json.dumps({"patients": 120, "ct": ct})
    words = ["prepare", "synthetic_text_codes", "--output", str(tmp_path), "--options", options, "--workers", "1"]
    assert main([*words, "--shards", "2"]) == 0
    truth = pl.concat(pl.from_arrow(pq.read_table(path)) for path in shard_paths(tmp_path, "truth"))
    asked = truth.drop_nulls("label").sort("subject_id", "prediction_time")
    labels = pl.from_arrow(read_labels(label_dataset("readmission_30d", tmp_path, progress=False)))
    labels = labels.sort("subject_id", "prediction_time")
    assert labels["prediction_time"].equals(asked["prediction_time"])
    assert labels["boolean_value"].to_list() == asked["label"].to_list()
    assert 0 < asked["label"].sum() < asked.height


@pytest.mark.parametrize(
    ("field", "value"), [("patients", 0), ("ct", -0.1), ("prevalence", 0.0), ("text_noise", 1.1), ("synonyms", 0)]
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be between"):
        SyntheticTextCodesConfig(**{field: value})
    with pytest.raises(ValueError, match="`index` must be between 0 and 2"):
        generate_shard(SyntheticTextCodesConfig(patients=5), 3, 3)


REPORTED = {0.0: (0.677, 0.677, 0.724, 0.724), 0.6: (0.695, 0.695, 0.742, 0.768), 1.0: (0.694, 0.697, 0.734, 0.801)}
"""AUROC of LR on what codes say, what text says, both, and both with their product, of the design (200,000 rows)."""


@pytest.mark.slow
@pytest.mark.parametrize("ct", REPORTED)
def test_the_product_is_worth_what_the_design_measured_and_nothing_without_interaction(ct):
    _, truth = make(ct=ct, patients=40_000)
    rows = truth.drop_nulls("label")
    a, b, c, t = (rows[name].cast(pl.Float64).to_numpy() for name in ("code_reading", "text_reading", "c", "t"))
    y, train = rows["label"].to_numpy(), (rows["subject_id"] % 2 == 0).to_numpy()
    measured = []
    for columns in ((a, c), (b, t), (a, b, c, t), (a, b, c, t, c * t)):
        x = np.stack(columns, axis=1)
        scores = LogisticRegression().fit(x[train], y[train]).decision_function(x[~train])
        measured.append(roc_auc_score(y[~train], scores))
    np.testing.assert_allclose(measured, REPORTED[ct], atol=0.02)
    gain = measured[3] - measured[2]
    assert gain > 0.02 if ct else abs(gain) < 0.002
    assert roc_auc_score(y, rows["oracle_probability"].to_numpy()) >= max(measured) - 0.005

"""What the synthetic worlds promise: the oracle, the planted effects, and the failure controls."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.compute as pc
import pytest
import scipy.sparse as sparse
from scipy.sparse.linalg import svds
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_ehr.schema import BIRTH_CODE, validate_events
from hf_ehr.sources._synthetic_worlds import ORDER_PAIRS, OUTCOME_ROWS, SHARED_CODES, draw_world
from hf_ehr.sources.synthetic import SyntheticConfig, code_table, generate_shard, shuffle_codes
from tests.cohorts import PATIENTS, WORLDS, auroc, cohort, diagnoses, make, onsets, present, stays


@pytest.mark.parametrize(("world", "seed"), [*((world, 0) for world in WORLDS), ("C", 1), ("C", 2), ("null", 1)])
def test_the_oracle_is_calibrated_and_as_good_as_the_world_says(world, seed):
    _, truth = make(world, seed=seed)
    probability, label = truth["oracle_probability"].to_numpy(), truth["label"].to_numpy()
    for decile in np.array_split(np.argsort(probability), 10):
        p = probability[decile]
        assert abs(label[decile].sum() - p.sum()) < 4.5 * np.sqrt((p * (1 - p)).sum())
    if world != "site_b":  # keeps the intercept of C
        assert label.mean() == pytest.approx(0.15, abs=0.015)
    low, high = {"null": (0.77, 0.83), "C+": (0.86, 0.90)}.get(world, (0.82, 0.86))
    assert low < auroc(truth, probability) < high


def test_the_prevalence_knob_sets_the_prevalence():
    assert make(prevalence=0.4)[1]["label"].mean() == pytest.approx(0.4, abs=0.02)


def conditions_predict(world: str) -> float:
    """Test AUROC of a logistic regression on the true conditions."""
    truth = make(world)[1]
    half = PATIENTS // 2
    model = LogisticRegression(C=0.1).fit(present(truth)[:half], truth["label"][:half])
    return auroc(truth[half:], model.decision_function(present(truth)[half:]))


def test_conditions_predict_the_outcome_in_world_c_and_not_in_null():
    assert conditions_predict("C") > 0.8
    assert conditions_predict("null") < 0.54


def test_individual_codes_carry_the_outcome_of_null():
    config = SyntheticConfig(world="null", patients=PATIENTS)
    events, truth = cohort(config)
    weights = dict(zip(code_table(config)["code"].to_pylist(), draw_world(config).code_weights, strict=True))
    known = diagnoses(events, truth, config).filter("known").unique(["subject_id", "code"])
    score = np.bincount(known["subject_id"], [weights[code] for code in known["code"]], PATIENTS + 1)[1:]
    assert auroc(truth, score) == pytest.approx(auroc(truth, truth["oracle_probability"].to_numpy()), abs=1e-9)


def test_age_and_sex_tell_a_little():
    config = SyntheticConfig(patients=PATIENTS)
    events, truth = cohort(config)
    birth = events.filter(pl.col("code") == BIRTH_CODE)["time"]
    age = (truth["prediction_time"] - birth).dt.total_days().to_numpy() / 365.25
    sex = events.filter(pl.col("code").str.starts_with("Sex/"))["code"].eq("Sex/F").to_numpy()
    z = np.array(truth["z"].to_list())
    assert np.corrcoef(age, z[:, 0])[0, 1] > 0.3
    assert roc_auc_score(sex, z[:, 1]) > 0.6
    features = np.column_stack([age, sex])
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, truth["label"])
    assert 0.5 < auroc(truth, model.decision_function(features)) < 0.66


# --- effects and their controls


def length_predicts(**options) -> float:
    """AUROC of the longest inpatient stay, with the number of stays held fixed by taking the first one."""
    events, truth = make(**options)
    first = stays(events).filter(pl.col("visit") == "Visit/inpatient").unique("subject_id", keep="first")
    joined = first.join(truth, on="subject_id")
    return auroc(joined, joined["days"].to_numpy())


def test_length_of_stay_tells_of_the_outcome_unless_it_is_independent():
    assert length_predicts(severity=1.0) > 0.58
    assert length_predicts() > 0.52
    assert length_predicts(severity=1.0, los_independent=True) == pytest.approx(0.5, abs=0.025)
    truth = make(severity=1.0, los_independent=True)[1]
    assert abs(np.corrcoef(truth["severity"], truth["los_latent"])[0, 1]) < 0.03
    assert make()[1].select((pl.col("severity") == pl.col("los_latent")).all()).item()


def without_effect(config: SyntheticConfig, severity: bool = True) -> float:
    """AUROC of the oracle that knows the conditions (and severity), but nothing of order."""
    world, truth = draw_world(config), cohort(config)[1]
    odds = present(truth) @ world.weights
    if severity:
        odds += (world.effects["severity"] + world.effects["principal"]) * truth["severity"].to_numpy()
    return auroc(truth, odds)


def oracle(config: SyntheticConfig) -> float:
    return auroc(cohort(config)[1], cohort(config)[1]["oracle_probability"].to_numpy())


def test_order_carries_risk_that_conditions_do_not_tell_and_none_at_strength_zero():
    plain, ordered = SyntheticConfig(patients=PATIENTS), SyntheticConfig(patients=PATIENTS, order=1.5)
    assert oracle(plain) == pytest.approx(without_effect(plain), abs=1e-6)
    assert oracle(ordered) > without_effect(ordered) + 0.01
    gaps = []
    for config in (plain, ordered):
        truth = cohort(config)[1]
        start, label = onsets(truth), np.repeat(truth["label"].to_numpy()[:, None], 4, 1)
        first, second = (start[:, [pair[i] for pair in ORDER_PAIRS]] for i in (0, 1))
        gaps.append(label[first < second].mean() - label[first > second].mean())
    assert abs(gaps[0]) < 0.06
    assert gaps[1] > 0.2


def principal_and_severity(config: SyntheticConfig) -> float:
    """Correlation of severity with how much oftener than by chance a patient's outcome codes come first."""
    events, truth = cohort(config)
    codes = diagnoses(events, truth, config).with_columns(size=pl.len().over("visit_id"))
    codes = codes.filter(pl.col("condition").is_in(list(OUTCOME_ROWS)) & (pl.col("size") > 2))
    codes = codes.join(truth.select("subject_id", "severity"), on="subject_id")
    return codes.select(pl.corr(pl.col("position").eq(1) - 1 / pl.col("size"), "severity")).item()


def test_the_principal_position_carries_severity_and_nothing_at_strength_zero():
    plain = SyntheticConfig(patients=PATIENTS)
    strong = SyntheticConfig(patients=PATIENTS, principal=1.0)
    assert abs(principal_and_severity(plain)) < 0.025
    assert principal_and_severity(strong) > 0.12
    assert oracle(strong) > without_effect(strong, severity=False) + 0.03
    assert oracle(plain) < without_effect(plain, severity=False) + 0.01


def test_an_unspecified_code_is_shared_by_opposite_risks_and_its_company_tells_which():
    config = SyntheticConfig(patients=PATIENTS, polysemy=0.3)
    events, truth = cohort(config)
    world, ill, z = draw_world(config), present(truth), np.array(truth["z"].to_list())
    codes = diagnoses(events, truth, config)
    share = codes["code"].is_in(SHARED_CODES).sum()
    own = codes["condition"].is_in(list(OUTCOME_ROWS)).sum()
    assert 0.25 < share / (share + own) < 0.3  # a repeat within a visit counts once, and shared codes repeat more
    for index, code in enumerate(SHARED_CODES):
        up, down = OUTCOME_ROWS[2 * index : 2 * index + 2]
        assert world.weights[up] > 0 > world.weights[down]
        holders = codes.filter(pl.col("code") == code)["subject_id"].unique().to_numpy() - 1
        one = holders[ill[holders, up] != ill[holders, down]]  # one of the two, and not both
        assert len(set(holders) - set(np.flatnonzero(ill[:, up] + ill[:, down]))) == 0
        assert 0.2 < ill[one, up].mean() < 0.8
        company = z[one] @ (world.loadings[up] - world.loadings[down])
        assert roc_auc_score(ill[one, up], company) > 0.6
    plain, _ = make()
    assert not plain["code"].is_in(SHARED_CODES).any()


def test_effects_that_are_off_leave_the_codes_of_world_c_untouched():
    plain, _ = make(patients=500)
    ordered, _ = make(patients=500, order=1.0)
    assert plain.equals(ordered)
    assert not plain.equals(make(patients=500, principal=1.0)[0])


def test_world_names_stand_for_their_effects():
    assert draw_world(SyntheticConfig(world="A")).effects["zipf"] == 1.1
    assert draw_world(SyntheticConfig(world="C+")).effects == {
        "zipf": 0.3, "severity": 0.25, "polysemy": 0.3, "order": 1.0, "principal": 0.5,
    }  # fmt: skip
    assert draw_world(SyntheticConfig(world="C+", order=0.0)).effects["order"] == 0.0
    codes = make("A")[0].filter(pl.col("kind") == "diagnosis")["code"].value_counts()["count"].sort(descending=True)
    flat = make("C")[0].filter(pl.col("kind") == "diagnosis")["code"].value_counts()["count"].sort(descending=True)
    assert codes[0] / codes.median() > 3 * flat[0] / flat.median()


def test_site_b_is_another_hospital_under_the_same_law():
    home, away = SyntheticConfig(patients=PATIENTS), SyntheticConfig(world="site_b", patients=PATIENTS)
    here, there = draw_world(home), draw_world(away)
    assert (here.loadings == there.loadings).all()
    assert (here.weights == there.weights).all()
    assert 0.02 < np.abs(here.prevalence - there.prevalence).mean() < 0.12
    codes = [set(code_table(config)["code"].to_pylist()) for config in (home, away)]
    icd9 = [sum(code.startswith("ICD9CM/") for code in part) for part in codes]
    assert icd9[1] < 0.65 * icd9[0]
    assert 0.7 < len(codes[0] & codes[1]) / len(codes[0]) < 0.9
    assert all(code.startswith("ICD10CM/") for code in codes[1] - codes[0])
    counts = [len(diagnoses(*cohort(config), config)) for config in (home, away)]
    assert 1.15 < counts[1] / counts[0] < 1.7
    # one intercept: the same conditions and severity have the same risk
    odds = []
    for config in (home, away):
        truth = cohort(config)[1]
        p = truth["oracle_probability"].to_numpy()
        odds.append(np.log(p / (1 - p)) - present(truth) @ here.weights - 0.25 * truth["severity"].to_numpy())
    assert np.ptp(np.concatenate(odds)) < 1e-5


def test_the_placebo_keeps_marginals_and_lengths_and_destroys_co_occurrence():
    config = SyntheticConfig(patients=4_000)
    events, truth = generate_shard(config, 0, 1)
    shuffled = validate_events(shuffle_codes(events, 7))
    assert shuffled.drop_columns("code").equals(events.drop_columns("code"))
    assert shuffled.equals(shuffle_codes(events, 7))
    before, after = (pl.from_arrow(table) for table in (events, shuffled))
    for kind in ("diagnosis", "medication"):
        counts = [part.filter(pl.col("kind") == kind)["code"].value_counts().sort("code") for part in (before, after)]
        assert counts[0].equals(counts[1])
    other = ~pl.col("kind").is_in(["diagnosis", "medication"])
    assert before.filter(other).equals(after.filter(other))

    def same_condition(part: pl.DataFrame) -> float:
        """Share of neighbouring codes of one patient that stand for the same condition."""
        codes = diagnoses(part, pl.from_arrow(truth), config).drop_nulls("condition")
        pair = codes.filter(pl.col("subject_id") == pl.col("subject_id").shift(1))
        shifted = codes["condition"].shift(1).filter(codes["subject_id"] == codes["subject_id"].shift(1))
        return (pair["condition"] == shifted).mean()

    frequency = np.bincount(diagnoses(before, pl.from_arrow(truth), config)["condition"].drop_nulls(), minlength=40)
    chance = ((frequency / frequency.sum()) ** 2).sum()
    assert same_condition(before) > 3 * chance
    assert same_condition(after) == pytest.approx(chance, rel=0.15)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"world": "B"}, "world"),
        ({"patients": 0}, "patients"),
        ({"conditions": 12}, "conditions"),
        ({"synonyms": 151}, "synonyms"),
        ({"polysemy": 1.2}, "polysemy"),
        ({"world": "null", "order": 1.0}, "null"),
    ],
)
def test_a_configuration_that_exists_is_valid(options, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SyntheticConfig(**options)


def test_a_shard_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="`index` must be between 0 and 2"):
        generate_shard(SyntheticConfig(patients=5), 3, 3)


def test_the_smallest_world_works():
    config = SyntheticConfig(conditions=18, synonyms=3, noise_codes=5, codes_per_patient=8, patients=50)
    events, _ = generate_shard(config, 0, 1)
    assert set(events.filter(pc.equal(events["kind"], "diagnosis"))["code"].to_pylist()) <= set(
        code_table(config)["code"].to_pylist()
    )


# --- the claim the cohort was built for: co-occurrence helps where labels are few


def bag(config: SyntheticConfig, shuffle: bool = False) -> sparse.csr_matrix:
    """``(patients, codes)`` 0/1 of the codes known at the prediction time."""
    events, truth = generate_shard(config, 0, 1)
    events = shuffle_codes(events, 0) if shuffle else events
    known = diagnoses(pl.from_arrow(events), pl.from_arrow(truth), config).filter("known")
    vocabulary = code_table(config)["code"].to_pylist()
    columns = known["code"].replace_strict(vocabulary, list(range(len(vocabulary))), return_dtype=pl.Int64)
    shape = (config.patients, len(vocabulary))
    return (sparse.csr_matrix((np.ones(len(known)), (known["subject_id"] - 1, columns)), shape) > 0).astype(float)


def ppmi_svd(codes: sparse.csr_matrix, size: int) -> np.ndarray:
    """``(codes, size)``: positive pointwise mutual information of two codes in one patient, factorised."""
    pairs = (codes.T @ codes).tocsr()
    pairs.setdiag(0)
    total, pairs = np.asarray(pairs.sum(1)).ravel(), pairs.tocoo()
    information = np.log(np.maximum(pairs.data, 1e-9) * total.sum() / (total[pairs.row] * total[pairs.col]))
    u, s, _ = svds(sparse.csr_matrix((np.maximum(information, 0), (pairs.row, pairs.col)), pairs.shape), size, rng=0)
    return u * np.sqrt(s)


def few_labels(world: str, shuffle: bool = False) -> tuple[float, float]:
    """AUROC with 300 labels of (bag of codes, mean PPMI-SVD vector of 16,000 unlabelled patients), over 4 draws."""
    config = SyntheticConfig(world=world, patients=24_000)
    codes, label = bag(config), cohort(config)[1]["label"].to_numpy()
    vectors = ppmi_svd(bag(config, shuffle)[:16_000] if shuffle else codes[:16_000], 40)
    dense = codes @ vectors / np.maximum(np.asarray(codes.sum(1)).reshape(-1, 1), 1)
    test, scores = slice(16_000, 20_000), []
    for draw in range(4):
        rows = np.random.default_rng(draw).choice(np.arange(20_000, 24_000), 300, replace=False)
        lr = LogisticRegression(C=0.1, max_iter=300).fit(codes[rows], label[rows])
        pre = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(dense[rows], label[rows])
        scores.append(
            [roc_auc_score(label[test], model.decision_function(x[test])) for model, x in ((lr, codes), (pre, dense))]
        )
    return tuple(np.mean(scores, axis=0))


@pytest.mark.slow
def test_co_occurrence_helps_at_300_labels_in_world_c_and_neither_in_null_nor_as_a_placebo():
    plain, pre = few_labels("C")
    assert pre > plain + 0.03
    plain_null, pre_null = few_labels("null")
    assert pre_null < plain_null + 0.01
    _, placebo = few_labels("C", shuffle=True)
    assert placebo < plain - 0.03

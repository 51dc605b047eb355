"""Baselines of medication recommendation: what they may know, and what each makes of it (rows 43 and 44)."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.recommendation import recommendation_metrics
from hf_ehr.recommendation_baselines import (
    RECOMMENDATION_BASELINES,
    AskedVisits,
    lightgbm,
    logistic_regression,
    popularity,
    repeat_last_visit,
)


def patient(subject: int, diagnoses: list, drugs: list, **columns) -> dict:
    """A row whose visits are asked about from the second on; ids from 5 on are codes."""
    asked = [number > 0 for number in range(len(drugs))]
    targets = [[code - 5 for code in codes] if number else [] for number, codes in enumerate(drugs)]
    row = {"subject_id": subject, "diagnosis_ids": diagnoses, "medication_ids": drugs}
    return row | {"asked": asked, "label_ids": targets} | columns


ROWS = [  # 4 diagnoses, 3 drugs
    patient(7, [[5, 2], [6, 6], [8]], [[5], [7], []], label_ids=[[], [2], [0, 1, 1]]),  # nothing shown of the last
    patient(3, [[5]], [[6]]),
    patient(9, [[], [], [7]], [[6], [], []], asked=[True, False, True]),  # the first is never asked about
]
NESTED = pa.list_(pa.list_(pa.int32()))
SCHEMA = pa.schema(
    {"subject_id": pa.int64(), "diagnosis_ids": NESTED, "medication_ids": NESTED, "asked": pa.list_(pa.bool_()),
     "label_ids": NESTED}
)  # fmt: skip


def visits(rows=ROWS, diagnoses: int = 4, drugs: int = 3) -> AskedVisits:
    return AskedVisits.of(pa.Table.from_pylist(rows, schema=SCHEMA), diagnoses + 5, drugs + 5)


def test_asked_visits_know_the_earlier_ones_and_their_own_diagnoses_by_hand():
    found = visits()
    assert found.patients.tolist() == [7, 7, 9]
    # History of diagnoses, history of drugs, the visit's diagnoses.
    assert found.features.toarray().tolist() == [
        [*(1, 0, 0, 0), *(1, 0, 0), *(0, 1, 0, 0)],
        [*(1, 1, 0, 0), *(1, 0, 1), *(0, 0, 0, 1)],
        [*(0, 0, 0, 0), *(0, 1, 0), *(0, 0, 1, 0)],
    ]
    assert found.drugs.toarray().tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert found.previous.toarray().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_a_dataset_that_is_a_selection_gives_the_visits_of_its_rows():
    import datasets

    dataset = datasets.Dataset(pa.Table.from_pylist(ROWS, schema=SCHEMA)).select([2, 0])
    found = AskedVisits.of(dataset, 9, 8)
    assert found.patients.tolist() == [9, 7, 7]
    assert np.array_equal(found.features.toarray(), visits([ROWS[2], ROWS[0]]).features.toarray())


def test_models_are_trained_and_read_on_the_same_visits_in_the_same_order():
    import datasets
    import torch

    from hf_ehr import VisitRnnConfig, VisitRnnForMedicationRecommendation
    from hf_ehr.training._visit_fitting import asked_visits, predict_visits

    rows = [row | {"visit_ids": list(range(len(row["asked"])))} for row in (ROWS[0], ROWS[0] | {"subject_id": 4})]
    examples = datasets.Dataset.from_list(rows)
    mine, theirs = AskedVisits.of(examples, 9, 8), asked_visits(examples, 3)
    assert mine.patients.tolist() == theirs.subject_ids.tolist()
    assert np.array_equal(mine.drugs.toarray(), theirs.truth)
    assert np.array_equal(mine.previous.toarray(), theirs.previous)
    torch.manual_seed(0)
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    sizes = {"diagnosis_vocab_size": 9, "medication_vocab_size": 8, "initializer_range": 1.0}
    model = VisitRnnForMedicationRecommendation(VisitRnnConfig.tiny(**sizes, **names)).eval()
    found = predict_visits(model, examples)
    diagnoses, drugs = torch.tensor([[[5, 2], [6, 6], [8, 0]]]), torch.tensor([[[5], [7], [0]]])
    with torch.no_grad():
        expected = model(diagnoses, drugs).logits[0, 1:].sigmoid().numpy()
    np.testing.assert_allclose(found, np.concatenate([expected, expected]), atol=1e-6)


sets = st.lists(st.integers(5, 8), max_size=3)
people = st.lists(st.tuples(sets, sets), min_size=1, max_size=5)


@given(st.lists(people, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_of_the_asked_visits_drugs_or_of_later_visits_is_known(cohort, data):
    rows = [patient(n, [dx for dx, _ in p], [rx for _, rx in p]) for n, p in enumerate(cohort)]
    before = visits(rows, 4, 4).features.toarray()
    place = data.draw(st.integers(0, len(rows) - 1))
    visit = data.draw(st.integers(0, len(cohort[place]) - 1))
    changed = list(rows)
    drugs, diagnoses = rows[place]["medication_ids"], rows[place]["diagnosis_ids"]
    later = len(drugs) - visit - 1
    changed[place] = patient(
        place, [*diagnoses[: visit + 1], *([[5, 8]] * later)], [*drugs[:visit], data.draw(sets), *([[8]] * later)]
    )
    after = visits(changed, 4, 4).features.toarray()
    first = sum(len(p) - 1 for p in cohort[:place])
    rows_of_patient = np.arange(first, first + len(cohort[place]) - 1)
    free = rows_of_patient[visit:]  # those asked about later may change
    same = np.setdiff1d(np.arange(len(before)), free)
    assert np.array_equal(before[same], after[same])


def world(seed: int, n: int = 150) -> AskedVisits:
    """Drug 0 is given for diagnosis 0, drug 1 goes on once given, drug 2 by chance, 3 never and 4 always."""
    rng = np.random.default_rng(seed)
    rows = []
    for subject in range(n):
        history: tuple[list, list] = ([], [])
        chronic = rng.random() < 0.2
        for _ in range(rng.integers(2, 5)):
            own = (np.flatnonzero(rng.random(6) < 0.3) + 5).tolist()
            chronic = chronic or rng.random() < 0.1
            drugs = [9, *([5] if 5 in own else []), *([6] if chronic else []), *([7] if rng.random() < 0.3 else [])]
            history[0].append(own)
            history[1].append(drugs)
        rows.append(patient(subject, *history))
    return visits(rows, 6, 5)


def test_repeating_the_last_visit_and_popularity_by_hand():
    found = visits()
    assert np.array_equal(repeat_last_visit(found, found, found).test, found.previous.toarray())
    shares = popularity(found, visits(ROWS[:1]), found)
    assert shares.validation.shape == (2, 3)
    np.testing.assert_allclose(shares.test, np.full((3, 3), 1 / 3), rtol=1e-6)


def test_logistic_regression_finds_what_the_diagnoses_and_the_history_say_and_skips_constant_drugs():
    train, validation, test = (world(seed) for seed in range(3))
    found = logistic_regression(train, validation, test, inverse_penalties=(1.0, 10.0)).test
    truth = test.drugs.toarray()
    assert (found[:, 3] == 0).all()
    assert (found[:, 4] == 1).all()
    assert ((found[:, 0] > 0.5) == truth[:, 0]).mean() > 0.99
    assert ((found[:, 1] > 0.5) == truth[:, 1]).mean() > 0.85
    scores = {
        name: recommendation_metrics(truth, p, threshold=0.5)["jaccard_samples"]
        for name, p in (
            ("lr", found),
            ("repeat", repeat_last_visit(train, validation, test).test),
            ("popular", popularity(train, validation, test).test),
        )
    }
    assert scores["lr"] > max(scores["repeat"], scores["popular"]) + 0.03


def test_one_drug_is_fitted_as_scikit_learn_fits_it():
    from sklearn.linear_model import LogisticRegression

    train, validation, test = (world(seed) for seed in range(3))
    found = logistic_regression(train, validation, test, inverse_penalties=(0.5,)).test[:, 2]
    reference = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000)
    reference.fit(train.features, train.drugs.toarray()[:, 2])
    np.testing.assert_allclose(found, reference.predict_proba(test.features)[:, 1], atol=2e-3)


def test_the_penalty_is_chosen_on_validation():
    train, validation, test = (world(seed) for seed in range(3))
    alone = {c: logistic_regression(train, validation, test, inverse_penalties=(c,)) for c in (1e-4, 1.0)}
    truth = validation.drugs.toarray()
    quality = {c: recommendation_metrics(truth, p.validation)["average_precision_samples"] for c, p in alone.items()}
    best = max(quality, key=quality.get)
    both = logistic_regression(train, validation, test, inverse_penalties=(1e-4, 1.0))
    assert quality[1e-4] != quality[1.0]
    assert np.array_equal(both.test, alone[best].test)


def test_lightgbm_is_fitted_for_the_most_frequent_mixed_drugs_and_others_get_their_share():
    pytest.importorskip("lightgbm")
    train, validation, test = (world(seed, 60) for seed in range(3))
    share = train.drugs.toarray().mean(axis=0)
    count = train.drugs.toarray().sum(axis=0)
    assert max(range(3), key=lambda drug: count[drug]) != 2
    fitted = sorted(range(3), key=lambda drug: -count[drug])[:2]
    found = lightgbm(train, validation, test, max_labels=2).test
    for drug in range(5):
        constant = np.allclose(found[:, drug], share[drug])
        assert constant == (drug not in fitted)
    assert recommendation_metrics(test.drugs.toarray()[:, [0]], found[:, [0]])["auroc_micro"] > 0.95


@pytest.mark.parametrize("name", ["Repeat last visit", "Popularity", "L2 LR"])
def test_the_drugs_of_the_test_visits_are_never_read(name):
    train, validation, test = (world(seed, 40) for seed in range(3))
    hidden = AskedVisits(test.features, test.drugs * 0, test.previous, test.patients)
    fit = RECOMMENDATION_BASELINES[name]
    assert np.array_equal(fit(train, validation, test, seed=0).test, fit(train, validation, hidden, seed=0).test)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="diagnosis_ids"):
        visits(diagnoses=3)
    with pytest.raises(ValueError, match="same visits"):
        visits([ROWS[0] | {"medication_ids": [[5]]}])
    with pytest.raises(ValueError, match="label_ids"):
        visits([ROWS[0] | {"label_ids": [[], [3], []]}])
    with pytest.raises(ValueError, match="train"):
        popularity(visits(ROWS[1:2]), visits(), visits())

"""Static code embeddings: which pairs a window makes, what the vectors learn from them, and what a folder holds."""

import json
from itertools import permutations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr import EhrCodeTokenizer
from hf_ehr import code_embeddings as module
from hf_ehr.baselines import ppmi_svd_embeddings
from hf_ehr.code_embeddings import CodeEmbeddings, ppmi_svd, time_window_skipgram, window_pairs
from hf_ehr.datasets import build_examples
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import LeakageError, check_fitted_on

from .builders import patient, records, visit

CODES = [f"LOCAL/{letter}" for letter in "ABCDEFGH"]
A, B, C, D, E, F, G, H = CODES


def pairs_of(table, tokenizer, subject_ids=None, **options):
    """All pairs as a sorted list of code strings."""
    ids = table["subject_id"].to_pylist() if subject_ids is None else subject_ids
    chunks = list(window_pairs(table, tokenizer, subject_ids=ids, **options))
    codes, contexts = (tokenizer.convert_ids_to_tokens(row.tolist()) for row in np.concatenate(chunks, axis=1))
    return sorted(zip(codes, contexts, strict=True))


def both_ways(*pairs):
    return sorted([*pairs, *((second, first) for first, second in pairs)])


def write_shards(folder, *tables):
    (folder / "records").mkdir(parents=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / "records" / f"shard-{number:05d}-of-{len(tables):05d}.parquet")
    return folder


# Pairs


THREE_VISITS = records(
    patient(1, [visit(0, diagnoses=[A, B]), visit(30, diagnoses=[C]), visit(31, diagnoses=[A, D])]), patient(2, [])
)


def test_the_pairs_of_three_visits_by_hand():
    tokenizer = EhrCodeTokenizer.from_codes(CODES)
    same_visit = both_ways((A, B), (A, D))
    # day 0 and day 30 are 30 days apart, day 30 and 31 one day, day 0 and 31 are too far; A with A is no pair
    month = both_ways((A, B), (A, D), (A, C), (B, C), (C, A), (C, D))
    assert pairs_of(THREE_VISITS, tokenizer, window_days=30) == month
    assert pairs_of(THREE_VISITS, tokenizer, window_days=29.9999) == both_ways((A, B), (A, D), (C, A), (C, D))
    assert pairs_of(THREE_VISITS, tokenizer, window_days=0) == same_visit
    ever = both_ways((A, B), (A, D), (A, C), (B, C), (C, A), (C, D), (A, D), (B, A), (B, D))
    assert pairs_of(THREE_VISITS, tokenizer, window_days=1e9) == ever


def test_back_off_joins_codes_and_unknown_ones_make_no_pair():
    tokenizer = EhrCodeTokenizer.from_codes(["ICD10CM/E11", A], kinds=["diagnoses", "medications"])
    table = records(
        patient(
            1,
            [
                visit(
                    0, diagnoses=["ICD10CM/E11.9", "ICD10CM/E11.65", "LOCAL/UNKNOWN"], medications=[A], procedures=[B]
                )
            ],
        )
    )
    assert pairs_of(table, tokenizer) == both_ways(("ICD10CM/E11", A))


def test_a_vocabulary_without_an_unknown_token_makes_no_pair_of_what_it_lacks():
    tokenizer = EhrCodeTokenizer.from_codes([A, B], code_exact=True)
    assert pairs_of(records(patient(1, [visit(0, diagnoses=[C, B, A])])), tokenizer) == both_ways((A, B))


def test_only_the_named_patients_are_read():
    tokenizer = EhrCodeTokenizer.from_codes(CODES)
    table = records(
        *(patient(number, [visit(0, diagnoses=pair)]) for number, pair in enumerate([[A, B], [C, D], [E, F]]))
    )
    assert pairs_of(table, tokenizer, subject_ids=[2, 0]) == both_ways((A, B), (E, F))
    assert pairs_of(table.slice(1), tokenizer, subject_ids=[1]) == both_ways((C, D))


def test_a_visit_without_a_start_has_no_place_in_time():
    tokenizer = EhrCodeTokenizer.from_codes(CODES)
    lost = visit(0, diagnoses=[E, F]) | {"start": None}
    table = records(patient(1, [visit(0, diagnoses=[A, B]), lost]))
    assert pairs_of(table, tokenizer, window_days=1e9) == both_ways((A, B))


@settings(max_examples=60, deadline=None)
@given(
    days=st.lists(st.lists(st.integers(-40_000, 40_000), max_size=5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(0, 3), min_size=20, max_size=20),
    window=st.sampled_from([0, 1, 30, 365.25, 40_000]),
    shuffled=st.booleans(),
)
def test_pairs_are_those_of_a_loop_and_never_cross_a_patient_or_the_window(days, sizes, window, shuffled):
    # every code occurs once in the world, so that its name tells whose it is and when
    counter, owner, patients = iter(range(1000)), {}, []
    for number, starts in enumerate(days):
        visits = []
        for place, start in enumerate(sorted(starts)):
            codes = [f"LOCAL/{next(counter)}" for _ in range(sizes[5 * number + place])]
            owner |= dict.fromkeys(codes, (number, start))
            visits.append(visit(start, diagnoses=codes))
        patients.append(patient(number, visits))
    tokenizer = EhrCodeTokenizer.from_codes(list(owner) or [A])
    expected = [
        (one, other)
        for one, other in permutations(owner, 2)
        if owner[one][0] == owner[other][0] and abs(owner[one][1] - owner[other][1]) <= window
    ]
    rng = np.random.default_rng(0) if shuffled else None
    assert pairs_of(records(*patients), tokenizer, window_days=window, rng=rng) == sorted(expected)


def test_chunks_shards_and_their_order_leave_the_pairs_the_same(tmp_path, monkeypatch):
    tokenizer = EhrCodeTokenizer.from_codes(CODES)
    rng = np.random.default_rng(0)
    tables = [
        records(
            *(
                patient(
                    10 * shard + number, [visit(day, diagnoses=rng.choice(CODES, 4, False)) for day in (0, 20, 60)]
                )
                for number in range(10)
            )
        )
        for shard in range(3)
    ]
    folder = write_shards(tmp_path, *tables)
    whole = pairs_of(folder, tokenizer, subject_ids=range(30))
    monkeypatch.setattr(module, "PAIRS_PER_CHUNK", 50)
    assert pairs_of(folder, tokenizer, subject_ids=range(30), rng=np.random.default_rng(1)) == whole
    sizes = [
        chunk.shape[1]
        for chunk in window_pairs(folder, tokenizer, subject_ids=range(30), rng=np.random.default_rng(1))
    ]
    assert max(sizes) <= 2 * 50


def test_the_shuffle_scatters_patients_and_the_contexts_of_a_code():
    table, tokenizer = planted(100, apart=0)
    options = {"subject_ids": range(100), "window_days": 0}
    (ordered,) = window_pairs(table, tokenizer, **options)
    (shuffled,) = window_pairs(table, tokenizer, rng=np.random.default_rng(0), **options)
    (other,) = window_pairs(table, tokenizer, rng=np.random.default_rng(1), **options)
    repeats = [np.mean(pairs[0, 1:] == pairs[0, :-1]) for pairs in (ordered, shuffled)]
    assert repeats[0] > 0.7  # a code and its four or five contexts
    assert repeats[1] < 2 / 24  # by chance one in 24
    assert not np.array_equal(shuffled, other)


@pytest.mark.parametrize("window", [-1, float("nan"), float("inf")])
def test_a_window_that_is_no_number_of_days_is_refused(window):
    with pytest.raises(ValueError, match="`window_days` must be a number of days from 0"):
        next(window_pairs(THREE_VISITS, EhrCodeTokenizer.from_codes(CODES), subject_ids=[1], window_days=window))


# Vectors


GROUPS = [[f"LOCAL/{group}{number}" for number in range(6)] for group in "PQRS"]


def planted(n, apart, seed=0):
    """Three codes of P (or R) on day 0, three of Q (or S) ``apart`` days later; P and Q never meet R and S."""
    rng = np.random.default_rng(seed)
    patients = []
    for number in range(n):
        first, second = GROUPS[:2] if number % 2 else GROUPS[2:]
        visits = [visit(0, diagnoses=rng.choice(first, 3, replace=False).tolist())]
        visits.append(visit(apart, diagnoses=rng.choice(second, 3, replace=False).tolist()))
        patients.append(patient(number, visits))
    return records(*patients), EhrCodeTokenizer.from_codes([code for group in GROUPS for code in group])


def cosines(table):
    """Mean cosine between groups, (4, 4), leaving a code and itself out."""
    unit = table.vectors / np.linalg.norm(table.vectors, axis=1, keepdims=True)
    matrix, rows = unit @ unit.T, np.array([code[6] for code in table.codes])
    np.fill_diagonal(matrix, np.nan)
    return np.array([[np.nanmean(matrix[np.ix_(rows == one, rows == two)]) for two in "PQRS"] for one in "PQRS"])


def learn(table, tokenizer, **options):
    options = {"dim": 8, "epochs": 20, "window_days": 30} | options
    return time_window_skipgram(table, tokenizer, subject_ids=table["subject_id"].to_numpy(), **options)


PARTNERS, STRANGERS = ([0, 2], [1, 3]), ([0, 0, 1, 1], [2, 3, 2, 3])


def test_codes_that_meet_within_the_window_are_nearer_than_codes_that_meet_only_outside_it():
    between = cosines(learn(*planted(300, apart=90)))
    assert np.diag(between).min() > between[~np.eye(4, dtype=bool)].max() + 0.3
    # P and Q meet 90 days apart, which a window of 30 days does not see: no nearer than P and R, which never meet
    assert between[PARTNERS].mean() < between[STRANGERS].mean() + 0.1


def test_one_day_decides_whether_two_visits_share_a_window():
    table, tokenizer = planted(300, apart=90)
    inside, outside = (cosines(learn(table, tokenizer, window_days=days)) for days in (90, 89))
    assert inside[PARTNERS].mean() > inside[STRANGERS].mean() + 0.5
    assert outside[PARTNERS].mean() < outside[STRANGERS].mean() + 0.1


def test_the_seed_decides_everything():
    table, tokenizer = planted(60, apart=10)
    one, again, other = (learn(table, tokenizer, epochs=2, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.vectors, again.vectors)
    assert not np.allclose(one.vectors, other.vectors)


@pytest.mark.parametrize("codes", [2, 300])
def test_a_step_is_the_gradient_of_the_objective(codes):
    rng = np.random.default_rng(0)
    model = module._SkipGram(rng.integers(1, 50, codes).astype(float), 4, negatives=5, rng=np.random.default_rng(7))
    model.context.normal_(generator=module.torch.Generator().manual_seed(0))
    u, v = model.centre.clone().requires_grad_(), model.context.clone().requires_grad_()
    i, j = rng.integers(0, codes, (2, 40))
    noise = np.random.default_rng(7)
    noise.random((codes, 4))  # the start
    drawn = np.searchsorted(model.cumulative, noise.random(module.NOISE_CODES_PER_STEP), side="right")
    log_sigmoid = module.torch.nn.functional.logsigmoid
    objective = log_sigmoid((u[i] * v[j]).sum(dim=1)).sum()
    objective = objective + 5 * log_sigmoid(-u[i] @ v[drawn].T).mean(dim=1).sum()
    objective.backward()
    model.step(i, j, rate=0.1)
    module.torch.testing.assert_close(model.centre, (u + 0.1 * u.grad).detach())
    module.torch.testing.assert_close(model.context, (v + 0.1 * v.grad).detach())


def test_two_codes_that_always_meet_stay_finite_however_often():
    table = records(*(patient(number, [visit(0, diagnoses=[A, B])]) for number in range(1000)))
    vectors = learn(table, EhrCodeTokenizer.from_codes(CODES), learning_rate=0.1).vectors
    assert vectors.shape == (2, 8)
    assert np.abs(vectors).max() < 10


def test_the_learning_rate_falls_whether_or_not_progress_is_shown(monkeypatch):
    table, tokenizer = planted(40, apart=10)
    shown = learn(table, tokenizer, epochs=2).vectors
    monkeypatch.setattr(module, "tqdm", lambda **options: _Silent())
    np.testing.assert_array_equal(shown, learn(table, tokenizer, epochs=2).vectors)


class _Silent:
    n = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def update(self, count):
        pass


def test_codes_without_company_have_no_vector_and_no_company_at_all_is_an_error():
    tokenizer = EhrCodeTokenizer.from_codes(CODES)
    table = records(
        patient(1, [visit(0, diagnoses=[A, B]), visit(100, diagnoses=[C])]), patient(2, [visit(0, diagnoses=[D])])
    )
    assert learn(table, tokenizer).codes == [A, B]
    with pytest.raises(EhrDataError, match="`window_days`=30"):
        learn(table.slice(1), tokenizer)
    with pytest.raises(EhrDataError, match="No two codes share a patient"):
        ppmi_svd(table.slice(1), tokenizer, subject_ids=[2], dim=2)
    with pytest.raises(ValueError, match="`epochs` must be above 0, got 0"):
        learn(table, tokenizer, epochs=0)


def test_both_methods_name_the_patients_they_were_fitted_on():
    table, tokenizer = planted(12, apart=10)
    for fitted in (
        ppmi_svd(table, tokenizer, subject_ids=[5, 3, 4], dim=2),
        time_window_skipgram(table, tokenizer, subject_ids=[5, 3, 4], dim=2),
    ):
        check_fitted_on(fitted.settings["fitted_on"], [3, 4, 5])
        with pytest.raises(LeakageError):
            check_fitted_on(fitted.settings["fitted_on"], [3, 4, 5, 6])


def test_ppmi_from_records_is_that_of_examples_shard_by_shard(tmp_path):
    table, tokenizer = planted(40, apart=400)
    folder = write_shards(tmp_path, table.slice(0, 13), table.slice(13))
    train = range(30)
    examples = build_examples(table, tokenizer, subject_ids=train)
    expected = ppmi_svd_embeddings(examples, len(tokenizer), dim=5)
    matrix, known = ppmi_svd(folder, tokenizer, subject_ids=train, dim=5).for_tokenizer(tokenizer)
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    assert known.tolist() == [False] * 5 + [True] * 24


# The table


def table_of(codes, vectors, **settings):
    return CodeEmbeddings(codes, np.array(vectors, np.float32), "ppmi_svd", settings)


def test_a_table_survives_its_folder(tmp_path):
    table = table_of([A, B], [[1, 2], [3, 4.5]], fitted_on="0f", dim=2)
    table.save(tmp_path / "new" / "folder")
    loaded = CodeEmbeddings.load(tmp_path / "new" / "folder")
    np.testing.assert_array_equal(loaded.vectors, table.vectors)
    assert loaded.vectors.dtype == np.float32
    assert (loaded.codes, loaded.method, loaded.settings) == (table.codes, table.method, table.settings)


def test_an_interrupted_rewrite_is_not_mistaken_for_a_table(tmp_path, monkeypatch):
    table_of([A, B], [[1, 2], [3, 4]]).save(tmp_path)

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        table_of([C, D], [[5, 6], [7, 8]]).save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(EhrDataError, match=r"is missing: `folder` must be one that `CodeEmbeddings\.save` wrote"):
        CodeEmbeddings.load(tmp_path)


def test_a_code_without_a_vector_takes_that_of_its_nearest_ancestor():
    table = table_of(["ICD10CM/E11", "ICD10CM/E11.6", A], [[1, 1], [2, 2], [3, 3]])
    codes = [A, "ICD10CM/E11.65", "ICD10CM/I10", "ICD10CM/E11.9", "ICD10CM/E11.6"]
    matrix, known = table.for_tokenizer(EhrCodeTokenizer.from_codes(codes))
    assert matrix[:, 0].tolist() == [0] * 5 + [3, 2, 0, 1, 2]
    assert known.tolist() == [False] * 5 + [True, True, False, True, True]
    exact, _ = table.for_tokenizer(EhrCodeTokenizer.from_codes(codes, code_exact=True))
    assert exact[:, 0].tolist() == [0, 3, 2, 0, 1, 2]


def test_nearest_orders_by_cosine_not_by_length():
    table = table_of([A, B, C, D], [[1, 0], [100, 100], [0.1, 0.01], [-1, 0]])
    names, values = zip(*table.nearest(A, 3), strict=True)
    assert names == (C, B, D)
    np.testing.assert_allclose(values, [1 / np.sqrt(1.01), np.sqrt(0.5), -1], rtol=1e-6)
    with pytest.raises(ValueError, match="`code` must be one of the 4 codes with a vector, got 'LOCAL/X'"):
        table.nearest("LOCAL/X")


def test_vectors_that_do_not_match_their_codes_are_refused():
    with pytest.raises(ValueError, match=r"`vectors` must be \(2, dim\)"):
        table_of([A, B], [[1, 2]])

"""Fitting hourly features and the bulk path over records: filters by hand, windows, shards, nothing leaks."""

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr._hourly_fitting import bin_edges
from hf_ehr._hourly_summary import quantiles, round_bits, two_ranges
from hf_ehr.hourly import fit_hourly_features, format_hourly_summary, hourly_examples, summarise_measurements
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import fingerprint

from .builders import day, patient, records, visit

LOOSE = {"min_patients": 1, "demographics": ()}


def stay(stay_id, *measurements, hours=1.0):
    """A stay from day 0; a measurement is (hour, name, value or text)."""
    rows = [
        {
            "hour": hour,
            "name": name,
            "value": None if isinstance(value, str) else value,
            "text": value if isinstance(value, str) else None,
        }
        for hour, name, value in measurements
    ]
    return {"stay_id": stay_id, "start": day(0), "end": day(hours / 24), "measurements": rows}


def one_each(stays, **fields):
    """Every stay is its own patient, of the same number."""
    return records(*(patient(one["stay_id"], [visit(0, 3, stays=[one])], **fields) for one in stays))


def named(extractor, table, row=0):
    """Names of the features of each hour of a row."""
    ids, counts = (table[name][row].as_py() for name in ("feature_ids", "feature_counts"))
    parts = np.split(ids, np.cumsum(counts)[:-1])
    return [{extractor.feature_names[int(number)] for number in part} for part in parts]


def test_a_toy_table_by_hand():
    stays = [stay(number, (0.5, "T/HR", float(number)), (0.6, "T/Rare", 7.0)) for number in range(1, 3)]
    stays += [stay(number, (0.5, "T/HR", float(number))) for number in range(3, 11)]
    table = one_each(stays)
    fitted = fit_hourly_features(table, subject_ids=range(1, 11), n_hours=4, **LOOSE)
    # Quintiles of 1 … 10. One number an hour: maximum, mean and last equal the minimum and go; `present` never is off.
    assert fitted.feature_names == [
        "T/HR min <= 2.8", "T/HR min in (2.8, 4.6]", "T/HR min in (4.6, 6.4]", "T/HR min in (6.4, 8.2]",
        "T/HR min > 8.2",
    ]  # fmt: skip
    made = hourly_examples(table, fitted).table
    assert [ids.as_py() for ids in made["feature_ids"]] == [[0], [0], [1], [1], [2], [2], [3], [3], [4], [4]]
    assert fitted.fitted_on == fingerprint(range(1, 11))


def test_what_is_known_of_the_rare_variable_is_what_its_equal_features_say_first():
    """`T/Rare` is 7 wherever it is: its one bin, its presence and 0 hours since are on in the same hours."""
    stays = [stay(n, (0.5, "T/HR", float(n)), *[(0.6, "T/Rare", 7.0)] * (n > 4)) for n in range(1, 11)]
    fitted = fit_hourly_features(one_each(stays), subject_ids=range(1, 11), n_hours=4, **LOOSE)
    assert [name for name in fitted.feature_names if "Rare" in name] == ["T/Rare last known"]


@pytest.mark.parametrize(("holders", "kept"), [(1, False), (2, True)])
def test_a_feature_of_fewer_than_five_percent_of_the_stays_goes(holders, kept):
    stays = [stay(n, (0.5, "T/HR", float(n)), *[(0.6, "T/Lab", 1.0)] * (n < holders)) for n in range(40)]
    fitted = fit_hourly_features(one_each(stays), subject_ids=range(40), n_hours=4, **LOOSE)
    assert any("Lab" in name for name in fitted.feature_names) is kept
    with_all = fit_hourly_features(one_each(stays), subject_ids=range(40), n_hours=4, min_prevalence=0, **LOOSE)
    assert any("Lab" in name for name in with_all.feature_names)


@pytest.mark.parametrize(("holders", "kept"), [(2, False), (3, True)])
def test_a_variable_must_be_met_in_more_than_its_share_of_stays(holders, kept):
    stays = [stay(n, (0.5, "T/HR", float(n)), *[(0.6, "T/Lab", 1.0)] * (n < holders)) for n in range(20)]
    fitted = fit_hourly_features(
        one_each(stays), subject_ids=range(20), n_hours=4, variable_threshold=0.1, min_prevalence=0, **LOOSE
    )
    assert [variable["name"] for variable in fitted.variables] == ["T/HR", "T/Lab"][: 1 + kept]


def test_a_variable_of_few_patients_is_not_published():
    stays = [stay(n, (0.5, "T/HR", float(n)), *[(0.6, "T/Lab", 1.0)] * (n < 10)) for n in range(20)]
    fitted = fit_hourly_features(one_each(stays), subject_ids=range(20), demographics=())
    assert [variable["name"] for variable in fitted.variables] == ["T/HR"]


def test_of_opposite_features_the_first_stays_and_the_near_constant_goes():
    # Known in every hour: two bins are opposites, and presence is always on.
    stays = [stay(n, (0.1, "T/X", float(n % 2)), (1.1, "T/X", float(n % 2)), hours=2) for n in range(20)]
    fitted = fit_hourly_features(one_each(stays), subject_ids=range(20), n_hours=4, **LOOSE)
    assert fitted.feature_names == ["T/X min <= 0"]


def test_frequency_decides_on_minimum_maximum_and_mean():
    stays = [stay(n, *((h + 0.1, "T/A", n + h) for h in range(4)), (0, "T/B", n), hours=4) for n in range(20)]
    fitted = fit_hourly_features(one_each(stays), subject_ids=range(20), n_hours=4, **LOOSE)
    assert [variable["numeric"]["frequent"] for variable in fitted.variables] == [True, False]
    lowered = fit_hourly_features(one_each(stays), subject_ids=range(20), frequent_per_hour=0.25, **LOOSE)
    assert [variable["numeric"]["frequent"] for variable in lowered.variables] == [True, True]


def test_texts_become_categories_and_numbers_too_where_they_are_declared():
    stays = [stay(n, (0, "T/Rhythm", "AF" if n % 2 else "SR"), (0, "T/Unit", n % 3)) for n in range(30)]
    fitted = fit_hourly_features(one_each(stays), subject_ids=range(30), as_text=["T/Unit"], **LOOSE)
    assert [variable["category"]["categories"] for variable in fitted.variables] == [["AF", "SR"], ["0", "1", "2"]]
    first = named(fitted, hourly_examples(one_each(stays), fitted).table, row=1)[0]
    assert {"T/Rhythm = AF", "T/Unit = 1"} <= first
    prose = [stay(n, (0, "T/HR", n), (0, "T/Note", "word " * 20)) for n in range(30)]
    assert len(fit_hourly_features(one_each(prose), subject_ids=range(30), **LOOSE).variables) == 1


def test_demographics_are_fitted_with_static_variables_among_them():
    stays = [stay(n, (0, "T/HR", n), (0, "T/Height", 150 + n), (0, "T/Type", n % 2)) for n in range(50)]
    table = records(
        *(
            patient(
                n, [visit(0, 3, stays=[one])], sex="F" if n % 2 else "M", birth_time=day(-365.25 * (20 + n)),
                race="rare" if n == 0 else None,
            )
            for n, one in enumerate(stays)
        )
    )  # fmt: skip
    fitted = fit_hourly_features(
        table, subject_ids=range(50), static=["T/Height", "T/Type"], as_text=["T/Type"], min_patients=1
    )
    names = fitted.demographic_names
    assert [variable["name"] for variable in fitted.variables] == ["T/HR"]
    assert names[:6] == [
        "age <= 29.8", "age in (29.8, 39.6]", "age in (39.6, 49.4]", "age in (49.4, 59.2]", "age > 59.2",
        "age unknown",
    ]  # fmt: skip
    assert "race = rare" not in names
    assert {"sex = F", "race other", "T/Height <= 159.8", "T/Type = 1", "T/Type unknown"} <= set(names)
    made = hourly_examples(table, fitted).table
    on = {names[number] for number in np.flatnonzero(made["demographics"][0].as_py())}
    assert on == {"age <= 29.8", "sex = M", "race other", "T/Height <= 159.8", "T/Type = 0"}


def test_a_patient_of_whom_nothing_is_known_has_the_unknown_columns():
    stays = [stay(n, (0, "T/HR", n)) for n in range(30)]
    fitted = fit_hourly_features(one_each(stays, sex="F"), subject_ids=range(30), min_patients=1)
    nobody = one_each([stay(99, (0, "T/HR", 1.0))], birth_time=None)
    made = hourly_examples(nobody, fitted).table["demographics"][0].as_py()
    assert [fitted.demographic_names[i] for i in np.flatnonzero(made)] == [
        "age unknown",
        "sex unknown",
        "race unknown",
    ]


def test_the_continuous_form_is_standardised_over_the_training_hours():
    draw = np.random.default_rng(0)
    stays = [stay(n, *((h, "T/HR", float(draw.normal(90, 15))) for h in range(4)), hours=4) for n in range(300)]
    table = one_each(stays)
    fitted = fit_hourly_features(table, subject_ids=range(300), n_hours=4, form="continuous", **LOOSE)
    assert fitted.feature_names == ["T/HR value"]  # measured in every hour: presence says nothing
    values = np.concatenate(hourly_examples(table, fitted).table["feature_values"].to_pylist())
    assert abs(values.mean()) < 1e-3
    assert abs(values.std() - 1) < 1e-3


# Windows


@pytest.fixture(scope="module")
def fitted():
    stays = [stay(n, *((h, "T/HR", float(n + h)) for h in range(0, 12, 2)), hours=12) for n in range(30)]
    return fit_hourly_features(one_each(stays), subject_ids=range(30), n_hours=8, **LOOSE)


@pytest.mark.parametrize(
    ("hours", "measured", "expected"),
    [
        (12, 1, 8),  # the window is 8 hours long
        (5, 1, 5),
        (4.5, 1, 5),  # the hour begun counts
        (0, None, 0),
        (0, 0.0, 1),  # what is measured when the stay ends belongs to it
        (3, 3.0, 4),
        (3, 3.5, 3),  # what is measured later does not
    ],
)
def test_a_stay_has_the_hours_it_lasts(fitted, hours, measured, expected):
    rows = () if measured is None else ((measured, "T/HR", 5.0),)
    made = hourly_examples(one_each([stay(1, *rows, hours=hours)]), fitted).table
    assert made["stay_hours"].to_pylist() == [expected]
    assert len(made["feature_counts"][0]) == expected


def test_windows_choose_stays_and_hours(fitted):
    table = one_each([stay(n, *((h + 0.5, "T/HR", 10.0 * h) for h in range(12)), hours=12) for n in (1, 2, 3)])
    windows = pl.DataFrame({"stay_id": [3, 1, 3, 77], "start_hour": [0.0, 4.0, 2.0, 0.0], "end_hour": [2.5, 9, 4, 1]})
    made = hourly_examples(table, fitted, windows).table
    assert made.select(["subject_id", "stay_id", "start_hour", "stay_hours"]).to_pylist() == [
        {"subject_id": 3, "stay_id": 3, "start_hour": 0.0, "stay_hours": 3},
        {"subject_id": 1, "stay_id": 1, "start_hour": 4.0, "stay_hours": 5},
        {"subject_id": 3, "stay_id": 3, "start_hour": 2.0, "stay_hours": 2},
    ]
    # The measurement at 2.5 is not read in a window that ends there: the hour carries forward that of 1.5.
    assert "T/HR present" in named(fitted, made, 2)[0]
    assert "T/HR present" not in named(fitted, made, 0)[2]
    later = hourly_examples(table, fitted, pl.DataFrame({"stay_id": [3], "end_hour": [2.6]})).table
    assert "T/HR present" in named(fitted, later, 0)[2]
    only = hourly_examples(table, fitted, subject_ids=[2]).table
    assert only["stay_id"].to_pylist() == [2]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.floats(0, 11.5, width=32), st.floats(1, 99, width=32)), max_size=12),
    st.lists(st.tuples(st.floats(0, 11.5, width=32), st.floats(1, 99, width=32)), max_size=6),
    st.floats(0.5, 8, width=32),
)
def test_nothing_at_or_after_the_end_of_the_window_is_read(fitted, rows, later, end):
    early = [(hour, "T/HR", value) for hour, value in rows if hour < end]
    moved = [(max(hour, end), "T/HR", value) for hour, value in later]
    windows = pa.table({"stay_id": [1], "end_hour": pa.array([end], pa.float64())})
    one, two = (
        hourly_examples(one_each([stay(1, *sorted(m, key=lambda row: row[0]), hours=12)]), fitted, windows).table
        for m in (early, early + moved)
    )
    assert one.equals(two)


def test_windows_that_make_no_sense_are_refused(fitted):
    table = one_each([stay(1)])
    with pytest.raises(EhrDataError, match="`windows` must have the column `stay_id`, got stay"):
        hourly_examples(table, fitted, pl.DataFrame({"stay": [1]}))
    with pytest.raises(EhrDataError, match="1 windows break this"):
        hourly_examples(table, fitted, pl.DataFrame({"stay_id": [1], "start_hour": [3.0], "end_hour": [2.0]}))


def test_bad_rows_are_counted_and_change_nothing(fitted):
    good = (1.5, "T/HR", 9.0)
    bad = [(-1.0, "T/HR", 9.0), (1.6, "T/HR", float("nan")), (1.7, "T/HR", float("inf")), (0.5, "T/New", 1.0)]
    bad += [(0.5, "T/HR", "refused"), (8.5, "T/HR", 9.0)]
    clean = hourly_examples(one_each([stay(1, good, hours=9)]), fitted)
    dirty = hourly_examples(one_each([stay(1, *sorted((good, *bad), key=lambda row: row[0]), hours=9)]), fitted)
    assert dirty.table.equals(clean.table)
    assert {reason: count for reason, count in dirty.ignored.items() if count} == {
        "no hour, or a negative one": 1,
        "NaN or infinite value": 2,
        "unknown variable": 1,
        "text without a category": 1,
        "outside the hours of the stay": 1,
    }


# Training patients, shards


def cohort(seed, patients=range(30)):
    draw = np.random.default_rng(seed)
    stays = []
    for n in patients:
        rows = [(float(h), "T/HR", float(draw.integers(40, 160))) for h in range(8)]
        rows += [(float(h), "T/Lab", float(draw.integers(1, 9))) for h in range(8) if draw.random() < 0.3]
        rows += [(float(h), "T/Rhythm", str(draw.choice(["AF", "SR"]))) for h in range(8) if draw.random() < 0.3]
        stays.append(stay(n, *sorted(rows, key=lambda row: row[0]), hours=8))
    return one_each(stays, sex="F")


@pytest.mark.parametrize("form", ["binned", "continuous"])
def test_other_patients_change_nothing_that_is_fitted(form):
    train = cohort(1)
    options = {"subject_ids": range(30), "n_hours": 8, "form": form}
    alone = fit_hourly_features(train, **options)
    assert alone.num_hourly_features > 4
    for seed in (2, 3):
        beside = fit_hourly_features(pa.concat_tables([train, cohort(seed, range(100, 140))]), **options)
        assert beside.to_dict() == alone.to_dict()


@pytest.mark.parametrize("form", ["binned", "continuous"])
def test_shards_give_what_one_table_gives(tmp_path, form):
    parts = [cohort(1, range(20)), cohort(2, range(20, 45)), cohort(3, range(45, 50))]
    paths = []
    for number, part in enumerate(parts):
        paths.append(tmp_path / f"{number}.parquet")
        pq.write_table(part, paths[-1])
    whole = pa.concat_tables(parts)
    options = {"subject_ids": range(50), "n_hours": 8, "form": form}
    one, several = fit_hourly_features(whole, **options), fit_hourly_features(iter(paths), **options)
    assert one.to_dict() == several.to_dict()
    assert hourly_examples(paths, several).table.equals(hourly_examples(whole, one).table.combine_chunks())
    assert hourly_examples(paths, several).ignored == hourly_examples(whole, one).ignored


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subject_ids": []}, ValueError, "`subject_ids` must name the patients"),
        ({"min_prevalence": 1.5}, ValueError, "`min_prevalence` must be a share of stays from 0 to below 1, got 1.5"),
        ({"num_bins": 0}, ValueError, "`num_bins` must be at least 1, got 0"),
        ({"demographics": ["eyes"]}, ValueError, "`demographics` must be of age, .*got eyes"),
        ({"static": ["T/Hight"]}, ValueError, "`static` must name measured variables, got T/Hight"),
        ({"subject_ids": [99]}, EhrDataError, "No stay of the 1 patients"),
        ({"min_patients": 99}, EhrDataError, "No variable of the 30 stays passes"),
    ],
)
def test_a_fit_that_makes_no_sense_says_what_to_do(options, error, message):
    with pytest.raises(error, match=message):
        fit_hourly_features(cohort(1), **{"subject_ids": range(30)} | options)


# Numbers


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_quantiles_of_counted_values_are_those_of_the_values(values, shares):
    distinct, counts = np.unique(np.array(values, np.float32), return_counts=True)
    np.testing.assert_allclose(quantiles(distinct, counts, shares), np.quantile(values, shares), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        (range(1, 11), [2.8, 4.6, 6.4, 8.2]),
        ([0] * 7 + [1, 2, 3], [0, 1.2]),  # quantiles 0, 0, 0, 1.2
        ([0] * 9 + [5], [0]),
        ([0] + [5] * 9, [0]),  # all quantiles are the largest value
        ([0, 1], [0.2, 0.4, 0.6, 0.8]),
        ([7, 7], []),
        ([], []),
        ([36.6] * 5 + [40.0] * 5, [36.6]),
    ],
)
def test_equal_edges_are_merged_and_two_values_always_come_apart(values, edges):
    distinct, counts = np.unique(round_bits(np.array(values, np.float32)), return_counts=True)
    assert bin_edges(distinct, counts, 5) == pytest.approx(edges)


def test_whole_numbers_and_three_digits_survive_rounding():
    numbers = np.concatenate([np.arange(65_536), np.arange(-999, 1000) / 10]).astype(np.float32)
    rounded = round_bits(numbers)
    np.testing.assert_array_equal(rounded[:65_536], numbers[:65_536])
    assert [f"{one:.4g}" for one in rounded] == [f"{one:.4g}" for one in numbers]


def test_two_units_are_reported_and_one_unit_is_not():
    draw = np.random.default_rng(0)

    def verdict(*parts):
        return two_ranges(*np.unique(np.concatenate(parts).round(1), return_counts=True))

    celsius, fahrenheit = draw.normal(37, 0.8, 900), draw.normal(98.6, 1.5, 100)
    assert verdict(celsius, fahrenheit) is not None
    assert verdict(draw.uniform(0.3, 1, 500), draw.uniform(30, 100, 500)) is not None  # share and percent
    assert verdict(celsius) is None
    assert verdict(draw.lognormal(0, 1, 1000)) is None
    assert verdict(celsius, fahrenheit[:5]) is None  # 0.5 % are errors, no second unit
    assert verdict(draw.integers(0, 2, 1000)) is None


def test_the_summary_counts_and_reports_and_repairs_nothing():
    draw = np.random.default_rng(0)
    stays = []
    for n in range(50):
        temperature = [
            (float(h), "T/Temp", float(draw.normal(*((98.6, 1) if n < 10 else (37, 0.5))))) for h in range(8)
        ]
        stays.append(stay(n, *temperature, (3.0, "T/HR", 80.0), (3.0, "T/HR", -1.0), (4.0, "T/HR", "off"), hours=9))
    table = one_each(stays)
    before = table.to_pylist()[0]
    summary = summarise_measurements(table, n_hours=8, valid_ranges={"HR": (0, 300)}, rename={"T/HR": "HR"})
    assert (summary.stays, summary.hours) == (50, 400)
    rows = {row["name"]: row for row in summary.variables.to_dicts()}
    assert set(rows) == {"HR", "T/Temp"}
    counts = ("numbers", "texts", "out_of_range", "stays", "number_patients", "p50", "two_ranges")
    assert [rows["HR"][name] for name in counts] == [50, 50, 50, 50, 50, 80, None]
    assert rows["T/Temp"]["two_ranges"] is not None
    text = format_hourly_summary(summary)
    assert "HR: 50 values outside the valid range count as missing" in text
    assert "T/Temp: no value between" in text
    assert table.to_pylist()[0] == before


def test_values_outside_the_valid_range_count_as_missing_in_the_fit_and_after_it():
    stays = [stay(n, (0.0, "T/HR", 50.0 + n), (0.5, "T/HR", 9999.0), hours=1) for n in range(30)]
    ranged = fit_hourly_features(one_each(stays), subject_ids=range(30), valid_ranges={"T/HR": (0, 300)}, **LOOSE)
    clean = fit_hourly_features(
        one_each([stay(n, (0.0, "T/HR", 50.0 + n)) for n in range(30)]), subject_ids=range(30), **LOOSE
    )
    assert ranged.feature_names == clean.feature_names
    made = hourly_examples(one_each(stays), ranged)
    assert made.ignored["outside the valid range"] == 30

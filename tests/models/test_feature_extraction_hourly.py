"""Hourly features of stays: the recipe by hand and spelled out, no look ahead, what is ignored, save and load."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor

import hf_ehr
from hf_ehr.models.feature_extraction_hourly import HourlyFeatureExtractor

HR_EDGES = {"min": [70], "max": [90], "mean": [80], "last": [80], "since": [0]}


def number(name, edges=None, *, frequent=False, scale=None, valid_range=None):
    numeric = {"frequent": frequent, "edges": edges or {"last": [1.5, 3], "since": [0, 2]}, "scale": scale}
    return {"name": name, "valid_range": valid_range, "as_text": False, "numeric": numeric, "category": None}


def category(name, *categories, as_text=False):
    own = {"categories": list(categories), "edges": {"since": [0, 2]}}
    return {"name": name, "valid_range": None, "as_text": as_text, "numeric": None, "category": own}


def field(name, *, static=False, categories=None, edges=(), scale=None):
    names = {"name": name, "static": static, "valid_range": None, "as_text": False}
    return names | {"categories": categories, "edges": list(edges), "scale": scale}


HR = number("HR", HR_EDGES, frequent=True, valid_range=[0, 300])
VARIABLES = [HR, number("Lactate"), category("Rhythm", "AF", "SR")]


@pytest.fixture(scope="module")
def extractor():
    return HourlyFeatureExtractor(
        VARIABLES, [field("age", edges=[50, 70]), field("sex", categories=["F", "M"])], n_hours=6, fitted_on="abc"
    )


def hours_of(extractor, rows, stay=0):
    """Names of the features of each hour of a stay."""
    ids, counts = rows["feature_ids"][stay], rows["feature_counts"][stay]
    assert counts.sum() == len(ids)
    return [{extractor.feature_names[number] for number in part} for part in np.split(ids, np.cumsum(counts)[:-1])]


def test_an_hour_by_hand(extractor):
    rows = extractor([0, 0, 0], [0.8, 2.5, 0.2], ["HR"] * 3, [100, 84, 60], stay_hours=[4])
    present = {"HR present", "HR hours since last <= 0"}
    filled = {"HR hours since last > 0"}
    assert hours_of(extractor, rows) == [
        {"HR min <= 70", "HR max > 90", "HR mean <= 80", "HR last > 80"} | present,  # 60, then 100: mean 80
        {"HR min > 70", "HR max > 90", "HR mean > 80", "HR last > 80"} | filled,  # 100 carried forward
        {"HR min > 70", "HR max <= 90", "HR mean > 80", "HR last > 80"} | present,  # 84
        {"HR min > 70", "HR max <= 90", "HR mean > 80", "HR last > 80"} | filled,
    ]
    assert rows["stay_hours"] == [4]


def test_a_category_is_one_hot_and_carried_forward(extractor):
    rows = extractor([0, 0], [1.0, 1.5], ["Rhythm"] * 2, [None] * 2, ["AF", "SR"], stay_hours=[3])
    assert hours_of(extractor, rows) == [
        set(),
        {"Rhythm = SR", "Rhythm present", "Rhythm hours since last <= 0"},
        {"Rhythm = SR", "Rhythm hours since last in (0, 2]"},
    ]


def test_without_filling_an_infrequent_variable_speaks_in_its_own_hours_only():
    bare = HourlyFeatureExtractor(VARIABLES, n_hours=6, fill_infrequent=False)
    rows = bare([0, 0], [1, 1], ["Lactate", "Rhythm"], [2, None], [None, "AF"], stay_hours=[3])
    assert hours_of(bare, rows) == [set(), {"Lactate last in (1.5, 3]", "Rhythm = AF"}, set()]
    assert "HR present" in bare.feature_names
    assert "Lactate present" not in bare.feature_names


def test_continuous_values_are_cut_standardised_and_zero_where_never_measured():
    variables = [number("HR", scale=[50, 150, 90, 20]), category("Rhythm", "AF")]
    made = HourlyFeatureExtractor(variables, n_hours=4, form="continuous")
    assert made.feature_names[:3] == ["HR value", "HR present", "HR hours since last"]
    rows = made([0, 0], [1, 3], ["HR", "HR"], [110, 500], stay_hours=[4])
    assert rows["feature_counts"][0].tolist() == [0, 2, 2, 2]
    assert rows["feature_ids"][0].tolist() == [0, 1, 0, 2, 0, 1]
    np.testing.assert_allclose(rows["feature_values"][0], [1, 1, 1, 0.25, 3, 1])  # (110 - 90) / 20; 1 h of 4; 150


def test_demographics_are_one_hot_with_other_and_unknown(extractor):
    assert extractor.demographic_names == [
        "age <= 50", "age in (50, 70]", "age > 70", "age unknown", "sex = F", "sex = M", "sex other", "sex unknown",
    ]  # fmt: skip
    rows = extractor(
        [], [], [], [], stay_hours=[0, 1, 1], demographics={"age": [50, 71, None], "sex": ["M", "X", None]}
    )
    assert [row.nonzero()[0].tolist() for row in rows["demographics"]] == [[0, 5], [2, 6], [3, 7]]
    without = extractor([], [], [], [], stay_hours=[1])
    assert without["demographics"][0].nonzero()[0].tolist() == [3, 7]


def test_a_static_variable_gives_its_first_value_in_the_window_to_the_demographics():
    fields = [field("Height", static=True, edges=[170]), field("Unit", static=True, categories=["1", "2"])]
    fields[1]["as_text"] = True
    made = HourlyFeatureExtractor([number("Lactate")], fields, n_hours=6)
    stay, hour = [0, 0, 0, 1, 1], [2, 0, 0, 5, 1]
    names, values = ["Height", "Height", "Unit", "Height", "Unit"], [180, 160, 2, 190, 7]
    rows = made(stay, hour, names, values, stay_hours=[6, 3])
    assert made.demographic_names[:3] == ["Height <= 170", "Height > 170", "Height unknown"]
    assert [row.nonzero()[0].tolist() for row in rows["demographics"]] == [[0, 4], [2, 5]]
    assert [len(ids) for ids in rows["feature_ids"]] == [0, 0]


def test_what_cannot_be_used_is_ignored_and_counted_once(extractor):
    rows = [
        (0.0, "Sodium", 140, None, "unknown variable"),
        (-0.5, "HR", 80, None, "no hour, or a negative one"),
        (np.nan, "HR", 80, None, "no hour, or a negative one"),
        (2.0, "HR", 80, None, "outside the hours of the stay"),
        (0.0, "HR", np.inf, None, "NaN or infinite value"),
        (0.0, "HR", 301, None, "outside the valid range"),
        (0.0, "HR", None, "refused", "text without a category"),
        (0.0, "Rhythm", None, "paced", "text without a category"),
        (0.0, "Rhythm", 3, None, "number where categories were fitted"),
        (0.0, "HR", None, None, "no value"),
    ]
    hour, names, values, texts, reasons = zip(*rows, strict=True)
    numbers = np.array([np.nan if value is None else value for value in values], np.float32)
    codes = np.array([-1 if text is None else ["refused", "paced"].index(text) for text in texts])
    variable, group = extractor.lookup(list(names), np.arange(len(rows)), numbers, ["refused", "paced"], codes)
    column = extractor.encode_column(np.zeros(len(rows), int), hour, variable, numbers, group, [2])
    assert len(column.feature_ids) == 0
    expected = {reason: reasons.count(reason) for reason in reasons}
    assert {reason: count for reason, count in column.ignored.items() if count} == expected


def test_a_stay_without_hours_or_measurements_has_no_features(extractor):
    rows = extractor([1], [0], ["HR"], [80], stay_hours=[0, 1, 2, 0])
    assert [len(counts) for counts in rows["feature_counts"]] == [0, 1, 2, 0]
    assert [len(ids) for ids in rows["feature_ids"]] == [0, 6, 0, 0]


def test_codes_of_two_sources_share_a_variable():
    made = HourlyFeatureExtractor([HR], n_hours=6, rename={"A/1": "HR", "B/9": "HR"})
    one, other, same = (
        made([0], [0], [code], [80], stay_hours=[2])["feature_ids"][0].tolist() for code in ("A/1", "B/9", "HR")
    )
    assert one == other == same != []


NAMES = ["HR", "Lactate", "Rhythm"]
measurement = st.tuples(
    st.integers(0, 2),
    st.floats(0, 5.99, allow_nan=False),
    st.sampled_from(NAMES),
    st.sampled_from([0.5, 1.5, 2, 3, 60, 70, 80, 90, 100]),
    st.sampled_from(["AF", "SR"]),
)


def encode(extractor, rows, stay_hours=(6, 3, 5)):
    stay, hour, name, value, text = zip(*rows, strict=True) if rows else [()] * 5
    value = [None if one == "Rhythm" else number for one, number in zip(name, value, strict=True)]
    return extractor(stay, hour, name, value, text, stay_hours=stay_hours)


def spelled_out(rows, stay, hours):
    """The rules of the recipe, one hour and one variable at a time."""

    def bins(title, edges, value):
        bounds = [float("-inf"), *edges, float("inf")]
        place = next(i for i, high in enumerate(bounds[1:]) if value <= high)
        low, high = bounds[place], bounds[place + 1]
        text = f"<= {high:g}" if place == 0 else f"> {low:g}" if high == float("inf") else f"in ({low:g}, {high:g}]"
        return f"{title} {text}"

    series = []
    for hour in range(hours):
        features = set()
        for name in NAMES:
            # Stable by time: of two at the same moment the later in the input is the later.
            own = sorted((row for row in rows if row[0] == stay and row[2] == name), key=lambda row: row[1])
            past = [row for row in own if row[1] < hour + 1]
            now = [row for row in past if row[1] >= hour]
            if not past:
                continue
            value = past[-1][3]
            since = hour - int(past[-1][1])
            features |= {f"{name} present"} if now else set()
            features |= {bins(f"{name} hours since last", [0] if name == "HR" else [0, 2], since)}
            if name == "Rhythm":
                features |= {f"Rhythm = {past[-1][4]}"}
                continue
            features |= {bins(f"{name} last", [80] if name == "HR" else [1.5, 3], value)}
            if name == "HR":
                values = [row[3] for row in now] or [value]
                features |= {bins("HR min", [70], min(values)), bins("HR max", [90], max(values))}
                features |= {bins("HR mean", [80], sum(values) / len(values))}
        series.append(features)
    return series


def test_each_feature_knows_its_variable(extractor):
    names = [extractor.variables[number]["name"] for number in extractor.recipe.variables[extractor.kept]]
    assert len(set(names)) > 1
    assert all(feature.startswith(f"{name} ") for feature, name in zip(extractor.feature_names, names, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(measurement, max_size=25))
def test_the_features_follow_the_rules_spelled_out(extractor, rows):
    made = encode(extractor, rows)
    for stay, hours in enumerate((6, 3, 5)):
        assert hours_of(extractor, made, stay) == spelled_out(rows, stay, hours)


@settings(deadline=None, max_examples=60)
@given(st.lists(measurement, max_size=25), st.lists(measurement, max_size=10), st.integers(0, 5))
def test_what_is_measured_later_changes_no_hour_before_it_and_no_other_stay(extractor, rows, others, hour):
    early = [row for row in rows if row[0] != 0 or row[1] < hour]
    late = [(0, max(row[1], hour), *row[2:]) for row in others]
    one, two = encode(extractor, rows), encode(extractor, early + late)
    assert hours_of(extractor, one)[:hour] == hours_of(extractor, two)[:hour]
    for stay in (1, 2):
        assert one["feature_ids"][stay].tolist() == two["feature_ids"][stay].tolist()


def test_blocks_of_stays_change_nothing(extractor, monkeypatch):
    draw = np.random.default_rng(0)
    rows = [
        (int(draw.integers(0, 3)), float(draw.uniform(0, 6)), NAMES[draw.integers(0, 3)], 80.0, "AF")
        for _ in range(100)
    ]
    whole = encode(extractor, rows)
    monkeypatch.setattr(sys.modules[type(extractor).__module__], "CELLS", 7)
    cut = encode(extractor, rows)
    for name in ("feature_ids", "feature_counts"):
        for one, other in zip(whole[name], cut[name], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "dense"}, "`form` must be one of binned, continuous, got 'dense'"),
        ({"n_hours": 0}, "`n_hours` must be at least 1, got 0"),
        ({"variables": [HR, HR]}, "distinct names"),
        ({"variables": [HR], "kept": [0, 99]}, "`kept` must number features from 0 to 10, got 0 to 99"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HourlyFeatureExtractor(**arguments)


@pytest.mark.parametrize(
    ("stay", "hour", "stay_hours", "message"),
    [
        ([1], [0], [4], "`stay` must be from 0 to 0"),
        ([0], [0], [7], "`stay_hours` must be from 0 to `n_hours`=6, got 7"),
        ([0], [0, 1], [4], "must be of one length"),
    ],
)
def test_input_that_does_not_fit_is_named(extractor, stay, hour, stay_hours, message):
    with pytest.raises(ValueError, match=message):
        extractor(stay, hour, ["HR"], [80], stay_hours=stay_hours)


PROBE = {"stay": [0, 0, 0], "hour": [0.5, 2, 1], "name": ["HR", "Lactate", "Rhythm"], "value": [77, 2, None]}
PROBE |= {"text": [None, None, "AF"], "stay_hours": [4], "demographics": {"age": [60], "sex": ["F"]}}


def plain(rows):
    return {name: [np.asarray(one).tolist() for one in values] for name, values in rows.items()}


def test_it_saves_and_loads_through_autofeatureextractor_with_the_package(tmp_path):
    made = HourlyFeatureExtractor(
        VARIABLES, [field("age", scale=[20, 90, 60, 10]), field("sex", categories=["F"])], range(0, 20, 2),
        rename={"A/1": "HR"}, fitted_on="abc", min_prevalence=0.05,
    )  # fmt: skip
    answer = plain(made(**PROBE))
    made.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not [name for name in state if name.startswith("_")]
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is hf_ehr.HourlyFeatureExtractor
    assert plain(loaded(**PROBE)) == answer
    assert loaded.feature_names == made.feature_names
    assert (loaded.fitted_on, loaded.min_prevalence, loaded.rename) == ("abc", 0.05, {"A/1": "HR"})


def test_it_loads_where_the_package_cannot_be_imported(tmp_path, extractor):
    extractor.save_pretrained(tmp_path)
    script = f"""
import sys
sys.modules["hf_ehr"] = None
import json
import numpy as np
from transformers import AutoFeatureExtractor
loaded = AutoFeatureExtractor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
rows = loaded(**{PROBE!r})
print(json.dumps({{name: [np.asarray(one).tolist() for one in values] for name, values in rows.items()}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == plain(extractor(**PROBE))

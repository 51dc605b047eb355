"""Hourly series: the rectangle that sparse entries stand for."""

from __future__ import annotations

import pytest
import torch

from hf_ehr.models.hourly_series import HourlySeries

# Stays of 2, 0 and 1 hours: features 1 and 3 in the first hour, none in the second; feature 0 in the hour of the last.
IDS, COUNTS, HOURS = torch.tensor([3, 1, 0]), torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])


def test_entries_fall_on_the_hours_of_their_stay():
    series = HourlySeries.of(4, HOURS, IDS, COUNTS)
    expected = [[[0, 1, 0, 1], [0] * 4], [[0] * 4, [0] * 4], [[1, 0, 0, 0], [0] * 4]]
    assert series.values.tolist() == expected
    assert series.mask.tolist() == [[True, True], [False, False], [True, False]]


def test_values_stand_at_their_features():
    values = torch.tensor([0.5, -2.0, 7.0])
    series = HourlySeries.of(4, HOURS, IDS, COUNTS, values)
    assert series.values[0, 0].tolist() == [0, -2.0, 0, 0.5]
    assert series.values[2, 0, 0] == 7.0
    dense = HourlySeries.of(4, HOURS, hourly_values=series.values + (~series.mask)[..., None] * 9)
    assert torch.equal(dense.values, series.values)  # what lies after the last hour is not read
    assert torch.equal(dense.mask, series.mask)


def test_stays_without_hours_make_an_empty_rectangle():
    series = HourlySeries.of(4, torch.tensor([0, 0]), IDS[:0], COUNTS[:0])
    assert series.values.shape == (2, 1, 4)
    assert not series.mask.any()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "got neither"),
        ({"feature_ids": IDS, "feature_counts": COUNTS[:2]}, "each of the 3 hours, got 2"),
        ({"feature_ids": IDS[:2], "feature_counts": COUNTS}, "add up to the 2 entries, got 3"),
    ],
)
def test_parts_that_do_not_add_up_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        HourlySeries.of(4, HOURS, **inputs)

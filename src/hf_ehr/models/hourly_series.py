"""Hourly series of ICU stays: sparse as they are stored and moved, dense as a recurrence reads them."""

from typing import NamedTuple

import torch


class HourlySeries(NamedTuple):
    """The hours of some stays, as a rectangle."""

    values: torch.Tensor
    """(stays, hours, features), 0 after the last hour of a stay."""
    mask: torch.Tensor
    """(stays, hours) bool, which hours a stay has."""

    @classmethod
    def of(
        cls,
        num_features: int,
        stay_hours: torch.Tensor,
        feature_ids: torch.Tensor | None = None,
        feature_counts: torch.Tensor | None = None,
        feature_values: torch.Tensor | None = None,
        hourly_values: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "HourlySeries":
        """The series of a batch, on the device that the batch is on.

        Args:
            num_features: Features of an hour.
            stay_hours: (stays,) int, hours of each stay; 0 is a stay without any.
            feature_ids: (entries,) int, the features that are not 0, hour after hour and stay after stay.
            feature_counts: (sum of stay_hours,) int, entries of each hour.
            feature_values: (entries,) values of `feature_ids`; all are 1 where there are none.
            hourly_values: (stays, hours, num_features), instead of the three before.
            dtype: Of the result.

        Raises:
            ValueError: Neither form is given, or parts of one do not add up.
        """
        if hourly_values is not None:
            width = hourly_values.shape[1]
            mask = torch.arange(width, device=stay_hours.device) < stay_hours[:, None]
            return cls(hourly_values.to(dtype) * mask[..., None], mask)
        if feature_ids is None or feature_counts is None:
            raise ValueError("`feature_ids` with `feature_counts`, or `hourly_values`, must be given, got neither.")
        width = max(int(stay_hours.max()), 1) if len(stay_hours) else 1
        mask = torch.arange(width, device=stay_hours.device) < stay_hours[:, None]
        hours = mask.flatten().nonzero().squeeze(-1)
        if len(hours) != len(feature_counts):
            raise ValueError(
                f"`feature_counts` must have an entry for each of the {len(hours)} hours, got {len(feature_counts)}."
            )
        rows = hours.repeat_interleave(feature_counts.long())
        if len(rows) != len(feature_ids):
            raise ValueError(f"`feature_counts` must add up to the {len(feature_ids)} entries, got {len(rows)}.")
        values = torch.zeros(len(stay_hours) * width, num_features, dtype=dtype, device=stay_hours.device)
        filled = values.new_ones(()) if feature_values is None else feature_values.to(dtype)
        values[rows, feature_ids.long()] = filled
        return cls(values.view(len(stay_hours), width, num_features), mask)

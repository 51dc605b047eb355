"""The sources that read nothing: cohorts made from a configuration, shard by shard, with the truth behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EVENTS_PER_PATIENT: Mapping[str, int] = {"synthetic": 45}
"""Name of the source → about how many events each of its patients has."""


def generate_shard(source: str, options: Mapping[str, Any], index: int, shards: int) -> tuple[pa.Table, pa.Table]:
    """EVENTS and the truth of the patients with ``subject_id % shards == index``.

    Args:
        source: One of ``EVENTS_PER_PATIENT``.
        options: Fields of its configuration.
        index: Number of the shard.
        shards: How many there are.

    Raises:
        ValueError: An option is out of its range.
    """
    from hf_ehr.sources import synthetic

    return synthetic.generate_shard(synthetic.SyntheticConfig(**options), index, shards)


def generated_labels(source: str, truth: Sequence[Path]) -> dict[str, pa.Table]:
    """LABELS that the truth holds, by task.

    Args:
        source: One of ``EVENTS_PER_PATIENT``.
        truth: Parquet files of the truth, one a shard.
    """
    from hf_ehr.sources import synthetic

    columns = ["subject_id", "prediction_time", "label"]
    return {synthetic.TASK: pa.concat_tables(synthetic.labels(pq.read_table(path, columns=columns)) for path in truth)}

"""The sources that read nothing: cohorts made from a configuration, shard by shard, with the truth behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GENERATED: Mapping[str, int] = {"synthetic": 45, "synthetic_icu": 550, "synthetic_text_codes": 70}
"""Name of the source → about how many events each of its patients has."""


def generate_shard(source: str, options: Mapping[str, Any], index: int, shards: int) -> tuple[pa.Table, pa.Table]:
    """EVENTS and the truth of the patients with ``subject_id % shards == index``.

    Args:
        source: One of ``GENERATED``.
        options: Fields of its configuration.
        index: Number of the shard.
        shards: How many there are.

    Raises:
        ValueError: An option is out of its range.
    """
    if source == "synthetic_text_codes":
        from hf_ehr.sources import synthetic_text_codes

        config = synthetic_text_codes.SyntheticTextCodesConfig(**options)
        return synthetic_text_codes.generate_shard(config, index, shards)
    if source == "synthetic_icu":
        from hf_ehr.sources import synthetic_icu

        return synthetic_icu.generate_shard(synthetic_icu.SyntheticIcuConfig(**options), index, shards)
    from hf_ehr.sources import synthetic

    return synthetic.generate_shard(synthetic.SyntheticConfig(**options), index, shards)


def expected_events(source: str, options: Mapping[str, Any]) -> int:
    """About how many events the cohort has.

    Raises:
        ValueError: An option is out of its range.
    """
    if source == "synthetic_text_codes":
        from hf_ehr.sources.synthetic_text_codes import SyntheticTextCodesConfig

        return SyntheticTextCodesConfig(**options).patients * GENERATED[source]
    if source == "synthetic_icu":
        from hf_ehr.sources.synthetic_icu import SyntheticIcuConfig

        return SyntheticIcuConfig(**options).patients * GENERATED[source]
    from hf_ehr.sources.synthetic import SyntheticConfig

    return SyntheticConfig(**options).patients * GENERATED[source]


def generated_labels(source: str, truth: Sequence[Path]) -> dict[str, pa.Table]:
    """LABELS that only the truth holds, by task.

    The outcomes of ``synthetic_icu`` and ``synthetic_text_codes`` are seen in their events: named tasks label them,
    and the truth has the probabilities.

    Args:
        source: One of ``GENERATED``.
        truth: Parquet files of the truth, one a shard.
    """
    if source != "synthetic":
        return {}
    from hf_ehr.sources.synthetic import TASK, labels

    columns = ["subject_id", "prediction_time", "label"]
    return {TASK: pa.concat_tables(labels(pq.read_table(path, columns=columns)) for path in truth)}

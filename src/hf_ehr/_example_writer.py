"""Examples of any kind as a memory-mapped ``datasets.Dataset``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from .schema import atomic_path

if TYPE_CHECKING:
    import datasets


class ExampleWriter:
    """Collects example tables, in memory or as one Arrow file per shard under ``directory``."""

    def __init__(self, features: datasets.Features, directory: Path | None):
        self.features, self.directory = features, directory
        self.tables: list[pa.Table] = []
        self.paths: list[Path] = []

    def add(self, tables: Iterable[pa.Table]) -> None:
        """Writes the examples of one shard; a file appears only when it is whole."""
        schema = self.features.arrow_schema
        if self.directory is None:
            self.tables.extend(table.cast(schema) for table in tables)
            return
        path = self.directory / f"examples-{len(self.paths):05d}.arrow"
        with atomic_path(path) as temporary, pa.ipc.new_stream(temporary, schema) as stream:
            for table in tables:
                stream.write_table(table.cast(schema))
        self.paths.append(path)

    def finish(self, description: str) -> datasets.Dataset:
        """The data set of all examples."""
        import datasets

        if self.directory is None:
            table = pa.concat_tables(self.tables)
            dataset = datasets.Dataset(table, info=datasets.DatasetInfo(features=self.features))
        else:
            dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in self.paths])
        dataset.info.description = description
        return dataset

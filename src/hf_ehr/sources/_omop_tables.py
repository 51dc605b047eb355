"""The tables of the OMOP common data model as the reader sees them: columns, their order, and concept ids."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ehr.schema import EhrDataError
from hf_ehr.sources.engine import ROW, Column, Engine, Scan, check_gzip

if TYPE_CHECKING:
    import ibis.expr.types as ir

SEX = {8507: "M", 8532: "F"}
RACE = {
    8527: "White",
    8516: "Black",
    8515: "Asian",
    8557: "Pacific_Islander",
    8657: "Native_American",
    8522: "Other",
}
ETHNICITY = {38003563: "Hispanic", 38003564: "Not_Hispanic"}
VISIT_KIND = {
    9201: "inpatient",
    32037: "inpatient",  # intensive care
    262: "emergency",  # emergency room and inpatient visit
    9203: "emergency",
    9202: "outpatient",
    581477: "outpatient",  # office visit
    5083: "outpatient",  # telehealth
}
DISPOSITION = {
    8536: "home",
    38004195: "home",  # home health agency
    581476: "home",  # home visit
    8863: "facility",  # skilled nursing
    8676: "facility",  # nursing facility
    8615: "facility",  # assisted living
    8920: "facility",  # inpatient rehabilitation
    8970: "facility",  # inpatient long-term care
    8971: "facility",  # inpatient psychiatric facility
    8717: "transfer",  # inpatient hospital
    9201: "transfer",
    8546: "hospice",
    4021968: "against_advice",
    4216643: "died",
}
PRIMARY_STATUS = (32902, 32903)  # primary (discharge) diagnosis
PRIMARY_TYPE = (38000183, 38000199, 44786627)  # the older way: the rank is part of the record's type
FIRST_POSITION_TYPE = (38000184, 38000200, 38000215, 38000230)  # each followed by the ids of positions 2 to 15

_VISIT = "provider_id visit_occurrence_id visit_detail_id"
_CODE_END = "provider_id visit_occurrence_id visit_detail_id {0}_source_value {0}_source_concept_id"
_MEASUREMENT = (
    "measurement_id person_id measurement_concept_id measurement_date measurement_datetime measurement_time "
    "measurement_type_concept_id operator_concept_id value_as_number value_as_concept_id unit_concept_id range_low "
    f"range_high {_CODE_END.format('measurement')} unit_source_value"
)
_PROCEDURE = "procedure_occurrence_id person_id procedure_concept_id procedure_date procedure_datetime"
_PROCEDURE_END = f"procedure_type_concept_id modifier_concept_id quantity {_CODE_END.format('procedure')}"
ORDER: dict[str, dict[int, str]] = {
    "person": {
        18: "person_id gender_concept_id year_of_birth month_of_birth day_of_birth birth_datetime race_concept_id "
        "ethnicity_concept_id location_id provider_id care_site_id person_source_value gender_source_value "
        "gender_source_concept_id race_source_value"
    },
    "death": {7: "person_id death_date death_datetime"},
    "visit_occurrence": {
        17: "visit_occurrence_id person_id visit_concept_id visit_start_date visit_start_datetime visit_end_date "
        "visit_end_datetime visit_type_concept_id provider_id care_site_id visit_source_value "
        "visit_source_concept_id admitted_from_concept_id admitted_from_source_value discharged_to_concept_id"
    },
    "condition_occurrence": {
        16: "condition_occurrence_id person_id condition_concept_id condition_start_date condition_start_datetime "
        "condition_end_date condition_end_datetime condition_type_concept_id condition_status_concept_id stop_reason "
        f"{_CODE_END.format('condition')}"
    },
    "drug_exposure": {
        23: "drug_exposure_id person_id drug_concept_id drug_exposure_start_date drug_exposure_start_datetime "
        "drug_exposure_end_date drug_exposure_end_datetime verbatim_end_date drug_type_concept_id stop_reason refills "
        f"quantity days_supply sig route_concept_id lot_number {_CODE_END.format('drug')}"
    },
    "procedure_occurrence": {
        14: f"{_PROCEDURE} {_PROCEDURE_END}",
        16: f"{_PROCEDURE} procedure_end_date procedure_end_datetime {_PROCEDURE_END}",
    },
    "measurement": {
        20: f"{_MEASUREMENT} value_source_value",
        23: f"{_MEASUREMENT} unit_source_concept_id value_source_value",
    },
    "note": dict.fromkeys(
        (14, 16),
        "note_id person_id note_date note_datetime note_type_concept_id note_class_concept_id note_title "
        f"note_text encoding_concept_id language_concept_id {_VISIT}",
    ),
    "condition_era": {6: "condition_era_id person_id condition_concept_id condition_era_start_date"},
    "drug_era": {7: "drug_era_id person_id drug_concept_id drug_era_start_date"},
    "concept": {10: "concept_id concept_name domain_id vocabulary_id concept_class_id standard_concept concept_code"},
}
"""Table → number of its columns (it tells v5.3 from v5.4) → their order up to the last one that is read."""


@dataclass(frozen=True)
class Domain:
    """A table of coded events.

    Attributes:
        table: Name of the table.
        kind: Kind of its events.
        prefix: What its concept columns begin with.
        start: What its date columns begin with.
        billed: Whether its codes may be written after the visit (rule L3), so that nobody knows them before its end.
    """

    table: str
    kind: str
    prefix: str
    start: str
    billed: bool = False


OCCURRENCES = (
    Domain("condition_occurrence", "diagnosis", "condition", "condition_start", billed=True),
    Domain("drug_exposure", "medication", "drug", "drug_exposure_start"),
    Domain("procedure_occurrence", "procedure", "procedure", "procedure", billed=True),
    Domain("measurement", "measurement", "measurement", "measurement"),
)
ERAS = {
    "condition_occurrence": Domain("condition_era", "diagnosis", "condition", "condition_era_start", billed=True),
    "drug_exposure": Domain("drug_era", "medication", "drug", "drug_era_start"),
}
"""What stands in for a table of occurrences that is not there."""


def read(engine: Engine, path: Path, table: str, columns: Mapping[str, Column], key: tuple[str, ...] = ()) -> Scan:
    """Scans ``columns`` of an OMOP table, whose text file may have no header and any of two delimiters.

    Raises:
        EhrDataError: A file without a header has another number of columns than CDM v5.3 and v5.4, or see
            :meth:`Engine.scan`.
    """
    import ibis

    if path.is_dir() or path.suffix == ".parquet":
        return engine.scan(path, columns, key=key)
    check_gzip(path)
    delimiter, first = _first_line(path)
    names = {name.strip().lstrip("\ufeff").lower() for name in first}
    if next(iter(ORDER[table].values())).split()[0] in names or "person_id" in names:
        return engine.scan(path, columns, key=key, delimiter=delimiter)
    if not first:
        raise EhrDataError(f"{path} has no rows. Export the table again, or leave the file out if it is optional.")
    order = ORDER[table].get(len(first))
    if order is None:
        widths = " or ".join(str(width) for width in ORDER[table])
        raise EhrDataError(
            f"{path} has no header and {len(first)} columns; `{table}` of CDM v5.3 or v5.4 has {widths}. "
            "Add a header line with the CDM's column names."
        )
    ordered = {name: columns.get(name, Column()) for name in order.split()}
    scan = engine.scan(path, ordered, key=key, delimiter=delimiter, header=False)
    absent = {name: ibis.null(column.type) for name, column in columns.items() if name not in ordered}
    return Scan(scan.table.mutate(**absent).select(ROW, *columns), scan.rejected)


def birth(table: ir.Table) -> ir.TimestampValue:
    """The middle of the year or the first of the month where the rest of a date of birth is unknown."""
    month = table.month_of_birth.fill_null(7).cast("string").lpad(2, "0")
    day = table.day_of_birth.fill_null(1).cast("string").lpad(2, "0")
    return (table.year_of_birth.cast("string").lpad(4, "0") + "-" + month + "-" + day).try_cast("timestamp")


def with_times(table: ir.Table) -> ir.Table:
    """Adds ``start`` and ``end`` of a visit; an end that is only a day is not before a start within that day."""
    import ibis

    table = table.mutate(
        start=table.visit_start_datetime.fill_null(table.visit_start_date),
        end=table.visit_end_datetime.fill_null(table.visit_end_date),
    )
    midnight = table.start.truncate("D")
    return table.mutate(end=ibis.ifelse(table.end == midnight, table.start, table.end))


def rank(table: ir.Table) -> ir.Value:
    """0 for a primary diagnosis, the position that its type tells, and 99 for the rest."""
    import ibis

    if "condition_type_concept_id" not in table.columns:
        return ibis.literal(0)
    kind = table.condition_type_concept_id
    primary = table.condition_status_concept_id.isin(PRIMARY_STATUS) | kind.isin(PRIMARY_TYPE)
    positions = [(kind.between(first, first + 14), (kind - first + 1).cast("int64")) for first in FIRST_POSITION_TYPE]
    return ibis.cases(
        (primary.fill_null(False), ibis.literal(0, "int64")), *positions, else_=ibis.literal(99, "int64")
    )


def _first_line(path: Path) -> tuple[str, list[str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace", newline="") as lines:
        line = lines.readline()
    delimiter = "\t" if line.count("\t") > line.count(",") else ","
    return delimiter, next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])

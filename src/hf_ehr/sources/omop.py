"""OMOP common data model (v5.3, v5.4) → EVENTS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ehr.schema import BIRTH_CODE, DEATH_CODE, EhrDataError
from hf_ehr.sources import _omop_tables as cdm
from hf_ehr.sources._codes import dotted, has_icd_shape, icd, joined, lookup
from hf_ehr.sources._mimic import end_of_day
from hf_ehr.sources._omop_tables import Domain
from hf_ehr.sources._rules import Rule, split_by_rules
from hf_ehr.sources.engine import Column, Engine, Extract, Source, as_events, find_table, reject

if TYPE_CHECKING:
    import ibis.expr.types as ir

_ID = Column("int64", required=True)
_CONCEPT = Column("int64", optional=True)
_TIME = Column("timestamp", optional=True)
_TEXT = Column(optional=True)
_CODE_TABLES = ("condition_occurrence", "drug_exposure", "procedure_occurrence", "condition_era", "drug_era")


def omop(
    engine: Engine,
    input_dir: str | Path,
    *,
    source_vocabulary: Mapping[str, str] | str | None = None,
    billing_lag_days: float = 0.0,
    shifted: bool = False,
) -> Source:
    """Reads a folder of OMOP tables (CSV, TSV or Parquet, with a header or in the column order of the CDM).

    Person and one table of codes are required; any other is used where it exists, its absence is a warning.
    Era tables are used only where the table of occurrences they were made from is missing.

    A code is, in this order: the concept of ``*_source_concept_id`` (needs the ``concept`` table); the source value
    that ``source_vocabulary`` explains; the standard concept (``concept`` table again, else ``OMOP/<concept_id>``);
    the source value under ``Source/``. Diagnoses and procedures are available from the end of their visit (rule L3:
    they are bills), drugs and measurements from their own time.

    Args:
        engine: What runs the queries.
        input_dir: Folder of the tables.
        source_vocabulary: The vocabulary of the source values, for conditions (``"ICD9CM"``) or by table
            (``{"condition_occurrence": "ICD10CM", "drug_exposure": "NDC"}``). A value that has not the shape of an
            ICD vocabulary is not taken for one.
        billing_lag_days: How long after the end of a visit its diagnoses and procedures are known, in days.
        shifted: Whether dates were moved person by person, so that they cannot be compared between persons (L12).

    Returns:
        The source; one extract for each table.

    Raises:
        EhrDataError: A required table or column is missing, a table is empty or cannot be read.
        ValueError: ``source_vocabulary`` names a table that has no source values.
    """
    reader = _Reader(engine, Path(input_dir), _vocabularies(source_vocabulary), billing_lag_days)
    extracts = reader.people()
    extracts += reader.visits()
    extracts += reader.codes()
    extracts += reader.notes()
    return Source("omop", extracts, "shifted" if shifted else "calendar", reader.warnings)


def _vocabularies(given: Mapping[str, str] | str | None) -> dict[str, str]:
    names = {"condition_occurrence": given} if isinstance(given, str) else dict(given or {})
    allowed = [domain.table for domain in cdm.OCCURRENCES]
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise ValueError(f"`source_vocabulary` must name tables among {', '.join(allowed)}, got {unknown[0]!r}.")
    return names


class _Reader:
    """What the tables share: the folder, the persons, the visits, the concepts and the warnings."""

    def __init__(self, engine: Engine, input_dir: Path, vocabularies: dict[str, str], lag: float) -> None:
        self.engine, self.input_dir, self.vocabularies, self.lag = engine, input_dir, vocabularies, lag
        self.warnings: list[str] = []
        self.rejected_concepts: list[ir.Table] = []
        if not any(find_table(input_dir, name, required=False) for name in _CODE_TABLES):
            raise EhrDataError(
                f"{input_dir} has no table of codes (one of {', '.join(_CODE_TABLES)}). Check `input_dir`."
            )
        self.concepts = self._concepts()

    def _find(self, name: str, without: str) -> Path | None:
        path = find_table(self.input_dir, name, required=False)
        if path is None:
            self.warnings.append(f"Table `{name}` is missing: {without}.")
        return path

    def _concepts(self) -> ir.Table | None:
        path = self._find("concept", "codes are source values and OMOP concept ids instead of vocabulary codes")
        if path is None:
            return None
        columns = {"concept_id": _ID, "concept_name": _TEXT, "vocabulary_id": Column(), "concept_code": Column()}
        scan = cdm.read(self.engine, path, "concept", columns, key=("concept_id",))
        self.rejected_concepts = [scan.rejected]  # the events that miss one of them fall back to its id
        table = scan.table
        named = table.filter((table.concept_id > 0) & table.vocabulary_id.notnull() & table.concept_code.notnull())
        code = joined(named.vocabulary_id, dotted(named.vocabulary_id, named.concept_code))
        return named.select(concept_key=named.concept_id, concept_name=named.concept_name, code=code)

    def people(self) -> list[Extract]:
        """Static events, births and deaths."""
        path = find_table(self.input_dir, "person")
        columns = {
            "person_id": _ID,
            "gender_concept_id": _CONCEPT,
            "year_of_birth": _CONCEPT,
            "month_of_birth": _CONCEPT,
            "day_of_birth": _CONCEPT,
            "birth_datetime": _TIME,
            "race_concept_id": _CONCEPT,
            "ethnicity_concept_id": _CONCEPT,
            "race_source_value": _TEXT,
        }
        scan = cdm.read(self.engine, path, "person", columns, key=("person_id",))
        table = scan.table.mutate(birth=scan.table.birth_datetime.fill_null(cdm.birth(scan.table)))
        self.persons = table.select(person_key=table.person_id)
        born, no_birth = reject(
            table,
            table.birth.isnull(),
            file=path.name,
            column="year_of_birth,month_of_birth,day_of_birth",
            reason="is no date of birth: the person is kept without one",
        )
        race = lookup(table.race_concept_id, cdm.RACE).fill_null(table.race_source_value)
        statics = {
            "Sex": lookup(table.gender_concept_id, cdm.SEX),
            "Race": race,
            "Ethnicity": lookup(table.ethnicity_concept_id, cdm.ETHNICITY),
        }
        events = as_events(born, subject_id=born.person_id, time=born.birth, code=BIRTH_CODE, kind="birth")
        for name, value in statics.items():
            known = table.mutate(code=joined(name, value))
            known = known.filter(known.code.notnull())
            events = events.union(as_events(known, subject_id=known.person_id, code=known.code, kind="static"))
        if find_table(self.input_dir, "observation_period", required=False):
            self.warnings.append(
                "Table `observation_period` is not read: follow-up ends with the last event of a person."
            )
        return [Extract("person", events, [*self.rejected_concepts, scan.rejected, no_birth]), *self._deaths()]

    def _deaths(self) -> list[Extract]:
        self.deaths = None
        path = self._find("death", "deaths are unknown unless a visit says so")
        if path is None:
            return []
        columns = {"person_id": _ID, "death_date": Column("timestamp", required=True), "death_datetime": _TIME}
        scan = cdm.read(self.engine, path, "death", columns, key=("person_id",))
        # A death known by its day only was not known at midnight.
        table = scan.table.mutate(death=scan.table.death_datetime.fill_null(end_of_day(scan.table.death_date)))
        table, known = self._with_person(table)
        table, strangers = split_by_rules(table, [known], path.name)
        self.deaths = table.select(dead_key=table.person_id, death=table.death)
        events = as_events(table, subject_id=table.person_id, time=table.death, code=DEATH_CODE, kind="death")
        return [Extract("death", events, [scan.rejected, strangers])]

    def _with_person(self, table: ir.Table) -> tuple[ir.Table, Rule]:
        """Joins the person table, which is unique by person, and gives the rule that the person is in it."""
        table = table.left_join(self.persons, table.person_id == self.persons.person_key)
        return table, Rule(lambda row: row.person_key.isnull(), "person_id", "is not in the table `person`")

    def visits(self) -> list[Extract]:
        """Admissions and discharges; also what the other tables look visits up in."""
        self.stays = None
        path = self._find("visit_occurrence", "events of one day make a visit")
        if path is None:
            return []
        columns = {
            "visit_occurrence_id": _ID,
            "person_id": _ID,
            "visit_concept_id": _CONCEPT,
            "visit_start_date": Column("timestamp", required=True),
            "visit_start_datetime": _TIME,
            "visit_end_date": _TIME,
            "visit_end_datetime": _TIME,
            "visit_source_value": _TEXT,
            "discharged_to_concept_id": _CONCEPT,  # v5.4
            "discharge_to_concept_id": _CONCEPT,  # v5.3
        }
        scan = cdm.read(self.engine, path, "visit_occurrence", columns, key=("visit_occurrence_id",))
        table, known = self._with_person(cdm.with_times(scan.table))
        negative = Rule(lambda row: row.end < row.start, "visit_end_date", "negative stay: ends before it starts")
        table, rejected = split_by_rules(table, [known, negative], path.name)
        self.stays = table.select(visit=table.visit_occurrence_id, visit_person=table.person_id, visit_end=table.end)
        return [Extract("visit_occurrence", self._visit_events(table), [scan.rejected, rejected])]

    def _visit_events(self, table: ir.Table) -> ir.Table:
        import ibis

        kind = lookup(table.visit_concept_id, cdm.VISIT_KIND).fill_null("unknown")
        ids = {"subject_id": table.person_id, "visit_id": table.visit_occurrence_id}
        text = table.visit_source_value.fill_null(table.visit_concept_id.cast("string"))
        code = ibis.literal("Visit/") + kind
        admissions = as_events(table, **ids, time=table.start, code=code, kind="admission", text_value=text)
        table = table.mutate(to=table.discharged_to_concept_id.fill_null(table.discharge_to_concept_id))
        if self.deaths is None:
            table = table.mutate(died=ibis.literal(False))
        else:
            table = table.left_join(self.deaths, table.person_id == self.deaths.dead_key)
            # Either may be a date without an hour, so days are compared.
            days = (table.death.date() >= table.start.date()) & (table.death.date() <= table.end.date())
            table = table.mutate(died=days.fill_null(False))
        ended = table.filter(table.end.notnull())
        disposition = ibis.ifelse(ended.died, "died", lookup(ended.to, cdm.DISPOSITION).fill_null("unknown"))
        discharges = as_events(
            ended,
            subject_id=ended.person_id,
            visit_id=ended.visit_occurrence_id,
            time=ended.end,
            code=ibis.literal("Discharge/") + disposition,
            kind="discharge",
            text_value=ended.to.cast("string"),
        )
        return admissions.union(discharges)

    def codes(self) -> list[Extract]:
        """The tables of coded events."""
        extracts = []
        for domain in cdm.OCCURRENCES:
            era = cdm.ERAS.get(domain.table)
            path = find_table(self.input_dir, domain.table, required=False)
            if path is not None:
                extracts.append(self._occurrences(domain, path))
            elif era is not None and (path := find_table(self.input_dir, era.table, required=False)) is not None:
                self.warnings.append(
                    f"Table `{domain.table}` is missing: `{era.table}` is used, without visits and source codes; it "
                    "joins what lies close in time."
                )
                extracts.append(self._occurrences(era, path))
            else:
                self._find(domain.table, f"there are no events of kind {domain.kind}")
        return extracts

    def _occurrences(self, domain: Domain, path: Path) -> Extract:
        prefix, is_era = domain.prefix, domain.table.endswith("_era")
        columns: dict[str, Column] = {
            f"{domain.table}_id" if domain.table != "drug_exposure" else "drug_exposure_id": Column("int64"),
            "person_id": _ID,
            f"{prefix}_concept_id": Column("int64"),
            f"{domain.start}_date": Column("timestamp", required=True),
        }
        if not is_era:
            columns |= {
                f"{domain.start}_datetime": _TIME,
                "visit_occurrence_id": _CONCEPT,
                f"{prefix}_source_value": _TEXT,
                f"{prefix}_source_concept_id": _CONCEPT,
            }
        if domain.kind == "diagnosis" and not is_era:
            columns |= {"condition_type_concept_id": _CONCEPT, "condition_status_concept_id": _CONCEPT}
        if domain.kind == "measurement":
            columns |= {"value_as_number": Column("float64", optional=True), "value_source_value": _TEXT}
        identifier = next(iter(columns))
        # Measurements are by far the most rows and nothing is joined to them: their ids are not compared.
        key = () if domain.kind == "measurement" else (identifier,)
        scan = cdm.read(self.engine, path, domain.table, columns, key=key)
        table, rules = self._placed(scan.table, domain)
        table = self._coded(table, domain)
        uncoded = "unmapped: concept 0 and no source value"
        rules.append(Rule(lambda row: row.code.isnull(), f"{prefix}_concept_id", uncoded))
        table, rejected = split_by_rules(table, rules, path.name)
        return Extract(domain.table, self._code_events(table, domain, identifier), [scan.rejected, rejected])

    def _placed(self, table: ir.Table, domain: Domain) -> tuple[ir.Table, list[Rule]]:
        """Adds ``time``, ``visit`` and ``visit_end``, with the rules that person and visit are known."""
        import ibis

        date, datetime = table[f"{domain.start}_date"], f"{domain.start}_datetime"
        table = table.mutate(time=table[datetime].fill_null(date) if datetime in table.columns else date)
        table, known = self._with_person(table)
        if self.stays is None or "visit_occurrence_id" not in table.columns:
            return table.mutate(visit=ibis.null("int64"), visit_end=ibis.null("timestamp")), [known]
        table = table.mutate(visit_occurrence_id=table.visit_occurrence_id.nullif(0))
        table = table.left_join(self.stays, table.visit_occurrence_id == self.stays.visit)
        return table, [
            known,
            Rule(
                lambda row: row.visit_occurrence_id.notnull() & row.visit.isnull(),
                "visit_occurrence_id",
                "its visit is missing or was rejected",
            ),
            Rule(
                lambda row: row.visit_person != row.person_id,
                "visit_occurrence_id",
                "its visit belongs to another person",
            ),
        ]

    def _coded(self, table: ir.Table, domain: Domain) -> ir.Table:
        """Adds ``code`` in the order of :func:`omop`, null where a row has none."""
        import ibis

        source = f"{domain.prefix}_source_concept_id"
        has_source = source in table.columns
        table = table.mutate(
            standard=table[f"{domain.prefix}_concept_id"].nullif(0),
            source_concept=table[source].nullif(0) if has_source else ibis.null("int64"),
            source_text=table[f"{domain.prefix}_source_value"] if has_source else ibis.null("string"),
        )
        chain = []
        if self.concepts is not None:
            table = self._join_concept(self._join_concept(table, "source_concept"), "standard")
            chain.append(table.source_concept_code)
        vocabulary = self.vocabularies.get(domain.table)
        if vocabulary is not None:
            code = icd(vocabulary, table.source_text)
            chain.append(ibis.ifelse(has_icd_shape(vocabulary, code), joined(vocabulary, code), ibis.null("string")))
        if self.concepts is not None:
            chain.append(table.standard_code)
        chain += [
            joined("OMOP", table.standard.cast("string")),
            joined("OMOP", table.source_concept.cast("string")),
            joined("Source", table.source_text),
        ]
        return table.mutate(code=ibis.coalesce(*chain))

    def _join_concept(self, table: ir.Table, column: str) -> ir.Table:
        """Adds ``<column>_code``; the concept table is unique by its id, so that no row is multiplied."""
        assert self.concepts is not None
        concepts = self.concepts.select(**{f"{column}_key": "concept_key", f"{column}_code": "code"})
        return table.left_join(concepts, table[column] == concepts[f"{column}_key"])

    def _code_events(self, table: ir.Table, domain: Domain, identifier: str) -> ir.Table:
        import ibis

        columns: dict[str, Any] = {"available_at": table.time}
        if domain.billed:
            known = ibis.ifelse(table.visit_end > table.time, table.visit_end, table.time)
            columns["available_at"] = known + ibis.interval(seconds=round(self.lag * 86400))
        if domain.kind == "measurement":
            columns |= {"numeric_value": table.value_as_number, "text_value": table.value_source_value}
        else:
            place = ibis.window(
                group_by=[table.person_id, table.visit], order_by=[cdm.rank(table), table.time, table[identifier]]
            )
            columns["position"] = ibis.row_number().over(place) + 1
        ids = {"subject_id": table.person_id, "visit_id": table.visit}
        return as_events(table, **ids, time=table.time, code=table.code, kind=domain.kind, **columns)

    def notes(self) -> list[Extract]:
        """Notes, under the name of their class."""
        import ibis

        path = self._find("note", "there are no notes")
        if path is None:
            return []
        columns = {
            "note_id": Column("int64"),
            "person_id": _ID,
            "note_date": Column("timestamp", required=True),
            "note_datetime": _TIME,
            "note_class_concept_id": _CONCEPT,
            "note_title": _TEXT,
            "note_text": Column(required=True),
            "visit_occurrence_id": _CONCEPT,
        }
        scan = cdm.read(self.engine, path, "note", columns, key=("note_id",))
        table, rules = self._placed(scan.table, Domain("note", "note", "note", "note"))
        table, rejected = split_by_rules(table, rules, path.name)
        name = table.note_title
        if self.concepts is not None:
            concepts = self.concepts.select(class_key="concept_key", class_name="concept_name")
            table = table.left_join(concepts, table.note_class_concept_id == concepts.class_key)
            name = table.class_name.fill_null(table.note_title)
        category = ibis.coalesce(name, table.note_class_concept_id.nullif(0).cast("string"), ibis.literal("unknown"))
        events = as_events(
            table,
            subject_id=table.person_id,
            visit_id=table.visit,
            time=table.time,
            available_at=table.time,
            code=joined("Note", category),
            kind="note",
            text_value=table.note_text,
        )
        return [Extract("note", events, [scan.rejected, rejected])]

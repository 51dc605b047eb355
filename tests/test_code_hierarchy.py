"""Parents from the code string, against hand-made chains, the published ICD-10-CM tree and real code lists."""

import csv
import gzip
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ehr.models.code_hierarchy import ancestors, block, chapter, dotted, is_valid, parent, undotted


@pytest.mark.parametrize(
    ("code", "chain"),
    [
        ("ICD9CM/250.02", ["250.0", "250"]),
        ("ICD9CM/428.0", ["428"]),
        ("ICD9CM/042", []),
        ("ICD9CM/V58.67", ["V58.6", "V58"]),
        ("ICD9CM/E812.0", ["E812"]),
        ("ICD9Proc/39.95", ["39.9", "39"]),
        ("ICD9Proc/00.01", ["00.0", "00"]),
        ("ICD10CM/E11.65", ["E11.6", "E11"]),
        ("ICD10CM/S52.521A", ["S52.521", "S52.52", "S52.5", "S52"]),
        ("ICD10CM/T36.0X1A", ["T36.0X1", "T36.0X", "T36.0", "T36"]),  # T36.0X is in the tabular list
        ("ICD10CM/V00.01XA", ["V00.01", "V00.0", "V00"]),  # V00.01X is not
        ("ICD10CM/W19.XXXA", ["W19"]),
        ("ICD10CM/C7A.01", ["C7A.0", "C7A"]),
        ("ICD10CM/QA0.01", ["QA0.0", "QA0"]),
        ("ATC/A10BA02", ["A10BA", "A10B", "A10", "A"]),
        ("ATC/C07A", ["C07", "C"]),
    ],
)
def test_chains_by_hand(code, chain):
    vocabulary = code.partition("/")[0]
    assert ancestors(code) == [f"{vocabulary}/{value}" for value in chain]


NOT_UNDERSTOOD = """
ICD9CM ICD9CM/ ICD9CM/25002 ICD9CM/abc ICD9CM/250. ICD9CM/X12.3 ICD9CM/٢٥٠ ICD9Proc/395 ICD10CM/e11.6
ICD10CM/E11.65432 ATC/A10BA0 NDC/0002-1433 LOINC/2345-7 [UNK] /250
"""


@pytest.mark.parametrize("code", ["", "ICD9CM/250 ", *NOT_UNDERSTOOD.split()])
def test_what_is_not_understood_has_no_parent_and_no_range(code):
    assert not is_valid(code)
    assert (parent(code), block(code), chapter(code)) == (None, None, None)


@pytest.mark.parametrize(
    ("code", "expected_block", "expected_chapter"),
    [
        ("250.00", "249-259", "240-279"),
        ("E812.0", "E810-E819", "E000-E999"),
        ("V58.67", "V50-V59", "V01-V91"),
        ("042", "042-042", "001-139"),
        ("001.0", "001-009", "001-139"),
        ("999.9", "996-999", "800-999"),
        ("280.9", "280-289", "280-289"),  # a chapter without sub-chapters
        ("745.4", "740-759", "740-759"),
        ("209.20", "209-209", "140-239"),
        ("E000.0", "E000-E000", "E000-E999"),
        ("E849.7", "E846-E849", "E000-E999"),
        ("V91.00", "V91-V91", "V01-V91"),
        ("V10", "V10-V19", "V01-V91"),
    ],
)
def test_icd9_ranges_by_hand(code, expected_block, expected_chapter):
    assert block(f"ICD9CM/{code}") == f"ICD9CM/{expected_block}"
    assert chapter(f"ICD9CM/{code}") == f"ICD9CM/{expected_chapter}"


@pytest.mark.parametrize(
    ("code", "expected"), [("39.95", "35-39"), ("00.01", "00-00"), ("17.5", "17-17"), ("99.1", "87-99")]
)
def test_icd9_procedure_chapters_by_hand(code, expected):
    assert chapter(f"ICD9Proc/{code}") == block(f"ICD9Proc/{code}") == f"ICD9Proc/{expected}"


def test_categories_between_two_ranges_belong_to_none():
    assert block("ICD9CM/029") == "ICD9CM/001-139"  # no sub-chapter holds 029, the chapter does
    assert chapter("ICD9CM/000") is None
    assert chapter("ICD9CM/V92.1") is None


def test_every_range_lies_inside_one_chapter_and_none_overlap():
    seen = {}
    categories = (
        [f"{n:03d}" for n in range(1000)] + [f"V{n:02d}" for n in range(100)] + [f"E{n:03d}" for n in range(1000)]
    )
    for category in categories:
        code = f"ICD9CM/{category}"
        if block(code) is not None:
            assert seen.setdefault(block(code), chapter(code)) == chapter(code)
    assert len(seen) > 150
    assert set(seen.values()) == {chapter(f"ICD9CM/{c}") for c in categories} - {None}
    assert len(set(seen.values())) == 19


@pytest.mark.parametrize(
    ("vocabulary", "bare", "with_dot"),
    [
        ("ICD9CM", "25000", "250.00"),
        ("ICD9CM", "042", "042"),
        ("ICD9CM", "E8120", "E812.0"),
        ("ICD9CM", "E812", "E812"),
        ("ICD9CM", "V5867", "V58.67"),
        ("ICD9Proc", "3995", "39.95"),
        ("ICD9Proc", "399", "39.9"),
        ("ICD10CM", "E1165", "E11.65"),
        ("ICD10CM", "E11", "E11"),
        ("ICD10CM", "S52521A", "S52.521A"),
        ("ICD10PCS", "0W9G3ZZ", "0W9G3ZZ"),
        ("ATC", "A10BA02", "A10BA02"),
    ],
)
def test_the_dot_goes_in_and_out(vocabulary, bare, with_dot):
    assert dotted(vocabulary, bare) == dotted(vocabulary, with_dot) == with_dot
    assert undotted(with_dot) == bare


icd_values = st.from_regex(r"(?:[0-9]{3}|V[0-9]{2}|E[0-9]{3}|[A-Z][0-9][0-9A-Z])(?:\.[0-9A-Z]{1,4})?", fullmatch=True)
any_code = st.builds(
    "/".join, st.tuples(st.sampled_from(["ICD9CM", "ICD9Proc", "ICD10CM", "ATC", "NDC"]), icd_values | st.text())
)


@given(any_code)
def test_every_chain_ends_and_gets_shorter_at_each_step(code):
    chain = [code, *ancestors(code)]
    assert all(len(above) < len(below) for below, above in pairwise(chain))
    assert parent(chain[-1]) is None
    assert all(is_valid(above) for above in chain[1:])


@pytest.mark.slow
def test_parents_are_those_of_the_published_icd10_tree():
    tree = pytest.importorskip("simple_icd_10_cm")
    codes = [code for code in set(tree.get_all_codes(True)) if tree.is_category_or_subcategory(code)]
    assert len(codes) > 90_000
    for code in codes:
        above = tree.get_parent(code)
        # A block of one category bears its name there, so the category looks like its own parent.
        inner = tree.is_category_or_subcategory(above) and above != code
        assert parent(f"ICD10CM/{code}") == (f"ICD10CM/{above}" if inner else None)


def _column(path, *names):
    with gzip.open(path, "rt", newline="") as lines:
        return {tuple(row[name] for name in names) for row in csv.DictReader(lines)}


def test_every_code_of_the_mimic3_demo_has_its_category_and_ranges(real_data):
    bare = [value for (value,) in _column(real_data("mimic3_demo") / "DIAGNOSES_ICD.csv.gz", "icd9_code")]
    assert len(bare) == 581
    for value in bare:
        code = f"ICD9CM/{dotted('ICD9CM', value)}"
        category = value[:4] if value.startswith("E") else value[:3]
        assert ([code, *ancestors(code)])[-1] == f"ICD9CM/{category}"
        start, end = block(code).removeprefix("ICD9CM/").split("-")
        assert start <= category <= end
        assert chapter(code) is not None


def test_every_icd_code_of_the_mimic4_demo_ends_in_a_category(real_data):
    rows = _column(real_data("mimic4_demo") / "hosp" / "diagnoses_icd.csv.gz", "icd_code", "icd_version")
    assert len(rows) > 1_000
    for value, version in rows:
        vocabulary = {"9": "ICD9CM", "10": "ICD10CM"}[version]
        value = value.strip()
        code = f"{vocabulary}/{dotted(vocabulary, value)}"
        category = value[:4] if version == "9" and value.startswith("E") else value[:3]
        assert ([code, *ancestors(code)])[-1] == f"{vocabulary}/{category}"
    procedures = _column(real_data("mimic4_demo") / "hosp" / "procedures_icd.csv.gz", "icd_code", "icd_version")
    for value, _ in {row for row in procedures if row[1] == "9"}:
        code = f"ICD9Proc/{dotted('ICD9Proc', value.strip())}"
        assert ([code, *ancestors(code)])[-1] == f"ICD9Proc/{value[:2]}"
        assert chapter(code) is not None

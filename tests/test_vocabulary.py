"""Vocabularies: counts by hand, the privacy rule, the leakage rule, shards against memory."""

import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr.models.code_hierarchy import ancestors, dotted
from hf_ehr.schema import EhrDataError, shard_name, write_parquet
from hf_ehr.tasks.audit import LeakageError, check_fitted_on, fingerprint
from hf_ehr.vocabulary import count_codes, coverage, fit_tokenizer

from .builders import patient, records, visit

E11, I50 = "ICD10CM/E11.9", "ICD10CM/I50.9"


def cohort(codes_of: dict[int, list[list[str]]]) -> pa.Table:
    """Patients whose visits hold the given diagnoses."""
    return records(
        *(
            patient(who, [visit(day, diagnoses=codes) for day, codes in enumerate(visits)])
            for who, visits in codes_of.items()
        )
    )


def vocabulary(tokenizer) -> list[str]:
    """The codes of a tokenizer in the order of their ids."""
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [code for code, _ in ordered if "/" in code]


def sharded(table: pa.Table, folder, shards: int = 3):
    """``table`` as the prepared folder it would have been written to."""
    owner = np.asarray(table["subject_id"]) % shards
    for index in range(shards):
        write_parquet(table.filter(pa.array(owner == index)), folder / "records" / shard_name(index, shards))
    return folder


def test_counts_are_visits_and_distinct_patients():
    table = cohort({1: [[E11, I50], [E11]], 2: [[E11]], 3: [[]]})
    counts = count_codes(table).rows()
    assert counts == [(E11, 3, 2), (I50, 1, 1)]


def test_only_the_asked_for_patients_and_code_lists_are_counted():
    table = records(
        patient(1, [visit(0, diagnoses=[E11], procedures=["ICD9Proc/39.95"])]),
        patient(2, [visit(0, diagnoses=[I50], medications=["ATC/A10BA02"])]),
    )
    assert count_codes(table, subject_ids=[2])["code"].to_list() == [I50]
    both = count_codes(table, kinds=("diagnoses", "procedures"))["code"].to_list()
    assert both == [E11, I50, "ICD9Proc/39.95"]


def test_a_patient_with_null_lists_and_no_visits_counts_nothing():
    empty = patient(2, [visit(0) | {"diagnoses": None}])
    assert count_codes(records(patient(1, []), empty)).is_empty()


def test_shards_on_disk_give_what_memory_gives(tmp_path):
    table = cohort({who: [[E11, f"ICD10CM/I50.{who % 7}"]] for who in range(40)})
    folder = sharded(table, tmp_path)
    assert count_codes(folder).equals(count_codes(table))
    paths = iter(sorted((folder / "records").iterdir()))
    fitted = [fit_tokenizer(source, subject_ids=range(40)) for source in (table, folder, paths)]
    assert vocabulary(fitted[0]) == vocabulary(fitted[1]) == vocabulary(fitted[2]) == [E11, "ICD10CM/I50"]


def test_ids_follow_falling_occurrences_then_the_code():
    table = cohort({1: [["A/2", "A/1", "A/3"], ["A/3"]]})
    assert vocabulary(fit_tokenizer(table, subject_ids=[1], min_patients=1)) == ["A/3", "A/1", "A/2"]


def test_eleven_patients_enter_and_ten_do_not():
    ten, eleven = "ICD10CM/J18.9", "ICD10CM/K21.9"
    table = cohort({who: [[eleven] + [ten] * (who < 10)] for who in range(11)})
    assert vocabulary(fit_tokenizer(table, subject_ids=range(11))) == [eleven]


def test_rare_codes_enter_as_the_ancestor_whose_patients_are_enough():
    # 6 + 6 patients below E11.6, which itself never occurs: the union has 12.
    codes = {who: [["ICD10CM/E11.65" if who < 6 else "ICD10CM/E11.69"]] for who in range(12)}
    assert vocabulary(fit_tokenizer(cohort(codes), subject_ids=range(12))) == ["ICD10CM/E11.6"]


def test_the_union_counts_a_patient_once():
    # 6 patients with both siblings: 12 pairs, 6 people.
    codes = {who: [["ICD10CM/E11.65", "ICD10CM/E11.69"]] for who in range(6)}
    with pytest.raises(EhrDataError, match="reaches `min_count`=1 and `min_patients`=11"):
        fit_tokenizer(cohort(codes), subject_ids=range(6))


def test_back_off_climbs_level_by_level_to_the_category():
    # Nobody but the category gathers 11: 4 under E11.6, 4 under E11.2, 3 with E11.9.
    leaves = ["ICD10CM/E11.65"] * 4 + ["ICD10CM/E11.21"] * 4 + [E11] * 3
    table = cohort({who: [[leaf]] for who, leaf in enumerate(leaves)})
    tokenizer = fit_tokenizer(table, subject_ids=range(11))
    assert vocabulary(tokenizer) == ["ICD10CM/E11"]
    assert coverage(tokenizer, table).backed_off == 1.0


def test_a_rare_child_does_not_lift_a_rare_parent_that_stays_rare():
    codes = {who: [["ICD10CM/E11.65"]] for who in range(5)} | {who: [[I50]] for who in range(5, 16)}
    tokenizer = fit_tokenizer(cohort(codes), subject_ids=range(16))
    assert vocabulary(tokenizer) == [I50]
    assert tokenizer.codes_to_ids(["ICD10CM/E11.65"]).tolist() == [tokenizer.unk_token_id]


def test_occurrences_of_rare_children_count_for_the_ancestor_they_encode_as():
    # E11.6 occurs 11 times itself and 8 times as E11.65, which outweighs I50.9's 15.
    codes = {who: [["ICD10CM/E11.6"], ["ICD10CM/E11.65"] if who < 8 else []] for who in range(11)}
    codes |= {who: [[I50]] for who in range(20, 35)}
    assert vocabulary(fit_tokenizer(cohort(codes), subject_ids=codes)) == ["ICD10CM/E11.6", I50]


def test_min_count_backs_off_too():
    table = cohort({1: [["ICD10CM/E11.65"], ["ICD10CM/E11.69"]]})
    assert vocabulary(fit_tokenizer(table, subject_ids=[1], min_patients=1, min_count=2)) == ["ICD10CM/E11.6"]


def test_max_size_keeps_the_most_frequent_and_the_rest_backs_off():
    table = cohort({1: [["ICD10CM/E11"], ["ICD10CM/E11", E11], ["ICD10CM/E11", "ICD10CM/I50"]]})
    tokenizer = fit_tokenizer(table, subject_ids=[1], min_patients=1, max_size=1)
    assert vocabulary(tokenizer) == ["ICD10CM/E11"]
    assert tokenizer.codes_to_ids([E11]).tolist() == tokenizer.codes_to_ids(["ICD10CM/E11"]).tolist()


def saved_bytes(tokenizer, folder) -> dict[str, bytes]:
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_test_patients_leave_every_saved_byte_alone(tmp_path):
    train = {who: [[E11, f"ICD10CM/I50.{who % 3}"]] for who in range(0, 30, 2)}
    one = cohort(train | {who: [[I50, "ICD10CM/J18.9"]] for who in range(1, 60, 2)})
    other = cohort(train | {who: [["ICD9CM/250.00"] * 3] for who in range(101, 160, 2)})
    saved = [
        saved_bytes(fit_tokenizer(table, subject_ids=ids), tmp_path / str(index))
        for index, (table, ids) in enumerate([(one, list(train)), (other, np.array([*train])[::-1])])
    ]
    assert saved[0] == saved[1]
    config = json.loads(saved[0]["tokenizer_config.json"])
    assert config["fitted_on"] == fingerprint(train)
    assert (config["min_patients"], config["min_count"], config["kinds"]) == (11, 1, ["diagnoses"])


def test_the_audit_knows_the_patients_it_was_fitted_on():
    tokenizer = fit_tokenizer(cohort({1: [[E11]], 2: [[E11]], 3: [[E11]]}), subject_ids=[1, 2], min_patients=1)
    check_fitted_on(tokenizer.init_kwargs["fitted_on"], np.array([2, 1, 1]))
    with pytest.raises(LeakageError, match="L5"):
        check_fitted_on(tokenizer.init_kwargs["fitted_on"], [1, 2, 3])


def test_code_exact_fits_with_mask_and_padding_on_zero():
    tokenizer = fit_tokenizer(cohort({1: [[E11]]}), subject_ids=[1], min_patients=1, code_exact=True)
    assert tokenizer.pad_token_id == tokenizer.mask_token_id == 0
    assert tokenizer.codes_to_ids([E11]).tolist() == [1]


def test_coverage_by_hand():
    table = cohort({1: [[E11, "ICD10CM/I50.9"], [E11, "ICD10CM/I50.9", "ICD9CM/428.0"]], 2: [["ICD10CM/I50.22"]]})
    tokenizer = fit_tokenizer(cohort({1: [[E11, "ICD10CM/I50"]]}), subject_ids=[1], min_patients=1)
    assert asdict(coverage(tokenizer, table)) == pytest.approx(
        {"occurrences": 6, "exact": 2 / 6, "backed_off": 3 / 6, "unknown": 1 / 6}
    )
    assert coverage(tokenizer, table, subject_ids=[2]).backed_off == 1.0
    with pytest.raises(EhrDataError, match="no diagnoses"):
        coverage(tokenizer, table, subject_ids=[99])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subject_ids": []}, "`subject_ids` must name the patients"),
        ({"subject_ids": ["a"]}, "`subject_ids` must be integers"),
        ({"subject_ids": [1], "min_patients": 0}, "`min_patients` must be at least 1, got 0"),
        ({"subject_ids": [1], "min_count": 0}, "`min_count` must be at least 1"),
        ({"subject_ids": [1], "max_size": 0}, "`max_size` must be at least 1"),
        ({"subject_ids": [1], "kinds": "diagnoses"}, "`kinds` must be a list"),
        ({"subject_ids": [1], "kinds": ["labs"]}, "`kinds` must be a list"),
        ({"subject_ids": [99]}, "Check that the ids belong to these records"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_tokenizer(cohort({1: [[E11]]}), **arguments)


def naive_vocabulary(histories: dict[int, list[str]], min_count: int, min_patients: int) -> set[str]:
    """The privacy rule with Python lists: deepest codes first, a rare one hands all it has to its parent."""
    held: dict[str, list[int]] = {}
    for who, codes in histories.items():
        for code in codes:
            held.setdefault(code, []).append(who)
    chains = [(code, *ancestors(code)) for code in held]
    steps = sorted(
        {pair for chain in chains for pair in pairwise((*chain, None))}, key=lambda step: -len(ancestors(step[0]))
    )
    kept = set()
    for code, above in steps:
        owners = held.get(code, [])
        if len(owners) >= min_count and len(set(owners)) >= min_patients:
            kept.add(code)
        elif above is not None:
            held.setdefault(above, []).extend(owners)
    return kept


LEAVES = """
ICD10CM/E11 ICD10CM/E11.6 ICD10CM/E11.65 ICD10CM/E11.69 ICD10CM/E11.21 ICD10CM/I50.9
ATC/A10BA02 ATC/A10BA ATC/A10BB01 NDC/1
"""
leaf_codes = st.sampled_from(LEAVES.split())


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 30), st.lists(st.sets(leaf_codes, max_size=4), max_size=3), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_the_vocabulary_is_that_of_the_rule_spelled_out(histories, min_count, min_patients):
    flat = {who: [code for codes in visits for code in codes] for who, visits in histories.items()}
    expected = naive_vocabulary(flat, min_count, min_patients)
    table = cohort({who: [sorted(codes) for codes in visits] for who, visits in histories.items()})
    try:
        fitted = fit_tokenizer(table, subject_ids=histories, min_count=min_count, min_patients=min_patients)
    except EhrDataError:
        assert not expected
    else:
        assert set(vocabulary(fitted)) == expected


def test_the_mimic3_demo_backs_off_to_codes_that_eleven_patients_share(real_data):
    rows = pl.read_csv(real_data("mimic3_demo") / "DIAGNOSES_ICD.csv.gz", schema_overrides={"icd9_code": pl.String})
    codes = [f"ICD9CM/{dotted('ICD9CM', code)}" for code in rows["icd9_code"]]
    rows = rows.with_columns(pl.Series("code", codes))
    table = cohort(
        {
            who[0]: [stay["code"].to_list() for stay in group.partition_by("hadm_id", maintain_order=True)]
            for who, group in rows.group_by("subject_id", maintain_order=True)
        }
    )
    tokenizer = fit_tokenizer(table, subject_ids=table["subject_id"])
    for code in vocabulary(tokenizer):
        below = rows.filter(pl.col("code").map_elements(lambda c, top=code: top in [c, *ancestors(c)], pl.Boolean))
        assert below["subject_id"].n_unique() >= 11, code
    report = coverage(tokenizer, table)
    assert report.occurrences == rows.select("hadm_id", "code").n_unique()
    # 100 patients are few: each of the three ways is taken often.
    assert min(report.exact, report.backed_off, report.unknown) > 0.1
    assert report.exact + report.backed_off + report.unknown == pytest.approx(1)

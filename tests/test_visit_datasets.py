"""Examples of visits: what is known when they are asked about, and nothing else (papers.md §2, rows 27, 37-39)."""

from __future__ import annotations

import copy
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ehr import EhrCodeTokenizer, GBertConfig, MedMPLMConfig, MedMPLMForMedicationRecommendation, MedMPLMProcessor
from hf_ehr.schema import LABEL_SCHEMA, DatasetInfo, EhrDataError, shard_name
from hf_ehr.tasks.labels import read_labels
from hf_ehr.tasks.recommendation import label_codes
from hf_ehr.visit_collators import VisitCollator
from hf_ehr.visit_datasets import build_visit_examples
from tests.builders import day, patient, records, visit

DIAGNOSES = [f"ICD10CM/A{number:02}" for number in range(9)]
DRUGS = [f"ATC/A{number:02}" for number in range(6)]
WORDS = ["fever", "pain", "cough", "rest", "sleep"]
PROCESSOR = MedMPLMProcessor(
    EhrCodeTokenizer.from_codes(DIAGNOSES, kinds=["diagnoses"]),
    EhrCodeTokenizer.from_codes(DRUGS, kinds=["medications"]),
    EhrCodeTokenizer.from_codes(WORDS, model_max_length=6),
)
SUMMARY = "Discharge summary"


def note(number: float, text: str, category: str = SUMMARY) -> dict:
    return {"time": day(number), "category": category, "text": text}


def write(folder, patients, shards: int = 1):
    (folder / "records").mkdir(parents=True)
    for shard in range(shards):
        rows = [row for row in patients if row["subject_id"] % shards == shard]
        pq.write_table(records(*rows), folder / "records" / shard_name(shard, shards))
    DatasetInfo("made", {}, shards).save(folder)
    return folder


def three_visits(subject: int = 1) -> dict:
    return patient(
        subject,
        [
            visit(0, 2, diagnoses=DIAGNOSES[:2], medications=DRUGS[:1], notes=[note(2, "fever pain")]),
            visit(5, 6, diagnoses=DIAGNOSES[2:3], medications=DRUGS[1:3], notes=[note(6, "cough")]),
            visit(9, 10, diagnoses=DIAGNOSES[3:4], medications=DRUGS[:3], notes=[note(10, "rest")]),
        ],
    )


def labels(column: str, *rows) -> pa.Table:
    made = [{"subject_id": subject, "prediction_time": day(time), column: value} for subject, time, value in rows]
    return pa.Table.from_pylist(made, schema=LABEL_SCHEMA)


def spelled(row: dict) -> dict:
    """An example with codes and words for ids."""
    parts = {"diagnosis_ids": PROCESSOR.diagnosis_tokenizer, "medication_ids": PROCESSOR.medication_tokenizer}
    parts["note_input_ids"] = PROCESSOR.note_tokenizer
    words = {n: [t.convert_ids_to_tokens(ids) for ids in row[n]] for n, t in parts.items() if n in row}
    return row | words


def test_every_visit_with_a_code_is_an_example_without_labels(tmp_path):
    silent = visit(20, 21, notes=[note(21, "sleep")])
    data = write(tmp_path / "data", [three_visits(), patient(2, [silent])], shards=2)
    rows = [spelled(row) for row in build_visit_examples(data, PROCESSOR).to_list()]
    assert [(row["subject_id"], row["visit_ids"]) for row in rows] == [(1, [0]), (1, [50]), (1, [90])]
    assert rows[0]["diagnosis_ids"] == [DIAGNOSES[:2]]
    assert rows[1]["medication_ids"] == [DRUGS[1:3]]
    assert rows[2]["note_input_ids"] == [["rest"]]
    kept = build_visit_examples(data, PROCESSOR, subject_ids=[1], cache_dir=tmp_path / "cache")
    assert [spelled(row) for row in kept.to_list()] == rows


def test_of_a_recommended_visit_its_diagnoses_alone_are_seen(tmp_path):
    data = write(tmp_path / "data", [three_visits()])
    asked = labels("codes", (1, 9, DRUGS[:3]))
    (row,) = map(spelled, build_visit_examples(data, PROCESSOR, labels=asked).to_list())
    assert row == {
        "subject_id": 1,
        "visit_ids": [0, 50, 90],
        "diagnosis_ids": [DIAGNOSES[:2], DIAGNOSES[2:3], DIAGNOSES[3:4]],
        "medication_ids": [DRUGS[:1], DRUGS[1:3], []],
        "note_input_ids": [["fever", "pain"], ["cough"], []],
        "asked": [False, False, True],
        "label_ids": [[], [], [0, 1, 2]],
    }
    (shown,) = map(spelled, build_visit_examples(data, PROCESSOR, labels=asked, target_text=True).to_list())
    assert shown["note_input_ids"][2] == ["rest"]


def test_labels_of_a_patient_share_a_row_only_where_each_sees_what_it_would_see_alone(tmp_path):
    tangled = three_visits(2)
    tangled["visits"][0]["diagnoses_at"][1] = day(7)  # known after the second visit has begun
    data = write(tmp_path / "data", [three_visits(1), tangled])
    asked = labels("codes", (1, 5, DRUGS[1:3]), (1, 9, DRUGS[:3]), (2, 5, DRUGS[1:3]), (2, 9, DRUGS[:3]))
    rows = [spelled(row) for row in build_visit_examples(data, PROCESSOR, labels=asked).to_list()]
    assert [(row["subject_id"], row["asked"]) for row in rows] == [
        (1, [False, True, True]), (2, [False, True]), (2, [False, False, True])
    ]  # fmt: skip
    assert rows[1]["diagnosis_ids"] == [DIAGNOSES[:1], DIAGNOSES[2:3]]
    assert rows[2]["diagnosis_ids"][0] == DIAGNOSES[:2]


def test_the_last_visits_are_seen_and_empty_ones_take_no_place(tmp_path):
    visits = [visit(10 * n, 10 * n + 1, diagnoses=[DIAGNOSES[n]], medications=[DRUGS[n]]) for n in range(5)]
    visits.insert(4, visit(35, 36))
    data = write(tmp_path / "data", [patient(1, visits)])
    asked = labels("codes", *((1, 10 * n, [DRUGS[n]]) for n in range(1, 5)))
    rows = build_visit_examples(data, PROCESSOR, labels=asked, max_visits=3).to_list()
    assert [(row["visit_ids"], row["asked"]) for row in rows] == [
        ([0, 100, 200], [False, True, True]),
        ([100, 200, 300], [False, False, True]),
        ([200, 300, 400], [False, False, True]),
    ]


def test_labels_that_nobody_can_answer_are_counted(tmp_path, caplog):
    late = three_visits(2)
    late["visits"][0] |= {
        f"{kind}_at": [day(99)] * len(late["visits"][0][kind]) for kind in ("diagnoses", "medications")
    }
    late["visits"][0]["notes"] = []
    data = write(tmp_path / "data", [three_visits(1), late])
    asked = labels("codes", (1, 5, DRUGS[:1]), (1, 5.5, DRUGS[:1]), (2, 5, DRUGS[:1]), (9, 5, DRUGS[:1]))
    examples = build_visit_examples(data, PROCESSOR, labels=asked)
    assert examples["subject_id"][:] == [1]
    for reason in ("1 × not asked at the start", "1 × nothing is known of earlier", "1 × label of a patient without"):
        assert reason in caplog.text
    with pytest.raises(EhrDataError, match="No example is left"):
        build_visit_examples(data, PROCESSOR, labels=labels("codes", (1, 0, DRUGS[:1])))


def test_an_admission_is_seen_as_known_at_its_discharge(tmp_path):
    made = three_visits()
    made["visits"][1] |= {"diagnoses": DIAGNOSES[2:4], "diagnoses_at": [day(6), day(8)]}
    made["visits"][1]["notes"].append(note(6.5, "sleep"))
    data = write(tmp_path / "data", [made])
    (row,) = map(
        spelled, build_visit_examples(data, PROCESSOR, labels=labels("boolean_value", (1, 6, True))).to_list()
    )
    assert row == {
        "subject_id": 1, "visit_ids": [50], "diagnosis_ids": [DIAGNOSES[2:3]], "medication_ids": [DRUGS[1:3]],
        "note_input_ids": [["cough"]], "labels": 1,
    }  # fmt: skip


def test_the_note_is_the_last_of_a_category_or_of_each_the_newest_first(tmp_path):
    notes = [note(1, "pain", "Nursing"), note(1.5, "fever"), note(2, "cough", "discharge summary "), note(2, " ", "X")]
    notes.append(note(1.2, "sleep", "Nursing"))
    data = write(tmp_path / "data", [patient(1, [visit(0, 2, diagnoses=DIAGNOSES[:1], notes=notes)])])

    def words(**options):
        (row,) = map(spelled, build_visit_examples(data, PROCESSOR, **options).to_list())
        return row["note_input_ids"][0]

    assert words() == ["cough", "sleep"]
    assert words(note_category=SUMMARY) == ["cough"]
    assert words(note_category="Radiology") == []


def test_a_note_known_by_its_date_counts_on_that_day_where_asked_for(tmp_path):
    last_second = 1 - 1 / 86_400
    notes = [note(2 + last_second, "fever"), note(2.9, "pain", "Nursing")]
    data = write(tmp_path / "data", [patient(1, [visit(0, 2.5, diagnoses=DIAGNOSES[:1], notes=notes)])])
    asked = labels("boolean_value", (1, 2.5, False))
    found = [
        build_visit_examples(data, PROCESSOR, labels=asked, notes_of_the_day=option)[0]["note_input_ids"]
        for option in (False, True)
    ]
    assert found == [[[]], [[5]]]


def test_what_is_coded_is_never_fed(tmp_path):
    data = write(tmp_path / "data", [three_visits()])
    asked = read_labels(label_codes("icd_coding", data))
    examples = build_visit_examples(data, PROCESSOR, labels=asked, setting="coding", label_names=DIAGNOSES[1:3])
    assert "diagnosis_ids" not in examples.column_names
    assert examples["label_ids"][:] == [[[0]], [[1]], [[]]]
    other = three_visits()
    for one in other["visits"]:
        one |= {"diagnoses": DIAGNOSES[5:6], "diagnoses_at": [one["end"]], "procedures": ["ICD10PCS/1"]}
        one["procedures_at"] = [one["end"]]
    changed = write(tmp_path / "changed", [other])
    again = build_visit_examples(changed, PROCESSOR, labels=asked, setting="coding", label_names=DIAGNOSES[1:3])
    assert again.to_list() == examples.to_list()


def test_a_chart_is_coded_when_its_last_note_is_written(tmp_path):
    made = patient(
        1, [visit(0, 2, diagnoses=DIAGNOSES[:1], notes=[note(3, "fever")]), visit(2.5, 4, diagnoses=DIAGNOSES[1:2])]
    )
    data = write(tmp_path / "data", [made])
    asked = read_labels(label_codes("icd_coding", data))
    assert asked["prediction_time"].to_pylist() == [day(3), day(4)]
    examples = build_visit_examples(data, PROCESSOR, labels=asked, setting="coding", label_names=DIAGNOSES[:2])
    assert examples["visit_ids"][:] == [[0], [25]]
    assert examples["note_input_ids"][:] == [[[5]], [[]]]


def test_medications_are_asked_for_from_the_second_visit_on(tmp_path):
    visits = [
        visit(0, 1, diagnoses=DIAGNOSES[:1]),  # no drug
        visit(3, 4, diagnoses=DIAGNOSES[:1], medications=DRUGS[:1]),
        visit(6, 7, medications=DRUGS[:1]),  # no diagnosis
        visit(9, 10, diagnoses=DIAGNOSES[:1], medications=["NDC/1", *DRUGS[2:4]]),
        visit(12, 12, diagnoses=DIAGNOSES[:1], medications=DRUGS[:1], visit_id=1),
        visit(12, 13, diagnoses=DIAGNOSES[:1], medications=DRUGS[1:2], visit_id=2),
    ]
    data = write(tmp_path / "data", [patient(1, visits), patient(2, visits[1:2])])
    path = label_codes("medication_recommendation", data)
    found = read_labels(path)
    assert found.select(["subject_id", "prediction_time", "codes"]).to_pylist() == [
        {"subject_id": 1, "prediction_time": day(9), "codes": ["NDC/1", *DRUGS[2:4]]},
        {"subject_id": 1, "prediction_time": day(12), "codes": DRUGS[1:2]},
    ]
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["excluded"] == {
        "no_diagnosis": 1, "no_medication": 1, "starts_with_another_visit": 1, "first_of_the_patient": 2
    }  # fmt: skip
    assert report["candidates"] == 7
    assert "25.0% of the medications are not in ATC" in report["warnings"][0]
    with pytest.raises(EhrDataError, match="asks about no visit"):
        label_codes("medication_recommendation", write(tmp_path / "one", [patient(2, visits[1:2])]))
    with pytest.raises(ValueError, match="`task` must be one of"):
        label_codes("drugs", data)


def recommender(**options) -> MedMPLMForMedicationRecommendation:
    torch.manual_seed(0)
    codes = GBertConfig.tiny(diagnosis_vocab_size=14, medication_vocab_size=11)
    notes = {"model_type": "bert", "vocab_size": 10, "hidden_size": 32, "num_hidden_layers": 1}
    notes |= {"num_attention_heads": 2, "intermediate_size": 32}
    config = MedMPLMConfig(code_config=codes, note_config=notes, id2label=dict(enumerate(DRUGS)), **options)
    return MedMPLMForMedicationRecommendation(config).eval()


def random_patient(draw, subject: int) -> dict:
    """Visits that may overlap, codes and notes that may become known long after."""
    starts = sorted(draw(st.lists(st.integers(0, 12), min_size=2, max_size=5)))
    visits = []
    for number, start in enumerate(starts):
        diagnoses, drugs = (
            draw(st.lists(st.sampled_from(codes), unique=True, max_size=3)) for codes in (DIAGNOSES, DRUGS)
        )
        lags = st.integers(0, 9)
        times = {
            f"{kind}_at": [day(start + draw(lags)) for _ in codes]
            for kind, codes in (("diagnoses", diagnoses), ("medications", drugs))
        }
        notes = [note(start + draw(lags), draw(st.sampled_from(WORDS)), category) for category in ("A", "B")]
        notes = notes[: draw(st.integers(0, 2))]
        end = start + draw(st.integers(0, 4))
        fields = {"diagnoses": diagnoses, "medications": drugs, "notes": notes, "visit_id": 10 * subject + number}
        visits.append(visit(start, end, **fields, **times))
    return patient(subject, visits)


@st.composite
def worlds(draw):
    return [random_patient(draw, subject) for subject in (1, 2)]


def after(patients: list[dict], times: dict[int, object], target_of: dict[int, int]) -> list[dict]:
    """With all changed that an answer may not depend on: what is known later, drugs and notes of the asked visit."""
    changed = copy.deepcopy(patients)
    for row in changed:
        time, target = times[row["subject_id"]], target_of[row["subject_id"]]
        for number, one in enumerate(row["visits"]):
            own, future = number == target, one["start"] > time
            for kind, codes in (("diagnoses", DIAGNOSES), ("medications", DRUGS)):
                if own and kind == "diagnoses":
                    continue
                moments = zip(one[kind], one[f"{kind}_at"], strict=True)
                kept = [(c, t) for c, t in moments if t <= time and not own and not future]
                one[kind] = [c for c, _ in kept] + codes[-1:] * (codes[-1] not in [c for c, _ in kept])
                one[f"{kind}_at"] = [t for _, t in kept] + [time_after(time)] * (len(one[kind]) - len(kept))
            one["notes"] = [n for n in one["notes"] if n["time"] <= time and not own and not future]
            one["notes"].append({"time": time_after(time), "category": "A", "text": "sleep sleep"})
            one["end"] = time_after(time) if own or future else one["end"]
    return changed


def time_after(time):
    return time + (day(1) - day(0)) / 2


@settings(max_examples=10, deadline=None)
@given(worlds())
def test_nothing_of_the_asked_visit_or_later_is_seen_and_sharing_a_row_changes_nothing(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("worlds")
    data = write(folder / "data", world)
    rows = [(row["subject_id"], one["start"]) for row in world for one in row["visits"]]
    rows = sorted(set(rows))
    everything = [{"subject_id": s, "prediction_time": t, "codes": DRUGS[:1]} for s, t in rows]
    try:
        together = build_visit_examples(data, PROCESSOR, labels=pa.Table.from_pylist(everything, schema=LABEL_SCHEMA))
    except EhrDataError:
        return  # nothing is known of any visit before another
    scores = scored(together)
    for question in everything:
        subject, time = question["subject_id"], question["prediction_time"]
        row = next(row for row in world if row["subject_id"] == subject)
        target = max(n for n, one in enumerate(row["visits"]) if one["start"] == time)
        key = (subject, row["visits"][target]["visit_id"])
        one = pa.Table.from_pylist([question], schema=LABEL_SCHEMA)
        if key not in scores:
            continue
        alone = build_visit_examples(data, PROCESSOR, labels=one)
        np.testing.assert_allclose(scored(alone)[key], scores[key], atol=1e-5)
        others = {r["subject_id"]: time for r in world}
        targets = {r["subject_id"]: target if r is row else -1 for r in world}
        other = write(folder / f"{subject}-{time:%d%H}", after(world, others, targets))
        assert build_visit_examples(other, PROCESSOR, labels=one).to_list() == alone.to_list()


def scored(examples) -> dict[tuple[int, int], np.ndarray]:
    """Scores of the asked visits, by patient and visit."""
    rows = examples.to_list()
    batch = VisitCollator(num_labels=len(DRUGS))(rows)
    asked = batch.pop("labels")[..., 0] >= 0
    with torch.no_grad():
        logits = MODEL(**batch).logits
    return {
        (row["subject_id"], row["visit_ids"][place]): logits[number, place].numpy()
        for number, row in enumerate(rows)
        for place in range(len(row["visit_ids"]))
        if asked[number, place]
    }


MODEL = recommender()


def test_drugs_and_text_of_a_visit_change_no_score_of_it_from_records_to_logits(tmp_path):
    asked = labels("codes", (1, 5, DRUGS[:1]), (1, 9, DRUGS[:1]))
    before = scored(build_visit_examples(write(tmp_path / "data", [three_visits()]), PROCESSOR, labels=asked))
    other = three_visits()
    other["visits"][1] |= {"medications": DRUGS[5:6], "medications_at": [day(6)], "notes": [note(6, "sleep")]}
    after_change = scored(build_visit_examples(write(tmp_path / "other", [other]), PROCESSOR, labels=asked))
    np.testing.assert_array_equal(after_change[1, 50], before[1, 50])
    assert np.abs(after_change[1, 90] - before[1, 90]).max() > 1e-4  # to the next visit they are history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": "stays"}, "`setting` must be one of"),
        ({"setting": "admission"}, "`labels` must be given"),
        ({"labels": labels("codes", (1, 5, DRUGS)), "setting": "coding"}, "`label_names` must be given"),
        ({"label_names": DRUGS}, "`label_names` must be given with the setting 'coding', and with no other"),
        ({"max_visits": 1}, "`max_visits` must be at least 2"),
        ({"labels": labels("boolean_value", (1, 5, None)), "setting": "admission"}, "must be set|in every row"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, options, message):
    data = write(tmp_path / "data", [three_visits()])
    with pytest.raises(ValueError, match=message):
        build_visit_examples(data, PROCESSOR, **options)


def test_sets_are_cut_at_sixty_codes_of_highest_priority(tmp_path):
    many = [f"ICD10CM/B{number:02}" for number in range(70)]
    processor = MedMPLMProcessor(
        EhrCodeTokenizer.from_codes(many, kinds=["diagnoses"]), PROCESSOR.medication_tokenizer
    )
    data = write(tmp_path / "data", [patient(1, [visit(0, 1, diagnoses=many)])])
    (row,) = build_visit_examples(data, processor).to_list()
    assert row["diagnosis_ids"] == [list(range(5, 65))]
    assert "note_input_ids" not in row

"""The synthetic note world: its evidence is where it says, its shares are what it promises, its seed decides all."""

import re

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ehr.models.code_hierarchy import parent
from hf_ehr.notes import DISTRACTOR_KINDS, EVIDENCE_KINDS, fit_word_tokenizer, segment_notes
from hf_ehr.ontology import chapter, describe
from hf_ehr.sources._synthetic_note_phrases import DISTRACTORS, words
from hf_ehr.sources._synthetic_note_worlds import FORMS
from hf_ehr.sources.synthetic_notes import (
    SyntheticNotesConfig,
    code_table,
    generate_notes,
    missed_share,
    write_notes,
)

CONFIG = SyntheticNotesConfig(patients=500)


@pytest.fixture(scope="module")
def world():
    return generate_notes(CONFIG)


@pytest.fixture(scope="module")
def codes() -> pl.DataFrame:
    return pl.DataFrame(code_table(CONFIG))


def quoted(world) -> pl.DataFrame:
    """SPANS with the text they point at."""
    texts = dict(zip(world.notes["note_id"].to_pylist(), world.notes["text"].to_pylist(), strict=True))
    rows = world.spans.to_pylist()
    return pl.DataFrame(
        [
            row | {"quote": texts[row["note_id"]][row["start"] : row["end"]], "text": texts[row["note_id"]]}
            for row in rows
        ]
    )


def joined(text: str) -> str:
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def test_every_span_quotes_a_name_of_its_code(world, codes):
    forms = {row["code"]: row for row in codes.to_dicts()}
    for row in quoted(world).to_dicts():
        if row["kind"] in EVIDENCE_KINDS:
            assert row["quote"] == forms[row["code"]][row["kind"]]
        else:
            assert row["quote"] in {
                forms[row["code"]][name] for name in ("term", "synonym", "abbreviation", "misspelling")
            }


def test_every_distractor_stands_in_a_sentence_that_takes_it_back(world):
    rows = quoted(world).filter(pl.col("kind").is_in(DISTRACTOR_KINDS)).to_dicts()
    assert {row["kind"] for row in rows} == set(DISTRACTOR_KINDS)
    for row in rows:
        around = [sentence.split("{}") for sentence in DISTRACTORS[row["kind"]]]
        assert any(
            row["text"][: row["start"]].endswith(before) and row["text"][row["end"] :].startswith(after)
            for before, after in around
        )


def test_a_code_is_named_nowhere_but_in_its_spans(world, codes):
    """The truth is whole: no filler, template or other code's mention holds a name of a code."""
    rows = quoted(world)
    for note in rows["note_id"].unique(maintain_order=True).to_list()[:60]:
        here = rows.filter(pl.col("note_id") == note)
        text = here["text"][0]
        for start, end in here.select("start", "end").rows():
            text = text[:start] + "|" * (end - start) + text[end:]
        left = " | ".join(map(joined, text.split("|")))
        names = [
            joined(form)
            for row in codes.select("term", "synonym", "abbreviation", "misspelling", "sign").rows()
            for form in row
        ]
        assert [name for name in names if name in left] == []


def test_no_name_serves_two_codes():
    table = pl.DataFrame(code_table(SyntheticNotesConfig(codes=700)))
    names = [joined(form) for row in table.select(FORMS).rows() for form in row]
    assert len(set(names)) == len(names) == 5 * 700


def test_labels_are_the_codes_with_evidence_and_a_known_share_without(world):
    truth = pl.DataFrame(world.truth).join(pl.DataFrame(world.labels), on=["note_id", "code"], validate="1:1")
    assert truth.height == world.labels.num_rows
    assert ((truth["mentions"] == 0) == (truth["provenance"] == "imputed")).all()
    assert (truth["mentions"] == 0).mean() == pytest.approx(CONFIG.unsupported, abs=0.02)
    evidence = pl.DataFrame(world.spans).filter(pl.col("kind").is_in(EVIDENCE_KINDS)).group_by("note_id", "code").len()
    counted = truth.filter(pl.col("mentions") > 0).join(evidence, on=["note_id", "code"], validate="1:1")
    assert counted.height == evidence.height
    assert (counted["mentions"] == counted["len"]).all()
    distractors = pl.DataFrame(world.spans).filter(pl.col("kind").is_in(DISTRACTOR_KINDS))
    assert distractors.join(truth, on=["note_id", "code"]).is_empty()


@pytest.mark.parametrize(("window", "share"), [(512, 0.35), (1_024, 0.123)])
def test_a_window_misses_the_share_of_evidence_that_the_world_promises(world, window, share):
    first = pl.DataFrame(world.truth)["first_word"].drop_nulls()
    assert missed_share(CONFIG, window) == pytest.approx(share, abs=0.001)
    assert (first >= window).mean() == pytest.approx(share, abs=0.03)


def test_the_missed_share_is_the_mean_over_simulated_lengths_and_places():
    config = SyntheticNotesConfig(missed=0.2, length_sigma=0.9)
    rng = np.random.default_rng(0)
    median = 512.0
    for _ in range(40):  # the median that gives the promised share, found by simulation alone
        lengths = median * np.exp(0.9 * rng.standard_normal(200_000))
        first = np.where(
            np.arange(3)[:, None] < rng.choice([1, 2, 3], 200_000, p=[0.5, 0.3, 0.2]), rng.random((3, 200_000)), 2
        )
        missed = (first.min(0) * lengths >= 512).mean()
        median *= (0.2 / missed) ** 0.5
    assert (first.min(0) * lengths >= 1_024).mean() == pytest.approx(missed_share(config, 1_024), abs=0.005)


def test_places_of_evidence_are_uniform_and_lengths_log_normal(world):
    rows = quoted(world).filter(pl.col("kind").is_in(EVIDENCE_KINDS))
    place = np.sort((rows["start"] / rows["text"].str.len_chars()).to_numpy())
    assert np.abs(place - (np.arange(len(place)) + 0.5) / len(place)).max() < 1.63 / np.sqrt(len(place))  # 1 % (K-S)
    lengths = np.log([len(words(text)) for text in world.notes["text"].to_pylist()])
    assert lengths.std() == pytest.approx(CONFIG.length_sigma, abs=0.06)
    assert abs(((lengths - lengths.mean()) ** 3).mean()) / lengths.std() ** 3 < 0.3  # symmetric in the logarithm


def test_the_tokenizer_counts_words_as_the_truth_does(world):
    notes = world.notes.slice(0, 40)
    tokenizer = fit_word_tokenizer(notes, subject_ids=notes["subject_id"].to_pylist(), cleaning="none", min_patients=1)
    segments = pl.DataFrame(segment_notes(notes, tokenizer, max_length=100_000))
    held = dict(zip(segments["note_id"], segments["input_ids"].list.len() - 2, strict=True))
    truth = pl.DataFrame(world.truth).filter(pl.col("note_id").is_in(list(held)))
    assert {row["note_id"]: row["note_words"] for row in truth.to_dicts()}.items() <= held.items()


def test_frequencies_are_zipf_with_a_band_of_rare_codes(codes):
    default = pl.DataFrame(code_table(SyntheticNotesConfig()))["expected_notes"].sort(descending=True)
    assert default.is_between(5, 50).sum() >= 80
    assert default.min() >= 5
    free = default.to_numpy()[10:]  # the first ones are capped
    assert np.polyfit(np.log(np.arange(11, 201)), np.log(free), 1)[0] == pytest.approx(-1, abs=1e-6)
    assert codes["probability"].sum() == pytest.approx(CONFIG.codes_per_note)


def test_codes_come_as_often_as_they_should(world, codes):
    counts = pl.DataFrame(world.labels).group_by("code").len()
    seen = codes.join(counts, on="code", how="left")["len"].fill_null(0).to_numpy()
    expected = codes["probability"].to_numpy() * world.notes.num_rows
    assert (np.abs(seen - expected) < 4.5 * np.sqrt(expected)).all()


def test_codes_are_real_with_siblings_under_one_subcategory(codes):
    names = codes["code"].to_list()
    assert describe(names) == codes["description"].to_list()
    assert None not in chapter(names)
    assert len(set(chapter(names))) >= 10
    for _, family in codes.filter(pl.col("family") < codes["family"].max()).group_by("family"):  # the last may be cut
        assert len({parent(code) for code in family["code"]}) == 1
        assert 2 <= family.height <= 4


def test_descriptions_share_words_with_mentions_except_in_the_control_set(codes):
    assert 0 < codes["opaque"].mean() < 0.4
    for row in codes.to_dicts():
        description = set(joined(row["description"]).split())
        shared = [len(description & set(joined(row[name]).split())) for name in ("term", "synonym", "misspelling")]
        assert (max(shared) == 0) if row["opaque"] else (min(shared) > 0)


@pytest.mark.parametrize("shards", [2, 3])
def test_a_patient_is_the_same_in_any_shard(shards):
    config = SyntheticNotesConfig(patients=20, codes=30)
    whole = generate_notes(config)
    parts = [generate_notes(config, index, shards) for index in range(shards)]
    for name in ("notes", "labels", "spans", "truth"):
        together = pa.concat_tables(getattr(part, name) for part in parts)
        key = [(row["note_id"], str(row)) for row in together.to_pylist()]
        assert sorted(key) == sorted((row["note_id"], str(row)) for row in getattr(whole, name).to_pylist())
    more = generate_notes(SyntheticNotesConfig(patients=25, codes=30))
    assert more.notes.slice(0, whole.notes.num_rows).equals(whole.notes)


def test_another_seed_is_another_world():
    one, other = (SyntheticNotesConfig(patients=3, codes=30, seed=seed) for seed in (0, 1))
    assert set(code_table(one)["code"].to_pylist()) != set(code_table(other)["code"].to_pylist())
    assert generate_notes(one).notes["text"][0] != generate_notes(other).notes["text"][0]


def test_notes_of_a_patient_follow_each_other_in_time(world):
    times = pl.DataFrame(world.notes).group_by("subject_id", maintain_order=True).agg("time", "visit_id")
    assert times["time"].list.len().max() == 3
    assert all(row == sorted(set(row)) for row in times["time"].to_list())
    assert all(len(set(row)) == len(row) for row in times["visit_id"].to_list())


def test_the_world_is_written_whole_or_not_at_all(tmp_path, world):
    config = SyntheticNotesConfig(patients=12, codes=30)
    folder = write_notes(config, tmp_path / "world", shards=2)
    assert sorted(path.name for path in folder.iterdir()) == ["codes.parquet", "labels", "notes", "spans", "truth"]
    shard = folder / "spans" / "shard-00001-of-00002.parquet"
    assert pq.read_table(shard).equals(generate_notes(config, 1, 2).spans)
    with pytest.raises(FileExistsError, match="must not exist yet"):
        write_notes(config, folder)


def test_switches_turn_distractors_unsupported_labels_and_the_control_set_off():
    config = SyntheticNotesConfig(patients=20, codes=30, distractors=0, unsupported=0, opaque=0)
    world = generate_notes(config)
    assert set(world.labels["provenance"].to_pylist()) == {"native"}
    assert set(world.spans["kind"].to_pylist()) <= set(EVIDENCE_KINDS)
    assert not any(code_table(config)["opaque"].to_pylist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"missed": 1.0}, "`missed` must be between"),
        ({"codes": 10, "codes_per_note": 4}, "`codes_per_note` must be at most"),
        ({"patients": 0}, "`patients` must be between"),
    ],
)
def test_a_world_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SyntheticNotesConfig(**fields)

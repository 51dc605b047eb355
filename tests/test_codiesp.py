"""CodiEsp: notes, codes and spans of a small hand-made corpus, and of the real one where it is."""

import tarfile

import pyarrow.compute as pc
import pytest

from hf_ehr.schema import EhrDataError
from hf_ehr.sources.codiesp import read_codiesp

TEXTS = {
    "S1-1-1": "Varón con diabetes tipo 2 y edemas.\r\nAñade: fractura.",
    "S1-1-2": "Mujer sana, sin hallazgos.",
    "S2-7-1": "Niño con fiebre.",
}
DIAGNOSES = "S1-1-1\te11.9\nS1-1-1\tr60.9\nS1-1-1\ts02.2xx\nS1-1-1\te11.9\nS2-7-1\tr50\n\nS2-7-1\tq99.zz9\n"
PROCEDURES = "S2-7-1\tbw03zzz\nS2-7-1\tbw03\n"
SPANS = (
    "S1-1-1\tDIAGNOSTICO\te11.9\tdiabetes 2\t10 18;24 25\n"
    "S1-1-1\tDIAGNOSTICO\tr60.9\tedemas\t28 34\n"
    "S1-1-1\tDIAGNOSTICO\ts02.2xx\tfractura\t44 53\n"
    "S2-7-1\tPROCEDIMIENTO\tbw03zzz\tfiebre\t9 15\n"
)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "v4" / "train"
    for name in ("text_files", "text_files_en"):
        (folder / name).mkdir(parents=True)
        for note, text in TEXTS.items():
            (folder / name / f"{note}.txt").write_bytes(text.encode())
    for letter, table in (("D", DIAGNOSES), ("P", PROCEDURES), ("X", SPANS)):
        (folder / f"train{letter}.tsv").write_text(table)
    return tmp_path / "v4"


def test_notes_keep_their_line_ends_and_cases_of_an_article_their_subject(corpus):
    notes = read_codiesp(corpus, "train").notes.to_pylist()
    assert [row["text"] for row in notes] == list(TEXTS.values())
    first, second, other = (row["subject_id"] for row in notes)
    assert first == second != other


def test_codes_are_written_the_packages_way_and_each_once(corpus):
    labels = read_codiesp(corpus, "train").labels.to_pylist()
    assert {row["provenance"] for row in labels} == {"native"}
    assert [(row["note_id"], row["code"]) for row in labels] == [
        ("S1-1-1", "ICD10CM/E11.9"),
        ("S1-1-1", "ICD10CM/R60.9"),
        ("S1-1-1", "ICD10CM/S02.2XX"),
        ("S2-7-1", "ICD10CM/R50"),
        ("S2-7-1", "ICD10CM/Q99.ZZ9"),
        ("S2-7-1", "ICD10PCS/BW03ZZZ"),
        ("S2-7-1", "ICD10PCS/BW03"),
    ]


def test_truncated_and_unknown_codes_are_kept_and_reported(corpus):
    report = read_codiesp(corpus, "train").codes.to_pylist()
    assert {row["code"]: row["status"] for row in report} == {
        "ICD10CM/E11.9": "valid",
        "ICD10CM/R60.9": "valid",
        "ICD10CM/S02.2XX": "truncated",
        "ICD10CM/R50": "truncated",
        "ICD10CM/Q99.ZZ9": "unknown",
        "ICD10PCS/BW03ZZZ": "valid",
        "ICD10PCS/BW03": "truncated",
    }
    assert {row["documents"] for row in report} == {1}


def test_spans_point_at_the_evidence_piece_by_piece(corpus):
    read = read_codiesp(corpus, "train")
    found = [(row["code"], TEXTS[row["note_id"]][row["start"] : row["end"]]) for row in read.spans.to_pylist()]
    assert found == [
        ("ICD10CM/E11.9", "diabetes"),
        ("ICD10CM/E11.9", "2"),
        ("ICD10CM/R60.9", "edemas"),
        ("ICD10CM/S02.2XX", "fractura."),
        ("ICD10PCS/BW03ZZZ", "fiebre"),
    ]
    assert read.mismatched == 1  # the closing dot


def test_the_translation_has_codes_but_no_spans(corpus):
    read = read_codiesp(corpus, "train", language="en")
    assert (read.labels.num_rows, read.spans.num_rows) == (7, 0)


def test_the_archive_reads_as_its_folder_does(corpus, tmp_path):
    with tarfile.open(tmp_path / "corpus.tar.xz", "w:xz") as archive:
        archive.add(corpus, "v4")
    packed, unpacked = read_codiesp(tmp_path / "corpus.tar.xz", "train"), read_codiesp(corpus, "train")
    assert packed.notes.equals(unpacked.notes)
    assert packed.spans.equals(unpacked.spans)


@pytest.mark.parametrize("position", ["3", "5 3", "0 99", "a b", ""])
def test_a_position_outside_of_its_text_is_an_error_that_names_the_row(corpus, position):
    (corpus / "train" / "trainX.tsv").write_text(f"{SPANS}S2-7-1\tDIAGNOSTICO\tr50\tx\t{position}\n")
    with pytest.raises(EhrDataError, match="Annotation 5 must name"):
        read_codiesp(corpus, "train")


def test_what_is_missing_or_not_known_is_refused(corpus, tmp_path):
    with pytest.raises(EhrDataError, match=r"must hold `dev/text_files/\*\.txt`"):
        read_codiesp(corpus, "dev")
    with pytest.raises(EhrDataError, match="does not exist"):
        read_codiesp(tmp_path / "nothing", "train")
    with pytest.raises(ValueError, match="`language` must be one of es, en"):
        read_codiesp(corpus, "train", language="fr")
    (corpus / "train" / "trainD.tsv").write_text("S1-1-1\n")
    with pytest.raises(EhrDataError, match=r"trainD.tsv row 1 must have 2 columns, got 1"):
        read_codiesp(corpus, "train")


def test_the_real_corpus_has_the_published_size_and_its_spans_quote_the_text(real_data):
    (archive,) = real_data("codiesp").glob("*.tar.xz")
    train, dev = read_codiesp(archive, "train"), read_codiesp(archive, "dev")
    diagnoses = pc.starts_with(train.labels["code"], "ICD10CM/")
    assert (train.notes.num_rows, dev.notes.num_rows) == (500, 250)
    assert pc.sum(diagnoses).as_py() == 5_639
    assert pc.sum(pc.starts_with(train.codes["code"], "ICD10CM/")).as_py() == 1_767
    assert train.mismatched + dev.mismatched <= 0.001 * (train.spans.num_rows + dev.spans.num_rows)
    assert set(train.codes["status"].to_pylist()) == {"valid", "truncated", "unknown"}
    background = read_codiesp(archive, "background", language="en")
    assert (background.notes.num_rows, background.labels.num_rows, background.codes.num_rows) == (2_685, 0, 0)

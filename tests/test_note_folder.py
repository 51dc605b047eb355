"""Raw notes → a prepared folder: what is kept, counted and refused."""

import json
import traceback

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from hf_ehr.notes import NoteFolder, format_notes_summary, prepare_notes
from hf_ehr.schema import EhrDataError
from hf_ehr.sources.synthetic_notes import SyntheticNotesConfig, generate_notes
from tests.builders import day

LONG = "Seen for chest pain and shortness of breath; no fever, no chills, no cough."


def raw_tables() -> dict[str, pa.Table]:
    """Patient 1 has diabetes on days 0 and 20; its note of day 10 is too short, that of day 15 has no code."""
    notes = [
        ("a", 1, day(0), "progress note", LONG),
        ("b", 1, day(10), "progress note", "Too short."),
        ("c", 1, day(15), "progress note", LONG),
        ("d", 1, day(20), "discharge summary", LONG),
        ("e", 2, day(3), "Telephone", LONG),
        ("f", -3, day(4), "progress note", LONG),
    ]
    labels = [("a", "ICD10CM/E11.9"), ("d", "ICD10CM/E11.9"), ("b", "ICD10CM/I10"), ("f", "ICD10CM/E11")]
    labels += [("f", "ICD10CM/Q99.99"), ("f", "ICD9CM/428.0"), ("f", "ICD9CM/428.0"), ("e", "ICD10CM/I10")]
    spans = [("a", "ICD10CM/E11.9", 9, 19, "term"), ("b", "ICD10CM/I10", 0, 3, "term")]
    return {
        "notes": table(notes, "note_id", "subject_id", "time", "category", "text"),
        "labels": table(labels, "note_id", "code"),
        "spans": table(spans, "note_id", "code", "start", "end", "kind"),
    }


def table(rows: list[tuple], *names: str) -> pa.Table:
    return pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))


def written(tables: dict[str, pa.Table], folder, suffix=".parquet"):
    folder.mkdir(exist_ok=True)
    for name, content in tables.items():
        write = pq.write_table if suffix == ".parquet" else pa.csv.write_csv
        write(content, folder / f"{name}{suffix}")
    return folder


def prepared(tmp_path, **settings) -> NoteFolder:
    return prepare_notes("table", written(raw_tables(), tmp_path / "raw"), tmp_path / "out", **settings)


def pairs(labels: pa.Table) -> set[tuple[str, str, str]]:
    return set(pl.DataFrame(labels).rows())


def note_ids(folder: NoteFolder) -> list[str]:
    return [one for part in folder.notes() for one in part["note_id"].to_pylist()]


# What is kept


def test_short_notes_and_unwanted_types_are_left_out_with_their_labels_and_spans(tmp_path):
    folder = prepared(tmp_path, exclude_categories=["telephone"])
    assert note_ids(folder) == ["f", "a", "c", "d"]  # by patient and time
    assert set(folder.labels()["note_id"].to_pylist()) == {"a", "d", "f"}
    assert folder.spans().to_pylist() == [raw_tables()["spans"].to_pylist()[0]]
    assert folder.info.summary["left_out"] == {
        "notes of fewer than 50 characters": 1,
        "notes of the type 'telephone'": 1,
        "labels given twice": 1,
        "labels of notes that were left out": 2,
        "spans of notes that were left out": 1,
    }
    counts = {name: folder.info.summary[name] for name in ("notes", "patients", "labels", "codes", "spans")}
    assert counts == {"notes": 4, "patients": 2, "labels": 5, "codes": 4, "spans": 1}
    assert folder.info.summary["notes_without_codes"] == 1


def test_codes_that_are_no_valid_icd_10_are_kept_and_reported(tmp_path):
    codes = {row["code"]: row for row in prepared(tmp_path).codes().to_pylist()}
    assert {code: row["status"] for code, row in codes.items()} == {
        "ICD10CM/E11.9": "valid", "ICD10CM/I10": "valid", "ICD10CM/E11": "truncated", "ICD10CM/Q99.99": "unknown",
        "ICD9CM/428.0": None,
    }  # fmt: skip
    assert codes["ICD10CM/E11.9"]["documents"] == 2
    assert codes["ICD10CM/I10"]["description"] == "Essential (primary) hypertension"
    assert codes["ICD10CM/Q99.99"]["description"] is None


@pytest.mark.parametrize(("mode", "imputed"), [("none", set()), ("paper", {"c"}), ("as_of", set())])
def test_chronic_codes_are_carried_over_in_the_mode_that_is_asked_for(tmp_path, mode, imputed):
    folder = prepared(tmp_path, imputation=mode)
    new = {note for note, code, kind in pairs(folder.labels()) if kind == "imputed" and code == "ICD10CM/E11.9"}
    assert new == imputed
    assert folder.info.summary["imputed_labels"] == len(imputed)


def test_a_short_note_counts_as_an_encounter_although_it_is_left_out(tmp_path):
    tables = raw_tables()
    tables["labels"] = table([("a", "ICD10CM/E11.9"), ("b", "ICD10CM/E11.9")], "note_id", "code")
    folder = prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out", imputation="as_of")
    new = {(note, kind) for note, _, kind in pairs(folder.labels())}
    assert new == {("a", "native"), ("c", "imputed"), ("d", "imputed")}


def test_an_empty_note_is_left_out_by_default_and_kept_without_a_minimum(tmp_path):
    tables = raw_tables()
    tables["notes"] = tables["notes"].set_column(4, "text", pa.array(["", *[LONG] * 5]))
    raw = written(tables | {"spans": tables["spans"].slice(0, 0)}, tmp_path / "raw")
    assert "a" not in note_ids(prepare_notes("table", raw, tmp_path / "out"))
    assert "a" in note_ids(prepare_notes("table", raw, tmp_path / "all", min_characters=0))


@pytest.mark.parametrize("shards", [1, 3])
def test_the_content_does_not_depend_on_files_order_or_shards(tmp_path, shards):
    whole = prepared(tmp_path, shards=1)
    tables = raw_tables()
    tables["notes"] = tables["notes"].take([5, 3, 1, 4, 2, 0])
    tables["labels"] = tables["labels"].take([7, 6, 5, 4, 3, 2, 1, 0])
    mixed = prepare_notes("table", written(tables, tmp_path / "mixed"), tmp_path / "other", shards=shards)
    for name in ("labels", "spans", "codes"):
        order = [(column, "ascending") for column in getattr(whole, name)().column_names]
        assert getattr(mixed, name)().sort_by(order) == getattr(whole, name)().sort_by(order)
    assert sorted(note_ids(mixed)) == sorted(note_ids(whole))
    for index, part in enumerate(mixed.notes()):
        assert {subject % shards for subject in part["subject_id"].to_pylist()} <= {index}
        assert set(mixed.labels(index)["note_id"].to_pylist()) <= set(part["note_id"].to_pylist())


def test_a_folder_gives_chosen_notes_and_columns(tmp_path):
    folder = prepared(tmp_path, shards=2)
    parts = list(folder.notes(["f", "a", "nobody"], columns=["subject_id"]))
    assert [part.column_names for part in parts] == [["subject_id"], ["subject_id"]]
    assert [part["subject_id"].to_pylist() for part in parts] == [[], [-3, 1]]


def test_csv_files_with_line_breaks_give_what_parquet_gives(tmp_path):
    tables = raw_tables()
    texts = ['He said "no",\nthen left. ' + LONG, *tables["notes"]["text"].to_pylist()[1:]]
    tables["notes"] = tables["notes"].set_column(4, "text", pa.array(texts))
    folders = [
        prepare_notes("table", written(tables, tmp_path / f"raw{suffix}", suffix), tmp_path / f"out{suffix}")
        for suffix in (".parquet", ".csv")
    ]
    first, second = (pa.concat_tables(folder.notes()) for folder in folders)
    assert first == second
    assert first["text"][1].as_py() == texts[0]


def test_files_may_lie_elsewhere_and_in_pieces(tmp_path):
    tables = raw_tables()
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    for number in range(3):
        pq.write_table(tables["notes"].slice(2 * number, 2), pieces / f"{number}.parquet")
    pq.write_table(tables["labels"], tmp_path / "coded.parquet")
    options = {"notes": pieces, "labels": tmp_path / "coded.parquet", "language": "en"}
    folder = prepare_notes("table", None, tmp_path / "out", options=options)
    assert (note_ids(folder), folder.info.summary["language"]) == (["f", "a", "c", "d", "e"], "en")
    assert folder.spans().num_rows == 0


# Sources


def test_the_synthetic_world_is_written_as_it_is_generated(tmp_path):
    options = {"patients": 12, "codes": 20}
    folder = prepare_notes("synthetic", None, tmp_path / "out", shards=2, options=options)
    world = generate_notes(SyntheticNotesConfig(**options))
    notes = pa.concat_tables(folder.notes()).drop_columns("split")
    order = [("note_id", "ascending")]
    assert notes.sort_by(order) == world.notes.sort_by(order)
    assert pairs(folder.labels()) == pairs(world.labels)
    assert sorted(pl.DataFrame(folder.spans()).rows()) == sorted(pl.DataFrame(world.spans).rows())


def test_the_real_corpus_keeps_its_official_split(real_data, tmp_path):
    (archive,) = real_data("codiesp").glob("*.tar.xz")
    folder = prepare_notes("codiesp", archive, tmp_path / "out")
    split = pa.concat_tables(folder.notes(columns=["split"]))["split"]
    counts = {row["values"]: row["counts"] for row in pc.value_counts(split).to_pylist()}
    assert counts == {"train": 500, "test": 250, "unlabelled": 2_685}
    assert folder.info.summary["codes_by_status"] == {"valid": 2_175, "truncated": 738, "unknown": 8}


# Whole or not there


def test_a_second_run_opens_what_is_there_and_reads_nothing(tmp_path):
    folder = prepared(tmp_path)
    for file in (tmp_path / "raw").iterdir():
        file.unlink()
    again = prepare_notes("table", tmp_path / "raw", tmp_path / "out")
    assert again == folder
    with pytest.raises(EhrDataError, match="prepared in another way"):
        prepare_notes("table", tmp_path / "raw", tmp_path / "out", min_characters=10)


def test_one_code_in_two_spellings_is_one_code(tmp_path):
    tables = raw_tables()
    labels = [("a", "ICD10CM/E119"), ("a", "ICD10CM/E11.9"), ("d", "ICD10CM/E11.9"), ("e", "ATC/A10BA02")]
    spans = [("a", "ICD10CM/E119", 9, 19, "term")]
    tables |= {"labels": table(labels, "note_id", "code")}
    tables |= {"spans": table(spans, "note_id", "code", "start", "end", "kind")}
    folder = prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")
    assert folder.labels()["code"].to_pylist() == ["ICD10CM/E11.9", "ICD10CM/E11.9", "ATC/A10BA02"]
    assert folder.spans()["code"].to_pylist() == ["ICD10CM/E11.9"]


def test_notes_that_will_be_in_no_split_are_counted_when_they_are_prepared(tmp_path):
    tables = raw_tables()
    parts = ["train", "train", "test", "train", "unlabelled", "train"]  # patient 1 has a test note
    tables |= {"notes": tables["notes"].append_column("split", pa.array(parts))}
    folder = prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")
    assert any("3 train notes will be in no split" in warning for warning in folder.info.warnings)
    (tmp_path / "other").mkdir()
    assert not any("in no split" in warning for warning in prepared(tmp_path / "other").info.warnings)


def test_a_missing_column_is_named_beside_those_that_the_file_has(tmp_path):
    tables = raw_tables()
    tables |= {"notes": tables["notes"].rename_columns(["note_id", "subject_id", "time", "category", "TEXT"])}
    with pytest.raises(EhrDataError, match=r"lacks the column `text`.*'category', 'TEXT'\]"):
        prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")


def test_other_notes_are_not_taken_for_those_that_were_prepared(tmp_path):
    prepared(tmp_path)
    tables = raw_tables()
    written(tables | {"notes": tables["notes"].slice(1)}, tmp_path / "raw")
    with pytest.raises(EhrDataError, match="other input"):
        prepare_notes("table", tmp_path / "raw", tmp_path / "out")


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    tables = raw_tables()
    tables["spans"] = table([("f", "ICD10CM/E11", 0, 9_999, "term")], "note_id", "code", "start", "end", "kind")
    with pytest.raises(EhrDataError, match="characters of the note"):
        prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("lost", ["dataset.json", "codes.parquet", "labels/shard-00001-of-00002.parquet"])
def test_a_folder_that_is_not_whole_is_refused(tmp_path, lost):
    folder = prepared(tmp_path, shards=2)
    (folder.path / lost).unlink()
    with pytest.raises(EhrDataError, match="must hold"):
        NoteFolder.open(folder.path)


def test_the_summary_names_what_a_reader_must_know(tmp_path):
    text = format_notes_summary(prepared(tmp_path))
    for part in ("5 notes of 3 patients", "1 notes have none", "1 truncated", "1 unknown", "1 notes of fewer than 50"):
        assert part in text
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["source"] == "table"


# Wrong input


def without(name: str, column: str) -> dict[str, pa.Table]:
    tables = raw_tables()
    return tables | {name: tables[name].drop_columns(column)}


def with_column(name: str, column: str, values: list) -> dict[str, pa.Table]:
    tables = raw_tables()
    changed = tables[name].drop_columns([column] if column in tables[name].column_names else [])
    return tables | {name: changed.append_column(column, pa.array(values))}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (without("notes", "text"), "lacks the column `text`"),
        (without("labels", "code"), "lacks the column `code`"),
        (without("spans", "start"), "lacks the column `start`"),
        (with_column("notes", "text", [None, *[LONG] * 5]), "`text` must not be null"),
        (with_column("notes", "note_id", list("aacdef")), "name each note once"),
        (with_column("notes", "split", ["train", None, "test", "test", "train", "train"]), "in all notes, or in none"),
        (with_column("notes", "split", ["train", "dev", "test", "test", "train", "train"]), "must be one of"),
        (with_column("labels", "note_id", list("abcdefgh")), "2 of 8 rows do not"),
        (with_column("labels", "code", ["I10"] * 8), "VOCABULARY/CODE"),
        (with_column("labels", "provenance", ["guessed"] * 8), "native or imputed"),
        (with_column("spans", "note_id", ["a", "nobody"]), "SPANS column `note_id`"),
        (with_column("spans", "kind", ["term", "rumour"]), "`kind` must be one of"),
        (with_column("spans", "start", [-1, 0]), "0 ≤ start < end"),
        (with_column("spans", "end", [9, 3]), "0 ≤ start < end"),
        (with_column("spans", "end", [len(LONG) + 1, 3]), "0 ≤ start < end"),
    ],
)  # fmt: skip
def test_input_that_breaks_a_contract_is_refused(tmp_path, tables, message):
    with pytest.raises(EhrDataError, match=message):
        prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_span_may_reach_the_end_of_a_text_that_is_not_ascii(tmp_path):
    tables = with_column("spans", "end", [len(LONG) + 1, 3])
    tables["notes"] = tables["notes"].set_column(4, "text", pa.array([f"é{LONG}", *[LONG] * 5]))
    folder = prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")
    assert folder.spans()["end"][0].as_py() == len(LONG) + 1
    tables = with_column("spans", "end", [len(LONG) + 2, 3]) | {"notes": tables["notes"]}  # within its bytes
    with pytest.raises(EhrDataError, match="Count characters"):
        prepare_notes("table", written(tables, tmp_path / "more"), tmp_path / "bytes")


@pytest.mark.parametrize("kinds", [["native", "imputed"], ["imputed", "native"]])
def test_a_label_given_as_native_and_as_imputed_is_native(tmp_path, kinds):
    tables = raw_tables()
    tables["labels"] = table([("a", "ICD10CM/I10", kind) for kind in kinds], "note_id", "code", "provenance")
    folder = prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")
    assert pairs(folder.labels()) == {("a", "ICD10CM/I10", "native")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,Jane Doe,Seen today.\n", r"row 2 \(the header is row 1\) .* int64 in column `subject_id`"),
        ("a,1,Seen.\nb,2,Jane Doe of Elm Street, seen today.\n", "row 3 .* has 4 values under 3 names"),
        ("a,Jane Doe\n", "has 2 values under 3 names"),
        ("a,1,Jane Doe, Jos\u00e9\n", "has 4 values"),
    ],
)
def test_no_error_of_a_csv_file_tells_a_value_of_a_patient(tmp_path, rows, message):
    raw = written(raw_tables(), tmp_path / "raw", ".csv")
    (raw / "notes.csv").write_text("note_id,subject_id,text\n" + rows, encoding="latin-1")
    with pytest.raises(EhrDataError, match=r"notes\.csv.*" + message) as caught:
        prepare_notes("table", raw, tmp_path / "out")
    assert_silent(caught.value)


def test_bytes_that_are_no_utf8_are_refused_without_the_text(tmp_path):
    raw = written(raw_tables(), tmp_path / "raw", ".csv")
    (raw / "notes.csv").write_bytes(b"note_id,subject_id,text\na,1,Jane Doe, Jos\xe9.\n".replace(b"Doe,", b"Doe"))
    with pytest.raises(EhrDataError, match=r"notes\.csv.*column `text`.*encoding") as caught:
        prepare_notes("table", raw, tmp_path / "out")
    assert_silent(caught.value)


@pytest.mark.parametrize(("column", "kind"), [("subject_id", "int64"), ("time", "timestamp")])
def test_no_error_of_a_parquet_file_tells_a_value_of_a_patient(tmp_path, column, kind):
    tables = raw_tables()
    count = tables["notes"].num_rows
    values = pa.array([*(["1"] * (count - 1) if column == "subject_id" else [None] * (count - 1)), "Jane Doe"])
    if column in tables["notes"].column_names:
        tables["notes"] = tables["notes"].drop([column])
    tables["notes"] = tables["notes"].append_column(column, values)
    with pytest.raises(EhrDataError, match=f"column `{column}` must be {kind}.*row {count - 1} cannot") as caught:
        prepare_notes("table", written(tables, tmp_path / "raw"), tmp_path / "out")
    assert_silent(caught.value)


def assert_silent(error: BaseException) -> None:
    """Neither the error, nor those behind it, nor the printed traceback hold the name."""
    chain, one = [], error
    while one is not None:
        chain.append(str(one))
        one = one.__cause__ or one.__context__
    printed = "".join(traceback.format_exception(error))
    assert not [text for text in (*chain, printed) if "Jane" in text or "Elm" in text]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"source": "mimic"}, "`source` must be one of"),
        ({"imputation": "future"}, "`imputation` must be one of"),
        ({"shards": 0}, "`shards` must be at least 1"),
        ({"options": {"pages": 3}}, "`options` of `table` must be among"),
        ({"source": "synthetic"}, "`input_dir` must be None"),
        ({"source": "codiesp", "options": {"language": "fr"}}, "`language` must be one of"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        prepare_notes(**({"source": "table", "input_dir": tmp_path, "output": tmp_path / "out"} | call))


def test_an_input_folder_without_labels_is_refused(tmp_path):
    tables = raw_tables()
    raw = written({"notes": tables["notes"]}, tmp_path / "raw")
    with pytest.raises(EhrDataError, match=r"`labels` must be a file or folder"):
        prepare_notes("table", raw, tmp_path / "out")

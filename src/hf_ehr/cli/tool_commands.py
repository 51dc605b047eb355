"""The commands about an installation and about data as they are: nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_ehr import doctor as examination
from hf_ehr.cli._arguments import parse
from hf_ehr.schema import EhrDataError
from hf_ehr.validation import validate as check

SHOWN = 20
"""Problems that are printed; the rest is counted."""


@dataclass
class DoctorArguments:
    """Arguments of `hf-ehr doctor`: there are none."""


@dataclass
class ValidateArguments:
    """Arguments of `hf-ehr validate`, beside the folder."""

    data: str = field(metadata={"help": "Prepared folder, or raw MEDS: a Parquet file, or a folder of them."})


def doctor(words: list[str]) -> None:
    """``hf-ehr doctor``.

    Raises:
        ImportError: Something that the package needs is missing or too old.
    """
    parse("doctor", "hf-ehr doctor", words, DoctorArguments)
    findings = examination.examine()
    print(examination.report(findings))
    needed = [finding for finding in findings if finding.needed]
    if needed:
        names = ", ".join(finding.name for finding in needed)
        raise ImportError(f"{names} must be repaired. Run: {needed[0].fix}")


def validate(words: list[str]) -> None:
    """``hf-ehr validate DIR``.

    Raises:
        EhrDataError: The data break a rule.
    """
    if words and not words[0].startswith("-"):
        words = ["--data", *words]
    (arguments,) = parse("validate", "hf-ehr validate data/", words, ValidateArguments)
    found = check(arguments.data)
    kind = "prepared folder" if found.kind == "prepared" else "MEDS data"
    counted = ", ".join(f"{number:,} {name}" for name, number in found.counts.items())
    print(f"{arguments.data}: {kind}, {counted or 'empty'}.")
    for remark in found.remarks:
        print(f"  note: {remark}")
    for problem in found.problems[:SHOWN]:
        print(f"  problem: {problem}")
    if found.problems:
        more = f" ({len(found.problems) - SHOWN} more are not shown)" if len(found.problems) > SHOWN else ""
        count = len(found.problems)
        raise EhrDataError(f"{count} problem{'s' * (count > 1)}{more}. Correct what the lines above name.")
    print("Nothing breaks the contracts.")

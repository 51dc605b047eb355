"""What must not leave an institution with a model, and how it is found.

Nothing is published that is not known to belong to a model: the list is of what may go, not of what may not. What is
on it is then read: whether it says who the patients were, holds a token, or names a place on this machine.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .schema import EhrDataError
from .vocabulary import MIN_PATIENTS

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
FIGURES = ("calibration.png", "decisions.png", "subgroups.png")
"""Figures over all patients. Those of one patient or note are none of them."""
MAY_LEAVE = (
    "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "*.py",
    "preprocessor_config.json", "processor_config.json", "README.md", "LICENSE", "evaluation.json",
    *TOKENIZER_FILES, *(f"*_tokenizer/{name}" for name in TOKENIZER_FILES), "*_tokenizer/*.py", *FIGURES,
)  # fmt: skip
"""Patterns of what a published folder is made of."""
REASONS = {
    "training_args.bin": "settings of a run, with paths and perhaps a token",
    "optimizer*": "state of the optimizer",
    "scheduler*": "state of the schedule",
    "rng_state*": "state of the random numbers",
    "trainer_state.json": "history of a run",
    "checkpoint-*": "checkpoint of a run",
    "splits.json": "one entry for each patient",
    "split_salt": "the secret of the split",
    "*.parquet": "data",
    "*.arrow": "data",
    "*.csv": "data",
    "*.jsonl": "data",
    "*.html": "a page about one patient or note",
    "*.npy": "data",
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz")
PATIENT_KEYS = {
    "subject_id", "subject_ids", "patient_id", "patient_ids", "hadm_id", "hadm_ids", "visit_id", "visit_ids",
    "stay_id", "stay_ids", "note_id", "note_ids", "salt_check",
}  # fmt: skip
"""Keys of JSON under which somebody's identity would stand."""
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
ARCHIVES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
"""First bytes of pickles of all protocols in use, and of zip archives."""
CODE_TOKENIZER = "EhrCodeTokenizer"


class PublishingError(EhrDataError):
    """Something in a folder must not be published: the message names the file, what it is and the next step."""


def why_not(path: Path) -> str | None:
    """Why a file may not be published, by its place in the folder; None where it may.

    Args:
        path: Relative to the folder.
    """
    for pattern, reason in REASONS.items():
        if any(fnmatch.fnmatch(part, pattern) for part in path.parts):
            return reason
    if path.suffix in PICKLES:
        return "a pickle"
    plain = path.as_posix()
    depth = plain.count("/")
    if any(fnmatch.fnmatch(plain, pattern) and pattern.count("/") == depth for pattern in MAY_LEAVE):
        return None
    return "no part of a model"


def check_contents(folder: Path, *, code: Path, secrets: Iterable[bytes] = (), places: Iterable[str] = ()) -> None:
    """Raises unless every file of a folder may leave, by its place and by what it holds.

    Args:
        folder: What is to be published.
        code: Folder of the modules that may travel; files of others, or changed ones, are refused.
        secrets: Byte strings that may occur nowhere, such as the token in use.
        places: Paths of this machine that may occur nowhere.

    Raises:
        PublishingError: With the file, what is wrong with it and what to do.
    """
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()):
        name = path.relative_to(folder)
        if path.is_symlink():
            raise PublishingError(f"{name} must be a file, got a link. Remove it.")
        if reason := why_not(name):
            raise PublishingError(f"{name} must not be published: it is {reason}. Remove it from the folder.")
        content = _head(path) if name.suffix == ".safetensors" else path.read_bytes()
        for found in _content_faults(name, content, code, tuple(secrets), tuple(places)):
            raise PublishingError(f"{name} must not be published: {found}.")


def _content_faults(
    name: Path, content: bytes, code: Path, secrets: tuple[bytes, ...], places: tuple[str, ...]
) -> Iterator[str]:
    if content[:2] in ARCHIVES:
        yield "it is a pickle or an archive, whatever its name says. Remove it"
    if name.suffix == ".py" and not _travels(name, content, code):
        yield "its code is not that of `hf_ehr.models`. Save the model again with this version of the package"
    if TOKEN.search(content) or any(secret in content for secret in secrets):
        yield "it holds an access token. Take it out, and revoke the token"
    if name.suffix == ".safetensors" and not content:
        yield "it is no safetensors file. Save the model again"
    if any(place.encode() in content for place in places):
        yield "it names a folder of this machine. Take the path out"
    if name.suffix == ".json" and (keys := _keys(json.loads(content)) & PATIENT_KEYS):
        yield f"under {', '.join(sorted(keys))} it tells one patient from another. Take them out"


def _head(path: Path) -> bytes:
    """What a safetensors file says of its tensors; the first bytes of any other, or nothing where they say nothing."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if 0 < length <= path.stat().st_size - 8 else b""
    if header.startswith(b"{"):  # looked at first, for a length may begin as a pickle does
        return header
    return start if start[:2] in ARCHIVES else b""


def _travels(name: Path, content: bytes, code: Path) -> bool:
    own = code / name.name
    return own.is_file() and own.read_bytes() == content


def _keys(content: Any) -> set[str]:
    """All keys of nested JSON."""
    if isinstance(content, list):
        return set().union(*(_keys(item) for item in content)) if content else set()
    if not isinstance(content, dict):
        return set()
    return set(content).union(*(_keys(value) for value in content.values()))


def check_vocabularies(folder: Path, min_patients: int = MIN_PATIENTS) -> None:
    """Raises where a vocabulary, variable or label rests on fewer patients than may be published.

    Whatever was fitted says of how many patients an entry is at least, and so do the records of training.

    Args:
        folder: Of the model, with the records of how it was trained where they are there.
        min_patients: Fewest patients.

    Raises:
        PublishingError: With the file and the number it gives.
    """
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("tokenizer.json", "vocab.json", "model.safetensors.index.json"):
            continue
        content = json.loads(path.read_text())
        name = path.relative_to(folder)
        for bound in _values(content, "min_patients"):
            if not isinstance(bound, int) or bound < min_patients:
                raise PublishingError(
                    f"`min_patients` must be at least {min_patients} to publish a vocabulary, got {bound} in {name}. "
                    "Fit it again on more patients an entry, and train on it."
                )
        if _fitted(path, content) and not any(True for _ in _values(content, "min_patients")):
            raise PublishingError(
                f"{name} must say of how many patients an entry is (`min_patients`), and does not. Fit the "
                "vocabulary again with this version."
            )


def _fitted(path: Path, content: Any) -> bool:
    """Whether a file describes something that was fitted on patients."""
    if path.name not in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        return False
    # Codes that nobody counted come with no bound at all.
    return "fitted_on" in _keys(content) or content.get("tokenizer_class") == CODE_TOKENIZER


def _values(content: Any, key: str) -> Iterator[Any]:
    """Everything that stands under a key of nested JSON."""
    for item in content if isinstance(content, list) else ():
        yield from _values(item, key)
    for name, value in content.items() if isinstance(content, dict) else ():
        if name == key:
            yield value
        yield from _values(value, key)


__all__ = ["FIGURES", "MAY_LEAVE", "PublishingError", "check_contents", "check_vocabularies", "why_not"]

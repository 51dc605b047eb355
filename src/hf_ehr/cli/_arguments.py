"""How every command reads its arguments."""

from __future__ import annotations

from typing import Any

from transformers import HfArgumentParser

DRY_RUN = "With --dry-run: reads the data, times a few steps, says what would be trained and how long; leaves nothing."


def parse(command: str, example: str, words: list[str], *kinds: Any, defaults: dict | None = None) -> tuple:
    """The dataclasses `kinds`, filled from the words behind a command."""
    hint = f" {DRY_RUN}" if command.split()[0] in ("pretrain", "finetune") else ""
    parser = HfArgumentParser(kinds, prog=f"hf-ehr {command}", epilog=f"example: {example}{hint}")
    parser.set_defaults(**(defaults or {}))
    return parser.parse_args_into_dataclasses(words)


def positional(words: list[str], name: str, example: str) -> tuple[str, list[str]]:
    """The first word, unless help is asked for."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if "-h" in words or "--help" in words:
        return "", words
    raise ValueError(f"{name} is missing. Example: {example}")


def model_of(command: str, words: list[str], known: tuple[str, ...], example: str) -> tuple[str, list[str]]:
    """The name of a model and the rest. Where help is asked for without one, says which there are and exits."""
    model, rest = positional(words, "MODEL", example)
    if not model:
        pages = "\n".join(f"  hf-ehr {command} {name} --help" for name in known)
        print(f"usage: hf-ehr {command} MODEL [ARGUMENTS]\n\nEvery model has its own arguments:\n{pages}\n")
        print(f"example: {example}")
        raise SystemExit(0)
    if model not in known:
        raise ValueError(f"MODEL must be one of {', '.join(known)}, got {model!r}. Example: {example}")
    return model, rest

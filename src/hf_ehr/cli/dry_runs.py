"""``--dry-run`` of the commands that train."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_ehr.training import dry_run
from hf_ehr.training._runs import Run

FLAGS = ("--dry-run", "--dry_run")
OUTPUT = "--output_dir"


def rehearsed(words: list[str], run: Callable[[list[str]], None]) -> None:
    """Runs a command that trains; with `--dry-run` up to a few steps, in a folder beside its own that goes again.

    Raises:
        ValueError: A dry run has no `output_dir`.
    """
    rest = [word for word in words if word not in FLAGS]
    if len(rest) == len(words) or "-h" in rest or "--help" in rest:
        return run(rest)
    spread = [part for word in rest for part in (word.split("=", 1) if word.startswith(f"{OUTPUT}=") else [word])]
    places = [place for place, word in enumerate(spread) if word == OUTPUT and place + 1 < len(spread)]
    if not places:
        raise ValueError("`output_dir` must be given. Name the folder that the run would write.")
    place = places[-1] + 1
    output = Path(spread[place])
    beside = output.with_name(f".{output.name}.dry-run")
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        with dry_run() as plans:
            run([*spread[:place], str(beside), *spread[place + 1 :]])
        if first:
            print("\n".join(map(str, plans)))
            if standing := Run.standing(output, beside):
                print(standing)
            print("A dry run: nothing was kept.")
    finally:
        if first:
            shutil.rmtree(beside, ignore_errors=True)

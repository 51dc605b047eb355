"""``hf-ehr COMMAND``: finds the command, reads its arguments, and turns errors into one sentence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_ehr.version import __version__

COMMANDS = {
    "prepare": "raw tables → events and records, one folder that everything else reads",
    "map-drugs": "prepared folder + table of drugs → the same with ATC classes for medications",
    "fit-tokenizer": "vocabulary of the training patients → tokenizer folder",
    "fit-hourly": "measurements of the training patients' stays → folder of hourly features",
    "prepare-notes": "raw notes and their codes → one folder of notes",
    "fit-text-tokenizer": "vocabulary of the training notes → tokenizer folder",
    "check-notes": "copies of notes across splits, and sections that give codes or outcomes away",
    "pretrain": "records, notes or intensive care stays → pre-trained model folder",
    "finetune": "pre-trained model + task or codes of notes → classifier or coder folder",
    "evaluate": "classifier folder → table with intervals and baselines, calibration plot, model card",
    "evaluate-coder": "coder folder → tables with intervals and baselines, per-code figures, model card",
    "evaluate-evidence": "coder folder + marked notes → how plausible and faithful its evidence is",
    "highlight": "coder folder + one note → its codes and what they rest on, as an HTML page",
    "report": "YAML file of rows × tasks × sizes → table, figures and comparisons of a whole experiment",
    "transfer": "checkpoint + another tokenizer → checkpoint with that vocabulary",
    "attention": "checkpoint + one patient or visit → attention figure and HTML page",
    "explain": "classifier + one patient → what its risk rests on: figure and table",
    "embedding-map": "checkpoint → its code embeddings in two dimensions by chapter, CSV and figure",
    "publish": "model folder → one that loads without this package, compared; pushed with --repo-id",
    "convert": "weights in the authors' layout → model folder, proved equal",
    "validate": "prepared folder or raw MEDS → whether it keeps the contracts, and what breaks them",
    "doctor": "versions, devices, attention backends, what is missing and the line that installs it",
    "quickstart": "all of it on synthetic patients, or on your tables with --source",
}
RESUME = "Stopped. The same command goes on where it stopped."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Exit status: 0 done, 2 bad input, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("--version", "version"):
        print(f"transformers-ehr {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"hf-ehr: `{words[0]}` is no command. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return run(words[0], words[1:])
    except KeyboardInterrupt:
        print(f"\nhf-ehr: {RESUME}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"hf-ehr {words[0]}: {error}", file=sys.stderr)
        return 2


def run(command: str, words: list[str]) -> int:
    """Runs `command`; the commands' own imports (torch, polars, …) happen here."""
    from hf_ehr.cli import commands

    function = getattr(commands, command.replace("-", "_"))
    function(_with_config(words))
    commands.leave_ranks()
    return 0


def usage() -> str:
    """What `hf-ehr --help` prints."""
    lines = [f"  {name:18} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-ehr COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "Every command: --help, --config FILE.yaml (the arguments as YAML), --debug (tracebacks).",
            "Start with: hf-ehr quickstart --output quickstart-output",
        ]
    )


def _with_config(words: list[str]) -> list[str]:
    """Replaces `--config FILE` by the file's arguments, before the rest so that the command line wins."""
    if "--config" not in words:
        return words
    place = words.index("--config")
    if place + 1 == len(words):
        raise ValueError("`--config` must be followed by a YAML file.")
    import yaml

    path = Path(words[place + 1])
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `argument: value` pairs, got {type(content).__name__}.")
    configured: list[str] = []
    for name, value in content.items():
        values = value if isinstance(value, list) else [value]
        configured += [f"--{name}", *(str(item) for item in values)]
    rest = words[:place] + words[place + 2 :]
    positional = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    return rest[:positional] + configured + rest[positional:]


if __name__ == "__main__":
    sys.exit(main())

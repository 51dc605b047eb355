"""What `mkdocs build` makes beside the pages in docs/: the command reference, the reports, links out of docs/."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
COMMANDS_HERE = "<!-- every command with its arguments is put here -->"
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#\s]+)[^)]*\)")


@dataclasses.dataclass
class Page:
    """One command, or one model of a command.

    Attributes:
        example: Its `example:` line.
        arguments: Name, default and help of its own arguments.
        trainer: Arguments of the stock `TrainingArguments` that it takes, with the defaults that it changes.
    """

    example: str
    arguments: list[tuple[str, str, str]]
    trainer: dict[str, Any]
    changed: dict[str, Any]


def on_files(files: Any, config: Any) -> Any:
    """Adds reports/ to the site, as the files are."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "reports").iterdir()):
        if path.suffix in (".md", ".png", ".csv", ".json"):
            files.append(File.generated(config, f"reports/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in the commands; a link out of docs/ becomes the name of the file, unless the site has it."""
    if COMMANDS_HERE in markdown:
        markdown = markdown.replace(COMMANDS_HERE, command_reference())

    def outside(link: re.Match) -> str:
        depth = len(Path(page.file.src_uri).parent.parts)
        up = link[2].count("../")
        if up <= depth or link[3].startswith("reports/"):
            return link[0] if up <= depth else f"[{link[1]}]({'../' * depth}{link[3]})"
        return f"`{link[3]}`" if link[1].strip("`") == link[3] else f"{link[1]} (`{link[3]}`)"

    return OUTSIDE.sub(outside, markdown)


def command_reference() -> str:
    """Every command as a section with a table of its arguments."""
    from hf_ehr.cli.main import COMMANDS

    sections, last = [], ""
    for name, found in command_pages():
        command = name.split()[0]
        if command != last:
            sections.append(f"## {command}\n\n{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.")
            last = command
        if name != command:
            sections.append(f"### {name}")
        sections.append(f"```text\n{found.example}\n```")
        if found.arguments:
            rows = [f"| `--{name}` | {default} | {_cell(what)} |" for name, default, what in found.arguments]
            sections.append("\n".join(["| argument | default | |", "|---|---|---|", *rows]))
        if found.trainer:
            changed = ", ".join(f"`--{name} {value}`" for name, value in found.changed.items())
            sections.append(f"And the arguments of the stock `Trainer`, by default with {changed}.")
    return "\n\n".join(sections)


def command_pages() -> Iterator[tuple[str, Page]]:
    """Every `hf-ehr NAME --help`, as the parser that prints it: the models of a command each have one."""
    from hf_ehr.cli.main import COMMANDS

    for command in COMMANDS:
        parser, printed = _asked_for_help([command])
        if parser is not None:
            yield command, _page(parser)
        for model in re.findall(rf"^  hf-ehr {command} (\w+) --help$", printed, re.MULTILINE):
            parser, _ = _asked_for_help([command, model])
            yield f"{command} {model}", _page(parser)
            if (command, model) == ("pretrain", "medhmp"):
                parser, _ = _asked_for_help([command, model, "--stage", "2"])
                yield f"{command} {model} --stage 2", _page(parser)


def _asked_for_help(words: list[str]) -> tuple[Any, str]:
    """The parser of a command, None where it has several, and what it printed."""
    from hf_ehr.cli import _arguments
    from hf_ehr.cli.main import main

    parsers: list[Any] = []

    class Recorder(_arguments.HfArgumentParser):
        def print_help(self, file: Any = None) -> None:
            parsers.append(self)

    with (
        mock.patch.object(_arguments, "HfArgumentParser", Recorder),
        redirect_stdout(StringIO()) as printed,
    ):
        try:
            main([*words, "--help"])
        except SystemExit as stop:
            if stop.code:
                raise
    return (parsers[0] if parsers else None), printed.getvalue()


def _page(parser: Any) -> Page:
    from transformers import TrainingArguments

    stock = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    stock.pop("output_dir")
    own, trainer, changed = [], {}, {}
    trains = any(action.dest == "per_device_train_batch_size" for action in parser._actions)
    for action in parser._actions:
        name, default = action.dest, action.default
        if name == "help" or action.option_strings[0].startswith("--no_"):
            continue
        if trains and name in stock:
            trainer[name] = default
            if (
                default is not None
                and default != stock[name].default
                and stock[name].default is not dataclasses.MISSING
            ):
                changed[name] = default
        else:
            shown = "required" if action.required else "" if default in (None, []) else f"`{_shown(default)}`"
            own.append((name, shown, action.help or ""))
    return Page(parser.epilog or "", own, trainer, changed)


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("%%", "%").replace("\n", " ").replace("<", "&lt;")

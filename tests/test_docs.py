"""The pages of docs/ and README.md: every code block runs, in the order of its page, and the site builds.

Python and bash blocks of a page run one after another in one empty folder, Python in one namespace. A `text` block
after one of them is what it prints (`...` stands for anything). A block after `<!-- file: NAME -->` is a file that the
reader saves. A YAML block is a task. What cannot run stands after `<!-- not run: REASON -->`, and in `NOT_RUN` below.
"""

from __future__ import annotations

import doctest
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path

import pytest
import yaml

import hf_ehr
from hf_ehr.tasks import TaskSpec
from tests.browser import NARROW, WIDE, opened
from tests.coders import random_coder, words_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))]
SLOW = {"README.md", "docs/data.md", "docs/publishing.md", *(page for page in PAGES if "/tutorials/" in page)}
"""Pages that start the command line several times, or train."""
NOT_RUN = {
    "README.md": [
        "make quickstart",
        "python3 -m venv .venv && source .venv/bin/activate",
        "hf-ehr publish classifier --repo-id my-org/readmission",
    ],
    "docs/index.md": ["python3 -m venv .venv"],
    "docs/publishing.md": ["hf-ehr publish classifier --repo-id my-org/readmission"],
}
"""Page → how its blocks begin that no test runs: they install, take long, or push to the Hub."""
FENCE = re.compile(r"(?:^<!-- (file|not run): (.+?) -->\n+)?^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
CHECKER = doctest.OutputChecker()
LAX = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Block:
    """A fenced block: `mark` is `file` or `not run`, and `note` the name or the reason that follows it."""

    language: str
    text: str
    line: int
    mark: str
    note: str


@cache
def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(found[3], found[4], text.count("\n", 0, found.start(4)) + 1, found[1] or "", found[2] or "")
        for found in FENCE.finditer(text)
    ]


def run_page(page: str, folder: Path) -> None:
    """Runs the blocks of a page in `folder`, the current one."""
    names: dict = {"__name__": "__main__"}
    printed = None
    for block in blocks(page):
        if block.mark == "not run":
            printed = None
        elif block.mark == "file":
            (folder / block.note).write_text(block.text)
        elif block.language == "python":
            with redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            printed = out.getvalue()
        elif block.language == "bash":
            printed = run_bash(block, page, folder)
        elif block.language == "text":
            assert printed is not None, f"{page}:{block.line}: nothing was run that could print this"
            if not CHECKER.check_output(block.text, printed, LAX):
                example = doctest.Example("", block.text)
                pytest.fail(f"{page}:{block.line}: {CHECKER.output_difference(example, printed, LAX)}")
        if block.language == "yaml" and not block.mark:
            TaskSpec.from_yaml(block.text)
        if block.language == "json":
            json.loads(block.text)


def run_bash(block: Block, page: str, folder: Path) -> str:
    """What the block prints, its errors with it."""
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", "COLUMNS": "100",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=environment, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{page}:{block.line} ended with {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout


def pages_with_code() -> list:
    return [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if any(block.mark != "not run" for block in blocks(page))
    ]


@pytest.mark.parametrize("page", pages_with_code())
def test_the_code_of_a_page_runs_in_its_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == "README.md":  # its coder is that of the tutorial of BERT-XML
        words = words_of("Known asthma. Hip fracture on the left.")
        random_coder(words, "ICD10CM/J45.909", "ICD10CM/S72.002A").save_pretrained(tmp_path / "coder")
        words.save_pretrained(tmp_path / "coder")
    run_page(page, tmp_path)


def test_a_broken_block_and_another_output_fail(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {
        "```python\nprint(1)\n```\n\n```text\n2\n```\n": pytest.fail.Exception,
        "```python\n1 / 0\n```\n": ZeroDivisionError,
        "```bash\nfalse\ntrue\n```\n": AssertionError,
        "```bash\nfalse | true\n```\n": AssertionError,
        "```yaml\nname: half a task\n```\n": ValueError,
        "```text\nnobody printed this\n```\n": AssertionError,
    }
    for number, (text, error) in enumerate(cases.items()):
        page = tmp_path / f"{number}.md"
        page.write_text(text)
        with pytest.raises(error):
            run_page(str(page), tmp_path)
    fine = tmp_path / "fine.md"
    fine.write_text(
        "<!-- file: a.txt -->\n```text\nhere\n```\n\n```bash\ncat a.txt; echo more\n```\n\n```text\nhere\n...\n```\n"
    )
    run_page(str(fine), tmp_path)


def test_what_is_not_run_is_exactly_what_cannot_be():
    marked = {
        page: [b.text.splitlines()[0].split("   ")[0] for b in blocks(page) if b.mark == "not run"] for page in PAGES
    }
    assert {page: found for page, found in marked.items() if found} == NOT_RUN


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_is_a_block_of_a_language_that_is_checked(page):
    text = (ROOT / page).read_text()
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(page)), "a fence is indented or open"
    unknown = {b.language for b in blocks(page) if b.mark != "file"} - {"python", "bash", "text", "yaml", "json"}
    assert unknown <= ({""} if page == "README.md" else set())  # the map of files
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec")
        if block.language == "yaml" and block.mark == "not run":
            yaml.safe_load(block.text)


# Commands


@cache
def site_hooks():
    spec = util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def arguments_of_commands() -> dict[str, set[str]]:
    return {
        name: {argument for argument, _, _ in page.arguments} | set(page.trainer)
        for name, page in site_hooks().command_pages()
    }


def calls(page: str) -> Iterator[list[str]]:
    """The words of every `hf-ehr` line of a page, also of those that are not run."""
    for block in blocks(page):
        if block.language == "bash":
            # A newline within quotes belongs to its word.
            for text in re.split(r"\n(?=hf-ehr)", block.text.replace("\\\n", " ")):
                words = shlex.split(text.replace("| head", "#"), comments=True)
                if words[:1] == ["hf-ehr"]:
                    yield words[1:]


def test_every_command_in_the_documents_takes_the_arguments_it_is_given():
    """So that the fast tests see a renamed argument in a page that only the slow ones run."""
    known = arguments_of_commands()
    seen = 0
    for page in PAGES:
        for words in calls(page):
            name = next(n for n in (" ".join(words[:k]) for k in (2, 1)) if n in known)
            name = f"{name} --stage 2" if "--stage 2" in " ".join(words) else name
            given = {
                word[2:].replace("-", "_")
                for word in words
                if word.startswith("--") and word not in ("--help", "--config", "--debug")
            }
            assert given <= known[name], f"{page}: {' '.join(words)}"
            seen += 1
    assert seen > 20


def test_the_command_reference_has_every_command_and_what_it_changes():
    text = site_hooks().command_reference()
    from hf_ehr.cli.main import COMMANDS

    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(COMMANDS)
    section = text.split("### finetune medbert")[1].split("###")[0]
    assert "| `--task` | required |" in section
    assert "`--num_train_epochs 5.0`" in section
    assert "push_to_hub" not in text


# The site


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_only_to_what_exists(page):
    text = re.sub(FENCE, "", (ROOT / page).read_text())
    links = {link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link}
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_every_page_is_in_the_navigation_and_every_public_name_in_the_reference():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w/]+\.md", json.dumps(nav)))
    assert named == {page.removeprefix("docs/") for page in PAGES if page != "README.md"} | {"reports/README.md"}
    reference = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = [
        name for name in re.findall(r"^::: hf_ehr\.(\w+)$", reference, re.MULTILINE) if name in hf_ehr.__all__
    ]
    assert sorted(documented) == sorted(set(hf_ehr.__all__) - {"__version__"})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(site):
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {f"{page.removeprefix('docs/')[:-3]}.html" for page in PAGES if page != "README.md"} <= pages
    assert "reports/index.html" in pages
    loaded = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(\w+:)?//|url\(["']?(\w+:)?//|@import""")
    links = re.compile(r"""<link(?![^>]*rel=["']?canonical)[^>]*\shref=["']?(?:\w+:)?//""")
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text()
        assert not loaded.search(text), path
        assert not links.search(text), path
    commands = (site / "commands.html").read_text()
    assert all(f">{name}<" in commands for name in ("prepare", "publish"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_pages_open_in_a_browser_without_a_complaint_or_a_request_to_elsewhere(site, size, tmp_path):
    with opened(tmp_path / "profile") as browser:
        for page in ("index.html", "tutorials/medbert.html", "api/codes.html"):
            browser.open(site / page, size=size)
            assert browser.requests()
            assert all(url.startswith(("file:", "data:")) for url in browser.requests())
            assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
            complaints = [str(one) for one in browser.complaints() if "search" not in str(one)]
            assert complaints == []

"""How a self-contained HTML page is made of its template and its data."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from hf_ehr.schema import atomic_path


def write_page(template: str, path: str | Path, *, title: str, data: Any) -> None:
    """Fills a template of the package with a title and with what its script reads, and writes it whole or not at all.

    Title and data stay text whatever they hold: the page's policy runs the template's own script and no other.

    Args:
        template: File name; it holds ``{{TITLE}}``, ``{{DATA}}``, ``{{SCRIPT_HASH}}`` and ``{{STYLE_HASH}}``.
        path: The file to write.
        title: Heading of the page.
        data: What JSON can hold.
    """
    markup = (resources.files("hf_ehr") / template).read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "DATA": _script_safe(data),
        "SCRIPT_HASH": _content_hash(markup, "script"),
        "STYLE_HASH": _content_hash(markup, "style"),
    }
    page = re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], markup)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _script_safe(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _content_hash(markup: str, tag: str) -> str:
    """The source expression by which a content security policy allows this one inline element."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", markup, re.DOTALL)
    assert found is not None  # the template is ours
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

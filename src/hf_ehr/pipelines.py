"""What the package adds to ``pipeline("icd-coding")``: the names of codes by the public lists, and a page.

The pipelines themselves are in ``models/``, for their code travels with a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import pipeline

from hf_ehr.models.pipeline_icd_coding import ICDCodingPipeline
from hf_ehr.ontology import nearest_name

TASK = "icd-coding"
ICDCodingPipeline.public_names = staticmethod(nearest_name)


def open_coder(model: Any, tokenizer: Any = None) -> Any:
    """The pipeline of a coder, by the package's own code, whatever code the folder carries.

    Args:
        model: The folder of a checkpoint with its tokenizer, or a model.
        tokenizer: Of a model that is passed as such.
    """
    kind: Any = ICDCodingPipeline
    return pipeline(TASK, model=model, tokenizer=tokenizer, pipeline_class=kind)  # type: ignore[call-overload]


def highlight_note(
    coder: Any,
    text: str,
    path: str | Path,
    *,
    tokenizer: Any = None,
    title: str = "Codes of a note",
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Codes a note and writes the page on which a code shows its evidence (:mod:`hf_ehr.highlight_page`).

    The file holds the note and must be kept like the record itself.

    Args:
        coder: An :class:`ICDCodingPipeline`, the folder of a checkpoint with its tokenizer, or a model.
        text: The note.
        path: The HTML file to write.
        tokenizer: Of a model that is passed as such.
        title: Heading of the page.
        **arguments: Of :class:`ICDCodingPipeline`.

    Returns:
        The codes, as the pipeline gives them.
    """
    from hf_ehr.highlight_page import highlight_page  # loads pyarrow

    if not isinstance(coder, ICDCodingPipeline):
        coder = open_coder(coder, tokenizer)
    codes = coder(text, **arguments)
    highlight_page(text, codes, path, title=title)
    return codes

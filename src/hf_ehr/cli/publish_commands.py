"""``hf-ehr publish``."""

from __future__ import annotations

from hf_ehr.cli._arguments import parse, positional


def publish(words: list[str]) -> None:
    """``hf-ehr publish DIR [--repo-id ORG/NAME]``."""
    from hf_ehr import hub

    example = "hf-ehr publish classifier/ --repo-id my-org/readmission-medbert"
    folder, words = positional(words, "DIR", example)
    (arguments,) = parse("publish DIR", example, words, hub.PublishArguments)
    where = hub.publish(folder, arguments)
    print(f"Loads without this package, with equal numbers: {where}")
    if arguments.repo_id is None:
        print("Nothing was pushed. Read its README.md, then: --repo-id ORG/NAME")


__all__ = ["publish"]

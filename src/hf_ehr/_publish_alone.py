"""What a published folder gives where this package cannot be imported; run as a script in a process of its own.

`python -I _publish_alone.py PLAN` reads a JSON list of folders, opens each with `trust_remote_code` and writes what
came out. The package calls the same functions on its side and compares; they therefore import nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def outputs_of(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of a model's output by its field; those of a tuple are numbered.

    Args:
        model: Any of the library's form.
        inputs: Name → tensor.
    """
    import torch

    model.eval()
    with torch.no_grad():
        outputs = model(**inputs)
    found: dict[str, Any] = {}
    for name, value in outputs.items():
        values = value if isinstance(value, (tuple, list)) else [value]
        found |= {f"{name}.{i}": v.contiguous() for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
    return found


def reading_of(folder: Path, **options: Any) -> dict[str, Any]:
    """Tokenizer, feature extractor or processor of a folder: classes, and digests of what they know.

    Args:
        folder: A model folder.
        **options: Of ``from_pretrained``.
    """
    from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

    if (folder / "processor_config.json").is_file():
        processor = AutoProcessor.from_pretrained(folder, **options)
        known = {name: _known(part) for name, part in sorted(vars(processor).items())}
        return {"class": type(processor).__name__} | {name: one for name, one in known.items() if one is not None}
    found = {}
    if (folder / "preprocessor_config.json").is_file():
        found["feature_extractor"] = _known(AutoFeatureExtractor.from_pretrained(folder, **options))
    if (folder / "tokenizer_config.json").is_file():
        found["tokenizer"] = _known(AutoTokenizer.from_pretrained(folder, **options))
    return found


def _known(part: Any) -> list[str] | None:
    """Class of a tokenizer or feature extractor and a digest of what it knows; None for what is none."""
    if not (hasattr(part, "get_vocab") or hasattr(part, "to_dict")):
        return None
    known = part.get_vocab() if hasattr(part, "get_vocab") else part.to_dict()
    known = {name: value for name, value in known.items() if name not in ("auto_map", "_processor_class")}
    text = json.dumps(known, sort_keys=True, default=str)
    return [type(part).__name__, hashlib.sha256(text.encode()).hexdigest()]


def main(plan: Path) -> None:
    """Opens every folder of the plan and writes its outputs, its reading and where its class came from.

    Args:
        plan: JSON list of `folder`, `auto_class`, `inputs` (safetensors), `outputs` (safetensors to write).
    """
    import transformers
    from safetensors.torch import load_file, save_file

    for step in json.loads(plan.read_text()):
        folder, target = Path(step["folder"]), Path(step["outputs"])
        model = getattr(transformers, step["auto_class"]).from_pretrained(folder, trust_remote_code=True)
        save_file(outputs_of(model, load_file(step["inputs"])), target)
        told = {"module": type(model).__module__, "class": type(model).__name__}
        reading = reading_of(folder, trust_remote_code=True)
        target.with_suffix(".json").write_text(json.dumps(told | {"reading": reading}))


if __name__ == "__main__":
    sys.modules["hf_ehr"] = None  # type: ignore[assignment] # an installed package must not help
    main(Path(sys.argv[1]))

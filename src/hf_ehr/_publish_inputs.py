"""Random input for any model of the package, made from its configuration: with it a published folder is tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

ROWS = 3
LENGTH = 6
VISITS = 2
CODES = 4
HOURS = 5


def example_inputs(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random input of three rows (patients, segments, stays, or two visits of three patients) in all streams it reads.

    Args:
        model: One of the package.
        seed: Of the random numbers.

    Raises:
        ValueError: The model is not of this package.
    """
    kind = model.config.model_type
    if kind not in STREAMS:
        raise ValueError(f"`model` must be one of {', '.join(sorted(STREAMS))}, got {kind!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = STREAMS[kind](model.config)
    known = inspect.signature(model.forward).parameters
    if kind == "ehr_medhmp":  # its heads hand whatever they get on to the encoder
        return inputs
    if kind == "ehr_concat" and "note_index" in known:
        inputs = {name.removeprefix("note_"): v[:, 0] for name, v in inputs.items() if name.startswith("note_")}
    return {name: value for name, value in inputs.items() if name in known}


def _ids(size: int, *shape: int) -> torch.Tensor:
    """Random ids from 1 on; the last of each row is padding, where there is a choice."""
    ids = torch.randint(min(1, size - 1), max(size, 2) if size > 1 else 1, shape)
    ids[-1, ..., -1] = 0
    return ids


def _codes(config: Any) -> dict[str, torch.Tensor]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[-1, LENGTH // 2 :] = 0
    visits = torch.arange(LENGTH).expand(ROWS, LENGTH) // 2 + 1
    streams = {
        "input_ids": torch.randint(min(5, config.vocab_size - 1), config.vocab_size, mask.shape),
        "attention_mask": torch.ones_like(mask),
        "visit_ids": visits,
        "serial_ids": torch.arange(LENGTH).expand(ROWS, LENGTH) % 2,
        "day_ids": visits * 30 - 29,
    }
    if getattr(config, "max_age", None):
        streams["age_ids"] = torch.full_like(mask, min(50, config.max_age - 1))
    return {name: value * mask for name, value in streams.items()}


def _text(config: Any, rows: int = ROWS) -> dict[str, torch.Tensor]:
    inner = getattr(config, "text_config", None) or getattr(config, "note_config", None) or config
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[-1, LENGTH // 2 :] = 0
    ids = torch.randint(min(5, inner.vocab_size - 1), inner.vocab_size, mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask, "word_mask": mask * (torch.arange(LENGTH) % 3 != 1)}


def _stays(config: Any) -> dict[str, torch.Tensor]:
    hours = torch.tensor([HOURS, HOURS - 2, 1])
    values = torch.rand(ROWS, HOURS, config.num_hourly_features) * (torch.rand(ROWS, HOURS, 1) > 1 / 3)
    return {
        "stay_hours": hours,
        "hourly_values": values * (torch.arange(HOURS) < hours[:, None])[..., None],
        "demographics": torch.rand(ROWS, config.num_demographics),
    }


def _notes_of_stays(config: Any) -> dict[str, torch.Tensor]:
    """Each stay is an admission of its own."""
    owners = {"stay_admissions": torch.arange(ROWS)}
    if config.note_config is not None:
        text = _text(config)
        return owners | {f"note_{name}": text[name] for name in ("input_ids", "attention_mask")}
    if config.note_size is None:
        return owners
    return owners | {
        "note_vectors": torch.randn(ROWS, config.note_size),
        "note_mask": torch.tensor([True] * (ROWS - 1) + [False]),
    }


def _fusion(config: Any) -> dict[str, torch.Tensor]:
    return _stays(config) | _notes_of_stays(config)


def _admissions(config: Any) -> dict[str, torch.Tensor]:
    diagnoses = _ids(config.diagnosis_vocab_size, ROWS, CODES)
    medications = _ids(config.medication_vocab_size, ROWS, CODES)
    first = torch.arange(CODES) == 0
    masks = {"diagnosis_mask": first & (diagnoses > 0), "medication_mask": first & (medications > 0)}
    return _fusion(config) | {"diagnosis_ids": diagnoses, "medication_ids": medications} | masks


def _visits(config: Any) -> dict[str, torch.Tensor]:
    """Codes of visits, and notes where the model reads them."""
    sizes = getattr(config, "code_config", None) or getattr(config, "gbert_config", None) or config
    mapped = {
        "diagnosis": getattr(config, "diagnosis_map", None),
        "medication": getattr(config, "medication_map", None),
    }
    streams = {}
    for kind, table in mapped.items():
        size = len(table) if table else getattr(sizes, f"{kind}_vocab_size", 2)
        streams[f"{kind}_ids"] = _ids(size, ROWS, VISITS, CODES)
    if getattr(config, "note_config", None) is not None:
        text = _text(config, ROWS * VISITS)
        streams |= {
            f"note_{name}": text[name].unflatten(0, (ROWS, VISITS)) for name in ("input_ids", "attention_mask")
        }
    return streams


STREAMS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "ehr_medbert": _codes,
    "ehr_rnn": _codes,
    "ehr_bert": _text,
    "ehr_text": _text,
    "ehr_tagger": _text,
    "ehr_series": _stays,
    "ehr_fusion": _fusion,
    "ehr_medhmp": _admissions,
    "ehr_gbert": _visits,
    "ehr_medmplm": _visits,
    "ehr_visitrnn": _visits,
    "ehr_concat": _visits,
}

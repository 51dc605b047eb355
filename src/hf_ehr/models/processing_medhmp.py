"""Raw hospital admissions → what MedHMP reads: hours of their stays, codes, and the note.

It joins an hourly feature extractor, two tokenizers of codes and, where a model reads text, the tokenizer of its text
encoder. Admissions of a prepared folder go through :func:`hf_ehr.admission_datasets.build_admission_examples`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from .feature_extraction_hourly import HourlyFeatureExtractor
from .processing_codes import CodesAndNotesProcessor, check_fields
from .tokenization_ehr import EhrCodeTokenizer

OTHER_FIELDS = ("stays", "demographics", "note", "note_vector")
"""What an admission holds beside the code lists."""
STAY_FIELDS = ("hours", "measurements", "demographics")
MEASUREMENT_FIELDS = ("hour", "name", "value", "text")


class MedHMPProcessor(CodesAndNotesProcessor):
    """Makes batches for the MedHMP models of admissions; saved in one folder, it opens with `AutoProcessor`.

    Args:
        feature_extractor: Hourly features of stays.
        diagnosis_tokenizer: Codes of the `kinds` it was fitted on, `diagnoses`.
        medication_tokenizer: Likewise, `medications`.
        note_tokenizer: Tokenizer of the text encoder, its `model_max_length` the most tokens of a note; `None` where
            notes come as vectors, or not at all.
    """

    def __init__(
        self,
        feature_extractor: HourlyFeatureExtractor,
        diagnosis_tokenizer: EhrCodeTokenizer,
        medication_tokenizer: EhrCodeTokenizer,
        note_tokenizer: Any = None,
    ):
        super().__init__(feature_extractor, diagnosis_tokenizer, medication_tokenizer, note_tokenizer=note_tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """All that a batch may hold."""
        codes = [f"{name}_ids" for name in self.code_tokenizers]
        notes = ["note_input_ids", "note_attention_mask", "note_vectors", "note_mask"]
        return [*self.feature_extractor.model_input_names, "stay_admissions", *codes, *notes]

    def __call__(self, admissions: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> BatchFeature:
        """A batch of admissions. Whatever is missing is missing to the model too, which knows that from a zero.

        Args:
            admissions: One mapping each (or one alone). All fields may be left out or be None: `stays`, a list in the
                order of time; `diagnoses` and `medications`, lists of `VOCABULARY/CODE`, unknown ones backing off as
                the tokenizer says; `note`, a text, or `note_vector`, its vector (note_size,), for all admissions of a
                call; `demographics`, values of the extractor's fields (`age` in years), those not given are unknown.

                A stay holds `measurements`, mappings with `hour` (since its start), `name`, `value` and `text`;
                `hours` that are seen of it, at and after which nothing is read (up to the last measurement when left
                out); and `demographics` of its own, over those of the admission. Of measurements those of unknown
                variables, before the start, or with a NaN or infinite value are ignored. A stay of 0 hours is none
                to the model.

        Returns:
            `diagnosis_ids` and `medication_ids` (admissions, codes) int64, padded; `stay_admissions` (stays,) int64;
            `stay_hours` (stays,), `feature_ids` (entries,), `feature_counts` (hours,), in continuous form
            `feature_values` (entries,), `demographics` (stays, size); of notes `note_input_ids` and
            `note_attention_mask` (admissions, tokens), or `note_vectors` (admissions, note_size) and `note_mask`.

        Raises:
            ValueError: There is no admission, a field is not known, `hours` is no number from 0, notes are given that
                nothing reads, or note vectors differ in size or are not finite.
        """
        rows = [admissions] if isinstance(admissions, Mapping) else list(admissions)
        if not rows:
            raise ValueError("`admissions` must hold at least one admission, got none.")
        for row in rows:
            check_fields(row, (*self.code_kinds, *OTHER_FIELDS), "An admission")
        return BatchFeature(self.code_ids(rows, truncation=False) | self._stays(rows) | self._notes(rows))

    def _stays(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The hours of all stays end to end, and whose they are."""
        stays = [(owner, row, stay) for owner, row in enumerate(rows) for stay in row.get("stays") or ()]
        measured, lengths = [], []
        for number, (_, _, stay) in enumerate(stays):
            check_fields(stay, STAY_FIELDS, "A stay")
            taken, hours = _measured(stay, self.feature_extractor.n_hours)
            measured += [(number, *(one.get(name) for name in MEASUREMENT_FIELDS)) for one in taken]
            lengths.append(hours)
        own = [{**(row.get("demographics") or {}), **(stay.get("demographics") or {})} for _, row, stay in stays]
        fields = [field["name"] for field in self.feature_extractor.demographics if not field["static"]]
        columns = [list(column) for column in zip(*measured, strict=True)] or [[] for _ in range(5)]
        made = self.feature_extractor(
            *columns, stay_hours=lengths, demographics={name: [each.get(name) for each in own] for name in fields}
        )
        owners = torch.tensor([owner for owner, _, _ in stays], dtype=torch.long)
        lists = {"feature_ids": np.int64, "feature_counts": np.int64, "feature_values": np.float32}
        batch = {"stay_admissions": owners, "stay_hours": torch.tensor(made["stay_hours"], dtype=torch.long)}
        for name, kind in lists.items():
            if name in made:
                batch[name] = torch.from_numpy(np.concatenate([np.empty(0, kind), *made[name]]).astype(kind))
        statics = np.array(made["demographics"], np.float32)
        size = self.feature_extractor.num_demographics
        return batch | {"demographics": torch.from_numpy(statics.reshape(len(stays), size))}

    def _notes(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tokens or vectors of notes; an admission without one has none of either."""
        texts = [(row.get("note") or "").strip() for row in rows]
        vectors = [row.get("note_vector") for row in rows]
        given = [np.asarray(vector, np.float32) for vector in vectors if vector is not None and len(vector)]
        if given and any(texts):
            raise ValueError("Notes of a call must be texts (`note`) or vectors (`note_vector`), got both.")
        if given:
            return _vectors(vectors, given)
        if self.note_tokenizer is None:
            if any(texts):
                raise ValueError(
                    "`note` must be left out: the processor has no `note_tokenizer`. Give `note_vector`, or make the "
                    "processor with the tokenizer of the model's text encoder."
                )
            return {}
        return self.note_batch(texts)


def _measured(stay: Mapping[str, Any], n_hours: int) -> tuple[list[Mapping[str, Any]], int]:
    """What is read of a stay, and how many hours it has for the model."""
    taken, hours = list(stay.get("measurements") or ()), stay.get("hours")
    # An hour that is no number is left to the extractor, which counts it as ignored.
    known = [math.nan if one.get("hour") is None else float(one["hour"]) for one in taken]
    taken = [{**one, "hour": hour} for one, hour in zip(taken, known, strict=True)]
    if hours is None:
        last = max((hour for hour in known if 0 <= hour < math.inf), default=-1.0)
        return taken, min(math.floor(last) + 1, n_hours)
    if not 0 <= hours < math.inf:
        raise ValueError(f"`hours` of a stay must be a number from 0, got {hours}. Leave it out where it is unknown.")
    return [one for one in taken if not one["hour"] >= hours], min(math.ceil(hours), n_hours)


def _vectors(vectors: Sequence[Any], given: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    if len({vector.shape for vector in given}) > 1 or not all(np.isfinite(vector).all() for vector in given):
        raise ValueError("`note_vector` must be finite and of one size in all admissions, and is not.")
    there = torch.tensor([vector is not None and len(vector) > 0 for vector in vectors])
    stacked = torch.zeros(len(vectors), given[0].shape[0])
    stacked[there] = torch.from_numpy(np.stack(given))
    return {"note_vectors": stacked, "note_mask": there}


MedHMPProcessor.register_for_auto_class()

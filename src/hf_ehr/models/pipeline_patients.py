"""What the pipelines over patients share: what a patient is, how batches are made of patients, and frames.

    patient (a dict, or a row of a frame) ─ tokenizer │ processor │ feature extractor ─▶ batch ─ model ─▶ answer

What reads the patients is asked what it can do and never for its class, which may come from a checkpoint.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .pipeline_frames import frame_of, is_frame, plain, rows_of

BATCH_SIZE = 32
DEFAULT_MAX_LENGTH = 512
RECORD_ONLY = {"visit_id", "start", "end", "kind", "planned", "discharged_to", "procedures", "notes"}
"""Fields of a visit in a RECORD that say nothing to a model of visits; times of codes (``*_at``) neither."""
# The library types the hooks of its base class more narrowly than its own pipelines use them.
_Base: Any = Pipeline


class PatientPipeline(_Base):
    """What the pipelines over patients share: what a patient is, batches, frames.

    A patient is a dict. What it holds follows from the model:

    - of histories of codes (Med-BERT, BEHRT, RNNs): ``visits``, oldest first, each a list of ``VOCABULARY/CODE`` or a
      dict with the code lists that the tokenizer was fitted on (``diagnoses``); with ``birth_time`` and the visits'
      ``start`` where the tokenizer has ages or days;
    - of visits (MedM-PLM, G-BERT and their rivals): ``visits`` with ``diagnoses``, ``medications`` and ``note``;
    - of admissions (MedHMP): ``visits`` as before, and in each ``stays`` as `MedHMPProcessor` takes them;
    - of intensive care stays (MedHMP): ``hours`` that are seen of it, ``measurements`` (``hour``, ``name``, ``value``
      and ``text``) and ``demographics``.

    Models of admissions and of visits are asked about the last visit. A record of this package is a patient too. What
    is given is seen: leave out what was not known at the time of the question.

    A frame of pandas or polars comes back as one, whatever its form: a row per patient with a column ``visits``, or a
    row per code with ``subject_id``, ``visit_id`` (visits in order) and ``code``, and if there are several kinds of
    codes ``kind`` (``diagnoses``, ``medications``). A column ``subject_id`` is carried over.
    """

    _load_processor = None
    _load_tokenizer = None
    _load_feature_extractor = None
    _load_image_processor = False
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not (self.reads_visits or self.reads_stays or self.reads_histories):
            raise ValueError(
                "`model` must come with what reads its patients (a tokenizer, processor or feature extractor of this "
                "package), and none was found. Name the folder that holds both, or pass it beside the model."
            )
        self.model.eval()

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Answers for a patient or several.

        Args:
            inputs: A patient, a list of patients, a frame, or a generator or data set of patients, whose answers then
                come one by one.
            batch_size: Patients that the model reads at a time, 32 by default.
            **kwargs: As when the pipeline is made.

        Returns:
            The answer of the patient; of several patients a list; of a frame a frame.

        Raises:
            ValueError: An input is no patient or an argument unknown.
        """
        size = batch_size or self._batch_size or BATCH_SIZE
        if isinstance(inputs, Mapping):
            return next(self._answers([inputs], 1, kwargs))
        if is_frame(inputs):
            return self._framed(inputs, size, kwargs)
        if isinstance(inputs, list | tuple):
            return list(self._answers(inputs, size, kwargs))
        if isinstance(inputs, str) or not hasattr(inputs, "__iter__"):
            raise ValueError(
                f"`inputs` must be a patient (a dict), a list of patients or a frame, got {type(inputs).__name__}."
            )
        return self._answers(inputs, size, kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in the library, with what it leaves out: the processor, and the code of what came with a folder.

        The folder then opens with `trust_remote_code=True` alone: its `custom_pipelines` name this file.
        """
        super().save_pretrained(save_directory, **kwargs)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)
        custom_object_save(self, save_directory)

    @property
    def reads_visits(self) -> bool:
        """Whether a patient is read visit by visit: of one admission, or of all of them."""
        return hasattr(self.processor, "code_tokenizers")

    @property
    def reads_stays(self) -> bool:
        """Whether a patient is one intensive care stay."""
        return hasattr(self.feature_extractor, "num_hourly_features") and not self.reads_visits

    @property
    def reads_histories(self) -> bool:
        """Whether a patient is a history of codes."""
        return hasattr(self.tokenizer, "encode_patients")

    def _answers(self, patients: Any, size: int, kwargs: dict[str, Any]) -> Iterator[Any]:
        given = self._sanitize_parameters(**kwargs)
        made = (self._preprocess_params, self._forward_params, self._postprocess_params)
        parameters = [{**before, **now} for before, now in zip(made, given, strict=True)]
        rows = iter(patients)
        while batch := list(islice(rows, size)):
            yield from self.run_single(batch, *parameters)

    def _framed(self, frame: Any, size: int, kwargs: dict[str, Any]) -> Any:
        patients = patients_of(frame)
        answers = self._answers(patients, size, kwargs)
        rows = []
        for patient, answer in zip(patients, answers, strict=True):
            own = {"subject_id": patient["subject_id"]} if "subject_id" in patient else {}
            rows += [own | row for row in self.frame_rows(answer)]
        return frame_of(rows, like=frame)

    def frame_rows(self, answer: Any) -> list[dict[str, Any]]:
        """The rows that an answer becomes in a frame."""
        return [answer]

    def preprocess(self, input_: Sequence[Any], **_: Any) -> dict[str, Any]:
        """Patients → a batch."""
        patients = [_patient(patient, place) for place, patient in enumerate(input_)]
        if self.reads_visits:
            return dict(self.visit_batch(patients))
        return self._stays(patients) if self.reads_stays else self._histories(patients)

    def visit_batch(self, patients: list[dict[str, Any]]) -> Mapping[str, Any]:
        """The last visit of each patient, for models of one admission."""
        return self.processor([self.history(patient, place)[-1] for place, patient in enumerate(patients)])

    def history(self, patient: dict[str, Any], place: int) -> list[dict[str, Any]]:
        """The visits of a patient, the one at `place` in its batch, as the processor takes them."""
        return [self._visit(visit) for visit in _visits_of(patient, place)]

    def whole_patients(self, histories: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """Visits of patients → (patients, visits, …), and `visits`, their numbers, (patients,)."""
        batch = dict(self.processor([{"visits": history} for history in histories]))
        return batch | {"visits": torch.tensor([len(history) for history in histories])}

    def _visit(self, visit: Any) -> dict[str, Any]:
        """A visit as the processor takes it."""
        if not isinstance(visit, Mapping):
            raise ValueError(
                "`visits` must hold dicts with `diagnoses` and `medications` for this model, got "
                f"{type(visit).__name__}. Name the code lists."
            )
        if visit.get("notes") and not visit.get("note") and getattr(self.processor, "note_tokenizer", None):
            raise ValueError(
                "`note` of a visit must be the text that is read, got a list `notes`. Join those that were known."
            )
        kinds = {kind for tokenizer in self.processor.code_tokenizers.values() for kind in tokenizer.kinds}
        dropped = (RECORD_ONLY - kinds) | {name for name in visit if name.endswith("_at")}
        if not hasattr(self.processor, "feature_extractor"):
            dropped.add("stays")
        return {name: value for name, value in visit.items() if name not in dropped}

    def _stays(self, patients: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stays → hours end to end, as the hourly collators make them."""
        extractor = self.feature_extractor
        columns: list[list[Any]] = [[], [], [], [], []]
        lengths = []
        for place, stay in enumerate(patients):
            hours = stay.get("hours")
            if not isinstance(hours, int | float) or not 0 < hours < math.inf:
                raise ValueError(
                    f"`hours` of stay {place} must be the hours that are seen of it, a number above 0, got {hours!r}."
                )
            lengths.append(min(math.ceil(hours), extractor.n_hours))
            for one in stay.get("measurements") or ():
                if one.get("hour") is not None and one["hour"] < hours:
                    row = (place, one["hour"], one.get("name"), one.get("value"), one.get("text"))
                    for column, value in zip(columns, row, strict=True):
                        column.append(value)
        given = [stay.get("demographics") or {} for stay in patients]
        names = [field["name"] for field in extractor.demographics if not field["static"]]
        demographics = {name: [each.get(name) for each in given] for name in names}
        made = extractor(*columns, stay_hours=lengths, demographics=demographics)
        flat = {
            name: torch.tensor([value for row in made[name] for value in row], dtype=kind)
            for name, kind in (
                *(("feature_ids", torch.long), ("feature_counts", torch.long), ("feature_values", torch.float32)),
            )
            if name in made
        }
        statics = torch.tensor([list(row) for row in made["demographics"]], dtype=torch.float32)
        return flat | {
            "stay_hours": torch.tensor(lengths),
            "demographics": statics.reshape(len(patients), extractor.num_demographics),
        }

    def _histories(self, patients: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Histories → padded streams (patients, codes)."""
        kinds = self.tokenizer.kinds
        rows = []
        for place, patient in enumerate(patients):
            visits = [_history_visit(visit, kinds) for visit in _visits_of(patient, place)]
            rows.append({"visits": visits, "birth_time": patient.get("birth_time")})
        length = getattr(self.model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
        encoded = self.tokenizer.encode_patients(rows, max_length=length)
        lengths = [sum(mask) for mask in encoded["attention_mask"]]
        if not all(lengths):
            raise ValueError(
                f"`visits` of patient {lengths.index(0)} must hold a code ({', '.join(kinds)}), and hold none. Leave "
                "the patient out: nothing is known to predict from."
            )
        batch = {}
        for name, lists in encoded.items():
            padding = self.tokenizer.pad_token_id if name == "input_ids" else 0
            batch[name] = torch.tensor([[*row, *[padding] * (max(lengths) - len(row))] for row in lists])
        return batch


def patients_of(frame: Any) -> list[dict[str, Any]]:
    """The patients of a frame with a row per patient, or per code.

    Raises:
        ValueError: The frame has neither `visits` (or `measurements`) nor `subject_id`, `visit_id` and `code`.
    """
    names = list(frame.columns)
    rows = rows_of(frame)
    if "visits" in names or "measurements" in names:
        return rows
    missing = [name for name in ("subject_id", "visit_id", "code") if name not in names]
    if missing:
        raise ValueError(
            "`inputs` must have a column `visits` (a row per patient), or `subject_id`, `visit_id` and `code` (a row "
            f"per code); it lacks {', '.join(missing)}. Rename its columns."
        )
    patients: dict[Any, dict[Any, dict[str, list]]] = {}
    for row in rows:
        visit = patients.setdefault(row["subject_id"], {}).setdefault(row["visit_id"], {})
        visit.setdefault(row.get("kind") or "diagnoses", []).append(row["code"])
    return [{"subject_id": one, "visits": [visits[key] for key in sorted(visits)]} for one, visits in patients.items()]


def _patient(patient: Any, place: int) -> dict[str, Any]:
    if not isinstance(patient, Mapping):
        raise ValueError(
            f"`inputs` must hold patients, dicts as {{'visits': [...]}}; number {place} is a {type(patient).__name__}."
        )
    return plain(patient)


def _visits_of(patient: dict[str, Any], place: int) -> list[Any]:
    visits = patient.get("visits")
    if not isinstance(visits, list | tuple) or not visits:
        raise ValueError(
            f"`visits` of patient {place} must be a list of visits, oldest first, got "
            f"{'none' if not visits else type(visits).__name__}. Give at least one visit."
        )
    return list(visits)


def _history_visit(visit: Any, kinds: Sequence[str]) -> Any:
    """A visit with every kind that the tokenizer reads."""
    if not isinstance(visit, Mapping):
        return visit
    return {kind: visit.get(kind) or [] for kind in kinds} | {"start": visit.get("start")}

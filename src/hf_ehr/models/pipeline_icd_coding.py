"""``pipeline("icd-coding")``: a note in; its codes with probability, decision and the evidence in the text out.

``import hf_ehr`` registers it. The file travels with a checkpoint whose ``custom_pipelines`` name it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .any_encoder import evaluating
from .code_decisions import DECISIONS, decide, stored_thresholds
from .evidence_spans import RELATIVE_THRESHOLD, Span, top_spans
from .integrated_gradients import positive_evidence
from .note_evidence import SEGMENTS_AT_A_TIME, EncodedNotes, check_method, segment_texts
from .pipeline_frames import frame_of, is_frame, rows_of

INTEGRATED = "integrated_gradients"
"""Evidence that every head can give, at the price of some thirty passes through the encoder."""
WEIGHT_BUDGET = 2**24
"""Token weights that are held at once (64 MiB); at least those of one code."""
CARRIED = ("note_id", "subject_id")
"""Columns of a frame of notes that its frame of codes has too."""
_UNSET: Any = object()
# The library types the hooks of its base class more narrowly than its own pipelines use them.
_Base: Any = Pipeline


class ICDCodingPipeline(_Base):
    """``pipeline("icd-coding")``: codes notes with an ``EhrBertForICDCoding`` on any encoder.

    A note may have any length: it is cut into segments as in training (``tokenizer.model_max_length`` tokens each; the
    first ``config.max_segments`` are read, or all), which are encoded ``batch_size`` at a time. An empty note gets the
    scores of a note that says nothing, and no spans.

    Every code is a dict with ``code`` (the label's name), ``description`` (``None`` where nothing knows one),
    ``probability``, ``decision`` and ``spans``. The decision is ``auto-code`` from the code's
    ``config.auto_code_thresholds`` on, ``review`` from its ``config.thresholds`` on, else ``ignore``. A code without a
    threshold takes ``config.common_threshold``, else 0.5, and is never coded automatically. A span has ``start`` and
    ``end`` in characters of the note as it was given, ``text`` and ``weight``.

    A frame of pandas or polars with a column ``text``, a note a row, becomes a frame with a row for each code of each
    note and the fields above as columns; ``note_id`` and ``subject_id`` are carried over.

    Example:
    ```python
    import hf_ehr
    from transformers import pipeline

    coder = pipeline("icd-coding", model="folder of a checkpoint and its tokenizer")
    codes = coder("Known asthma. Hip fracture on the left.", top_k=5)
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    public_names: ClassVar[Callable[[Sequence[str]], list[str | None]] | None] = None
    """Names of codes by the public lists, which do not travel; the package puts them here."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.model, "code", None)):
            raise ValueError(
                f"`model` must be an `EhrBertForICDCoding`, got {type(self.model).__name__}. Train one, on any "
                "encoder of the library."
            )
        if self.tokenizer is None:
            raise ValueError("`tokenizer` must come with the model, got none. Pass the one it was trained with.")
        for field in ("thresholds", "auto_code_thresholds"):
            _check_thresholds(field, getattr(self.model.config, field) or {}, self.model.config.label2id)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Codes a note or several.

        Args:
            inputs: A note (or a dict with its `text`), a list of notes, a frame, or a generator or dataset of notes,
                whose results then come one by one.
            batch_size: Segments that are encoded at a time, 8 by default. Notes are read one after the other.
            **kwargs: Here or when the pipeline is made: `top_k`: codes to return, 20 by default, `None` for all;
                `threshold`: one review threshold for all codes, in place of the configuration's; `evidence`:
                `label_attention` (default of the label-attention head), `attention_gradient`, `gradient` (default of
                the [CLS] head), `integrated_gradients`, or `None` for no spans; `max_spans`: spans of a code, 5 by
                default, `None` for all; `relative_threshold`: of `top_spans`; `max_length`: tokens of a segment, in
                place of the tokenizer's; `descriptions`: code → description, before `config.label_descriptions` and,
                with the package's own class, the public lists.

        Returns:
            The codes of the note by falling probability; of several notes a list of such lists; of a frame a frame.

        Raises:
            ValueError: An input is no text, or an argument is unknown or out of range.
        """
        if is_frame(inputs):
            return self._framed(inputs, batch_size=batch_size, **kwargs)
        if isinstance(inputs, list) and not inputs:
            return []
        segments_at_a_time = batch_size or self._batch_size or SEGMENTS_AT_A_TIME
        return super().__call__(inputs, batch_size=1, segments_at_a_time=segments_at_a_time, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in the library; a pipeline that came with a folder is saved with its code too."""
        super().save_pretrained(save_directory, **kwargs)
        custom_object_save(self, save_directory)

    def _framed(self, frame: Any, **kwargs: Any) -> Any:
        if "text" not in frame.columns:
            raise ValueError("`inputs` must have a column `text`, a note a row, and has none. Rename its columns.")
        notes = rows_of(frame)
        rows = []
        for note, codes in zip(notes, self(notes, **kwargs), strict=True):
            own = {name: note[name] for name in CARRIED if name in note}
            rows += [own | code for code in codes]
        return frame_of(rows, like=frame)

    def _sanitize_parameters(
        self,
        top_k: int | None = _UNSET,
        threshold: float | None = _UNSET,
        evidence: str | None = _UNSET,
        max_spans: int | None = _UNSET,
        relative_threshold: float = _UNSET,
        max_length: int | None = _UNSET,
        descriptions: Mapping[str, str] | None = _UNSET,
        segments_at_a_time: int = _UNSET,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            known = "top_k, threshold, evidence, max_spans, relative_threshold, max_length, descriptions, batch_size"
            raise ValueError(f"Arguments must be among {known}, got {', '.join(unknown)}. Leave the others out.")
        for name, count in (("top_k", top_k), ("max_spans", max_spans)):
            if count is not _UNSET and count is not None and count < 1:
                raise ValueError(f"`{name}` must be at least 1, or None for all, got {count}.")
        if threshold is not _UNSET and threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must lie in [0, 1], got {threshold}.")
        if evidence is not _UNSET and evidence not in (None, INTEGRATED):
            check_method(evidence, self.model)
        reading = {"max_length": max_length}
        looking = {
            "top_k": top_k,
            "evidence": evidence,
            "max_spans": max_spans,
            "relative_threshold": relative_threshold,
            "segments_at_a_time": segments_at_a_time,
        }
        telling = {"threshold": threshold, "descriptions": descriptions}
        given = [
            {name: value for name, value in part.items() if value is not _UNSET}
            for part in (reading, looking, telling)
        ]
        return given[0], given[1], given[2]

    def preprocess(self, input_: Any, max_length: int | None = None) -> dict[str, Any]:
        """A note → its segments."""
        note = input_.get("text") if isinstance(input_, Mapping) else input_
        if not isinstance(note, str):
            raise ValueError(
                f"`inputs` must be a note (str) or a list of notes, got {type(input_).__name__}"
                f"{' without such a `text`' if isinstance(input_, Mapping) else ''}. Pass the text itself."
            )
        return {"text": note, "segments": segment_texts(self.model, self.tokenizer, [note], max_length)}

    def _forward(
        self,
        input_tensors: dict[str, Any],
        top_k: int | None = 20,
        evidence: Any = _UNSET,
        max_spans: int | None = 5,
        relative_threshold: float = RELATIVE_THRESHOLD,
        segments_at_a_time: int = SEGMENTS_AT_A_TIME,
    ) -> dict[str, Any]:
        """Segments → the most probable labels, their probabilities and spans."""
        if evidence is _UNSET:
            evidence = "label_attention" if self.model.config.head == "xml" else "gradient"
        with evaluating(self.model):
            note = EncodedNotes(self.model, input_tensors["segments"], segments_at_a_time)
            probabilities = note.probabilities()[0]
            labels = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
            weights = _weights(note, evidence, labels) if evidence else ()
            offsets = note.segments.offsets
            found = [top_spans(row, offsets, relative_threshold=relative_threshold, k=max_spans) for row in weights]
        text = input_tensors["text"]
        return {
            "labels": labels,
            "probabilities": probabilities[labels].tolist(),
            "spans": [[_shown(span, text) for span in spans] for spans in found] or [[] for _ in labels],
        }

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        threshold: float | None = None,
        descriptions: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Labels → codes as coders read them."""
        config = self.model.config
        codes = [config.id2label[label] for label in model_outputs["labels"]]
        names = described(config, codes, descriptions, type(self).public_names)
        review, auto = stored_thresholds(config, codes, threshold)
        decisions = decide(model_outputs["probabilities"], review=review, auto_code=auto)
        columns = (codes, names, model_outputs["probabilities"], [DECISIONS[one] for one in decisions])
        rows = zip(*columns, model_outputs["spans"], strict=True)
        return [
            dict(zip(("code", "description", "probability", "decision", "spans"), row, strict=True)) for row in rows
        ]


def described(
    config: Any,
    codes: Sequence[str],
    descriptions: Mapping[str, str] | None = None,
    public_names: Callable[[Sequence[str]], list[str | None]] | None = None,
) -> list[str | None]:
    """The description of each code: as given, else of `config.label_descriptions`, else by the public lists."""
    own = (config.label_descriptions or {}) | dict(descriptions or {})
    names = [None] * len(codes) if public_names is None else public_names(codes)
    return [own.get(code, name) for code, name in zip(codes, names, strict=True)]


def _weights(note: EncodedNotes, method: Any, labels: list[int]) -> Iterator[np.ndarray]:
    """Token weights of one label after the other, computed some at a time."""
    step = max(1, WEIGHT_BUDGET // max(1, len(note.segments.offsets)))
    for start in range(0, len(labels), step):
        some = labels[start : start + step]
        yield from (positive_evidence(note, some) if method == INTEGRATED else note.evidence(method, some)).weights


def _shown(span: Span, text: str) -> dict[str, Any]:
    return {**span._asdict(), "text": text[span.start : span.end]}


def _check_thresholds(field: str, thresholds: Mapping[str, float], labels: Mapping[str, int]) -> None:
    """Refuses thresholds of labels that the model does not have, and what is no number from 0 on."""
    if unknown := sorted(set(thresholds) - set(labels)):
        raise ValueError(f"`{field}` must name labels of the model, got {unknown[:5]}. Take the others out.")
    wrong = [name for name, value in thresholds.items() if not (value >= 0 and math.isfinite(value))]
    if wrong:
        raise ValueError(
            f"`{field}` must be finite and at least 0, got others for {sorted(wrong)[:5]}. Tune them again."
        )

"""What a coding model looked at in a note: one function a method, and the descriptions of codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_ehr.models.any_encoder import evaluating
from hf_ehr.models.note_evidence import (
    SEGMENTS_AT_A_TIME,
    EncodedNotes,
    EvidenceMethod,
    NoteEvidence,
    segment_texts,
)
from hf_ehr.models.pipeline_icd_coding import described
from hf_ehr.ontology import nearest_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def label_attention_evidence(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    label_ids: Sequence[int],
    *,
    max_length: int | None = None,
    batch_size: int = SEGMENTS_AT_A_TIME,
) -> NoteEvidence:
    """The label attention of BERT-XML (Zhang, Liu & Razavian 2020, Eq 2 and Fig 3) over a whole note.

    Args:
        model: An ``EhrBertForICDCoding``, on any encoder.
        tokenizer: Its fast tokenizer.
        text: The note, of any length.
        label_ids: The codes to explain, ids of ``config.label2id``.
        max_length: Tokens of a segment; the tokenizer's ``model_max_length`` by default, which is that of training.
        batch_size: Segments that are encoded at a time.

    Raises:
        ValueError: The head is ``cls``, which has no label attention, an id is unknown, or an argument is out of
            range.
    """
    return _evidence("label_attention", model, tokenizer, text, label_ids, max_length, batch_size)


def gradient_evidence(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    label_ids: Sequence[int],
    *,
    max_length: int | None = None,
    batch_size: int = SEGMENTS_AT_A_TIME,
) -> NoteEvidence:
    """Input × gradient: ‖x ⊙ ∂z/∂x‖₂ of the token embeddings x for the score z of a code, before the sigmoid.

    Takes and raises what :func:`label_attention_evidence` does, and works with every head.
    """
    return _evidence("gradient", model, tokenizer, text, label_ids, max_length, batch_size)


def attention_gradient_evidence(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    label_ids: Sequence[int],
    *,
    max_length: int | None = None,
    batch_size: int = SEGMENTS_AT_A_TIME,
) -> NoteEvidence:
    """AttInGrad: label attention times input × gradient (Edin et al., EMNLP 2024, arXiv 2406.08958).

    The product takes weight from tokens that are looked at and change nothing, such as separators. Takes and raises
    what :func:`label_attention_evidence` does.
    """
    return _evidence("attention_gradient", model, tokenizer, text, label_ids, max_length, batch_size)


def code_descriptions(
    model: Any, codes: Sequence[str], descriptions: Mapping[str, str] | None = None
) -> list[str | None]:
    """The description of each code: as given, else of ``config.label_descriptions``, else of the public lists.

    A code that the lists do not name takes the name of its nearest ancestor.
    """
    return described(model.config, codes, descriptions, nearest_name)


def _evidence(method: EvidenceMethod, model, tokenizer, text, label_ids, max_length, batch_size) -> NoteEvidence:
    with evaluating(model):
        segments = segment_texts(model, tokenizer, [text], max_length)
        return EncodedNotes(model, segments, batch_size).evidence(method, list(label_ids))

"""Integrated gradients of a coding model over a note of any length (Sundararajan, Taly & Yan, ICML 2017, Eq 1).

Each token's part in the score of a code, along the straight way from a note that says nothing to the note: the words'
embeddings become that of `[PAD]`, special tokens stay. The parts add up to the difference of the two scores.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .any_encoder import evaluating
from .note_evidence import SEGMENTS_AT_A_TIME, EncodedNotes, NoteEvidence, segment_texts

STEPS = 32
"""Nodes of the Gauss-Legendre rule; so many passes through the encoder does one note cost."""


def integrated_gradient_evidence(
    model: Any,
    tokenizer: Any,
    text: str,
    label_ids: Sequence[int],
    *,
    steps: int = STEPS,
    max_length: int | None = None,
    batch_size: int = SEGMENTS_AT_A_TIME,
) -> NoteEvidence:
    """What speaks for codes in a note: the positive part of its tokens' integrated gradients.

    Works with every head; takes and raises what `hf_ehr.explanations.label_attention_evidence` does, and

    Args:
        steps: Nodes of the integral.
    """
    with evaluating(model):
        note = EncodedNotes(model, segment_texts(model, tokenizer, [text], max_length), batch_size)
        return positive_evidence(note, label_ids, steps)


def positive_evidence(note: EncodedNotes, label_ids: Sequence[int], steps: int = STEPS) -> NoteEvidence:
    """[`integrated_gradients`] above 0, as evidence."""
    return NoteEvidence(np.maximum(integrated_gradients(note, label_ids, steps), 0), note.segments.offsets)


def integrated_gradients(note: EncodedNotes, label_ids: Sequence[int], steps: int = STEPS) -> np.ndarray:
    """Signed parts of all tokens but padding in the scores of codes, before the sigmoid.

    Args:
        note: Notes behind their encoder, in evaluation mode; each token counts for the codes of its own note.
        label_ids: Ids of `config.label2id`.
        steps: Nodes of the integral.

    Returns:
        (labels, tokens) float32.

    Raises:
        ValueError: `steps` is below 1, or a label does not exist.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if not all(0 <= label < note.model.num_labels for label in label_ids):
        raise ValueError(f"`label_ids` must lie in [0, {note.model.num_labels}), got others. Look them up.")
    start, way = _way(note)
    total = torch.zeros(len(label_ids), *note.mask.shape, device=note.mask.device)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        total += float(weight) * _gradients(note, start + float(node) * way, way, label_ids)
    return total[:, note.mask.bool()].cpu().numpy()


@torch.no_grad()
def _way(note: EncodedNotes) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a note that says nothing, and the difference to the note; both (segments, length, hidden)."""
    ids = note.segments.input_ids.to(note.mask.device)
    special = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    special[note.mask.bool()] = torch.from_numpy(note.segments.offsets[:, 0] < 0).to(ids.device)
    silent = torch.where(special, ids, getattr(note.model.config, "pad_token_id", None) or 0)
    embed = note.model.get_input_embeddings()
    start = embed(silent)
    return start, embed(ids) - start


@torch.enable_grad()
def _gradients(note: EncodedNotes, inputs: torch.Tensor, way: torch.Tensor, label_ids: Sequence[int]) -> torch.Tensor:
    """∂z/∂x · way at one place of the way, (labels, segments, length), a few segments at a time."""
    with torch.no_grad():
        states = torch.cat([note._encode(part, embeddings=inputs[part]) for part in note.batches])
    states.requires_grad_()
    logits = note._coded(states, label_ids)["logits"].sum(dim=0)  # a token belongs to one note
    upstream = [torch.autograd.grad(logit, states, retain_graph=True)[0] for logit in logits]
    parts = []
    for part in note.batches:
        leaf = inputs[part].detach().requires_grad_()
        outputs = note._encode(part, embeddings=leaf)
        rows = [torch.autograd.grad(outputs, leaf, row[part], retain_graph=True)[0] for row in upstream]
        parts.append(torch.stack([(row * way[part]).sum(dim=-1).float() for row in rows]))
    return torch.cat(parts, dim=1)

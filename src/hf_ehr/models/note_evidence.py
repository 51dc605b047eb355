"""What a coding model looked at: weights of a note's tokens for its codes, in characters of the note.

A note of any length is cut into segments, which are encoded a few at a time. A gradient goes back the same way: from
the score of a code to the states of all segments, and from there through the encoder, again a few segments at a time.
So memory grows with the note only by its states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from .any_encoder import longest_segment, segment_length
from .note_windows import cut_windows, text_tokens, window_frame

EvidenceMethod = Literal["label_attention", "attention_gradient", "gradient"]
METHODS: tuple[EvidenceMethod, ...] = ("label_attention", "attention_gradient", "gradient")
SEGMENTS_AT_A_TIME = 8
STATE_BUDGET = 2**26
"""Numbers in the gradients of the states that are held at once (256 MiB in fp32); at least those of one code."""
_PER_LABEL = {"label_vectors", "output.weight", "output.bias", "weight", "bias"}
"""Parameters of the heads that have a row for each label."""


class NoteEvidence(NamedTuple):
    """What codes looked at in one note, as [`top_spans`] takes it row by row.

    Attributes:
        weights: (labels, tokens) float32, not negative; those of label attention sum to 1 over the tokens.
        offsets: (tokens, 2) int64 characters `[start, end)` of the original text; (-1, -1) for special tokens.
    """

    weights: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, eq=False)
class NoteSegments:
    """Notes as a model reads them.

    Attributes:
        input_ids: (segments, length) int64, padded on the right.
        attention_mask: (segments, length) int64, 1 for tokens.
        note_index: (segments,) int64, the note of each segment.
        offsets: (tokens, 2) int64 of all tokens but padding, as in [`NoteEvidence`].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    note_index: torch.Tensor
    offsets: np.ndarray


def segment_texts(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> NoteSegments:
    """Cuts notes into the segments that `model` reads; an empty note is one segment of special tokens.

    A segment has `max_length` tokens, those of training by default (`tokenizer.model_max_length`), and of a note the
    first `config.max_segments` are read, all where that is `None`.

    Raises:
        ValueError: `max_length` is more than the model takes or leaves no room for text, or the tokenizer is slow.
    """
    limit = longest_segment(model)
    if max_length is not None and max_length > limit:
        raise ValueError(f"`max_length` must be at most {limit}, what the model reads at once, got {max_length}.")
    frame = window_frame(tokenizer, segment_length(model, tokenizer) if max_length is None else max_length)
    # Half of a surrogate pair is no character and has no UTF-8; what takes its place is as long.
    readable = [text.encode("utf-8", "replace").decode() for text in texts]
    windows = cut_windows(text_tokens(readable, tokenizer), frame)
    most = getattr(model.config, "max_segments", None)
    kept = np.ones(len(windows.texts), bool) if most is None else windows.segments < most
    lengths = np.diff(windows.borders)
    read = np.repeat(kept, lengths)
    mask = np.arange(lengths[kept].max(initial=0)) < lengths[kept, None]
    grid = np.full(mask.shape, tokenizer.pad_token_id or 0, np.int64)
    grid[mask] = windows.ids[read]
    return NoteSegments(
        torch.from_numpy(grid),
        torch.from_numpy(mask.astype(np.int64)),
        torch.from_numpy(windows.texts[kept]),
        np.stack([windows.starts[read], windows.ends[read]], axis=1).astype(np.int64),
    )


class EncodedNotes:
    """Notes behind the encoder: their probabilities, and the evidence of any code without encoding them again.

    Args:
        model: An `EhrBertForICDCoding` in evaluation mode.
        segments: From [`segment_texts`].
        batch_size: Segments that are encoded at a time.
    """

    def __init__(self, model: Any, segments: NoteSegments, batch_size: int = SEGMENTS_AT_A_TIME):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model, self.segments = model, segments
        self.mask, self.note_index = segments.attention_mask.to(model.device), segments.note_index.to(model.device)
        rows = range(0, len(segments.input_ids), batch_size)
        self.batches = [slice(start, start + batch_size) for start in rows]
        with torch.no_grad():
            ids = segments.input_ids.to(model.device)
            self.states = torch.cat([self._encode(part, ids=ids[part]) for part in self.batches])

    def probabilities(self, label_ids: Sequence[int] | None = None) -> np.ndarray:
        """Float32 (notes, labels) of the given labels, of all by default."""
        with torch.no_grad():
            logits = self._coded(self.states, label_ids)["logits"]
        return logits.float().sigmoid().cpu().numpy()

    def evidence(self, method: EvidenceMethod, label_ids: Sequence[int]) -> NoteEvidence:
        """The evidence of codes, tokens of all notes end to end.

        Raises:
            ValueError: An id or the method is unknown, or the model has no label attention.
        """
        if not all(0 <= label < self.model.num_labels for label in label_ids):
            raise ValueError(
                f"`label_ids` must lie in [0, {self.model.num_labels}), got others. Look them up in `config.label2id`."
            )
        check_method(method, self.model)
        weights = torch.ones(len(label_ids), int(self.mask.sum()), device=self.mask.device)
        if method != "gradient":
            weights = weights * self._label_attention(label_ids)
        if method != "label_attention":
            weights = weights * self._input_gradients(label_ids)
        return NoteEvidence(weights.cpu().numpy(), self.segments.offsets)

    def _encode(self, part: slice, ids: torch.Tensor | None = None, embeddings: torch.Tensor | None = None):
        """States of some segments from their ids or embeddings, (segments, length, hidden)."""
        return self.model.encode(ids, self.mask[part], None, None, None, embeddings).last_hidden_state

    def _coded(self, states: torch.Tensor, label_ids: Sequence[int] | None, attention: bool = False) -> dict[str, Any]:
        """What the head makes of states for some labels alone: the cost is theirs, whatever the size of the label set.

        Returns:
            `logits` (notes, labels); with `attention` also `label_attentions` (segments, labels, length).
        """
        rows, wanted = {}, None
        if label_ids is not None:
            index = torch.as_tensor(list(label_ids), dtype=torch.long, device=states.device)
            parameters = dict(self.model.head.named_parameters())
            rows = {f"model.head.{name}": parameters[name][index] for name in _PER_LABEL & set(parameters)}
            wanted = range(len(index)) if attention else None
        return torch.func.functional_call(_Head(self.model), rows, (states, self.mask, self.note_index, wanted))

    def _label_attention(self, label_ids: Sequence[int]) -> torch.Tensor:
        """(labels, tokens)."""
        with torch.no_grad():
            weights = self._coded(self.states, label_ids, attention=True)["label_attentions"]
        return weights.transpose(0, 1)[:, self.mask.bool()]

    def _input_gradients(self, label_ids: Sequence[int]) -> torch.Tensor:
        """‖x ⊙ ∂z/∂x‖₂, (labels, tokens), a few labels at a time."""
        step = max(1, STATE_BUDGET // self.states.numel())
        groups = [label_ids[start : start + step] for start in range(0, len(label_ids), step)]
        rows = [self._of_group(group)[:, self.mask.bool()] for group in groups]
        return torch.cat(rows) if rows else torch.ones(0, 1, device=self.mask.device)

    @torch.enable_grad()
    def _of_group(self, label_ids: Sequence[int]) -> torch.Tensor:
        """The same as (labels, segments, length): by the chain rule, first to the states, then to the embeddings."""
        states = self.states.detach().requires_grad_()
        logits = self._coded(states, label_ids)["logits"].sum(dim=0)  # a token belongs to one note
        upstream = [torch.autograd.grad(logit, states, retain_graph=True)[0] for logit in logits]
        parts = []
        for part in self.batches:
            ids = self.segments.input_ids[part].to(states.device)
            inputs = self.model.get_input_embeddings()(ids).detach().requires_grad_()
            outputs = self._encode(part, embeddings=inputs)
            gradients = [torch.autograd.grad(outputs, inputs, row[part], retain_graph=True)[0] for row in upstream]
            parts.append(torch.stack([(inputs * row).detach().float().norm(dim=-1) for row in gradients]))
        return torch.cat(parts, dim=1)


class _Head(nn.Module):
    """The head of a model as a module of its own, so that parameters can be replaced for one call."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, states, mask, note_index, label_ids):
        return self.model.code(states, mask, None, None, note_index, None, None, label_ids)


def check_method(method: str, model: Any) -> None:
    """Refuses a method that does not exist or that the model cannot give.

    Raises:
        ValueError: There is no such method, or the model has no label attention.
    """
    if method not in METHODS:
        raise ValueError(f"`evidence` must be one of {', '.join(METHODS)}, got {method!r}.")
    if method != "gradient" and model.config.head != "xml":
        raise ValueError(
            f"`evidence` must be 'gradient' with `head='cls'`, which has no label attention, got {method!r}."
        )

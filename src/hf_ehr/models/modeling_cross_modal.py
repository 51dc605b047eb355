"""Cross-modal attention of MedM-PLM (Eq 6-7): a vector of one modality looks at the tokens of the other."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init


class CrossModalAttention(nn.Module):
    """`softmax(W_q q (W_k K)ᵀ / √d_q) (W_v V)`, one head, without dropout, output layer or norm.

    There is one query for many keys, so `W_k` is pushed to its side, `(W_q q)ᵀ W_k K`, and `W_v` behind the sum: the
    tokens themselves are never projected. `W_k` is therefore no layer that an adapter could wrap.

    Args:
        query_size: Width of the query and of the output.
        key_size: Width of the tokens.
    """

    def __init__(self, query_size: int, key_size: int):
        super().__init__()
        self.query = nn.Linear(query_size, query_size)
        self.key_weight = nn.Parameter(torch.empty(query_size, key_size))
        self.key_bias = nn.Parameter(torch.empty(query_size))
        self.value = nn.Linear(key_size, query_size)

    def forward(self, queries, tokens, there) -> tuple[torch.Tensor, torch.Tensor]:
        """Looks.

        Args:
            queries: (rows, query_size).
            tokens: (rows, tokens, key_size).
            there: (rows, tokens) bool, False on padding.

        Returns:
            (rows, query_size), and the weights (rows, tokens) in fp32: 0 on padding, elsewhere summing to 1. Both are
            0 where there is nothing to look at.
        """
        queries = self.query(queries)
        pushed = queries @ self.key_weight.to(queries.dtype)
        scores = torch.einsum("rk,rnk->rn", pushed, tokens.to(pushed.dtype))
        scores = scores.float() + (queries * self.key_bias).sum(dim=1, keepdim=True).float()
        scores = scores * queries.shape[1] ** -0.5
        weights = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(dim=1) * there
        mixed = torch.einsum("rn,rnk->rk", weights.to(tokens.dtype), tokens)
        return self.value(mixed) * there.any(dim=1, keepdim=True), weights


class CodeSets(NamedTuple):
    """The sets of codes of one kind beside the notes of a batch."""

    pooled: torch.Tensor
    """(notes, hidden), the state of `[CLS]`."""
    states: torch.Tensor
    """(notes, codes, hidden)."""
    there: torch.Tensor
    """(notes, codes) bool."""


class NoteStates(NamedTuple):
    """The notes of a batch."""

    rows: torch.Tensor
    """(notes,): the visits that have one."""
    pooled: torch.Tensor
    """(notes, note_size)."""
    states: torch.Tensor
    """(notes, tokens, note_size)."""
    tokens: torch.Tensor
    """(notes, tokens) bool."""


class Fused(NamedTuple):
    """What a kind of code and a note have become in each other's light."""

    codes: torch.Tensor
    """(notes, hidden), R_code."""
    text: torch.Tensor
    """(notes, note_size), R_text."""
    code_weights: torch.Tensor | None = None
    """(notes, tokens): what the codes looked at."""
    text_weights: torch.Tensor | None = None
    """(notes, codes): what the note looked at."""


class CrossModal(nn.Module):
    """One kind of code and the notes, each in the light of the other.

    `text_only`: the note looks at the codes (its own vector is not added), the codes at nothing. `cross`: both look.
    `cross_residual`: both look, and their own vectors are added (Eq 6-7). With nothing to look at a vector stays as it
    was, and a visit without codes keeps 0 for them.
    """

    def __init__(self, mode: str, code_size: int, note_size: int):
        super().__init__()
        self.residual = mode == "cross_residual"
        self.code_queries = None if mode == "text_only" else CrossModalAttention(code_size, note_size)
        self.text_queries = CrossModalAttention(note_size, code_size)

    def forward(self, codes: CodeSets, notes: NoteStates) -> Fused:
        """Row for row."""
        both = codes.there.any(dim=1, keepdim=True)
        text, text_weights = self.text_queries(notes.pooled, codes.states, codes.there)
        text = torch.where(both, text + notes.pooled if self.residual else text, notes.pooled)
        if self.code_queries is None:
            return Fused(codes.pooled, text, None, text_weights)
        # The paper's code adds in place, so that its note reads codes that have read the note; here neither has.
        state, code_weights = self.code_queries(codes.pooled, notes.states, notes.tokens)
        state = torch.where(both, state + codes.pooled if self.residual else state, codes.pooled)
        return Fused(state, text, code_weights * both, text_weights)


@torch.no_grad()
def init_cross_modal(module: nn.Module) -> None:
    """PyTorch's own start of a linear layer, for `_init_weights`."""
    if isinstance(module, CrossModalAttention):
        for layer in (module.query, module.value):
            bound = layer.in_features**-0.5
            init.uniform_(layer.weight, -bound, bound)
        bound = module.key_weight.shape[1] ** -0.5
        init.uniform_(module.key_weight, -bound, bound)
        init.zeros_(module.key_bias)

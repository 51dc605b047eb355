"""Masked-code prediction over sets of codes (MedHMP, Eq 8-9): what is hidden, what is seen, and three losses."""

from typing import NamedTuple

import torch
from torch import nn


class MaskedCodes(NamedTuple):
    """The codes of admissions over the vocabulary."""

    hidden: torch.Tensor
    """(admissions, vocabulary) bool: what is to be predicted."""
    visible: torch.Tensor
    """(admissions, vocabulary) bool: what the model was shown."""

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor, vocab_size: int, pad_token_id: int) -> "MaskedCodes":
        """From ids (admissions, codes) and `mask` of that shape, True on what is hidden.

        A code that stands twice in an admission is hidden where it is hidden each time.
        """
        codes = ids != pad_token_id
        visible = indicators(ids, codes & ~mask, vocab_size)
        return cls(indicators(ids, codes & mask, vocab_size) & ~visible, visible)


def indicators(ids: torch.Tensor, keep: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Which codes an admission has, (admissions, vocab_size) bool; `ids` and `keep` are (admissions, codes)."""
    counts = torch.zeros(len(ids), vocab_size, dtype=torch.int32, device=ids.device)
    return counts.scatter_add_(1, ids, keep.int()) > 0


def masked_code_losses(
    logits: torch.Tensor,
    codes: MaskedCodes,
    pad_token_id: int,
    loss: str = "bce",
    reduction: str = "mean",
    pos_weight: float | None = None,
) -> torch.Tensor:
    """The loss of each admission; the padding is no code and never counts.

    Args:
        logits: (admissions, vocabulary).
        codes: What is hidden and what is visible.
        pad_token_id: Id that is no code.
        loss: `bce`: binary cross-entropy to the hidden codes, over those that are not visible. `mse_indicator`:
            squared error of the probabilities to the hidden codes, over all (Eq 9). `mse_masked`: over the hidden
            ones.
        reduction: `mean` over the codes that the loss goes over, or their `sum`.
        pos_weight: Factor of the hidden codes under `bce`.

    Returns:
        (admissions,) in fp32; 0 for one over no codes.
    """
    logits, target = logits.float(), codes.hidden.float()
    if loss == "bce":
        weight = None if pos_weight is None else logits.new_tensor(pos_weight)
        cells = nn.functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
        counted = ~codes.visible
    else:
        cells = (logits.sigmoid() - target).square()
        counted = torch.ones_like(codes.visible) if loss == "mse_indicator" else codes.hidden.clone()
    counted[:, pad_token_id] = False
    total = (cells * counted).sum(dim=1)
    return total if reduction == "sum" else total / counted.sum(dim=1).clamp(min=1)


def checked_masks(ids, masks, pads) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks of diagnoses and medications, (admissions, codes) bool; where there are no codes none is needed.

    Raises:
        ValueError: A mask is missing, or not of the shape of its ids.
    """
    checked = []
    for kind, given, mask, pad in zip(("diagnosis", "medication"), ids, masks, pads, strict=True):
        if mask is None and not (given != pad).any():
            mask = torch.zeros_like(given, dtype=torch.bool)
        if mask is None or mask.shape != given.shape:
            shape = None if mask is None else tuple(mask.shape)
            raise ValueError(
                f"`{kind}_mask` must have the shape {tuple(given.shape)} of `{kind}_ids`, got {shape}. Draw which "
                "codes are hidden in the collator, or set `masked_code_weight=0`."
            )
        checked.append(mask.bool())
    return checked[0], checked[1]

"""Sets of codes of visits → part of them masked, for the pre-training of G-BERT and MedM-PLM."""

from __future__ import annotations

from typing import Any

import numpy as np

from .collators import IGNORED, _Masking


class CodeSetMasking(_Masking):
    """Masks some codes of each set: 80 % become ``[MASK]``, 10 % a code of the same vocabulary, 10 % stay (MedM-PLM).

    Of n codes ``round(probability × n)`` are chosen, at least one and at most ``most``; the authors draw them once for
    all epochs, here each batch draws anew. Diagnoses and medications have a masking each, so that none is replaced by
    a code of the other kind, as in G-BERT's code.

    Args:
        tokenizer: Of one kind of code; gives the mask, the special ids and the size of the vocabulary.
        probability: Share of the codes that are chosen.
        most: Most codes of a set that are chosen.
        seed: Seed of the choices.

    Raises:
        ValueError: The probability is out of range, ``most`` is below 1, or the tokenizer has no mask or no code.
    """

    mask_share, random_share = 0.8, 0.1

    def __init__(self, tokenizer: Any, probability: float = 0.15, most: int = 20, seed: int = 0):
        super().__init__(tokenizer, probability, seed)
        if most < 1:
            raise ValueError(f"`most` must be at least 1, got {most}. Change it.")
        if tokenizer.mask_token_id is None:
            raise ValueError("`tokenizer` must have a mask token, got None. Use `EhrCodeTokenizer.from_codes`.")
        self.most, self.mask_id = most, tokenizer.mask_token_id

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks a batch.

        Args:
            ids: (…, codes) int64, padded.

        Returns:
            What the model is shown, and the labels: the true id where a code was chosen, -100 elsewhere. Both (…,
            codes) int64. A set without codes has no label.
        """
        generator = self.generator(None)
        eligible = self.is_code[ids]
        number = eligible.sum(axis=-1, keepdims=True)
        wanted = np.minimum(np.rint(self.probability * number).clip(1, self.most), number)
        draw = np.where(eligible, generator.random(ids.shape), 2.0)
        chosen = draw.argsort(axis=-1).argsort(axis=-1) < wanted
        action = generator.random(ids.shape)
        other = self.codes[generator.integers(len(self.codes), size=ids.shape)]
        swapped = chosen & (action >= self.mask_share) & (action < self.mask_share + self.random_share)
        shown = np.where(chosen & (action < self.mask_share), self.mask_id, np.where(swapped, other, ids))
        return shown, np.where(chosen, ids, IGNORED)

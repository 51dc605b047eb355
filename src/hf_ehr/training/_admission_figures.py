"""What stage 2 of MedHMP learned, on admissions that were held out, beside guessing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hf_ehr.models.any_encoder import evaluating
from hf_ehr.models.modeling_contrastive import ContrastiveViews
from hf_ehr.models.modeling_masked_codes import MaskedCodes, masked_code_losses
from hf_ehr.models.modeling_medhmp import MedHMPForAdmissionPreTraining
from hf_ehr.models.processing_medhmp import MedHMPProcessor
from hf_ehr.stay_collators import CODES, AdmissionCollator, code_hiding
from hf_ehr.training._notes import flat_column
from hf_ehr.training.stays import loader_of

if TYPE_CHECKING:
    import datasets

HIDDEN_SHARE = 0.15
"""Of the codes of an admission, under the masked-code loss (Eq 8)."""
TOP_CODES = 10
"""k of recall at k."""
ADMISSIONS_AT_A_TIME = 256
"""Admissions that are compared with each other."""


def held_out_admissions(
    model: MedHMPForAdmissionPreTraining,
    validation: datasets.Dataset,
    train: datasets.Dataset,
    processor: MedHMPProcessor,
) -> dict[str, float]:
    """How well hidden codes and matching modalities of admissions are found that were not trained on.

    Codes are hidden as in training, always the same ones. Admissions are compared in groups of
    `ADMISSIONS_AT_A_TIME`, in the order of the examples.

    Returns:
        Means over admissions and both kinds of codes: `masked_code_loss`, binary cross-entropy in nats over the codes
        that are not visible, and `recall_at_10`, the share of hidden codes among the ten likeliest that are not
        visible; `frequency_loss` and `frequency_recall_at_10`, the same of guessing by the shares of training
        admissions. Over modalities that have another beside them: `contrastive_accuracy`, how often the admission
        without the modality that is nearest to it is its own, and `contrastive_chance` of a blind guess. What a weight
        of 0 left untrained, or what nothing was found for, is left out.
    """
    collate = AdmissionCollator.for_model(model.config, validation.column_names)
    collate.hiding = code_hiding(processor.code_tokenizers, HIDDEN_SHARE, 0)
    rates = {name: _hidden_rates(train, column, processor.code_tokenizers[name]) for name, column in CODES.items()}
    sums: dict[str, list[torch.Tensor]] = {}
    for batch in loader_of(validation, collate, ADMISSIONS_AT_A_TIME):
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        with torch.no_grad(), evaluating(model):
            for name, value in _figures(model, inputs, rates):
                sums.setdefault(name, []).append(value.cpu())
    means = {name: torch.cat(parts) for name, parts in sums.items()}
    return {name: float(values.mean()) for name, values in means.items() if len(values)}


def _figures(model: MedHMPForAdmissionPreTraining, inputs: dict[str, torch.Tensor], rates: dict[str, torch.Tensor]):
    """Names of figures and their values, (what they are a mean over,)."""
    encoded = model.medhmp.encode(**inputs)
    if model.config.contrastive_weight:
        yield from _matches(model.contrastive_views(encoded))
    if not model.config.masked_code_weight:
        return
    logits = model.masked_codes(encoded, inputs["diagnosis_mask"], inputs["medication_mask"]).logits
    for (name, column), scores in zip(CODES.items(), logits, strict=True):
        pad = getattr(model.config, f"{name}_pad_token_id")
        codes = MaskedCodes.of(inputs[column], inputs[f"{name}_mask"], scores.shape[1], pad)
        for prefix, guess in (
            ("", scores.float()),
            ("frequency_", rates[name].to(scores.device).expand(scores.shape)),
        ):
            losses = masked_code_losses(guess, codes, pad)
            yield f"{prefix or 'masked_code_'}loss", losses[(inputs[column] != pad).any(dim=1)]
            yield f"{prefix}recall_at_{TOP_CODES}", _recall(guess, codes, pad)


def _recall(scores: torch.Tensor, codes: MaskedCodes, pad: int) -> torch.Tensor:
    """Share of the hidden codes among the likeliest, (admissions with a hidden code,)."""
    scores = scores.masked_fill(codes.visible, -torch.inf)
    scores[:, pad] = -torch.inf
    top = scores.topk(min(TOP_CODES, scores.shape[1]), dim=1).indices
    hidden = codes.hidden.sum(dim=1)
    found = codes.hidden.gather(1, top).sum(dim=1)
    return (found / hidden)[hidden > 0]


def _matches(views: ContrastiveViews):
    """Whether each anchor's nearest key is its own, and the chance of that."""
    queries, fused = (nn.functional.normalize(part.float(), dim=-1) for part in views[:2])
    for column in range(views.anchors.shape[1]):
        anchors, keys = views.anchors[:, column], views.keys[:, column]
        similarities = (queries[:, column] @ fused[:, column].t()).masked_fill(~keys, -torch.inf)
        own = torch.arange(len(keys), device=keys.device)
        yield "contrastive_accuracy", (similarities.argmax(dim=1) == own)[anchors].float()
        yield "contrastive_chance", (1 / keys.sum().clamp(min=1)).expand(int(anchors.sum()))


def _hidden_rates(train: datasets.Dataset, column: str, tokenizer: Any) -> torch.Tensor:
    """Log odds, (vocabulary,), that a code is hidden in an admission where it is not visible, if all are alike."""
    share = (np.bincount(flat_column(train, column), minlength=len(tokenizer)) + 0.5) / (len(train) + 1)
    rate = HIDDEN_SHARE * share / (1 - (1 - HIDDEN_SHARE) * share)
    rate[tokenizer.all_special_ids] = 1e-6  # never hidden
    return torch.from_numpy(np.log(rate / (1 - rate))).float()

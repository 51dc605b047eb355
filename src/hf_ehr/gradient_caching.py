"""Contrastive batches of any size in the memory of a chunk (gradient caching: Gao et al., RepL4NLP 2021).

    chunks ─ encode, no graph ─▶ representations of all ranks ─▶ loss ─▶ gradient of each representation
    chunks ─ encode again, same dropout, with a graph ─▶ backward from that gradient, chunk by chunk

Every admission is compared with every other of the batch, and the gradients are those of one graph over all chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import distributed

from .models.modeling_contrastive import ContrastiveViews
from .models.modeling_medhmp import MedHMPForAdmissionPreTraining


class StepLosses(NamedTuple):
    """The losses of a batch, equal on all ranks, without a graph."""

    loss: torch.Tensor
    masked_code_loss: torch.Tensor | None
    """`None` at weight 0, as the next."""
    contrastive_loss: torch.Tensor | None


def cached_step(model: Any, chunks: Sequence[Mapping[str, torch.Tensor]]) -> StepLosses:
    """Adds to the gradients of a model those of its loss over a batch that comes in chunks.

    The batch is all chunks of all ranks. After the call each rank holds the gradient of the loss over it, summed over
    the ranks: nothing is left for `DistributedDataParallel` to average, whose wrapping is looked through. A text
    encoder reads each note twice; vectors of notes made beforehand are read once.

    Args:
        model: A [`MedHMPForAdmissionPreTraining`], or its wrapper.
        chunks: Inputs of its `forward`, on its device. Each draws its dropout from a seed of its own, which comes from
            the global generator.

    Raises:
        ValueError: There is no chunk, or both losses have weight 0; and what `forward` refuses.
    """
    model = getattr(model, "module", model)
    weights = (model.config.masked_code_weight, model.config.contrastive_weight)
    if not chunks or not any(weights):
        raise ValueError(
            f"A step needs at least one chunk and a loss of weight above 0, got {len(chunks)} chunks and weights "
            f"{weights}. Set `masked_code_weight` or `contrastive_weight`."
        )
    seeds = torch.randint(2**62, (len(chunks),)).tolist()
    before = _taken_gradients(model)
    contrast, gradients = None, [None] * len(chunks)
    if weights[1]:
        contrast, gradients = _representation_gradients(model, chunks, seeds)
    rows = _sum_over_ranks(torch.stack([model.admissions_with_codes(**chunk) for chunk in chunks]).sum(dim=0))
    sums = torch.zeros(2, device=rows.device)
    for chunk, seed, gradient in zip(chunks, seeds, gradients, strict=True):
        sums += _backward(model, chunk, seed, gradient, rows)
    _add_gradients_of_all_ranks(model, before)
    masked = model.masked_code_loss(_sum_over_ranks(sums), rows) if weights[0] else None
    terms = [w * term for w, term in zip(weights, (masked, contrast), strict=True) if term is not None]
    return StepLosses(torch.stack(terms).sum(), masked, contrast)


def _representation_gradients(model: MedHMPForAdmissionPreTraining, chunks, seeds):
    """The contrastive loss of all ranks, and its gradient at (views, fused) of each chunk of this one."""
    found = []
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            with _seeded(model, seed):
                found.append(model.contrastive_views(model.medhmp.encode(**chunk)))
    views, fused, anchors, keys = (torch.cat(parts) for parts in zip(*found, strict=True))
    views, fused = views.requires_grad_(), fused.requires_grad_()
    with torch.enable_grad():
        loss = model.contrastive_loss(ContrastiveViews(*map(_from_all_ranks, (views, fused, anchors, keys))))
    if loss.requires_grad:  # there is an anchor
        loss.backward(inputs=[views, fused])
    sizes = [len(part.views) for part in found]
    pieces = (
        (torch.zeros_like(x) if x.grad is None else x.grad).mul(model.config.contrastive_weight).split(sizes)
        for x in (views, fused)
    )
    return loss.detach(), list(zip(*pieces, strict=True))


def _backward(model: MedHMPForAdmissionPreTraining, chunk, seed: int, gradient, rows) -> torch.Tensor:
    """Backward through one chunk; returns its sums (2,) of masked-code losses."""
    terms, sums = [], torch.zeros(2, device=rows.device)
    with torch.enable_grad(), _seeded(model, seed):
        encoded = model.medhmp.encode(**chunk)
        if gradient is not None:
            found = model.contrastive_views(encoded)
            terms += [(x.float() * g).sum() for x, g in zip(found[:2], gradient, strict=True)]
        if model.config.masked_code_weight:
            parts = model.masked_codes(encoded, chunk.get("diagnosis_mask"), chunk.get("medication_mask"))
            terms.append(model.config.masked_code_weight * model.masked_code_loss(parts.sums, rows))
            sums = parts.sums.detach()
    torch.stack(terms).sum().backward()
    return sums


@contextmanager
def _seeded(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Randomness from `seed`; that of the caller goes on as if nothing had been drawn."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor that every rank has in the same shape."""
    if _ranks() > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def _from_all_ranks(local: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, (all rows, …); those of this rank keep their graph. Ranks may have unequal numbers."""
    if _ranks() == 1:
        return local
    size = torch.tensor([len(local)], device=local.device)
    sizes = [torch.zeros_like(size) for _ in range(_ranks())]
    distributed.all_gather(sizes, size)
    longest = int(torch.stack(sizes).max())
    # Bytes: not every backend gathers booleans.
    padded = local.detach().new_zeros(longest, *local.shape[1:], dtype=_sent_dtype(local))
    padded[: len(local)] = local.detach()
    gathered = [torch.zeros_like(padded) for _ in range(_ranks())]
    distributed.all_gather(gathered, padded)
    rows = [x[: int(n)].to(local.dtype) for x, n in zip(gathered, sizes, strict=True)]
    rows[distributed.get_rank()] = local
    return torch.cat(rows)


def _sent_dtype(local: torch.Tensor) -> torch.dtype:
    return torch.uint8 if local.dtype == torch.bool else local.dtype


def _taken_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Takes gradients of earlier steps away, which are the ranks' sum already; none where there is one rank."""
    if _ranks() == 1:
        return {}
    before = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return before


def _add_gradients_of_all_ranks(model: torch.nn.Module, before: dict[str, torch.Tensor | None]) -> None:
    """Sums this step's gradients over the ranks, and puts those of earlier steps back."""
    for name, earlier in before.items():
        weight = model.get_parameter(name)
        if weight.grad is None:  # no chunk of this rank had a part for it
            weight.grad = torch.zeros_like(weight)
        distributed.all_reduce(weight.grad)
        if earlier is not None:
            weight.grad += earlier


__all__ = ["StepLosses", "cached_step"]

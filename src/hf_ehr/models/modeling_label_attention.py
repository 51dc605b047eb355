"""Label attention: every code looks for its own evidence among the tokens of a note (BERT-XML, Eq 2-4).

    token states h ─ norm ─┬─ keys  ──────▶ a = softmax_i⟨h_i, l_j⟩ ─▶ Σ_i a_ij W_b h_i ─▶ network ─▶ score of code j
                           └─ values W_b h ─────────────────────────────────▲

`W_b` is applied before the attention (Σ a W h = W Σ a h): fewer products, and no context of full width is ever held.
The codes go in chunks; with a loss, each chunk's gradient is made in the forward pass. Memory is that of one chunk,
whatever the number of codes.
"""

from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .modeling_ehr import PackedSequences
from .modeling_heads import Steps

SCORE_BUDGET = 2**21
"""Attention weights held at once (8 MiB in fp32), whatever the number of labels; at least one label's."""


class UnitTokens(NamedTuple):
    """The tokens that label attention reads, of all units of a batch end to end; a unit is a note or a segment."""

    steps: Steps
    """The states of the tokens, by unit."""
    places: torch.Tensor
    """(total,) int64: where each token lies in the flattened (rows, width) of the input."""
    segments: torch.Tensor
    """(total,) int64: the segment of each token."""

    @classmethod
    def of(cls, states, attention_mask, packed: PackedSequences | None, units, num_units: int) -> "UnitTokens":
        """All tokens but padding and the first of each segment, which is `[CLS]` (h_1 … h_N of the paper).

        Args:
            states: (segments, length, hidden), or (1, total, hidden) when packed.
            attention_mask: (segments, length), 1 for tokens; `None` means no padding.
            packed: The segments' borders of a packed row.
            units: (segments,) int64, ascending: the unit of each segment.
            num_units: Number of units.
        """
        places, segments = _after_the_first(states, attention_mask, packed)
        lengths = units[segments].bincount(minlength=num_units)
        borders = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        chosen = states.flatten(0, 1).index_select(0, places)
        return cls(
            Steps.of(chosen[None], packed=PackedSequences.from_cu_seqlens(borders, len(places))), places, segments
        )

    def spread(self, weights: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Weights of the units (units, labels, width) → (rows, labels, length) of the input, 0 elsewhere."""
        flat = weights.new_zeros(shape[0] * shape[1], weights.shape[1])
        values = weights.transpose(1, 2).flatten(0, 1).index_select(0, self.steps.places)
        return flat.index_copy(0, self.places, values).unflatten(0, shape).transpose(1, 2)


def _after_the_first(states, attention_mask, packed: PackedSequences | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of all tokens but each segment's first, and their segments; both (total,)."""
    keep = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if packed is not None:
        keep[0, packed.cu_seqlens[:-1].long()] = False
        places = keep[0].nonzero().squeeze(1)
        return places, packed.segment_ids[places]
    if attention_mask is not None:
        keep = attention_mask.bool()
    first = keep.int().argmax(dim=1, keepdim=True)
    places = keep.scatter(1, first, False).flatten().nonzero().squeeze(1)
    return places, places // states.shape[1]


class LabelAttentionHead(nn.Module):
    """Scores of all labels for each unit (Eq 2-4); options in [`EhrBertConfig`]."""

    def __init__(self, config, hidden_size: int, num_labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size) if config.label_attention_norm else nn.Identity()
        self.key = None if config.label_key_size is None else nn.Linear(hidden_size, config.label_key_size)
        key_size = config.label_key_size or hidden_size
        self.scale = key_size**-0.5 if config.label_attention_scale else 1.0
        self.label_vectors = nn.Parameter(torch.empty(num_labels, key_size))
        self.output: Any = None
        self.layers: Any = None
        if config.label_output == "per_label":
            self.output = nn.Linear(hidden_size, num_labels)
        else:
            sizes = [hidden_size, *config.xml_hidden_sizes, 1]
            self.layers = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(sizes)])

    @torch.no_grad()
    def init_weights(self) -> None:
        """AttentionXML's start (its `modules.py`): Xavier's uniform for label vectors and layers."""
        init.xavier_uniform_(self.label_vectors)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)

    def forward(self, tokens: UnitTokens, targets=None, unit_weights=None):
        """Scores the labels.

        Args:
            tokens: What the labels look at.
            targets: (units, labels) of 0 and 1.
            unit_weights: (units,), what each unit's cross-entropy counts; with `targets`.

        Returns:
            Scores (units, labels), and the weighted sum of the binary cross-entropies, `None` without `targets`. With
            `targets` the gradient flows through the loss alone.
        """
        inputs = self._inputs(tokens)
        per_label, shared = self._rows_and_shared()
        with torch.autocast(inputs[0].device.type, enabled=False):
            if targets is None or not torch.is_grad_enabled():
                logits = _chunked_logits(inputs, self.scale, per_label, shared)
                return logits, None if targets is None else weighted_bce(logits, targets, unit_weights)
            loss, logits = _LabelLoss.apply(
                *inputs, self.scale, targets, unit_weights, len(per_label), *per_label, *shared
            )
        return logits, loss

    @torch.no_grad()
    def weights(self, tokens: UnitTokens, labels: torch.Tensor) -> torch.Tensor:
        """What each of the `labels` (ids) looks at: (units, labels, width), rows of units with tokens sum to 1."""
        keys, _, mask = self._inputs(tokens)
        return _weights(keys, mask, self.label_vectors[labels] * self.scale) * (mask == 0)[:, None]

    def keys(self, states: torch.Tensor) -> torch.Tensor:
        """What label vectors meet, (…, hidden) → (…, hidden or `label_key_size`)."""
        return self._project(self.norm(states))

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.key is None else torch.tanh(self.key(states))

    def _inputs(self, tokens: UnitTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values (units, width, …), and what hides padding, (units, width), in the precision of the step."""
        steps = tokens.steps
        states = self.norm(steps.states)
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        keys = self._project(states)
        values = states if self.layers is None else nn.functional.linear(states, self.layers[0].weight)
        # Half of the least number: a score added to it stays finite, and a unit without tokens gets no NaN.
        hidden = torch.finfo(dtype).min / 2
        mask = steps.rectangle(torch.zeros(len(states), dtype=dtype, device=states.device), fill=hidden)
        wide = steps.rectangle(keys.to(dtype))
        return wide, wide if values is keys else steps.rectangle(values.to(dtype)), mask

    def _rows_and_shared(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Parameters with a row for each label, and those that the labels share (all but `W_b`)."""
        if self.layers is None:
            return [self.label_vectors, self.output.weight, self.output.bias], []
        rest = [parameter for layer in self.layers[1:] for parameter in (layer.weight, layer.bias)]
        return [self.label_vectors], [self.layers[0].bias, *rest]


def _weights(keys, mask, vectors) -> torch.Tensor:
    """Attention of label vectors (labels, key) over keys (units, width, key): (units, labels, width) in fp32."""
    labels = vectors.to(keys.dtype).expand(len(keys), -1, -1)
    return torch.baddbmm(mask[:, None], labels, keys.transpose(1, 2)).softmax(dim=-1, dtype=torch.float32)


def _logits(inputs, scale: float, per_label, shared) -> torch.Tensor:
    """Scores in fp32, (units, labels), of the labels whose rows are in `per_label`."""
    keys, values, mask = inputs
    vectors, *output = per_label
    # A unit without tokens spreads its weight over padding, whose values are 0.
    contexts = torch.bmm(_weights(keys, mask, vectors * scale).to(values.dtype), values)
    if output:
        weight, bias = output
        return (contexts * weight.to(contexts.dtype)).sum(dim=-1, dtype=torch.float32) + bias.float()
    first_bias, *rest = (parameter.to(contexts.dtype) for parameter in shared)
    contexts = contexts + first_bias
    for weight, bias in zip(rest[::2], rest[1::2], strict=True):
        contexts = nn.functional.linear(contexts.relu(), weight, bias)
    return contexts.squeeze(-1).float()


def _chunks(inputs, labels: int) -> tuple[list[slice], list[slice]]:
    """Slices of the units and of the labels; any pair is within `SCORE_BUDGET`.

    About a thousand labels meet a few units at a time: narrow products are slow, and every chunk adds to the gradients
    of all its units' keys.
    """
    units, width = inputs[2].shape
    step = max(1, SCORE_BUDGET // max(1, width * 1024))
    unit_slices = [slice(start, start + step) for start in range(0, units, step)]
    step = max(1, SCORE_BUDGET // max(1, width * min(step, units)))
    return unit_slices, [slice(start, start + step) for start in range(0, labels, step)]


def _chunked_logits(inputs, scale: float, per_label, shared) -> torch.Tensor:
    """`_logits` of all labels; under autograd a chunk's weights are made again in the backward pass."""
    units, labels = _chunks(inputs, len(per_label[0]))
    rows = []
    for unit in units:
        some = tuple(tensor[unit] for tensor in inputs)
        arguments = [(some, scale, [parameter[part] for parameter in per_label], shared) for part in labels]
        if torch.is_grad_enabled() and len(units) * len(labels) > 1:
            scores = [checkpoint(_logits, *one, use_reentrant=False) for one in arguments]
        else:
            scores = [_logits(*one) for one in arguments]
        rows.append(torch.cat(scores, dim=1))
    return torch.cat(rows)


def weighted_bce(logits, targets, unit_weights) -> torch.Tensor:
    """Binary cross-entropy summed over labels, then over units by their weights (units,); scalar in fp32."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return (losses.sum(dim=1) * unit_weights).sum()  # a matrix product would fall to half precision under autocast


class _LabelLoss(torch.autograd.Function):
    """Loss and scores of all labels; the gradients are made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, keys, values, mask, scale, targets, unit_weights, num_per_label, *parameters):
        per_label, shared = parameters[:num_per_label], parameters[num_per_label:]
        inputs, loss = (keys, values, mask), keys.new_zeros((), dtype=torch.float32)
        # Sums over chunks are kept in fp32: hundreds of small terms would be lost in half precision.
        tensors = (keys, values, *parameters)
        totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
        logits = keys.new_empty(len(keys), len(per_label[0]), dtype=torch.float32)
        units, labels = _chunks(inputs, len(per_label[0]))
        for unit, part in product(units, labels):
            slices = [unit, unit, *[part] * num_per_label, *[slice(None)] * len(shared)]
            leaves = [tensor[rows].detach().requires_grad_() for tensor, rows in zip(tensors, slices, strict=True)]
            own, common = leaves[2 : 2 + num_per_label], leaves[2 + num_per_label :]
            with torch.enable_grad():
                scores = _logits((*leaves[:2], mask[unit]), scale, own, common)
                chunk_loss = weighted_bce(scores, targets[unit, part], unit_weights[unit])
            gradients = torch.autograd.grad(chunk_loss, leaves)
            for total, rows, gradient in zip(totals, slices, gradients, strict=True):
                total[rows] += gradient
            loss += chunk_loss.detach()
            logits[unit, part] = scores.detach()
        ctx.save_for_backward(*[total.to(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)])
        ctx.mark_non_differentiable(logits)
        return loss, logits

    @staticmethod
    def backward(ctx, scale, _):
        # The buffers are ours alone: scaling in place keeps the gradient of all labels from being held twice.
        keys, values, *parameters = (gradient.mul_(scale.to(gradient.dtype)) for gradient in ctx.saved_tensors)
        return keys, values, None, None, None, None, None, *parameters

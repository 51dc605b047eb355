"""What every encoder of the package shares: attention over padded or packed patients, pooling, masked-row loss.

Packed means: the codes of all patients of a batch in one row `(1, total)`, borders in `cu_seqlens` `(patients + 1,)`.
Nothing is paid for padding, and no patient sees another.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:  # torch >= 2.10 ships variable-length flash attention for CUDA
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


class PackedSequences(NamedTuple):
    """Where each patient lies in a packed row."""

    cu_seqlens: torch.Tensor
    """(patients + 1,) int32: patient i owns the slots [cu_seqlens[i], cu_seqlens[i + 1])."""
    max_seqlen: int
    segment_ids: torch.Tensor
    """(total,) int64: the patient of each slot."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, total: int, max_seqlen: int | None = None) -> "PackedSequences":
        """Checks the borders and derives the rest.

        Raises:
            ValueError: The borders do not start at 0 or do not end at the length of the row.
        """
        lengths = cu_seqlens.diff()
        if not torch.compiler.is_compiling() and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total):
            raise ValueError(
                f"`cu_seqlens` must run from 0 to the packed length {total}, got {int(cu_seqlens[0])} to "
                f"{int(cu_seqlens[-1])}. Build the batch with `PackedCollator`."
            )
        patients = torch.arange(len(lengths), device=lengths.device)
        segment_ids = torch.repeat_interleave(patients, lengths, output_size=total)
        return cls(cu_seqlens, int(lengths.max()) if max_seqlen is None else max_seqlen, segment_ids)

    def positions(self) -> torch.Tensor:
        """(total,) int64: the running index of each slot within its patient."""
        total = len(self.segment_ids)
        return torch.arange(total, device=self.segment_ids.device) - self.cu_seqlens[self.segment_ids]

    def runs(self) -> list[tuple[int, int]]:
        """Consecutive patients of equal length as (patients, length): each run is one dense attention problem."""
        runs: list[list[int]] = []
        for length in self.cu_seqlens.diff().tolist():
            if runs and runs[-1][1] == length:
                runs[-1][0] += 1
            else:
                runs.append([1, length])
        return [(patients, length) for patients, length in runs]


def packed_borders(codes, attention_mask, cu_seqlens, max_seqlen) -> PackedSequences | None:
    """The borders of a packed batch, `None` for a padded one; `codes` is any tensor (batch, sequence, …) of it.

    Raises:
        ValueError: There is a mask as well, or more than one row.
    """
    if cu_seqlens is None:
        return None
    if attention_mask is not None or codes.shape[0] != 1:
        raise ValueError(
            "`cu_seqlens` means packed input: one row (1, total) and no `attention_mask`, got "
            f"{tuple(codes.shape)} and {'a' if attention_mask is not None else 'no'} mask."
        )
    return PackedSequences.from_cu_seqlens(cu_seqlens, codes.shape[1], max_seqlen)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Textbook attention that returns its weights; tensors are (batch, heads, sequence, head_dim)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def packed_attention(qkv, packed: PackedSequences, runs, scaling: float, dropout: float) -> torch.Tensor:
    """Attention within each patient of a packed row.

    Args:
        qkv: (total, 3, heads, head_dim).
        packed: The patients' borders.
        runs: `packed.runs()`, or `None` where a variable-length kernel takes the borders themselves.
        scaling: Factor of the scores.
        dropout: Dropout of the attention probabilities.

    Returns:
        (total, heads, head_dim).
    """
    if runs is None:
        query, key, value = qkv.unbind(1)
        borders = (packed.cu_seqlens, packed.cu_seqlens, packed.max_seqlen, packed.max_seqlen)
        return varlen_attn(query, key, value, *borders, scale=scaling)  # type: ignore[return-value]
    _, _, heads, head_dim = qkv.shape
    outputs = []
    # One split (its backward is one concatenation); slicing would zero a full-size gradient for each run.
    for (patients, length), chunk in zip(runs, qkv.split([n * length for n, length in runs]), strict=True):
        query, key, value = chunk.view(patients, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
        outputs.append(attended.transpose(1, 2).reshape(patients * length, heads, head_dim))
    return torch.cat(outputs)


class IdentityStartLinear(nn.Linear):
    """A projection whose last rows start as the identity times `gain`, unless that is 0 (config `attention_gain`)."""

    gain: float = 0.0

    def identity_start(self) -> torch.Tensor:
        """The weight with its last rows replaced, (out, in)."""
        identity = torch.eye(self.in_features, device=self.weight.device, dtype=self.weight.dtype)
        return torch.cat([self.weight[: -self.in_features], self.gain * identity])


class EhrAttention(nn.Module):
    """Multi-head self-attention with one fused projection; bidirectional."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv = IdentityStartLinear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = IdentityStartLinear(config.hidden_size, config.hidden_size)
        if config.attention_gain is not None:
            self.qkv.gain, self.out_proj.gain = config.attention_gain, 1.0

    def forward(self, hidden_states, attention_mask=None, packed=None, runs=None, **kwargs):
        """(batch, sequence, hidden) → the same shape, and the attention weights where the implementation has them."""
        shape = hidden_states.shape[:-1]
        qkv = self.qkv(hidden_states).view(*shape, 3, self.num_heads, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        if packed is not None:
            attended, weights = packed_attention(qkv[0], packed, runs, self.scaling, dropout), None
        else:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            attended, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return self.out_proj(attended.reshape(*shape, -1)), weights


class EhrLayer(GradientCheckpointingLayer):
    """Attention and feed-forward with residuals; `config.norm_position` is BERT's `post` or `pre`."""

    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention = EhrAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def feed_forward(self, hidden_states):
        """(…, hidden) → (…, hidden)."""
        return self.output(self.activation(self.intermediate(hidden_states)))

    def forward(self, hidden_states, attention_mask=None, packed=None, runs=None, **kwargs):
        """(batch, sequence, hidden) → the same shape."""
        if self.pre_norm:
            attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, packed, runs, **kwargs)
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self.dropout(self.feed_forward(self.output_norm(hidden_states)))
        attended, _ = self.attention(hidden_states, attention_mask, packed, runs, **kwargs)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        return self.output_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))


class EhrEncoder(nn.Module):
    """A stack of layers that chooses the attention path once per forward."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([EhrLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.norm_position == "pre"
            else nn.Identity()
        )
        self.gradient_checkpointing = False

    def forward(self, hidden_states, attention_mask=None, packed=None, **kwargs):
        """(batch, sequence, hidden) → the same shape; `attention_mask` (batch, sequence) for padded input."""
        arguments = self.attention_arguments(hidden_states, attention_mask, packed)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **arguments, **kwargs)
        return self.final_norm(hidden_states)

    def attention_arguments(self, hidden_states, attention_mask, packed: PackedSequences | None) -> dict:
        """What the layers need: a library mask for padded input, borders for packed input."""
        implementation = self.config._attn_implementation
        mask_inputs = {"config": self.config, "inputs_embeds": hidden_states}
        if packed is None:
            return {"attention_mask": create_bidirectional_mask(attention_mask=attention_mask, **mask_inputs)}
        if implementation == "sdpa":
            return {"packed": packed, "runs": None if self._has_varlen_kernel(hidden_states) else packed.runs()}
        if "flash" in implementation:
            borders, longest = packed.cu_seqlens, packed.max_seqlen
            names = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            return names | {"max_length_q": longest, "max_length_k": longest}
        # eager and flex: a block-diagonal mask. Without it the library lets packed patients attend to each other.
        same_patient = packed_sequence_mask_function(packed.segment_ids[None])
        mask = create_bidirectional_mask(attention_mask=None, and_mask_function=same_patient, **mask_inputs)
        return {"attention_mask": mask}

    def _has_varlen_kernel(self, hidden_states) -> bool:
        """CUDA in half precision without attention dropout, which the kernel does not take."""
        if varlen_attn is None or not hidden_states.is_cuda:
            return False
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden_states.dtype
        dropout = self.config.attention_probs_dropout_prob if self.training else 0
        return dtype in (torch.float16, torch.bfloat16) and not dropout


def pool_states(states, mode: str, attention_mask=None, packed: PackedSequences | None = None) -> torch.Tensor:
    """One vector per patient.

    Args:
        states: (batch, sequence, hidden), or (1, total, hidden) when packed.
        mode: `mean` and `sum` over the patient's codes, `first` code, or `sum_unmasked` (padding included).
        attention_mask: (batch, sequence), 1 for codes; `None` means no padding.
        packed: The patients' borders of a packed row.

    Returns:
        (patients, hidden).
    """
    if packed is not None:
        return _pool_packed(states[0], mode, packed)
    if attention_mask is None:
        attention_mask = torch.ones(states.shape[:2], device=states.device, dtype=torch.long)
    if mode == "first":
        first = attention_mask.int().argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), first]
    if mode == "sum_unmasked":
        return states.sum(dim=1)
    weights = attention_mask.to(states.dtype).unsqueeze(-1)
    total = (states * weights).sum(dim=1)
    return total if mode == "sum" else total / weights.sum(dim=1).clamp(min=1)


def _pool_packed(states, mode: str, packed: PackedSequences) -> torch.Tensor:
    """`pool_states` for a packed row: states (total, hidden) → (patients, hidden)."""
    if mode == "first":
        return states[packed.cu_seqlens[:-1].long()]
    lengths = packed.cu_seqlens.diff()
    total = states.new_zeros(len(lengths), states.shape[-1]).index_add(0, packed.segment_ids, states)
    return total / lengths.clamp(min=1).to(states.dtype)[:, None] if mode == "mean" else total


class EhrPredictionHead(nn.Module):
    """BERT's masked-code head: dense, activation, norm, decoder (tied to the code embeddings by the model)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def transform(self, states):
        """(…, hidden) → (…, hidden)."""
        return self.norm(self.activation(self.dense(states)))

    def forward(self, states):
        """(…, hidden) → scores (…, vocab)."""
        return self.decoder(self.transform(states))

    def loss(self, states, targets) -> torch.Tensor:
        """Summed cross-entropy of `targets` (rows,) or (rows, k) given `states` (rows, hidden); -100 is no target."""
        return linear_cross_entropy(self.transform(states), self.decoder.weight, self.decoder.bias, targets)

    def masked_loss(self, states, labels, num_items=None) -> torch.Tensor:
        """Cross-entropy over the masked rows of states (rows, length, hidden); the mean when there is no count."""
        rows = (labels.flatten() != -100).nonzero().squeeze(1)
        targets = labels.flatten()[rows]
        loss = self.loss(states.flatten(0, 1).index_select(0, rows), targets)
        return loss / (max(len(targets), 1) if num_items is None else num_items)


LOGIT_BUDGET = 2**24
"""Scores held at once by `linear_cross_entropy` (64 MiB in fp32), whatever the vocabulary or the batch."""


def linear_cross_entropy(states, weight, bias, targets) -> torch.Tensor:
    """Cross-entropy of `states @ weight.T + bias`, summed over targets, without holding all scores.

    The rows go in chunks, and each chunk's gradient is made in the forward pass: no score survives its chunk.

    Args:
        states: (rows, hidden).
        weight: (vocab, hidden).
        bias: (vocab,).
        targets: (rows,), or (rows, k) for several targets a row; -100 is no target.

    Returns:
        Scalar in fp32, 0 when there is no target.
    """
    targets = targets[:, None] if targets.ndim == 1 else targets
    return _LinearCrossEntropy.apply(states, weight, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets):
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        with torch.autocast(device, enabled=False):
            loss, gradients = _chunked_loss(states, weight, bias, targets, dtype, any(ctx.needs_input_grad))
        if gradients is not None:
            ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale):
        states, weight, bias = ctx.saved_tensors
        # The buffers are ours alone: scaling in place keeps the vocabulary-sized gradient from being held twice.
        return states.mul_(scale.to(states.dtype)), weight.mul_(scale), bias.mul_(scale), None


def _chunked_loss(states, weight, bias, targets, dtype, with_gradients: bool):
    """The loss and, if asked for, its gradients with respect to states, weight and bias."""
    inputs, weights = states.detach().to(dtype), weight.detach().to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=states.device)
    gradients = None
    if with_gradients:
        gradients = (
            torch.empty_like(states),
            torch.zeros_like(weight, dtype=torch.float32),
            torch.zeros_like(bias, dtype=torch.float32),
        )
    rows = max(1, LOGIT_BUDGET // weight.shape[0])
    for start in range(0, len(inputs), rows):
        chunk, wanted = inputs[start : start + rows], targets[start : start + rows]
        present = wanted != -100
        counts = present.sum(dim=1, keepdim=True)
        index = wanted.masked_fill(~present, 0)
        logits = torch.addmm(bias.detach().to(dtype), chunk, weights.t()).float()
        normaliser = logits.logsumexp(dim=1, keepdim=True)
        loss += ((normaliser - logits.gather(1, index)) * present).sum()
        if gradients is not None:
            scores = logits.sub_(normaliser).exp_().mul_(counts)
            scores.scatter_add_(1, index, -present.to(scores.dtype))
            _add_gradients(gradients, slice(start, start + rows), scores, chunk, weights)
    return loss, gradients


def _add_gradients(gradients, rows: slice, scores, inputs, weights) -> None:
    """Adds one chunk: `scores` (rows, vocab) is the gradient of the loss with respect to the logits."""
    states_gradient, weight_gradient, bias_gradient = gradients
    bias_gradient += scores.sum(dim=0)
    scores = scores.to(weights.dtype)
    states_gradient[rows] = scores @ weights
    if weight_gradient.dtype == weights.dtype:
        weight_gradient.addmm_(scores.t(), inputs)
    else:
        weight_gradient += scores.t() @ inputs


def sinusoids(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Fixed position vectors: `sin(p / 10000^(2i/size))` at 2i and the cosine beside it (Vaswani et al. 2017, §3.5).

    BEHRT's text follows that paper; its code doubles the exponents.

    Args:
        positions: Any shape, from 0.
        size: Length of a vector.

    Returns:
        (*positions, size) float32.
    """
    pairs = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * 10000 ** (-pairs / size)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :size]

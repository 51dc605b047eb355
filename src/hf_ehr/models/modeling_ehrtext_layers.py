"""The layers of the EhrText models: encoders over the words of whole notes, and the heads without label attention.

Words of all notes lie end to end, without padding (`Steps`), so that padding cannot change a number.
"""

import torch
from torch import nn
from transformers import initialization as init

from .modeling_ehr import PackedSequences
from .modeling_heads import Steps
from .modeling_label_attention import UnitTokens


def note_tokens(embedded, attention_mask, packed: PackedSequences | None, notes, num_notes: int) -> UnitTokens:
    """The words of whole notes: the segments of a note are joined in their order, special tokens included.

    Args:
        embedded: (segments, length, embedding), or (1, total, embedding) when packed.
        attention_mask: (segments, length), 1 for tokens; `None` means no padding.
        packed: The segments' borders of a packed row.
        notes: (segments,) int64, ascending: the note of each segment.
        num_notes: Number of notes.
    """
    steps = Steps.of(embedded, attention_mask, packed)
    segments = steps.packed.segment_ids
    places = steps.places if packed is None else torch.arange(len(segments), device=segments.device)
    lengths = notes[segments].bincount(minlength=num_notes)
    borders = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    whole = PackedSequences.from_cu_seqlens(borders, len(segments))
    return UnitTokens(Steps.of(steps.states[None], packed=whole), places, segments)


class TextConvolution(nn.Module):
    """One convolution and tanh (CAML, Eq 1): as many states as words, zeros beyond both ends of a note.

    A window of even width reaches one word further to the right; CAML's padding gives it one state more than words.
    """

    def __init__(self, config):
        super().__init__()
        self.convolution = nn.Conv1d(config.embedding_size, config.hidden_size, config.kernel_size)
        self.left, self.right = (config.kernel_size - 1) // 2, config.kernel_size // 2

    def forward(self, steps: Steps) -> torch.Tensor:
        """Words (total, embedding) → states (total, hidden)."""
        # All notes in one row with zeros between: the cost is that of the words, however uneven the notes are.
        places = torch.arange(len(steps.states), device=steps.states.device) + self.right * steps.packed.segment_ids
        row = steps.states.new_zeros(len(steps.states) + self.right * steps.shape[0], steps.states.shape[1])
        row = nn.functional.pad(row.index_copy(0, places, steps.states).t(), (self.left, 0))
        return torch.tanh(self.convolution(row[None])[0].t().index_select(0, places))


class TextRecurrence(nn.Module):
    """LSTM or GRU in both directions, one layer; every note from a zero state at its own first and last word."""

    def __init__(self, config):
        super().__init__()
        make = nn.LSTM if config.encoder == "lstm" else nn.GRU
        self.rnn = make(config.embedding_size, config.hidden_size, batch_first=True)
        self.reverse_rnn = make(config.embedding_size, config.hidden_size, batch_first=True)

    def forward(self, steps: Steps) -> torch.Tensor:
        """Words (total, embedding) → states (total, 2 × hidden), first those of the direction of reading."""
        after = steps.packed.positions()
        lengths = steps.packed.cu_seqlens.diff()
        before = lengths[steps.packed.segment_ids] - 1 - after
        return torch.cat([_run(self.rnn, steps, after), _run(self.reverse_rnn, steps, before)], dim=1)


def _run(rnn: nn.LSTM | nn.GRU, steps: Steps, time: torch.Tensor) -> torch.Tensor:
    """The state after each word (total, hidden), in the precision of the weights; `time` (total,) is when it is read.

    Padding is read last, so that no word sees it. PyTorch's packed sequences would skip it, but on the CPU their
    backward pass is quadratic in the longest note: 61 s against 0.8 s for four notes of up to 2,000 words.
    """
    places = steps.packed.segment_ids * steps.shape[1] + time
    states = steps._replace(states=steps.states.to(rnn.all_weights[0][0].dtype), places=places)
    with torch.autocast(states.states.device.type, enabled=False):
        outputs, _ = rnn(states.rectangle(states.states))
    return outputs.flatten(0, 1).index_select(0, places)


def new_encoder(config) -> TextConvolution | TextRecurrence:
    """The encoder of a configuration."""
    return TextConvolution(config) if config.encoder == "cnn" else TextRecurrence(config)


class MaxPooling(nn.Module):
    """The greatest value of each feature over the note, and one layer."""

    def __init__(self, config, num_labels: int):
        super().__init__()
        self.output = nn.Linear(config.state_size, num_labels)

    def forward(self, steps: Steps) -> torch.Tensor:
        """States of words → scores (notes, labels); a note without words is scored by the biases."""
        owners = steps.packed.segment_ids[:, None].expand(steps.states.shape)
        pooled = steps.states.new_zeros(steps.shape[0], steps.states.shape[1])
        return self.output(pooled.scatter_reduce(0, owners, steps.states, "amax", include_self=False))


class MultiHeadPooling(nn.Module):
    """Queries that all codes share (BERT-XML, Eq 5-8): a_ik = softmax_i⟨h_i, q_k⟩, c_k = Σ_i a_ik h_i / √d_h.

    d_h is the width of h_i, both directions together. The output layer has a bias, which the paper's y = σ(W_a c) does
    not show: without one no code could be rare in a note that says nothing.
    """

    def __init__(self, config, num_labels: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_attention_queries, config.state_size))
        self.output = nn.Linear(config.num_attention_queries * config.state_size, num_labels)

    def forward(self, steps: Steps) -> torch.Tensor:
        """States of words → scores (notes, labels)."""
        states = steps.states
        scores = nn.functional.linear(states, self.queries.to(states.dtype)).float()
        weights = steps.rectangle(scores, fill=torch.finfo(scores.dtype).min).softmax(dim=1)
        # A note without words spreads its weight over padding, whose states are 0.
        contexts = torch.bmm(weights.transpose(1, 2).to(states.dtype), steps.rectangle(states))
        return self.output(contexts.flatten(1) * states.shape[1] ** -0.5)


@torch.no_grad()
def init_layer(module: nn.Module) -> None:
    """Starting weights of these layers, for `_init_weights`."""
    if isinstance(module, nn.RNNBase):  # PyTorch's own start
        bound = module.hidden_size**-0.5
        for weight in module.parameters():
            init.uniform_(weight, -bound, bound)
    if isinstance(module, nn.Linear | nn.Conv1d):  # CAML's start
        init.xavier_uniform_(module.weight)
    if isinstance(module, MultiHeadPooling):
        init.xavier_uniform_(module.queries)

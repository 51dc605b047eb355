"""A linear-chain conditional random field over tags (Lafferty et al., ICML 2001), as the layer behind a tagger.

    score(y | x) = start_{y1} + Σ_t emission_{t, yt} + Σ_t transition_{y(t-1), yt} + end_{yT}
    log p(y | x) = score(y | x) - log Σ_y' exp score(y' | x)

The likelihood runs over all sequences of tags; what a scheme forbids (an `I-` without its `B-`) is forbidden when the
best sequence is looked for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

FORBIDDEN = -1e4
"""Added to a score that must not be; finite, so that a sequence is found where all are forbidden."""


def iob2_rules(tags: Mapping[Any, str]) -> tuple[list[list[float]], list[float]]:
    """What may follow what under IOB2: `I-x` only `B-x` or `I-x`, and it begins nothing. Other names are free.

    Args:
        tags: Name of each tag, as `config.id2label`.

    Returns:
        (from, to) transitions and starts, 0 where allowed and `FORBIDDEN` where not.
    """
    names = [tags[index] for index in range(len(tags))]
    transitions = [
        [FORBIDDEN if after[:2] == "I-" and before not in ("B-" + after[2:], after) else 0.0 for after in names]
        for before in names
    ]
    return transitions, [FORBIDDEN if name[:2] == "I-" else 0.0 for name in names]


class LinearChainCrf(nn.Module):
    """Scores, likelihood and best sequence of tags.

    Args:
        tags: Name of each tag, as `config.id2label`.
    """

    def __init__(self, tags: Mapping[Any, str]):
        super().__init__()
        self.rules = iob2_rules(tags)
        self.transitions = nn.Parameter(torch.empty(len(tags), len(tags)))
        self.starts = nn.Parameter(torch.empty(len(tags)))
        self.ends = nn.Parameter(torch.empty(len(tags)))

    def log_likelihood(self, emissions: torch.Tensor, tags: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of sequences of tags.

        Args:
            emissions: (sequences, length, tags).
            tags: (sequences, length) int64; what lies behind a sequence's end is not read.
            lengths: (sequences,) int64; a sequence may be empty.

        Returns:
            (sequences,) float32; 0 for an empty one.
        """
        with torch.autocast(emissions.device.type, enabled=False):
            emissions, weights = emissions.float(), [weight.float() for weight in self.parameters()]
            there = _there(emissions, lengths)
            likelihood = _score(emissions, tags.where(there, 0), there, *weights)
            likelihood = likelihood - _log_partition(emissions, there, *weights)
        return torch.where(lengths > 0, likelihood, 0.0)

    @torch.no_grad()
    def decode(self, emissions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The most likely sequences of tags that the scheme allows (Viterbi).

        Args:
            emissions: (sequences, length, tags).
            lengths: (sequences,) int64.

        Returns:
            (sequences, length) int64, -100 behind a sequence's end.
        """
        emissions, there = emissions.float(), _there(emissions, lengths)
        rules, begins = (torch.tensor(rule, device=emissions.device) for rule in self.rules)
        transitions = self.transitions.float() + rules
        best, pointers = emissions[:, 0] + self.starts + begins, []
        stay = torch.arange(len(transitions), device=emissions.device).expand_as(best)
        for time in range(1, emissions.shape[1]):
            scores, origins = (best[:, :, None] + transitions).max(dim=1)
            inside = there[:, time, None]
            best = torch.where(inside, scores + emissions[:, time], best)
            pointers.append(torch.where(inside, origins, stay))
        path = [(best + self.ends).argmax(dim=1)]
        for origins in reversed(pointers):
            path.append(origins.gather(1, path[-1][:, None]).squeeze(1))
        return torch.stack(path[::-1], dim=1).masked_fill(~there, -100)


def _there(emissions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(sequences, length) bool, which places belong to their sequence."""
    return torch.arange(emissions.shape[1], device=emissions.device) < lengths[:, None]


def _score(emissions, tags, there, transitions, starts, ends) -> torch.Tensor:
    """Unnormalised score of each sequence, (sequences,)."""
    own = emissions.gather(2, tags[..., None]).squeeze(2)
    steps = transitions[tags[:, :-1], tags[:, 1:]]
    last = tags.gather(1, (there.sum(dim=1) - 1).clamp(min=0)[:, None]).squeeze(1)
    inner = (own * there).sum(dim=1) + (steps * there[:, 1:]).sum(dim=1)
    return starts[tags[:, 0]] + inner + ends[last]


def _log_partition(emissions, there, transitions, starts, ends) -> torch.Tensor:
    """Logarithm of the sum over all sequences (the forward algorithm), (sequences,)."""
    alpha = starts + emissions[:, 0]
    for time in range(1, emissions.shape[1]):
        after = (alpha[:, :, None] + transitions).logsumexp(dim=1) + emissions[:, time]
        alpha = torch.where(there[:, time, None], after, alpha)
    return (alpha + ends).logsumexp(dim=1)


@torch.no_grad()
def init_crf(module: nn.Module) -> None:
    """Starting weights, for `_init_weights`: close to a tagger without memory."""
    if isinstance(module, LinearChainCrf):
        for weight in module.parameters():
            init.uniform_(weight, -0.1, 0.1)

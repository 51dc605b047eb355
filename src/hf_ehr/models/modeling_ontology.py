"""Ontology embeddings (G-BERT, MedM-PLM Eq 1-2): codes that know their place in a tree, by graph attention.

    children of an ancestor, and itself ─ graph attention ─▶ the ancestor       stage 1
    ancestors of a code,     and itself ─ graph attention ─▶ the code           stage 2, the same weights

Only the distinct codes of a batch are computed, with their ancestors and these ancestors' children.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .code_tree import NO_PARENT, ancestor_chains


class GraphAttention(nn.Module):
    """Velickovic et al. (ICLR 2018), Eq 4-5: `α_ij = softmax_j(LeakyReLU(aᵀ[W x_i ‖ W x_j]))`, `Σ_j α_ij W x_j + b`.

    The heads stand side by side. No dropout; the softmax is in fp32.
    """

    negative_slope = 0.2

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.projection = nn.Linear(size, size, bias=False)
        self.target_scores = nn.Parameter(torch.empty(num_heads, size // num_heads))
        self.source_scores = nn.Parameter(torch.empty(num_heads, size // num_heads))
        self.bias = nn.Parameter(torch.empty(size))

    def projected(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nodes (n, size) → W x (n, heads, size / heads), and its part of the scores as target and as source."""
        values = self.projection(nodes).unflatten(1, self.target_scores.shape)
        return values, (values * self.target_scores).sum(dim=2), (values * self.source_scores).sum(dim=2)

    def over_edges(self, targets: torch.Tensor, sources: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        """Each target looks at itself and at its sources, of which it may have any number.

        Args:
            targets: (targets, size).
            sources: (edges, size).
            owners: (edges,), the target of each source.

        Returns:
            (targets, size).
        """
        values, to, own = self.projected(targets)
        others, _, from_ = self.projected(sources)
        values, count = torch.cat([values, others]), len(targets)
        owners = torch.cat([torch.arange(count, device=owners.device), owners])
        scores = self._activated(to[owners] + torch.cat([own, from_]))
        greatest = scores.new_full((count, self.num_heads), -torch.inf)
        greatest = greatest.scatter_reduce(0, owners[:, None].expand(scores.shape), scores.detach(), "amax")
        weights = (scores - greatest[owners]).exp()
        weights = weights / weights.new_zeros(greatest.shape).index_add(0, owners, weights)[owners]
        messages = weights[..., None] * values  # in fp32: a root may have thousands of children
        total = messages.new_zeros(count, *values.shape[1:]).index_add(0, owners, messages)
        return self._output(total.to(values.dtype))

    def over_rows(self, targets: torch.Tensor, nodes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Each target looks at itself and at a row of nodes.

        Args:
            targets: (targets, size).
            nodes: (nodes, size).
            places: (targets, most), which of `nodes`; -1 is none.

        Returns:
            (targets, size).
        """
        values, to, own = self.projected(targets)
        others, _, from_ = self.projected(nodes)
        there, places = places >= 0, places.clamp(min=0)
        scores = self._activated(to[:, None] + torch.cat([own[:, None], from_[places]], dim=1))
        there = nn.functional.pad(there, (1, 0), value=True)[..., None]
        weights = scores.masked_fill(~there, -torch.inf).softmax(dim=1).to(values.dtype)
        return self._output(torch.einsum("tkh,tkhd->thd", weights, torch.cat([values[:, None], others[places]], 1)))

    def _activated(self, scores: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(scores.float(), self.negative_slope)

    def _output(self, states: torch.Tensor) -> torch.Tensor:
        return states.flatten(1) + self.bias.to(states.dtype)


class _Neighbourhood(NamedTuple):
    """What the codes of a batch look at."""

    ancestors: torch.Tensor
    """(ancestors,): the nodes above the codes, distinct."""
    children: torch.Tensor
    """(edges,): their children, ancestor after ancestor."""
    owners: torch.Tensor
    """(edges,): the place of a child's parent in `ancestors`."""
    places: torch.Tensor
    """(codes, depth): the places of a code's ancestors in `ancestors`, -1 where it has no more."""


class OntologyEmbeddings(nn.Module):
    """Ids of a vocabulary → vectors that its tree has shaped; special tokens have plain rows.

    In the authors' stage 2 a leaf has gone through stage 1 too, alone with itself; here it enters as it is (Eq 2).

    Args:
        parents: Of every node, as [`code_parents`] builds them.
        vocab_size: Nodes that are ids; the others are levels above them.
        size: Width of the vectors.
        num_heads: Heads of the graph attention.
    """

    ancestors: torch.Tensor
    child_nodes: torch.Tensor
    child_counts: torch.Tensor

    def __init__(self, parents: Sequence[int], vocab_size: int, size: int, num_heads: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.nodes = nn.Parameter(torch.empty(len(parents), size))
        self.graph_attention = GraphAttention(size, num_heads)
        # Persistent: loading builds models without values, and fills what the checkpoint holds.
        chains = ancestor_chains(parents)[:vocab_size]
        depth = max(map(len, chains))
        self.register_buffer("ancestors", torch.tensor([row + [NO_PARENT] * (depth - len(row)) for row in chains]))
        children = sorted((parent, node) for node, parent in enumerate(parents) if parent != NO_PARENT)
        counts = [0] * len(parents)
        for parent, _ in children:
            counts[parent] += 1
        self.register_buffer("child_nodes", torch.tensor([node for _, node in children]))
        self.register_buffer("child_counts", torch.tensor(counts))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape → (*shape, size)."""
        distinct, places = ids.unique(return_inverse=True)
        return self.rows(distinct)[places]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Distinct ids (ids,) → (ids, size)."""
        own, chains = self.nodes[ids], self.ancestors[ids]
        inside = (chains[:, 0] >= 0).nonzero().squeeze(1)
        around = self._around(chains[inside])
        attend = self.graph_attention
        above = attend.over_edges(self.nodes[around.ancestors], self.nodes[around.children], around.owners)
        shaped = attend.over_rows(own[inside], above, around.places)
        return own.to(shaped.dtype).index_copy(0, inside, shaped)

    def _around(self, chains: torch.Tensor) -> _Neighbourhood:
        """Chains of ancestors (codes, depth), padded with -1."""
        there = chains >= 0
        ancestors, inverse = chains[there].unique(return_inverse=True)
        places = torch.full_like(chains, -1).masked_scatter(there, inverse)
        counts = self.child_counts[ancestors]
        owners = torch.arange(len(ancestors), device=chains.device).repeat_interleave(counts)
        starts = (self.child_counts.cumsum(0) - self.child_counts)[ancestors] - (counts.cumsum(0) - counts)
        children = self.child_nodes[starts[owners] + torch.arange(len(owners), device=chains.device)]
        return _Neighbourhood(ancestors, children, owners, places)


@torch.no_grad()
def init_ontology(module: nn.Module) -> None:
    """Glorot's start, as in the authors' code, for `_init_weights`."""
    if isinstance(module, GraphAttention):
        for weight in (module.projection.weight, module.target_scores, module.source_scores):
            init.xavier_uniform_(weight)
        init.zeros_(module.bias)
    if isinstance(module, OntologyEmbeddings):
        init.xavier_uniform_(module.nodes)

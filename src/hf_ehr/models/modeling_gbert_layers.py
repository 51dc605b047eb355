"""What reads sets of codes: ontology embeddings, and pre-norm blocks in which no code has a place."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modeling_ehr import eager_attention_forward
from .modeling_ontology import OntologyEmbeddings


class GBertAttention(nn.Module):
    """Multi-head self-attention, with a bias in the output alone."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        """(sets, tokens, hidden) → the same shape, and the weights where the implementation has them."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            self.qkv(hidden_states).view(*shape, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out_proj(attended.flatten(2)), weights


class GBertLayer(GradientCheckpointingLayer):
    """`x ← x + Drop(MHA(LN(x)))`, `x ← Drop(x + Drop(FFN(LN(x))))`."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GBertAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        """(sets, tokens, hidden) → the same shape."""
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        expanded = self.dropout(self.activation(self.intermediate(self.feed_forward_norm(hidden_states))))
        return self.dropout(hidden_states + self.dropout(self.output(expanded)))


class CodeSetEmbeddings(nn.Module):
    """`[CLS]` and the codes of one kind behind it: ontology plus type, without positions or norm.

    The type tells diagnoses (0) from medications (1). The authors' pre-training leaves it 0 for both, so that row 1
    reaches fine-tuning untrained.
    """

    def __init__(self, config, kind: str):
        super().__init__()
        self.cls_token_id = config.cls_token_id
        vocab_size = getattr(config, f"{kind}_vocab_size")
        self.ontology = OntologyEmbeddings(
            config.tree(kind), vocab_size, config.hidden_size, config.graph_attention_heads
        )

    def forward(self, ids: torch.Tensor, type_embedding: torch.Tensor) -> torch.Tensor:
        """Ids (sets, codes) and the vector of their type (hidden,) → (sets, 1 + codes, hidden)."""
        codes = self.ontology(ids)
        first = self.ontology.nodes[self.cls_token_id].to(codes.dtype).expand(len(ids), 1, -1)
        return torch.cat([first, codes], dim=1) + type_embedding


class GBertEncoder(nn.Module):
    """The blocks. `[CLS]` looks at the codes and none looks at it, as in the authors' code; there is no last norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([GBertLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, codes: torch.Tensor, **kwargs) -> torch.Tensor:
        """States (sets, 1 + codes, hidden) and which of the codes are there (sets, codes) → states."""
        if not len(hidden_states):
            return hidden_states  # a batch without any code: the library's attention takes no empty one
        keys = nn.functional.pad(codes, (1, 0), value=False)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=keys.long())
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        return hidden_states

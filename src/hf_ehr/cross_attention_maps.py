"""What codes and the note of one visit look at in each other, of a model with a cross-modal module (MedM-PLM, Fig 5).

The module asks with one vector per set of codes, and with one for the note. The weights of these are the model's own.
Those of single codes and single tokens ask the same layers with the vector of one code or token in their place: what
the layer would look up for it. No prediction uses them, and they sum to 1 as well.

As in ``attention_maps``: attention is where information flows, not why a model predicts what it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_ehr.attention_maps import COLOR_MAP, ROW_SUM_TOLERANCE, Weights, bare_code
from hf_ehr.models.any_encoder import evaluating
from hf_ehr.ontology import describe
from hf_ehr.visualization import saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TOKENS = 48
"""Tokens of a figure."""
NAME_LENGTH = 30
"""Characters of a code's name beside a figure."""


@dataclass(frozen=True, eq=False)
class KindAttention:
    """One kind of code and a note of T tokens.

    Attributes:
        kind: ``diagnosis`` or ``medication``.
        codes: The L codes as the model saw them (``VOCABULARY/CODE``, after back-off).
        descriptions: Their names, ``None`` for one without a name.
        text_looks: (1 + T, L) float32: which codes the note looks at, and would look at for each token alone.
        codes_look: (1 + L, T): which tokens the codes look at together, and would look at for each code alone;
            ``None`` of a model whose codes look at nothing.

    Raises:
        ValueError: The parts do not fit together, or a row of weights does not sum to 1.
    """

    kind: str
    codes: Sequence[str]
    descriptions: Sequence[str | None]
    text_looks: Weights
    codes_look: Weights | None = None

    @property
    def together(self) -> str:
        """What the codes are called together."""
        return f"all {'diagnoses' if self.kind == 'diagnosis' else self.kind + 's'}"

    def __post_init__(self):
        codes, tokens = len(self.codes), len(self.text_looks) - 1
        if len(self.descriptions) != codes or self.text_looks.shape[1:] != (codes,):
            raise ValueError(f"`text_looks` must be (1 + tokens, {codes}), got {self.text_looks.shape}.")
        if self.codes_look is not None and self.codes_look.shape != (1 + codes, tokens):
            raise ValueError(f"`codes_look` must be {(1 + codes, tokens)}, got {self.codes_look.shape}.")
        for name, weights in (("text_looks", self.text_looks), ("codes_look", self.codes_look)):
            off = 0.0 if weights is None else float(np.abs(weights.sum(axis=-1) - 1).max())
            if not off <= ROW_SUM_TOLERANCE:
                raise ValueError(f"`{name}` must have rows that sum to 1, got one that is off by {off:.3g}.")


@dataclass(frozen=True, eq=False)
class CrossAttentionView:
    """What a model's cross-modal module looks at in one visit.

    Attributes:
        text: The note.
        tokens: Its T tokens that the model saw, special ones included.
        spans: For each where it stands in ``text``, ``(0, 0)`` for a special one; ``None`` if that is not known.
        kinds: The kinds of which the visit has a code.
        note_tokens: Tokens of the whole note; more than T where the note is longer than the model reads.
    """

    text: str
    tokens: Sequence[str]
    spans: Sequence[tuple[int, int]] | None
    kinds: Sequence[KindAttention]
    note_tokens: int


def cross_attention_of(model: Any, processor: Any, visit: Mapping[str, Any]) -> CrossAttentionView:
    """The cross-modal attention weights of a model in one visit.

    The model runs without gradients in evaluation mode; afterwards it is as it was.

    Args:
        model: A MedM-PLM, any head of it.
        processor: Its ``MedMPLMProcessor``, with a tokenizer of notes.
        visit: ``diagnoses`` and ``medications``, lists of ``VOCABULARY/CODE``, and ``note``, a text.

    Raises:
        ValueError: The model has no cross-modal module, the processor reads no notes, the visit has no note, or no
            code that the model reads.
    """
    import torch

    base = model.base_model
    modules = getattr(base, "cross_modal", None)
    if modules is None:
        raise ValueError(
            f"`model` must have a cross-modal module, and {type(model).__name__} has none. Pass a MedM-PLM whose "
            "`cross_modal` is not 'none'."
        )
    batch = _batch(processor, visit, tuple(modules), model.device)
    with evaluating(model), torch.no_grad():
        outputs = base(**batch)
        encoded = base.code_encoder(**{name: ids for name, ids in batch.items() if "note" not in name})
        tokens, vectors = _token_states(base, batch)
        kinds = []
        for kind, module in modules.items():
            ids = batch[f"{kind}_ids"][0]
            there = ids != processor.code_tokenizers[kind].pad_token_id
            if there.any():
                codes = processor.code_tokenizers[kind].convert_ids_to_tokens(ids[there].tolist())
                states = encoded[f"{kind}_states"][0][there]
                note_looked = outputs[f"note_{kind}_attentions"][0][there]
                text_looks = _asked(module.text_queries, note_looked, vectors, states)
                set_looked = outputs[f"{kind}_note_attentions"]
                codes_look = None if set_looked is None else _asked(module.code_queries, set_looked[0], states, tokens)
                kinds.append(KindAttention(kind, codes, describe(codes), text_looks, codes_look))
    if not kinds:
        raise ValueError("`visit` must hold at least one code that the model reads, got none.")
    return _view(processor.note_tokenizer, visit["note"].strip(), batch["note_input_ids"][0].tolist(), kinds)


def cross_attention_map(view: CrossAttentionView, path: str | Path) -> Figure:
    """Draws two heat maps with codes as rows and tokens as columns: what codes look at, and what the note looks at.

    In the upper map each row sums to 1; the first row of a kind is what its codes look at together. In the lower map
    each column sums to 1 over the codes of a kind; the first column is what the note as a whole looks at. These are
    the model's own, the others ask for one code or token alone. Of a note of more than 48 tokens those are drawn that
    take most of the codes' attention, or, of a model whose codes look at nothing, the first.

    Args:
        view: The visit, from :func:`cross_attention_of`.
        path: The PNG to write.

    Returns:
        The figure that was written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    places = _drawn_tokens(view)
    maps = _maps(view, places)
    heights = [0.17 * len(map_.rows) for map_ in maps]
    with saved_figure(path, (3.6 + 0.21 * len(places), sum(heights) + 1.5 * len(maps) + 0.6)) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights).ravel()
        for axes, map_ in zip(grid, maps, strict=True):
            bar = figure.colorbar(_draw(axes, map_), ax=axes, pad=0.01, aspect=15)
            bar.set_label("Weight", fontsize=8)
            bar.ax.tick_params(labelsize=7)
        figure.supxlabel(_what_is_left_out(view, len(places)), fontsize=9)
    return figure


def _batch(processor: Any, visit: Mapping[str, Any], kinds: Sequence[str], device: Any) -> dict[str, Any]:
    """The visit alone, with the kinds of codes that the model reads."""
    if processor.note_tokenizer is None:
        raise ValueError("`processor` must have a tokenizer of notes, got None. Pass that of a model of notes.")
    if not (visit.get("note") or "").strip():
        raise ValueError("`visit` must hold a `note`, got none. Choose a visit with a note.")
    lists = [name for kind in kinds for name in processor.code_tokenizers[kind].kinds]
    fields = {name: list(visit.get(name) or ()) for name in lists} | {"note": visit["note"].strip()}
    read = [*(f"{kind}_ids" for kind in kinds), "note_input_ids", "note_attention_mask"]
    return {name: ids.to(device) for name, ids in processor(fields).items() if name in read}


def _token_states(base: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The states of the tokens, (T, note_size), and each as the vector of a note of which it was the first token."""
    encoded = base.note_encoder(input_ids=batch["note_input_ids"], attention_mask=batch["note_attention_mask"])
    states = encoded.last_hidden_state[0]
    pooled = base.config.note_pooling == "pooler"
    return states, base.note_encoder.pooler(states[:, None]) if pooled else states


def _asked(layer: Any, own: Any, queries: Any, keys: Any) -> Weights:
    """The model's own weights, and below them those of each query by itself: (1 + queries, keys)."""
    import torch

    there = torch.ones(len(queries), len(keys), dtype=torch.bool, device=keys.device)
    _, single = layer(queries, keys.expand(len(queries), -1, -1), there)
    return torch.cat([own[None].float(), single.float()]).cpu().numpy()


def _view(tokenizer: Any, text: str, ids: list[int], kinds: list[KindAttention]) -> CrossAttentionView:
    whole = tokenizer(text, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    spans = None
    if tokenizer.is_fast:
        cut = tokenizer(text, truncation=True, return_offsets_mapping=True)
        spans = [(start, end) for start, end in cut["offset_mapping"]]
    return CrossAttentionView(text, tokenizer.convert_ids_to_tokens(ids), spans, kinds, len(whole["input_ids"]))


def _drawn_tokens(view: CrossAttentionView) -> list[int]:
    """The places of the tokens of a figure."""
    total = len(view.tokens)
    own = [kind.codes_look[0] for kind in view.kinds if kind.codes_look is not None]
    if total <= MAX_TOKENS or not own:
        return list(range(min(total, MAX_TOKENS)))
    return sorted(np.argsort(-np.max(own, axis=0), kind="stable")[:MAX_TOKENS].tolist())


def _labels(kind: KindAttention) -> list[str]:
    """Codes with the beginnings of their names."""
    names = [name or "" for name in kind.descriptions]
    short = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1].rstrip()}…" for name in names]
    return [f"{bare_code(code)} {name}".rstrip() for code, name in zip(kind.codes, short, strict=True)]


class _Map(NamedTuple):
    """A heat map: codes are rows, in groups by kind."""

    title: str
    weights: Weights
    rows: list[str]
    columns: list[str]
    sizes: list[int]
    """Rows of each kind."""


def _maps(view: CrossAttentionView, places: list[int]) -> list[_Map]:
    tokens = [view.tokens[place] for place in places]
    looking = [(kind, kind.codes_look) for kind in view.kinds if kind.codes_look is not None]
    maps = []
    if looking:
        rows = [label for kind, _ in looking for label in (kind.together, *_labels(kind))]
        weights = np.concatenate([weights for _, weights in looking])[:, places]
        sizes = [len(weights) for _, weights in looking]
        maps.append(_Map("Codes look at the note: each row sums to 1", weights, rows, tokens, sizes))
    title = "The note looks at codes: each column sums to 1 over a kind of code"
    weights = np.concatenate([kind.text_looks for kind in view.kinds], axis=1).T
    rows = [label for kind in view.kinds for label in _labels(kind)]
    columns = weights[:, [0, *(place + 1 for place in places)]]
    return [*maps, _Map(title, columns, rows, ["whole note", *tokens], [len(kind.codes) for kind in view.kinds])]


def _draw(axes: Axes, map_: _Map) -> Any:
    image = axes.imshow(map_.weights, cmap=COLOR_MAP, vmin=0, interpolation="nearest", aspect="auto")
    for border in np.cumsum(map_.sizes)[:-1]:
        axes.axhline(border - 0.5, color="0.45", linewidth=0.8)
    axes.set_xticks(range(len(map_.columns)), map_.columns, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(map_.rows)), map_.rows, fontsize=7, parse_math=False)
    axes.tick_params(length=2, pad=2)
    axes.set_title(map_.title, fontsize=10, loc="left")
    return image


def _what_is_left_out(view: CrossAttentionView, drawn: int) -> str:
    read = len(view.tokens)
    parts = [f"Drawn are {drawn} of {read} tokens: rows of the upper map sum to less than 1."] if drawn < read else []
    if read < view.note_tokens:
        parts.append(f"The model read the first {read} of {view.note_tokens} tokens.")
    return " ".join(parts)

"""What an encoder attends to in one patient or in one note: the numbers, and figures of them.

Layers and heads are numbered from 1, as in Med-BERT's paper. Attention is where information flows, not why a model
predicts what it predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_ehr.models.any_encoder import evaluating, segment_length
from hf_ehr.ontology import describe
from hf_ehr.visualization import saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights = NDArray[np.float32]

MAX_DRAWN = 64
"""Codes of a figure: with more, the ticks of a grid of heads are too small to read."""
MAX_TICKS = 32
"""Words beside the map of a note; the map itself has all tokens."""
BRIGHTEST = 0.998
"""Quantile of the weights that the darkest colour stands for in the map of a note: a few tokens take nearly all of a
head's attention, and the others would look alike."""
MAPS_PER_ROW = 4
COLOR_MAP = "Blues"
"""One hue from white (0) to dark: its order survives every kind of colour blindness, and grey print."""
ROW_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class AttentionView:
    """The attention of an encoder over one patient's codes.

    Attributes:
        codes: The n codes as the model saw them (``VOCABULARY/CODE``, after back-off), oldest visit first.
        visit_numbers: (n,) the visit of each code, counted from 1 for the oldest visit that the model saw.
        attention: (layers, heads, n, n) float32; row i holds the weights with which code i looks at all codes, and
            sums to 1.
        visit_dates: The day of visit 1, 2, …, where they are known.
        descriptions: The n names of the codes, ``None`` for one without a name.

    Raises:
        ValueError: The parts do not fit together, or a row of attention does not sum to 1.
    """

    codes: Sequence[str]
    visit_numbers: NDArray[np.int64]
    attention: Weights
    visit_dates: Sequence[date | None] | None = None
    descriptions: Sequence[str | None] | None = None

    def __post_init__(self):
        n = len(self.codes)
        if not n or self.attention.ndim != 4 or self.attention.shape[2:] != (n, n):
            raise ValueError(
                f"`attention` must be (layers, heads, n, n) for n ≥ 1 codes, got {self.attention.shape} for {n}."
            )
        numbers = self.visit_numbers
        if numbers.shape != (n,) or numbers[0] < 1 or (np.diff(numbers) < 0).any():
            raise ValueError("`visit_numbers` must hold one number from 1 per code, in ascending order.")
        if self.visit_dates is not None and len(self.visit_dates) < numbers[-1]:
            raise ValueError(f"`visit_dates` must hold {numbers[-1]} days, got {len(self.visit_dates)}.")
        if self.descriptions is not None and len(self.descriptions) != n:
            raise ValueError(f"`descriptions` must hold one name per code ({n}), got {len(self.descriptions)}.")
        off = float(np.abs(self.attention.sum(axis=-1) - 1).max())
        if not off <= ROW_SUM_TOLERANCE:
            raise ValueError(f"`attention` must have rows that sum to 1, got one that is off by {off:.3g}.")

    @property
    def ticks(self) -> list[str]:
        """``I10@2`` for ``ICD10CM/I10`` in visit 2, one per code."""
        return [f"{bare_code(code)}@{visit}" for code, visit in zip(self.codes, self.visit_numbers, strict=True)]


@dataclass(frozen=True, eq=False)
class NoteAttention:
    """The self-attention of one layer of an encoder over a note (BERT-XML: Zhang, Liu & Razavian 2020, Fig 4).

    Attributes:
        tokens: The T tokens that the model saw, special ones included.
        attention: (heads, T, T) float32; row i holds the weights with which token i looks at all tokens, and
            sums to 1.
        layer: Which layer, from 1.
        note_tokens: Tokens of the whole note; more than T where the note is longer than the model reads at once.
    """

    tokens: Sequence[str]
    attention: Weights
    layer: int
    note_tokens: int


def attention_of(
    model: Any, tokenizer: Any, visits: Sequence[Iterable[str]] | Mapping, *, max_length: int | None = None
) -> AttentionView:
    """The attention weights of a model's encoder over one patient.

    The model runs once, without gradients, in evaluation mode and with eager attention, the only one that returns
    weights; afterwards it is as it was. Codes are named by :func:`hf_ehr.ontology.describe`.

    Args:
        model: A transformers model whose base model takes what ``tokenizer`` gives and returns attention weights.
        tokenizer: An ``EhrCodeTokenizer``.
        visits: Lists of codes, oldest visit first, or a RECORD (a mapping with ``visits``), which also has dates.
        max_length: Most codes, the newest; the model's own limit when ``None``.

    Raises:
        ValueError: No code of the patient is known to the tokenizer, or the model returns no attention weights.
    """
    import torch

    limit = getattr(model.config, "max_position_embeddings", None) if max_length is None else max_length
    inputs = tokenizer.encode_patient(visits, max_length=limit)
    if not inputs["input_ids"]:
        raise ValueError("`visits` must hold at least one code that the tokenizer knows, got none.")
    batch = {name: torch.tensor([ids], device=model.device) for name, ids in inputs.items()}
    attention = _rows(torch.cat(_layers(model, batch)))
    numbers = np.asarray(inputs["visit_ids"], np.int64)
    codes = tokenizer.convert_ids_to_tokens(inputs["input_ids"])
    return AttentionView(codes, numbers, attention, _visit_dates(tokenizer, visits, numbers[-1]), describe(codes))


def layer_mean(view: AttentionView) -> Weights:
    """Mean over the heads of each layer, (layers, n, n)."""
    return view.attention.mean(axis=1)


def rollout(view: AttentionView) -> Weights:
    """Attention rollout (Abnar & Zuidema 2020, section 3), (n, n): how the top layer's codes mix the input's.

    With ``A_l`` the mean over heads, each layer and its residual connection are ``Ã_l = 0.5 A_l + 0.5 I``; the rollout
    is ``Ã_L ⋯ Ã_2 Ã_1``. Row i belongs to code i of the top layer and sums to 1.
    """
    mixed = np.eye(len(view.codes))
    for mean in layer_mean(view).astype(np.float64):
        residual = 0.5 * mean + 0.5 * np.eye(len(mean))
        mixed = (residual / residual.sum(axis=-1, keepdims=True)) @ mixed
    return mixed.astype(np.float32)


def attention_map(
    view: AttentionView, path: str | Path, *, layer: int | None = None, head: int | None = None
) -> Figure:
    """Draws attention as heat maps: rows look at columns, lines are the borders of visits.

    A history of more than 64 codes is drawn from its newest 64, and a note under the maps says so.

    Args:
        view: The patient, from :func:`attention_of`.
        path: The PNG to write.
        layer: Which layer, from 1. ``None`` draws the mean over heads of every layer, and the rollout.
        head: Which head of ``layer``, from 1. ``None`` draws all of them.

    Returns:
        The figure that was written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no such layer or head, or ``head`` is given without ``layer``.
    """
    title, maps = _chosen_maps(view, layer, head)
    n, drawn = len(view.codes), min(len(view.codes), MAX_DRAWN)
    maps = {name: weights[-drawn:, -drawn:] for name, weights in maps.items()}
    strongest = max(float(weights.max()) for weights in maps.values())
    note = f"The newest {drawn} of {n} codes. Weights on older codes are not drawn: rows sum to less than 1."

    def draw(axes: Axes, name: str, weights: Weights) -> Any:
        return _draw_map(axes, name, weights, view, strongest)

    return _heat_maps(path, title, maps, draw, max(2.6, 0.135 * drawn), "Code", note if drawn < n else None)


def note_attention(
    model: Any, tokenizer: Any, text: str, *, layer: int | None = None, max_length: int | None = None
) -> NoteAttention:
    """The self-attention weights of a text encoder over a note.

    The model runs once, as in :func:`attention_of`. Segments of a note do not see each other, so a note that is longer
    than the model reads at once is cut to its beginning.

    Args:
        model: EhrBert or another text encoder of the library, alone or under any head.
        tokenizer: Its tokenizer.
        text: The note.
        layer: Which layer, from 1; the last by default.
        max_length: Most tokens; the model's own limit when ``None``.

    Raises:
        ValueError: There is no such layer, or the model returns no attention weights.
    """
    import torch

    ids = tokenizer(text, truncation=True, max_length=max_length or segment_length(model, tokenizer))["input_ids"]
    batch = torch.tensor([ids], device=model.device)
    layers = _layers(model, {"input_ids": batch, "attention_mask": torch.ones_like(batch)})
    layer = len(layers) if layer is None else layer
    if not 1 <= layer <= len(layers):
        raise ValueError(f"`layer` must be from 1 to {len(layers)}, got {layer}.")
    whole = len(tokenizer(text, verbose=False)["input_ids"])
    return NoteAttention(tokenizer.convert_ids_to_tokens(ids), _rows(layers[layer - 1])[0], layer, whole)


def note_attention_map(view: NoteAttention, path: str | Path) -> Figure:
    """Draws every head of a layer over a note: all tokens, and the words of at most 32 of them, evenly spaced.

    Args:
        view: The note, from :func:`note_attention`.
        path: The PNG to write.

    Returns:
        The figure that was written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    total = len(view.tokens)
    maps = {f"Head {number}": weights for number, weights in enumerate(view.attention, 1)}
    strongest = float(np.quantile(view.attention, BRIGHTEST))
    places = np.unique(np.linspace(0, total - 1, min(total, MAX_TICKS)).round().astype(int)).tolist()

    def draw(axes: Axes, name: str, weights: Weights) -> Any:
        image = axes.imshow(weights, cmap=COLOR_MAP, vmin=0, vmax=strongest, interpolation="antialiased")
        _ticks(axes, name, places, [view.tokens[place] for place in places])
        return image

    title = f"Self-attention, layer {view.layer}"
    cut = f"The first {total} of {view.note_tokens} tokens." if total < view.note_tokens else None
    return _heat_maps(path, title, maps, draw, max(2.6, 0.135 * len(places)), "Token", cut, extend="max")


def _heat_maps(
    path: str | Path,
    title: str,
    maps: Mapping[str, Weights],
    draw: Callable[[Axes, str, Weights], Any],
    side: float,
    unit: str,
    note: str | None,
    extend: str = "neither",
) -> Figure:
    """Writes maps in rows of four with one colour scale; ``draw`` draws one and returns its image."""
    rows = ceil(len(maps) / MAPS_PER_ROW)
    columns = ceil(len(maps) / rows)
    size = (columns * (side + 0.9) + 1.0, rows * (side + 1.1) + 0.6)
    with saved_figure(path, size) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, weights) in zip(grid, maps.items(), strict=False):
            image = draw(axes, name, weights)
        for axes in grid[::columns]:
            axes.set_ylabel(unit)
        for axes in grid[max(len(maps) - columns, 0) : len(maps)]:
            axes.set_xlabel(f"looks at this {unit.lower()}")
        for axes in grid[len(maps) :]:
            axes.remove()
        shown = list(grid[: len(maps)])
        figure.colorbar(image, ax=shown, label="Attention weight", shrink=0.8, pad=0.02, aspect=30, extend=extend)
        figure.suptitle(title)
        if note:
            figure.supxlabel(note, fontsize=9)
    return figure


def bare_code(code: str) -> str:
    """The code without its vocabulary: ``I10`` for ``ICD10CM/I10``."""
    return code.partition("/")[2] or code


def _layers(model: Any, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """The attention weights of each layer of the encoder, (1, heads, n, n).

    Raises:
        ValueError: The model returns none.
    """
    import torch

    with _evaluating_eagerly(model), torch.no_grad():
        layers = getattr(model.base_model(**batch, output_attentions=True), "attentions", None)
    if not layers or layers[0] is None:
        raise ValueError(
            f"`model` must return attention weights, and {type(model).__name__} returned none. Pass a model with an "
            "attention encoder, such as Med-BERT."
        )
    return layers


def _rows(attention: Any) -> Weights:
    """Weights in single precision, of which every row sums to 1.

    In half precision the weights of a row are rounded one by one, and their sum is off by up to a percent.
    """
    weights = attention.float().cpu().numpy()
    return weights / weights.sum(axis=-1, keepdims=True)


def _chosen_maps(view: AttentionView, layer: int | None, head: int | None) -> tuple[str, dict[str, Weights]]:
    """The title of a figure, and its maps by name."""
    if layer is None:
        if head is not None:
            raise ValueError(f"`head` must come with a `layer`, got head {head} alone. Say which layer's.")
        means = {f"Layer {number}": mean for number, mean in enumerate(layer_mean(view), 1)}
        return "Attention, mean over heads", means | {"Rollout": rollout(view)}
    layers, heads = view.attention.shape[:2]
    for name, number, most in (("layer", layer, layers), ("head", 1 if head is None else head, heads)):
        if not 1 <= number <= most:
            raise ValueError(f"`{name}` must be from 1 to {most}, got {number}.")
    maps = {f"Head {number}": weights for number, weights in enumerate(view.attention[layer - 1], 1)}
    if head is not None:
        maps = {f"Head {head}": maps[f"Head {head}"]}
    return f"Attention, layer {layer}", maps


def _draw_map(axes: Axes, name: str, weights: Weights, view: AttentionView, strongest: float) -> Any:
    """One heat map of the newest ``len(weights)`` codes."""
    drawn = len(weights)
    ticks, numbers = view.ticks[-drawn:], view.visit_numbers[-drawn:]
    image = axes.imshow(weights, cmap=COLOR_MAP, vmin=0, vmax=strongest, interpolation="nearest")
    for border in np.flatnonzero(np.diff(numbers)) + 0.5:
        axes.axhline(border, color="0.45", linewidth=0.6)
        axes.axvline(border, color="0.45", linewidth=0.6)
    _ticks(axes, name, range(drawn), ticks)
    return image


def _ticks(axes: Axes, name: str, places: Sequence[int], labels: Sequence[str]) -> None:
    axes.set_xticks(places, labels, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(places, labels, fontsize=7, parse_math=False)
    axes.tick_params(length=2, pad=2)
    axes.set_title(name, fontsize=10)


def _visit_dates(tokenizer: Any, visits: Sequence | Mapping, kept: int) -> list[date | None] | None:
    """The days of the newest ``kept`` visits that have a code; only a RECORD knows them."""
    if not isinstance(visits, Mapping):
        return None
    alone = tokenizer.encode_patients([[visit] for visit in visits["visits"]])["input_ids"]
    starts = [visit.get("start") for visit, ids in zip(visits["visits"], alone, strict=True) if ids]
    return [None if start is None else date(start.year, start.month, start.day) for start in starts[-kept:]]


@contextmanager
def _evaluating_eagerly(model: Any) -> Iterator[None]:
    """Evaluation mode and eager attention; every module and configuration gets its own setting back."""
    configs = [module.config for module in model.modules() if hasattr(module, "set_attn_implementation")]
    implementations = [config._attn_implementation for config in configs]
    with evaluating(model):
        try:
            model.set_attn_implementation("eager")
            yield
        finally:
            for config, implementation in zip(configs, implementations, strict=True):
                config._attn_implementation = implementation

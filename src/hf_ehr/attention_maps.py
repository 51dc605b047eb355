"""What an encoder attends to in one patient: the numbers, and figures of them with ``code@visit`` ticks.

Layers and heads are numbered from 1, as in Med-BERT's paper. Attention is where information flows, not why a model
predicts what it predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_ehr.ontology import describe
from hf_ehr.visualization import _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights = NDArray[np.float32]

MAX_DRAWN = 64
"""Codes of a figure: with more, the ticks of a grid of heads are too small to read."""
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
    with _evaluating_eagerly(model), torch.no_grad():
        layers = getattr(model.base_model(**batch, output_attentions=True), "attentions", None)
    if not layers or layers[0] is None:
        raise ValueError(
            f"`model` must return attention weights, and {type(model).__name__} returned none. Pass a model with an "
            "attention encoder, such as Med-BERT."
        )
    attention = torch.cat([layer.float() for layer in layers]).cpu().numpy()
    numbers = np.asarray(inputs["visit_ids"], np.int64)
    codes = tokenizer.convert_ids_to_tokens(inputs["input_ids"])
    # In half precision the weights of a row are rounded one by one, and their sum is off by up to a percent.
    attention /= attention.sum(axis=-1, keepdims=True)
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
    rows = ceil(len(maps) / MAPS_PER_ROW)
    columns = ceil(len(maps) / rows)
    side = max(2.6, 0.135 * drawn)
    size = (columns * (side + 0.9) + 1.0, rows * (side + 1.1) + 0.6)
    with _figure(path, size) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        strongest = max(float(weights.max()) for weights in maps.values())
        for axes, (name, weights) in zip(grid, maps.items(), strict=False):
            image = _draw_map(axes, name, weights, view, strongest)
        for axes in grid[::columns]:
            axes.set_ylabel("Code")
        for axes in grid[max(len(maps) - columns, 0) : len(maps)]:
            axes.set_xlabel("looks at this code")
        for axes in grid[len(maps) :]:
            axes.remove()
        figure.colorbar(image, ax=list(grid[: len(maps)]), label="Attention weight", shrink=0.8, pad=0.02, aspect=30)
        figure.suptitle(title)
        if drawn < n:
            note = f"The newest {drawn} of {n} codes. Weights on older codes are not drawn: rows sum to less than 1."
            figure.supxlabel(note, fontsize=9)
    return figure


def bare_code(code: str) -> str:
    """The code without its vocabulary: ``I10`` for ``ICD10CM/I10``."""
    return code.partition("/")[2] or code


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
    axes.set_xticks(range(drawn), ticks, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(drawn), ticks, fontsize=7, parse_math=False)
    axes.tick_params(length=2, pad=2)
    axes.set_title(name, fontsize=10)
    return image


def _visit_dates(tokenizer: Any, visits: Sequence | Mapping, kept: int) -> list[date | None] | None:
    """The days of the newest ``kept`` visits that have a code; only a RECORD knows them."""
    if not isinstance(visits, Mapping):
        return None
    alone = tokenizer.encode_patients([[visit] for visit in visits["visits"]])["input_ids"]
    starts = [visit.get("start") for visit, ids in zip(visits["visits"], alone, strict=True) if ids]
    return [None if start is None else date(start.year, start.month, start.day) for start in starts[-kept:]]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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

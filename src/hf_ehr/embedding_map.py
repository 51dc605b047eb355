"""A map of a model's code embeddings in two dimensions, coloured by chapter (as G-BERT's authors drew theirs).

    model ─ code_vectors ─▶ codes and vectors of each kind ─ embedding_table ─▶ CSV ─ embedding_figure ─▶ PNG

A vocabulary holds no code of fewer patients than it was fitted with, 11 by default, and neither does a map of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hf_ehr.ontology import category, chapter, describe
from hf_ehr.schema import atomic_path
from hf_ehr.visualization import COLORS, MARKERS, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Method = Literal["pca", "tsne"]
Vectors = Mapping[str, tuple[Sequence[str], NDArray[np.float32]]]
"""What the codes are → the codes and their vectors, (codes, size)."""

OTHER = "other"
NAME_LENGTH = 60
TABLE_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("chapter", pa.string(), nullable=False),  # ICD10CM/E00-E89, ATC/A; `other` without one
        pa.field("chapter_name", pa.string()),
        pa.field("x", pa.float64(), nullable=False),
        pa.field("y", pa.float64(), nullable=False),
    ]
)
_ATC_NAMES = {
    "A": "Alimentary tract and metabolism",
    "B": "Blood and blood forming organs",
    "C": "Cardiovascular system",
    "D": "Dermatologicals",
    "G": "Genito-urinary system and sex hormones",
    "H": "Systemic hormonal preparations",
    "J": "Antiinfectives for systemic use",
    "L": "Antineoplastic and immunomodulating agents",
    "M": "Musculo-skeletal system",
    "N": "Nervous system",
    "P": "Antiparasitic products",
    "R": "Respiratory system",
    "S": "Sensory organs",
    "V": "Various",
}


def code_vectors(model: Any, tokenizers: Mapping[str, Any]) -> dict[str, tuple[list[str], NDArray[np.float32]]]:
    """The embeddings of all codes of a vocabulary, special tokens left out.

    Of G-BERT and MedM-PLM they are what the trees have made of them, as the encoder reads them, without the type; of
    other models the rows of the table of input embeddings.

    Args:
        model: A model of codes, any head.
        tokenizers: What the codes are → their ``EhrCodeTokenizer``: ``diagnosis`` and ``medication`` of G-BERT and
            MedM-PLM, one tokenizer under any name of others.

    Returns:
        For each tokenizer that the model has embeddings for: codes, and their vectors (codes, size).

    Raises:
        ValueError: A table of embeddings and its tokenizer differ in size, or the model has no embeddings of codes.
    """
    import torch

    base = model.base_model
    encoder = getattr(base, "code_encoder", base)
    found = {}
    for kind, tokenizer in tokenizers.items():
        special = set(tokenizer.all_special_ids)
        ids = [index for index in range(len(tokenizer)) if index not in special]
        with torch.no_grad():
            rows = _rows(encoder, kind, ids, len(tokenizer))
        if rows is not None and ids:
            found[kind] = (tokenizer.convert_ids_to_tokens(ids), rows.float().cpu().numpy())
    if not found:
        raise ValueError(f"`model` must have embeddings of codes, and {type(model).__name__} has none of {kind!r}.")
    return found


def embedding_table(vectors: Vectors, *, method: Method = "pca", seed: int = 0) -> pa.Table:
    """The place of every code in two dimensions, each kind by itself, and its chapter.

    Args:
        vectors: Codes and vectors, as from :func:`code_vectors`; those of a ``CodeEmbeddings`` do as well.
        method: ``pca``: the two directions of the largest variance; distances mean something. ``tsne`` (van der Maaten
            & Hinton 2008): neighbours stay neighbours, while the size of groups and the distance between them mean
            nothing.
        seed: Seed of ``tsne``.

    Returns:
        ``TABLE_SCHEMA``, in the order of ``vectors``.

    Raises:
        ValueError: The method is unknown, a kind has fewer than three codes, or a vector is not finite.
    """
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {', '.join(get_args(Method))}, got {method!r}.")
    parts = [TABLE_SCHEMA.empty_table()]
    for kind, (codes, rows) in vectors.items():
        if len(codes) < 3 or not np.isfinite(rows).all():
            raise ValueError(f"`vectors` of {kind!r} must be finite, of at least 3 codes, got {len(codes)} codes.")
        places = _projected(np.asarray(rows, np.float64), method, seed)
        chapters = chapters_of(codes)
        columns = [[kind] * len(codes), list(codes), chapters, _chapter_names(chapters), places[:, 0], places[:, 1]]
        parts.append(pa.table(columns, schema=TABLE_SCHEMA))
    return pa.concat_tables(parts)


def write_embedding_table(table: pa.Table, path: str | Path) -> None:
    """Writes the table as CSV, whole or not at all."""
    from pyarrow import csv

    with atomic_path(Path(path)) as temporary:
        csv.write_csv(table, temporary)


def embedding_figure(table: pa.Table, path: str | Path, *, title: str = "Code embeddings by chapter") -> Figure:
    """Draws the codes of each kind in a panel of their own, chapters told apart by colour and mark.

    Args:
        table: From :func:`embedding_table`.
        path: The PNG to write.
        title: Above the figure.

    Returns:
        The figure that was written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    kinds = pc.unique(table["kind"]).to_pylist()
    with saved_figure(path, (10.5, 5.2 * len(kinds))) as figure:
        figure.set_layout_engine("constrained")
        for axes, kind in zip(figure.subplots(len(kinds), 1, squeeze=False).ravel(), kinds, strict=True):
            _draw(axes, table.filter(pc.equal(table["kind"], kind)))
            axes.set_title(kind.capitalize(), loc="left", fontsize=10)
        figure.suptitle(title)
    return figure


def chapters_of(codes: Sequence[str]) -> list[str]:
    """The ICD chapter or the ATC main group of each code, ``other`` without one.

    Example:
        >>> chapters_of(["ICD10CM/E11.9", "ICD9CM/428.0", "ATC/A10BA02", "NDC/0002"])
        ['ICD10CM/E00-E89', 'ICD9CM/390-459', 'ATC/A', 'other']
    """
    groups = [found if code.startswith("ATC/") else None for code, found in zip(codes, category(codes), strict=True)]
    return [found or group or OTHER for found, group in zip(chapter(codes), groups, strict=True)]


def _rows(encoder: Any, kind: str, ids: list[int], size: int) -> Any:
    """Vectors of ids, ``None`` where the encoder has no embeddings of this kind."""
    import torch

    if hasattr(encoder, "medication_embeddings"):
        embeddings = getattr(encoder, f"{kind}_embeddings", None)
        if embeddings is None:
            return None
        _check_size(embeddings.ontology.vocab_size, size, kind)
        return embeddings.ontology(torch.tensor(ids, device=encoder.device))
    weight = encoder.get_input_embeddings().weight
    _check_size(len(weight), size, kind)
    return weight[ids]


def _check_size(rows: int, size: int, kind: str) -> None:
    if rows != size:
        raise ValueError(f"`tokenizers[{kind!r}]` must be the model's own, of {rows} tokens, got one of {size}.")


def _projected(rows: NDArray[np.float64], method: Method, seed: int) -> NDArray[np.float64]:
    """(codes, size) → (codes, 2)."""
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, svd_solver="full").fit_transform(rows)
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows).astype(np.float64)


def _chapter_names(chapters: Sequence[str]) -> list[str | None]:
    names = describe(chapters)
    return [_ATC_NAMES.get(group.removeprefix("ATC/"), name) for group, name in zip(chapters, names, strict=True)]


def _draw(axes: Axes, table: pa.Table) -> None:
    present = dict(sorted(zip(table["chapter"].to_pylist(), table["chapter_name"].to_pylist(), strict=True)))
    for number, (group, name) in enumerate(present.items()):
        rows = table.filter(pc.equal(table["chapter"], group))
        label = f"{group} {name}" if name else group
        axes.scatter(
            rows["x"].to_numpy(), rows["y"].to_numpy(), s=18, alpha=0.8, linewidths=0,
            color=COLORS[number % len(COLORS)], marker=MARKERS[number // len(COLORS) % len(MARKERS)],
            label=label if len(label) <= NAME_LENGTH else f"{label[: NAME_LENGTH - 1].rstrip()}…",
        )  # fmt: skip
    axes.set(xticks=[], yticks=[], xlabel="First direction", ylabel="Second direction")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7, frameon=False, borderaxespad=0)

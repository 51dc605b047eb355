"""What was learnt of codes, put where it is needed: a model moved to another vocabulary, static embeddings in a model.

    model + its tokenizer ──┐
    new tokenizer ──────────┴▶ move_to_vocabulary   ─▶ model whose ids are the new tokenizer's, and a report
    CodeEmbeddings + model ──▶ load_code_embeddings ─▶ the same model, and a report

Only the rows of codes change hands (code embeddings, decoder weight and bias); whatever else a model has stays.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import hf_ehr

from .code_embeddings import CodeEmbeddings
from .models.tokenization_ehr import SPECIAL_TOKENS, EhrCodeTokenizer
from .schema import EhrDataError, atomic_folder
from .training import SPLITS_FILE
from .vocabulary import count_codes

Model = TypeVar("Model", bound=PreTrainedModel)

REPORT_FILE = "transfer.json"
INITIALIZER_RANGE = 0.02
"""Standard deviation of fresh rows where the configuration of a model names none."""


@dataclass
class TransferReport:
    """Where the rows of a vocabulary's codes come from.

    Attributes:
        codes: Codes of the vocabulary, special tokens not counted.
        kept: Codes that have their own row.
        from_ancestor: Codes that start from the row of their nearest known ancestor.
        fresh: Codes of which nothing was known.
        occurrences: Number of code occurrences, where counts were given.
        occurrences_kept: Share of them whose id has its own row. A code outside the vocabulary counts under the
            ancestor it takes the id of, and as uncovered when it becomes ``[UNK]``.
        occurrences_from_ancestor: Share whose id starts from an ancestor's row.
    """

    codes: int
    kept: int
    from_ancestor: int
    fresh: int
    occurrences: int | None = None
    occurrences_kept: float | None = None
    occurrences_from_ancestor: float | None = None

    def as_dict(self) -> dict[str, int | float | None]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"{self.codes:,} codes: {self.kept:,} kept, {self.from_ancestor:,} from an ancestor, {self.fresh:,} fresh"
        )
        if self.occurrences_kept is None or self.occurrences_from_ancestor is None:
            return text + "."
        return (
            f"{text}; of {self.occurrences:,} occurrences {self.occurrences_kept:.1%} kept, "
            f"{self.occurrences_from_ancestor:.1%} from an ancestor."
        )


@dataclass
class TransferArguments:
    """Arguments of `hf-ehr transfer`."""

    model: str = field(metadata={"help": "Folder of a model with its tokenizer."})
    tokenizer: str = field(metadata={"help": "Folder of the new tokenizer (`hf-ehr fit-tokenizer`)."})
    output: str = field(metadata={"help": "Folder to write; must not exist or be empty."})
    data: str | None = field(
        default=None, metadata={"help": "Prepared folder whose code occurrences the report counts."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the rows of codes of which nothing is known."})


def transfer(arguments: TransferArguments) -> TransferReport:
    """Moves a model folder to another vocabulary; writes model, tokenizer, the model's splits and `transfer.json`.

    Raises:
        EhrDataError: `output` holds something, or `model` is no model of this package.
    """
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EhrDataError(f"`output` must not exist or be an empty folder, got {output}. Name another one.")
    model = _load(arguments.model)
    old, new = (EhrCodeTokenizer.from_pretrained(folder) for folder in (arguments.model, arguments.tokenizer))
    counts = None
    if arguments.data is not None:
        table = count_codes(arguments.data, kinds=new.kinds)
        counts = dict(zip(table["code"], table["occurrences"], strict=True))
    moved, report = move_to_vocabulary(model, old, new, seed=arguments.seed, counts=counts)
    with atomic_folder(output) as folder:
        moved.save_pretrained(folder)
        new.save_pretrained(folder)
        splits = Path(arguments.model) / SPLITS_FILE
        if splits.is_file():  # who was seen in training stays known
            shutil.copyfile(splits, folder / SPLITS_FILE)
        (folder / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return report


def move_to_vocabulary(
    model: Model,
    old_tokenizer: EhrCodeTokenizer,
    new_tokenizer: EhrCodeTokenizer,
    *,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
) -> tuple[Model, TransferReport]:
    """A copy of a model that reads the ids of another tokenizer, e.g. to go on training at another hospital.

    A code that both know keeps its row of the embeddings, the decoder's weight and the decoder's bias. A code that is
    new starts from the row that the old tokenizer's back-off would have given it (its nearest known ancestor), else
    from the mean of all codes with normal noise of the initialiser's range. Special tokens follow their role. All
    other weights are the same, so histories of shared codes give the same outputs, bit by bit.

    Args:
        model: Any model of the package; it is not changed.
        old_tokenizer: The model's tokenizer.
        new_tokenizer: The tokenizer to move to.
        seed: Of the noise.
        counts: Code → occurrences in the data to come, for the report.

    Returns:
        The moved model, its configuration with the new `vocab_size` and special ids, and the report.

    Raises:
        ValueError: ``old_tokenizer`` is not as large as the model's vocabulary.
    """
    rows = _check_size(model, old_tokenizer, "old_tokenizer")
    source, report = _plan(old_tokenizer, new_tokenizer, counts)
    known = np.setdiff1d(np.arange(rows), old_tokenizer.all_special_ids)
    noise = getattr(model.config, "initializer_range", INITIALIZER_RANGE)
    move = _RowMove(torch.from_numpy(source), torch.from_numpy(known), noise, torch.Generator().manual_seed(seed))
    moved = copy.deepcopy(model)
    _replace_rows(moved, move)
    _code_embeddings(moved).num_embeddings = moved.config.vocab_size = len(new_tokenizer)
    for role in SPECIAL_TOKENS:
        if getattr(moved.config, f"{role}_id", None) is not None:
            setattr(moved.config, f"{role}_id", getattr(new_tokenizer, f"{role}_id"))
    return moved, report


def load_code_embeddings(
    model: PreTrainedModel,
    table: CodeEmbeddings,
    tokenizer: EhrCodeTokenizer,
    *,
    freeze: bool = False,
    counts: Mapping[str, int] | None = None,
) -> TransferReport:
    """Starts the code embeddings of a model from static ones; rows of which nothing is known stay as they are.

    The vectors are scaled, all by one factor, to the size (root mean square) of the rows they replace: the rest of a
    model starts in proportion to its embeddings, and word2vec's are many times smaller than those of a GRU.

    Args:
        model: Any model of the package; changed in place. A tied decoder changes with the embeddings.
        table: The static embeddings, as wide as the model's.
        tokenizer: The model's tokenizer.
        freeze: Whether training leaves the code embeddings as they are: all rows, those of special tokens included.
            A saved model forgets this.
        counts: Code → occurrences in the data to come, for the report.

    Returns:
        How many codes got a vector of their own, an ancestor's, or none.

    Raises:
        ValueError: The width of the table or the size of the tokenizer is not that of the model.
    """
    _check_size(model, tokenizer, "tokenizer")
    weight = _code_embeddings(model).weight
    if table.dim != weight.shape[1]:
        raise ValueError(
            f"`table` must have vectors of {weight.shape[1]} numbers, the width of the model's code embeddings, got "
            f"{table.dim}. Make it again with `dim={weight.shape[1]}`."
        )
    matrix, known = table.for_tokenizer(tokenizer)
    with torch.no_grad():
        rows, vectors = torch.from_numpy(known), torch.from_numpy(matrix[known]).to(weight)
        size = vectors.square().mean().sqrt().clamp(min=torch.finfo(vectors.dtype).tiny)
        weight[rows] = vectors * (weight[rows].square().mean().sqrt() / size)
    if freeze:
        weight.requires_grad_(False)
    own = np.isin(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), table.codes)
    return _report(tokenizer, own, known, counts)


@dataclass
class _RowMove:
    """How rows of an old vocabulary become rows of a new one.

    Attributes:
        source: Old id of each new id, -1 for none, (new,).
        known: Old ids of codes, (codes,).
        noise: Standard deviation of what is added to the mean row.
        generator: Of that noise.
    """

    source: torch.Tensor
    known: torch.Tensor
    noise: float
    generator: torch.Generator

    def __call__(self, old: torch.Tensor) -> nn.Parameter:
        """(old, …) → (new, …), of the same kind; a vector, as a bias is, gets no noise."""
        fresh = (self.source < 0).to(old.device)
        rows = old.detach()[self.source.clamp(min=0).to(old.device)]
        rows[fresh] = old.detach()[self.known.to(old.device)].mean(dim=0)
        if old.ndim > 1:
            noise = torch.empty(int(fresh.sum()), *old.shape[1:]).normal_(0, self.noise, generator=self.generator)
            rows[fresh] += noise.to(rows)
        return nn.Parameter(rows, requires_grad=old.requires_grad)


def _replace_rows(model: PreTrainedModel, move: _RowMove) -> None:
    """Gives the code embeddings and the decoder over codes, where there is one, their new rows."""
    embeddings, decoder = _code_embeddings(model), cast(nn.Linear | None, model.get_output_embeddings())
    tied = decoder is not None and decoder.weight is embeddings.weight
    embeddings.weight = move(embeddings.weight)
    if decoder is not None:
        decoder.weight = embeddings.weight if tied else move(decoder.weight)
        decoder.out_features = len(move.source)
        if decoder.bias is not None:
            decoder.bias = move(decoder.bias)


def _plan(
    old: EhrCodeTokenizer, new: EhrCodeTokenizer, counts: Mapping[str, int] | None
) -> tuple[np.ndarray, TransferReport]:
    """The old id that each new id takes its row from, -1 for none, (new,) int64, and the report of it."""
    source = new.ids_in(old)
    own = np.isin(new.convert_ids_to_tokens(list(range(len(new)))), list(old.get_vocab()))
    return source, _report(new, own, source >= 0, counts)


def _report(
    tokenizer: EhrCodeTokenizer, own: np.ndarray, known: np.ndarray, counts: Mapping[str, int] | None
) -> TransferReport:
    """Counts codes, and occurrences where there are any, by their rows; ``own`` and ``known`` are (vocab,) bool."""
    code = np.ones(len(tokenizer), bool)
    code[tokenizer.all_special_ids] = False
    kept, backed_off = code & own, code & known & ~own
    report = TransferReport(int(code.sum()), int(kept.sum()), int(backed_off.sum()), int((code & ~known & ~own).sum()))
    if counts:
        ids, weights = tokenizer.codes_to_ids(list(counts)), np.array(list(counts.values()))
        report.occurrences = int(weights.sum())
        shares = [float(weights[(ids >= 0) & which[ids]].sum() / weights.sum()) for which in (kept, backed_off)]
        report.occurrences_kept, report.occurrences_from_ancestor = shares
    return report


def _code_embeddings(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _check_size(model: PreTrainedModel, tokenizer: EhrCodeTokenizer, name: str) -> int:
    """Rows of the model's code embeddings.

    Raises:
        ValueError: The tokenizer has another number of tokens.
    """
    rows = _code_embeddings(model).weight.shape[0]
    if len(tokenizer) != rows:
        raise ValueError(
            f"`{name}` must be the model's own, with {rows} tokens, got {len(tokenizer)}. Load it from the folder of "
            "the model."
        )
    return rows


def _load(folder: str) -> Any:
    """A saved model as an object of its own class, heads included.

    Raises:
        EhrDataError: Its class is none of this package.
    """
    names = AutoConfig.from_pretrained(folder).architectures or ["unknown"]
    if names[0] not in hf_ehr.__all__:
        raise EhrDataError(f"`model` must hold a model of this package, got the architecture {names[0]} in {folder}.")
    return getattr(hf_ehr, names[0]).from_pretrained(folder)


__all__ = ["TransferArguments", "TransferReport", "load_code_embeddings", "move_to_vocabulary", "transfer"]

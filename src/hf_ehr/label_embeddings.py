"""Label vectors from the descriptions of codes (BERT-XML, §3.3.2): a rare code starts where its words are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tqdm.auto import tqdm

from hf_ehr import ontology
from hf_ehr.models.code_hierarchy import ancestors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_ehr.models.modeling_ehrbert import EhrBertForICDCoding

LabelInit = Literal["final_layer", "word_embeddings", "parent_sum", "random"]
_BATCH = 64  # descriptions that are encoded at a time
_LENGTH = 128  # most tokens of one


@dataclass(frozen=True)
class LabelInitReport:
    """Where the label vectors start.

    Attributes:
        labels: Labels of the model.
        described: Labels with a description of their own.
        from_ancestor: Labels that took the description of their nearest named ancestor.
        random: Labels that keep their random start: without a description, or of which the tokenizer knows no word.
    """

    labels: int
    described: int
    from_ancestor: int
    random: int

    def __str__(self) -> str:
        return (
            f"{self.labels:,} label vectors: {self.described:,} from their description, {self.from_ancestor:,} from "
            f"an ancestor's, {self.random:,} random."
        )


def label_descriptions(codes: Sequence[str]) -> list[str | None]:
    """English names of codes, offline; one without a name takes that of its nearest named ancestor.

    Names of ICD-10-CM categories need `simple-icd-10-cm` (extra `icd10`); without it a category takes its block's.

    Args:
        codes: ``VOCABULARY/CODE``.

    Returns:
        One name per code, ``None`` where nothing above the code has a name either.
    """
    lines = [_line(code) for code in codes]
    names = _names([code for line in lines for code in line])
    return [next((names[code] for code in line if names[code] is not None), None) for line in lines]


def init_label_embeddings(
    model: EhrBertForICDCoding,
    tokenizer: PreTrainedTokenizerBase,
    method: LabelInit = "final_layer",
    *,
    descriptions: Mapping[str, str] | None = None,
) -> LabelInitReport:
    """Starts the label vectors of a model from descriptions of its codes; they are then trained like all else.

    A vector is the mean over the description's tokens, special ones left out, of what label attention would compare a
    label with (the states behind its norm and projection, where it has them).

    Args:
        model: With label attention; changed in place.
        tokenizer: The model's.
        method: ``final_layer``: contextual states of the last layer (the paper's; it does not name the layer).
            ``word_embeddings``: token embeddings. ``parent_sum``: ``final_layer`` summed over the code and its named
            ancestors, over their number, so that siblings start near each other. ``random``: nothing is changed.
        descriptions: Label name → text; by default `config.label_descriptions` and, for the others,
            :func:`label_descriptions`.

    Raises:
        ValueError: ``method`` is not known, or the model has no label vectors.
    """
    if method not in get_args(LabelInit):
        raise ValueError(f"`method` must be one of {', '.join(get_args(LabelInit))}, got {method!r}.")
    labels = [model.config.id2label[index] for index in range(model.num_labels)]
    vectors = model.label_embeddings.detach().clone()
    if method == "random":
        return LabelInitReport(len(labels), 0, 0, len(labels))
    texts, own = _texts(labels, descriptions, model.config.label_descriptions or {})
    sources: list[list[str]] = [[text] if text else [] for text in texts]
    if method == "parent_sum":
        sources = [list(dict.fromkeys(mine + above)) for mine, above in zip(sources, _above(labels), strict=True)]
    encoded = _encode(model, tokenizer, sorted({text for row in sources for text in row}), method == "word_embeddings")
    known = [[encoded[text] for text in row if text in encoded] for row in sources]
    for index, row in enumerate(known):
        if row:
            vectors[index] = torch.stack(row).mean(0)
    model.set_label_embeddings(vectors)
    described = sum(bool(row) and mine for row, mine in zip(known, own, strict=True))
    found = sum(map(bool, known))
    return LabelInitReport(len(labels), described, found - described, len(labels) - found)


def _texts(
    labels: Sequence[str], descriptions: Mapping[str, str] | None, of_the_model: Mapping[str, str]
) -> tuple[list[str | None], list[bool]]:
    """The text of each label, and whether it is its own and not an ancestor's."""
    if descriptions is not None:
        return [descriptions.get(label) for label in labels], [True] * len(labels)
    names, public = _names(labels), label_descriptions(labels)
    texts = [of_the_model.get(label, text) for label, text in zip(labels, public, strict=True)]
    return texts, [label in of_the_model or names[label] is not None for label in labels]


def _above(labels: Sequence[str]) -> list[list[str]]:
    """The names of all named ancestors of each label."""
    lines = [_line(label)[1:] for label in labels]
    names = _names([code for line in lines for code in line])
    return [[name for code in line if (name := names[code])] for line in lines]


def _line(code: str) -> list[str]:
    """A code and all above it, nearest first."""
    ranges = [name for above in (ontology.block, ontology.chapter) for name in above([code]) if name is not None]
    return [code, *ancestors(code), *ranges]


def _names(codes: Sequence[str]) -> dict[str, str | None]:
    distinct = list(dict.fromkeys(codes))
    tree = any(code.startswith("ICD10CM/") for code in distinct) and find_spec("simple_icd_10_cm") is not None
    return dict(zip(distinct, ontology.describe(distinct, non_billable=tree), strict=True))


@torch.no_grad()
def _encode(model: Any, tokenizer: Any, texts: Sequence[str], embeddings: bool) -> dict[str, torch.Tensor]:
    """The vector of each text that has a token the tokenizer knows."""
    vectors, training = {}, model.training
    model.eval()
    starts = range(0, len(texts), _BATCH)
    for start in tqdm(starts, desc="Describing labels", unit="batch", disable=len(starts) < 8):
        batch = list(texts[start : start + _BATCH])
        inputs = tokenizer(
            batch, padding=True, truncation=True, max_length=_LENGTH, return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if embeddings:
            states = model.get_input_embeddings()(ids)
        else:
            outputs = model.encode(ids, mask, inputs.get("token_type_ids"), None, None, None)
            states = outputs.last_hidden_state
        own = mask.bool() & ~inputs["special_tokens_mask"].bool() & (ids != tokenizer.unk_token_id)
        keys = model.head.keys(states) * own[..., None]
        means = keys.sum(1) / own.sum(1, keepdim=True).clamp(min=1)
        vectors.update({text: mean for text, mean, some in zip(batch, means, own.any(1), strict=True) if some})
    model.train(training)
    return vectors

"""Label vectors from the descriptions of codes (BERT-XML, §3.3.2): a rare code starts where its words are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tqdm.auto import tqdm

from hf_ehr import ontology

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
            :func:`hf_ehr.ontology.nearest_name`.

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
    names, public = ontology.known_names(labels), ontology.nearest_name(labels)
    texts = [of_the_model.get(label, text) for label, text in zip(labels, public, strict=True)]
    return texts, [label in of_the_model or names[label] is not None for label in labels]


def _above(labels: Sequence[str]) -> list[list[str]]:
    """The names of all named ancestors of each label."""
    lines = [ontology.lineage(label)[1:] for label in labels]
    names = ontology.known_names([code for line in lines for code in line])
    return [[name for code in line if (name := names[code])] for line in lines]


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

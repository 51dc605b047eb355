"""The admission level of MedHMP: sets of codes, any number of stays and a note → four tokens, and their fusion."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .modeling_medhmp_stay import TokenFusion
from .modeling_note_encoder import given_vectors


class CodeSetEncoder(nn.Module):
    """A set of codes → Linear, LN, ReLU, Linear, LN, ReLU of its indicators (Eq 5), which are never made."""

    def __init__(self, vocab_size: int, pad_token_id: int, hidden_size: int, layer_norm_eps: float):
        super().__init__()
        self.pad_token_id = pad_token_id
        self.embeddings = nn.EmbeddingBag(vocab_size, hidden_size, mode="sum", padding_idx=pad_token_id)
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dense_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (sets, codes), padded, in any order → (sets, hidden). A code that stands twice counts once."""
        ids = ids.sort(dim=1).values
        again = nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0)) if ids.shape[1] else ids.bool()
        states = self.embeddings(ids.masked_fill(again, self.pad_token_id)) + self.bias
        return self.dense_norm(self.dense(self.norm(states).relu())).relu()


class StayPooling(nn.Module):
    """The stays of admissions → one token each, as `config.stay_pooling` says."""

    def __init__(self, config):
        super().__init__()
        self.mode, self.max_stays = config.stay_pooling, config.max_stays
        hidden = config.hidden_size
        if self.mode == "attention":
            self.query = nn.Linear(hidden, 1, bias=False)
        self.projection = nn.Linear(hidden * (self.max_stays if self.mode == "concat" else 1), hidden)
        norm = config.stay_projection != "linear"
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps) if norm else nn.Identity()
        self.activation = nn.ReLU() if config.stay_projection == "linear_norm_relu" else nn.Identity()

    def forward(self, states: torch.Tensor, admissions: torch.Tensor, count: int) -> torch.Tensor:
        """States (stays, hidden) and the admission of each (stays,), ascending → (count, hidden)."""
        if self.mode == "concat":
            pooled = self._concatenated(states, admissions, count)
        else:
            weights = self._weights(states, admissions, count)
            pooled = states.new_zeros(count, states.shape[1])
            pooled = pooled.index_add(0, admissions, states * weights[:, None].to(states.dtype))
        return self.activation(self.norm(self.projection(pooled)))

    def _weights(self, states, admissions, count: int) -> torch.Tensor:
        """(stays,) in fp32, summing to 1 over the stays of an admission."""
        scores = states.new_zeros(len(states), dtype=torch.float32)
        if self.mode == "attention":
            scores = self.query(states)[:, 0].float()
        greatest = scores.new_zeros(count).scatter_reduce(0, admissions, scores, "amax", include_self=False)
        weights = (scores - greatest.detach()[admissions]).exp()
        return weights / weights.new_zeros(count).index_add(0, admissions, weights)[admissions]

    def _concatenated(self, states, admissions, count: int) -> torch.Tensor:
        """The last `max_stays` of each admission side by side, (count, max_stays × hidden), zeros behind them."""
        counts = admissions.bincount(minlength=count)
        order = torch.arange(len(states), device=states.device) - (counts.cumsum(0) - counts)[admissions]
        slots = order - (counts - self.max_stays).clamp(min=0)[admissions]
        kept = slots >= 0
        slots = admissions[kept] * self.max_stays + slots[kept]
        flat = states.new_zeros(count * self.max_stays, states.shape[1]).index_copy(0, slots, states[kept])
        return flat.view(count, -1)


class NoteProjection(nn.Module):
    """Vectors of notes (notes, note_size) → one token each, (notes, hidden): Linear, LN, ReLU."""

    def __init__(self, config):
        super().__init__()
        self.projection = nn.Linear(config.note_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(notes, note_size) → (notes, hidden)."""
        return self.norm(self.projection(vectors.to(self.projection.weight.dtype))).relu()


class Modalities(NamedTuple):
    """The tokens of admissions, in the order stays, diagnoses, medications, note."""

    tokens: torch.Tensor
    """(admissions, 4, hidden), a learned token where a modality is missing."""
    present: torch.Tensor
    """(admissions, 4) bool."""


class AdmissionEncoder(nn.Module):
    """Stays, codes and note of admissions → tokens, and their fusion, a of Eq 7."""

    def __init__(self, config):
        super().__init__()
        size = (config.hidden_size, config.layer_norm_eps)
        self.stays = StayPooling(config)
        self.diagnoses = CodeSetEncoder(config.diagnosis_vocab_size, config.diagnosis_pad_token_id, *size)
        self.medications = CodeSetEncoder(config.medication_vocab_size, config.medication_pad_token_id, *size)
        self.note = None if config.note_size is None else NoteProjection(config)
        self.missing = nn.Parameter(torch.empty(4, config.hidden_size))
        self.fusion = TokenFusion(config)

    def modalities(self, parts) -> Modalities:
        """Tokens (admissions, hidden) and which are there (admissions,), of the four modalities → one tensor each."""
        tokens = torch.stack([token.to(self.missing.dtype) for token, _ in parts], dim=1)
        present = torch.stack([there for _, there in parts], dim=1)
        return Modalities(torch.where(present[..., None], tokens, self.missing), present)

    def pooled(self, states, there, owners, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States of stays (stays, hidden) → tokens (count, hidden) of those `there`, and which admissions have one."""
        owners = owners[there]
        return self.stays(states[there], owners, count), owners.bincount(minlength=count) > 0

    def notes(self, count: int, note_vectors=None, note_mask=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of notes → tokens (count, hidden), and which admissions have one.

        Raises:
            ValueError: The model reads no notes, or vectors are not as wide as it reads them.
        """
        if self.note is None:
            if note_vectors is not None:
                raise ValueError("A model with `note_size=None` reads no notes, got some. Leave them out.")
            return self.missing.new_zeros(count, self.missing.shape[1]), self.missing.new_zeros(
                count, dtype=torch.bool
            )
        size = self.note.projection.in_features
        if note_vectors is None:
            note_vectors, note_mask = self.missing.new_zeros(count, size), self.missing.new_zeros(count)
        vectors, there = given_vectors(note_vectors, note_mask, size)
        return self.note(vectors), there

    def codes(self, kind: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (admissions, codes) → tokens (admissions, hidden), and which admissions have a code."""
        encoder = getattr(self, kind)
        return encoder(ids), (ids != encoder.pad_token_id).any(dim=1)

    def replaced(self, modalities: Modalities, column: int, token, present) -> Modalities:
        """The same admissions with another token (admissions, hidden) of one modality."""
        tokens = torch.where(present[:, None], token.to(self.missing.dtype), self.missing[column])
        columns, there = list(modalities.tokens.unbind(1)), list(modalities.present.unbind(1))
        columns[column], there[column] = tokens, present
        return Modalities(torch.stack(columns, dim=1), torch.stack(there, dim=1))

    def forward(self, modalities: Modalities, without: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuses the tokens; those that are missing are pooled, which tells that they are, but not looked at.

        Args:
            modalities: The tokens.
            without: A modality that is left out altogether.

        Returns:
            (admissions, hidden), and the attention weights (admissions, heads, 4, 4).
        """
        pooled = torch.ones_like(modalities.present)
        present = modalities.present
        if without is not None:
            pooled[:, without] = False
            present = present & pooled
        return self.fusion(modalities.tokens, present, pooled)


def owners_of_stays(lengths: list[int], stay_hours, stay_admissions) -> tuple[int, torch.Tensor | None]:
    """How many admissions a batch has, and the admission of each stay (stays,), `None` where there are no stays.

    Args:
        lengths: Rows of every input that has one row an admission.
        stay_hours: (stays,), or `None`.
        stay_admissions: (stays,) ascending; `None` for one stay an admission.

    Raises:
        ValueError: The inputs differ in their admissions, or a stay is of none of them.
    """
    stays = 0 if stay_hours is None else len(stay_hours)
    if stay_hours is not None and stay_admissions is None:
        lengths = [*lengths, stays]
        stay_admissions = torch.arange(stays, device=stay_hours.device)
    if not lengths:
        lengths = [int(stay_admissions[-1]) + 1 if stay_admissions is not None and stays else 0]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"All modalities of a batch must have as many rows as admissions, got {lengths}. Give `stay_admissions` "
            "where admissions have any number of stays, and rows of padding where they lack codes or a note."
        )
    if stays and (
        stay_admissions.shape != (stays,)
        or (stay_admissions.diff() < 0).any()
        or stay_admissions[0] < 0
        or stay_admissions[-1] >= lengths[0]
    ):
        raise ValueError(
            f"`stay_admissions` must hold one ascending number below {lengths[0]} for each of the {stays} stays. Keep "
            "the stays in the order of their admissions."
        )
    return lengths[0], stay_admissions


@torch.no_grad()
def init_layer(module: nn.Module) -> None:
    """PyTorch's own start, which the authors trained from, for `_init_weights`."""
    if isinstance(module, nn.RNNBase):
        for weight in module.parameters():
            init.uniform_(weight, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
    if isinstance(module, nn.Linear):
        init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
    if isinstance(module, CodeSetEncoder):  # a linear layer over indicators
        bound = module.embeddings.num_embeddings**-0.5
        init.uniform_(module.embeddings.weight, -bound, bound)
        init.uniform_(module.bias, -bound, bound)
    if isinstance(module, AdmissionEncoder):
        init.normal_(module.missing)

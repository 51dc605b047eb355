"""MedHMP checkpoints carried over: to the next stage, to other features, to a text encoder, to models of visits."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from .configuration_medhmp import MedHMPConfig
from .modeling_ehrrnn import VisitMlp
from .modeling_medhmp import MedHMPModel, MedHMPStayModel
from .modeling_medhmp_admission import CodeSetEncoder
from .modeling_note_encoder import opened_note_encoder, put_note_encoder
from .tokenization_ehr import EhrCodeTokenizer

_FEATURE_WEIGHTS = (
    "stay_encoder.hourly.input_lstm.weight_ih_l0",
    "stay_encoder.demographics.0.weight",
    "decoder.output.weight",
    "decoder.output.bias",
)
"""Tensors that have one row or column for each feature."""


class FeatureTransfer(NamedTuple):
    """What became of the tensors of a model that was moved to other features."""

    kept: list[str]
    fresh: list[str]


def load_stage(model: PreTrainedModel, folder: str | Path) -> list[str]:
    """Fills the encoders of a model with those of a checkpoint of an earlier stage, every tensor of them.

    `from_pretrained` on such a folder does the same for a model that is made anew.

    Args:
        model: Any MedHMP model; changed in place.
        folder: Where any MedHMP model was saved: of the level of stays, or of admissions, which fills both encoders.

    Returns:
        Names of the tensors that were filled.

    Raises:
        ValueError: The checkpoint lacks a tensor, or one has another shape than in the model. Nothing is changed.
    """
    stays_only = _is_stay_level(folder)
    source = _encoders(MedHMPStayModel if stays_only else MedHMPModel, folder)
    found, targets = source.state_dict(), dict(model.base_model.state_dict())
    parts = ("stay_encoder.",) if stays_only else ("stay_encoder.", "admission_encoder.")
    names = [name for name in targets if name.startswith(parts)]
    unlike = [name for name in names if name not in found or found[name].shape != targets[name].shape]
    if unlike:
        raise ValueError(
            f"The encoders of the checkpoint must be of the model's shape, these are not: {unlike}. Make the model "
            "with the configuration of the checkpoint; `with_new_features` moves it to other features."
        )
    with torch.no_grad():
        for name in names:
            targets[name].copy_(found[name])
    return names


def load_hourly_encoder(model: Any, folder: str | Path) -> list[str]:
    """Starts a unimodal model of stays from the pre-trained encoder of hours (Figure 4 of the paper).

    Args:
        model: An [`EhrSeriesModel`] or its classifier with `medhmp_encoder=True`; changed in place.
        folder: Where a MedHMP model of either level was saved.

    Returns:
        Names of the tensors of the encoder, all of which were filled.

    Raises:
        ValueError: The model has no such encoder, the checkpoint lacks a tensor, or one has another shape. Nothing is
            changed.
    """
    hours = getattr(model.base_model.network, "hours", None)
    if hours is None:
        raise ValueError("`model` must have `medhmp_encoder=True`, got False. Make it with it.")
    source = _encoders(MedHMPStayModel if _is_stay_level(folder) else MedHMPModel, folder).stay_encoder.hourly
    found, targets = source.state_dict(), hours.state_dict()
    unlike = [name for name, weight in targets.items() if found[name].shape != weight.shape]
    if unlike or hours.norm.eps != source.norm.eps:
        raise ValueError(
            f"`model` must have the sizes of the checkpoint, these differ: {unlike or ['layer_norm_eps']}. Make it "
            "with its `num_hourly_features`, `hidden_size` and `layer_norm_eps`."
        )
    hours.load_state_dict(found)
    return list(found)


def load_code_encoder(
    rnn: Any, folder: str | Path, source_tokenizer: EhrCodeTokenizer, tokenizer: EhrCodeTokenizer
) -> np.ndarray:
    """Starts the MLP over the diagnoses of a visit from the pre-trained one of an admission (Table 4 of the paper).

    Rows of codes go over by code: one that the checkpoint does not know takes the row of its nearest known ancestor,
    one without any keeps its own. All else is taken over as it is.

    Args:
        rnn: An [`EhrRnnModel`] or its classifier with `visit_encoder="mlp"` and `embedding_size` as the checkpoint's
            `hidden_size`; changed in place.
        folder: Where a MedHMP model of the level of admissions was saved.
        source_tokenizer: The tokenizer of the checkpoint's diagnoses.
        tokenizer: That of `rnn`; may be the same one.

    Returns:
        (vocabulary,) int64, the row of the checkpoint that each id of `tokenizer` took, -1 where it kept its own.

    Raises:
        ValueError: The checkpoint lacks the encoder, a size differs, or no code is shared. Nothing is changed.
    """
    if _is_stay_level(folder):
        raise ValueError(f"`folder` must hold a model of admissions, got one of stays in {folder}. Run stage 2 first.")
    source: CodeSetEncoder = _encoders(MedHMPModel, folder).admission_encoder.diagnoses
    table, mlp = rnn.get_input_embeddings().weight, rnn.base_model.embeddings.visit_encoder
    _check_visit_mlp(mlp, source)
    for name, given, size in (
        ("source_tokenizer", source_tokenizer, len(source.embeddings.weight)),
        ("tokenizer", tokenizer, len(table)),
    ):
        if len(given) != size:
            raise ValueError(f"`{name}` must be the model's own, with {size} tokens, got {len(given)}. Load that one.")
    rows = tokenizer.ids_in(source_tokenizer)
    if (np.delete(rows, tokenizer.all_special_ids) < 0).all():
        raise ValueError("`source_tokenizer` must know codes of `tokenizer`, got none in common. Check the order.")
    taken = torch.from_numpy(rows >= 0)
    with torch.no_grad():
        table[taken] = source.embeddings.weight[torch.from_numpy(rows)[taken]].to(table)
    mlp.load_state_dict({name: value for name, value in source.state_dict().items() if "embeddings" not in name})
    return rows


def with_new_features(
    model: Any, num_hourly_features: int, num_demographics: int, seed: int = 0
) -> tuple[Any, FeatureTransfer]:
    """A copy of a model that reads other features, e.g. those of another hospital (Table 11).

    The layers that have a weight for each feature start anew, also where the numbers are the same: another feature set
    has other columns. All else is kept.

    Args:
        model: Any MedHMP model; not changed.
        num_hourly_features: Features of an hour.
        num_demographics: Features of a patient.
        seed: Of the fresh weights.

    Returns:
        The copy, and which of its tensors are kept and which fresh.
    """
    config = copy.deepcopy(model.config)
    config.num_hourly_features, config.num_demographics = num_hourly_features, num_demographics
    names = _FEATURE_WEIGHTS + (("decoder.lstm.",) if config.decoder == "first_input" else ())
    fresh = [name for name in model.state_dict() if name.removeprefix("medhmp.").startswith(names)]
    moved = _copied(model, config, fresh, seed)
    return moved, FeatureTransfer([name for name in moved.state_dict() if name not in fresh], fresh)


def with_note_encoder(model: Any, encoder: str | Path | PreTrainedModel, seed: int = 0) -> Any:
    """A copy of a model whose notes go through a text encoder (BERT, ModernBERT, ClinicalT5, …).

    Args:
        model: A MedHMP model of the level of admissions; not changed.
        encoder: Name or folder of a checkpoint, opened in fp32, or a model, whose encoder becomes part of the copy
            (without its pooler).
        seed: Of the layer after it, which starts anew if the encoder's width is not `note_size`.

    Raises:
        ValueError: The model is not of that level, or `encoder` has a decoder too.
    """
    if not hasattr(model.base_model, "admission_encoder"):
        raise ValueError(f"`model` must be of the level of admissions, got {type(model).__name__}. It reads notes.")
    base = opened_note_encoder(encoder)
    config = copy.deepcopy(model.config)
    config.note_config, config.note_size = base.config, base.config.hidden_size
    old = model.base_model.admission_encoder.note
    same = old is not None and old.projection.in_features == config.note_size
    names = ("note_encoder.",) if same else ("note_encoder.", "admission_encoder.note.")
    fresh = [name for name in model.state_dict() if name.removeprefix("medhmp.").startswith(names)]
    moved = _copied(model, config, fresh, seed)
    put_note_encoder(moved, base)
    return moved.train(model.training)


def _is_stay_level(folder: str | Path) -> bool:
    """Whether the model in a folder reads stays alone."""
    return "Stay" in (MedHMPConfig.from_pretrained(folder).architectures or ["MedHMPModel"])[0]


def _encoders(kind: Any, folder: str | Path) -> Any:
    """The encoders of a checkpoint.

    Raises:
        ValueError: It lacks some of their tensors.
    """
    source, info = kind.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"The checkpoint must hold every tensor of its encoders, it lacks {sorted(info['missing_keys'])}. Load a "
            "folder that a MedHMP model was saved to."
        )
    return source


def _check_visit_mlp(mlp: Any, source: CodeSetEncoder) -> None:
    """Refuses a model of visits that would not compute what the checkpoint does."""
    if not isinstance(mlp, VisitMlp):
        raise ValueError(
            "`rnn` must have an MLP over visits, got none. Make it with level='visit', visit_encoder='mlp'."
        )
    sizes = [(len(encoder.bias), encoder.norm.eps) for encoder in (mlp, source)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`rnn` must have the width and epsilon of the checkpoint, {sizes[1]}, got {sizes[0]}. Make it with "
            f"embedding_size={sizes[1][0]}."
        )


def _copied(model: Any, config: MedHMPConfig, fresh: list[str], seed: int) -> Any:
    """A model of the same class with this configuration and all weights but `fresh`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        moved = type(model)(config)
    kept = {name: weight for name, weight in model.state_dict().items() if name not in fresh}
    moved.load_state_dict(kept, strict=False)
    return moved.to(model.device, model.dtype).train(model.training)

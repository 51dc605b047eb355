"""Tensors under transformers' or TensorFlow's names → transformers' own BERT → our model, each name in its place."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertConfig, BertForPreTraining

from hf_ehr.models.configuration_medbert import MedBertConfig
from hf_ehr.models.modeling_medbert import MedBertForPreTraining
from hf_ehr.schema import EhrDataError

Layout = Literal["transformers", "tensorflow"]

HEAD_DIM = 32
"""Width of a head in the paper, where no config says otherwise."""
SETTINGS = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")
"""What the tensors do not tell."""

_NO_WEIGHTS = re.compile(r"(^|[./])(global_step|adam_[mv]|beta[12]_power|position_ids)$")
_TENSORFLOW_NAMES = {
    "kernel": "weight", "gamma": "weight", "output_weights": "weight", "beta": "bias", "output_bias": "bias",
}  # fmt: skip
_DECODER = "cls.predictions.decoder"
_BIAS = "cls.predictions.bias"
_EMBEDDINGS = "bert.embeddings.{}_embeddings.weight"
_WORDS = _EMBEDDINGS.format("word")
_MODULES = {
    "bert.embeddings.word_embeddings": "model.embeddings.code_embeddings",
    "bert.embeddings.token_type_embeddings": "model.embeddings.visit_embeddings",
    "bert.embeddings.position_embeddings": "model.embeddings.serial_embeddings",
    "bert.embeddings.LayerNorm": "model.embeddings.norm",
    "bert.pooler.dense": "model.pooler",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.seq_relationship": "stay_classifier",
}
_LAYER_MODULES = {
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}


def weights_file(checkpoint: Path) -> Path:
    """The file of weights that is or lies in `checkpoint`.

    Raises:
        EhrDataError: There is none.
    """
    if checkpoint.is_dir():
        found = [checkpoint / name for name in ("model.safetensors", "pytorch_model.bin")]
        checkpoint = next((path for path in found if path.is_file()), found[0])
    if not checkpoint.is_file():
        raise EhrDataError(f"`checkpoint` must be a file of weights or a folder with one, {checkpoint} is missing.")
    return checkpoint


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor.

    Raises:
        EhrDataError: The file holds more than tensors (it is then refused, not unpickled) or cannot be read.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError):
        raise EhrDataError(
            f"`checkpoint` must hold tensors only, {path.name} does not: it is damaged, or unpickling it would run "
            "code. Save it as safetensors where it was made (for TensorFlow see hf_ehr.convert)."
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise EhrDataError(
            f"`checkpoint` must be a dict of name → tensor, {path.name} is not. Save `model.state_dict()` alone."
        )
    return tensors


def named_as_bert(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str], Layout]:
    """The weights in fp32 under transformers' names, the entries that are no weights, and whose names they had.

    Raises:
        EhrDataError: A weight is there twice.
    """
    ignored = sorted(name for name in tensors if _NO_WEIGHTS.search(name))
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(tensors.keys() - set(ignored)):
        new = _bert_name(name)
        if new in weights:
            raise EhrDataError(f"`checkpoint` must hold each weight once, got `{new}` under two names. Drop one.")
        # TensorFlow multiplies from the other side.
        weights[new] = (tensors[name].T if name.endswith("/kernel") else tensors[name]).float().contiguous()
    return weights, ignored, "tensorflow" if any("/" in name for name in tensors) else "transformers"


def _bert_name(name: str) -> str:
    """`bert/encoder/layer_0/output/LayerNorm/gamma` → `bert.encoder.layer.0.output.LayerNorm.weight`."""
    if "/" in name:
        name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name).replace("/", ".")
        name += ".weight" if name.endswith("_embeddings") else ""
    stem, dot, last = name.rpartition(".")
    return stem + dot + _TENSORFLOW_NAMES.get(last, last)


def bert_with(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any], layout: Layout) -> BertForPreTraining:
    """transformers' own model with these weights.

    Raises:
        EhrDataError: A key is missing or unexpected, shapes disagree with each other or with `settings`.
    """
    numbers = [int(found[1]) for name in weights if (found := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))]
    layers = max(numbers, default=0) + 1
    smallest: dict[str, Any] = {"vocab_size": 2, "hidden_size": 2, "num_attention_heads": 1, "intermediate_size": 2}
    _check_names(set(weights), set(BertForPreTraining(BertConfig(num_hidden_layers=layers, **smallest)).state_dict()))
    decoder = {_DECODER + ".weight": weights[_WORDS], _DECODER + ".bias": weights[_BIAS]}
    weights = decoder | dict(weights)
    bert = BertForPreTraining(_bert_config(weights, layers, settings, layout))
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected.shape)}"
        for name, expected in bert.state_dict().items()
        if weights[name].shape != expected.shape
    ]
    if wrong:
        raise EhrDataError(f"`checkpoint` must have the shapes of one model, got {_some(wrong)}. Check the export.")
    if not torch.equal(weights[_DECODER + ".bias"], weights[_BIAS]):
        raise EhrDataError(f"`{_DECODER}.bias` must equal `{_BIAS}`, it does not. Drop the wrong one.")
    bert.load_state_dict(weights)
    return bert.eval()


def _check_names(found: set[str], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - found - {_DECODER + ".weight", _DECODER + ".bias"}), found - expected
    problems = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    problems += [f"{len(unexpected)} unexpected ({_some(sorted(unexpected))})"] if unexpected else []
    if problems:
        raise EhrDataError(
            f"`checkpoint` must have the keys of BertForPreTraining, got {' and '.join(problems)}. Export the whole "
            "pre-training model and nothing else."
        )


def _bert_config(
    weights: Mapping[str, torch.Tensor], layers: int, settings: Mapping[str, Any], layout: Layout
) -> BertConfig:
    """The sizes of the tensors with the settings of the config; both must agree."""
    fields: dict[str, Any] = {
        "vocab_size": weights[_WORDS].shape[0],
        "hidden_size": weights[_WORDS].shape[-1],
        "num_hidden_layers": layers,
        "intermediate_size": weights["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": weights[_EMBEDDINGS.format("position")].shape[0],
        "type_vocab_size": weights[_EMBEDDINGS.format("token_type")].shape[0],
    }
    for name, size in fields.items():
        if settings.get(name, size) != size:
            raise EhrDataError(
                f"`{name}` of `config` must be {size} as in the weights, got {settings[name]}. Take their own config."
            )
    heads = settings.get("num_attention_heads", fields["hidden_size"] // HEAD_DIM)
    if not isinstance(heads, int) or heads < 1 or fields["hidden_size"] % heads:
        raise EhrDataError(
            f"`num_attention_heads` must divide the width {fields['hidden_size']}, got {heads}. Pass their `config`."
        )
    fields |= {name: settings[name] for name in SETTINGS if name in settings}
    if fields.get("hidden_act", "gelu") == "gelu" and (layout == "tensorflow" or "hidden_act" not in settings):
        fields["hidden_act"] = "gelu_pytorch_tanh"
    tied = torch.equal(weights[_DECODER + ".weight"], weights[_WORDS])
    return BertConfig(num_attention_heads=heads, pad_token_id=0, tie_word_embeddings=tied, **fields)


def medbert_with(bert: BertForPreTraining) -> MedBertForPreTraining:
    """Our model with the weights of `bert`."""
    theirs, config = bert.state_dict(), bert.config
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "tie_word_embeddings", *SETTINGS)  # fmt: skip
    fields = {name: getattr(config, name) for name in same}
    model = MedBertForPreTraining(MedBertConfig.code_exact(max_visits=config.type_vocab_size, **fields))
    modules = {_DECODER: "head.decoder", **_MODULES}
    ours = {}
    for index in range(config.num_hidden_layers):
        source, target = f"bert.encoder.layer.{index}.", f"model.encoder.layers.{index}."
        modules |= {source + one: target + other for one, other in _LAYER_MODULES.items()}
        for name in ("weight", "bias"):
            parts = [theirs[f"{source}attention.self.{part}.{name}"] for part in ("query", "key", "value")]
            ours[f"{target}attention.qkv.{name}"] = torch.cat(parts)
    for one, other in modules.items():
        names = [f".{name}" for name in ("weight", "bias") if f"{one}.{name}" in theirs]
        ours |= {other + name: theirs[one + name] for name in names}
    model.load_state_dict(ours)
    return model.eval()


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Models of visits, new or on the weights of an earlier stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from hf_ehr._encoders import table_positions
from hf_ehr.models.configuration_gbert import GBertConfig
from hf_ehr.models.configuration_medmplm import MedMPLMConfig
from hf_ehr.models.modeling_gbert import GBertForMedicationRecommendation, GBertForPreTraining, GBertModel
from hf_ehr.models.modeling_medmplm import (
    MedMPLMForICDCoding,
    MedMPLMForMedicationRecommendation,
    MedMPLMForPreTraining,
    MedMPLMForReadmission,
    MedMPLMModel,
)
from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.training._runs import PRETRAIN_FILE, json_options

if TYPE_CHECKING:
    from hf_ehr.training.visits import VisitFinetuneArguments, VisitPretrainArguments

ARCHITECTURES = ("medmplm", "gbert")


def new_visit_model(options: VisitPretrainArguments, processor: MedMPLMProcessor, seed: int) -> Any:
    """A model to pre-train, its sizes and trees those of the vocabularies.

    Raises:
        ValueError: An option is not known, or the text encoder reads fewer tokens than `note_max_length`.
    """
    torch.manual_seed(seed)
    fields = json_options(options.model_options, "model_options")
    tokens = [
        tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        for tokenizer in processor.code_tokenizers.values()
    ]
    heads = {"num_attention_heads": 2} if options.preset == "paper" else {}
    sizes = {"hidden_size": 32, "intermediate_size": 32} if options.preset == "tiny" else heads
    if options.architecture == "gbert":
        return GBertForPreTraining(GBertConfig.from_vocabularies(*tokens, **(sizes | fields)))
    codes = GBertConfig.from_vocabularies(*tokens, **(sizes | fields.pop("code_config", {})))
    preset: Any = {"base": MedMPLMConfig, "paper": MedMPLMConfig.paper, "tiny": MedMPLMConfig.tiny}[options.preset]
    if options.note_encoder is None:
        fields = {"note_config": _new_text(preset, options, processor, fields.pop("note_config", {}))} | fields
        if processor.note_tokenizer is None:
            fields["freeze_note_layers"] = None
        return MedMPLMForPreTraining(preset(code_config=codes, **fields))
    if options.preset == "paper":
        paper = MedMPLMConfig.paper()
        names = ("freeze_note_layers", "pretraining_loss", "target_text")
        fields = {name: getattr(paper, name) for name in names} | fields
    model = MedMPLMForPreTraining.from_note_encoder(options.note_encoder, code_config=codes, **fields)
    room_left = table_positions(model.base_model.note_encoder)
    if room_left is not None and room_left < options.note_max_length:
        raise ValueError(
            f"`note_max_length` must be at most the text encoder's {room_left}, got {options.note_max_length}."
        )
    return model


def _new_text(preset: Any, options: VisitPretrainArguments, processor: MedMPLMProcessor, given: dict) -> dict:
    """Configuration of a new text encoder: that of the preset, in the words of the processor."""
    words = processor.note_tokenizer
    if words is None:  # nothing reads notes: the smallest that the model can have
        return MedMPLMConfig.tiny().note_config.to_dict() | {"vocab_size": 8}
    if "model_type" not in given:
        given = preset().note_config.to_dict() | given
    sizes = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    return given | sizes | {"max_position_embeddings": options.note_max_length}


def visit_processor(options: VisitFinetuneArguments) -> MedMPLMProcessor:
    """The processor of `options.model`; without notes for G-BERT."""
    processor = MedMPLMProcessor.from_pretrained(options.model)
    if architecture_of(options) == "gbert":
        return MedMPLMProcessor(*processor.code_tokenizers.values())
    return processor


def new_visit_classifier(options: VisitFinetuneArguments, names: Sequence[str], seed: int) -> Any:
    """A classifier on the weights of `options.model`; under `untrained` only its text encoder is taken.

    Raises:
        ValueError: G-BERT is asked for another task than recommendation, or does not fit the model.
    """
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)},
    }  # fmt: skip
    if architecture_of(options) == "gbert":
        return _new_gbert(options, fields)
    if options.setting == "recommendation":
        fields["target_text"] = options.target_text
    if options.setting == "coding":
        fields["problem_type"] = "multi_label_classification"
    kinds: dict[str, Any] = {
        "recommendation": MedMPLMForMedicationRecommendation,
        "admission": MedMPLMForReadmission,
        "coding": MedMPLMForICDCoding,
    }
    model = kinds[options.setting].from_pretrained(options.model, **fields)
    if options.untrained:
        fresh = kinds[options.setting](model.config)
        text = _text_encoder(options)
        if text is not None:
            fresh.base_model.note_encoder.load_state_dict(text.state_dict())
        fresh.tie_weights()
        return fresh
    return model


def _text_encoder(options: VisitFinetuneArguments) -> Any:
    """The text encoder that pre-training began with; None where it was new too."""
    path = Path(options.model) / PRETRAIN_FILE
    name = json.loads(path.read_text()).get("note_encoder") if path.is_file() else None
    if name is None:
        return None
    config = MedMPLMConfig.from_pretrained(options.model)
    small = {"note_pooling": config.note_pooling, "code_config": GBertConfig.tiny()}
    return MedMPLMModel.from_note_encoder(name, **small).note_encoder


def _new_gbert(options: VisitFinetuneArguments, fields: dict[str, Any]) -> GBertForMedicationRecommendation:
    if options.setting != "recommendation" or options.target_text != "none":
        raise ValueError(f"G-BERT recommends medications and reads no notes, got the task {options.task!r}.")
    kind = PreTrainedConfig.get_config_dict(options.model)[0].get("model_type")
    if kind == GBertConfig.model_type:
        model = GBertForMedicationRecommendation.from_pretrained(options.model, **fields)
        return GBertForMedicationRecommendation(model.config) if options.untrained else model
    codes: Any = MedMPLMConfig.from_pretrained(options.model).code_config
    model = GBertForMedicationRecommendation(GBertConfig.from_dict(codes.to_dict() | fields))
    if not options.untrained:
        take_code_encoder(model.gbert, options.model)
    return model


def take_code_encoder(gbert: GBertModel, medmplm: str) -> None:
    """Puts the code encoder of a MedM-PLM into G-BERT (Table VI of the paper): every tensor, or none.

    Args:
        gbert: What receives it.
        medmplm: Folder or Hub id of any MedM-PLM that reads diagnoses.

    Raises:
        ValueError: A tensor is missing in one of the two, or of another shape; or the trees of the codes differ.
    """
    loaded: Any = MedMPLMModel.from_pretrained(medmplm, output_loading_info=True)
    source, info = loaded
    missing = sorted(name for name in info["missing_keys"] if name.startswith("code_encoder."))
    mine, theirs = gbert.state_dict(), source.code_encoder.state_dict()
    trees = {name for name, _ in gbert.named_buffers()}
    unlike = sorted(
        name
        for name in mine.keys() | theirs.keys()
        if _shape(mine, name) != _shape(theirs, name) or (name in trees and not torch.equal(mine[name], theirs[name]))
    )
    if missing or unlike:
        raise ValueError(
            f"`model` must have all tensors of G-BERT in the same shapes, and its trees; {len(missing)} are missing "
            f"and {len(unlike)} differ: {[*missing, *unlike][:5]}. Take a pre-trained MedM-PLM, and its code_config."
        )
    gbert.load_state_dict(theirs, strict=True)


def _shape(state: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def architecture_of(options: VisitFinetuneArguments) -> str:
    """`medmplm` or `gbert`.

    Raises:
        ValueError: The option is not known, or the folder holds neither.
    """
    if options.architecture is not None and options.architecture not in ARCHITECTURES:
        raise ValueError(f"`architecture` must be one of {', '.join(ARCHITECTURES)}, got {options.architecture!r}.")
    kind = PreTrainedConfig.get_config_dict(options.model)[0].get("model_type")
    own = {GBertConfig.model_type: "gbert", MedMPLMConfig.model_type: "medmplm"}.get(kind or "")
    if own is None or (own, options.architecture) == ("gbert", "medmplm"):
        raise ValueError(f"`model` must be a pre-trained MedM-PLM or G-BERT, got model type {kind!r}.")
    return options.architecture or own

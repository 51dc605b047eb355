"""Models of visits, new or on the weights of an earlier stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_ehr.models.any_encoder import table_positions
from hf_ehr.models.configuration_ehrconcat import EhrConcatConfig
from hf_ehr.models.configuration_ehrtext import EhrTextConfig
from hf_ehr.models.configuration_gbert import TINY_SIZES, GBertConfig
from hf_ehr.models.configuration_medbert import MedBertConfig
from hf_ehr.models.configuration_medmplm import MedMPLMConfig
from hf_ehr.models.configuration_visitrnn import VisitRnnConfig
from hf_ehr.models.modeling_ehrconcat import EhrConcatForMedicationRecommendation, EhrConcatForSequenceClassification
from hf_ehr.models.modeling_ehrtext import EhrTextForICDCoding
from hf_ehr.models.modeling_gbert import GBertForMedicationRecommendation, GBertForPreTraining, GBertModel
from hf_ehr.models.modeling_medbert import MedBertModel
from hf_ehr.models.modeling_medmplm import (
    MedMPLMForICDCoding,
    MedMPLMForMedicationRecommendation,
    MedMPLMForPreTraining,
    MedMPLMForReadmission,
    MedMPLMModel,
)
from hf_ehr.models.modeling_visitrnn import VisitRnnForMedicationRecommendation
from hf_ehr.models.processing_medmplm import MedMPLMProcessor
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.training._runs import PRETRAIN_FILE, check_config_fields, config_options

if TYPE_CHECKING:
    from hf_ehr.training.visit_baselines import VisitBaselineArguments
    from hf_ehr.training.visits import VisitFinetuneArguments, VisitPretrainArguments

ARCHITECTURES = ("medmplm", "gbert")
VISIT_READERS = {
    "rnn": ("codes",),
    "gbert": ("gbert",),
    "medbert": ("medbert",),
    "note": ("note",),
    "note+gbert": ("note", "gbert"),
    "note+medbert": ("note", "medbert"),
    "cnn": ("note",),
}
"""Baseline → what reads the visits. G-BERT alone as its authors have it is a model of its own, `gbert`."""
VISIT_BASELINES = tuple(VISIT_READERS)


def new_visit_model(options: VisitPretrainArguments, processor: MedMPLMProcessor, seed: int) -> Any:
    """A model to pre-train, its sizes and trees those of the vocabularies.

    Raises:
        ValueError: An option is not known, or the text encoder reads fewer tokens than `note_max_length`.
    """
    torch.manual_seed(seed)
    kind = GBertConfig if options.architecture == "gbert" else MedMPLMConfig
    fields = config_options(options.model_options, kind)
    check_config_fields(fields.get("code_config", {}), GBertConfig, "code_config")
    tokens = [_tokens(tokenizer) for tokenizer in processor.code_tokenizers.values()]
    heads = {"num_attention_heads": 2} if options.preset == "paper" else {}
    sizes = TINY_SIZES if options.preset == "tiny" else heads
    if options.architecture == "gbert":
        return GBertForPreTraining(GBertConfig.from_vocabularies(*tokens, **(sizes | fields)))
    codes = GBertConfig.from_vocabularies(*tokens, **(sizes | fields.pop("code_config", {})))
    preset: Any = {"base": MedMPLMConfig, "paper": MedMPLMConfig.paper, "tiny": MedMPLMConfig.tiny}[options.preset]
    if options.note_encoder is None:
        fields = {"note_config": _new_text(preset, processor, fields.pop("note_config", {}))} | fields
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


def _new_text(preset: Any, processor: MedMPLMProcessor, given: dict) -> dict:
    """Configuration of a new text encoder: that of the preset, in the words of the processor."""
    words = processor.note_tokenizer
    if words is None:  # nothing reads notes: the smallest that the model can have
        return MedMPLMConfig.tiny().note_config.to_dict() | {"vocab_size": 8}
    return _text_fields(preset, words, given)


def _text_fields(preset: Any, words: Any, given: dict) -> dict:
    """Configuration of a new text encoder in the words of a tokenizer.

    Raises:
        ValueError: A field of `given` is none of such an encoder, or Transformers has no such encoder.
    """
    usual = preset().note_config
    if isinstance(given, Mapping) and "model_type" in given:
        if (kind := given["model_type"]) not in CONFIG_MAPPING:
            raise ValueError(
                f"`model_type` of `note_config` must be one that Transformers has, got {kind!r}. Give 'bert', say."
            )
        rest = {name: value for name, value in given.items() if name != "model_type"}
        check_config_fields(rest, CONFIG_MAPPING[kind], "note_config")
    else:
        check_config_fields(given, type(usual), "note_config")
        given = usual.to_dict() | given
    sizes = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    return given | sizes | {"max_position_embeddings": words.model_max_length}


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


def _text_encoder(options: VisitFinetuneArguments | VisitBaselineArguments) -> Any:
    """The text encoder that pre-training began with; None where it was new too."""
    path = Path(str(options.model)) / PRETRAIN_FILE
    name = json.loads(path.read_text()).get("note_encoder") if path.is_file() else None
    if name is None:
        return None
    config = MedMPLMConfig.from_pretrained(str(options.model))
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


def new_visit_baseline(
    kind: str, options: VisitBaselineArguments, names: Sequence[str], processor: MedMPLMProcessor, seed: int
) -> Any:
    """A baseline of MedM-PLM, on trained encoders where `options` name them.

    Args:
        kind: A name of `VISIT_BASELINES`.
        options: Its `setting` is the task; encoders, preset and fields of the configuration.
        names: Of the labels; `no` and the task where the question is yes or no. The CNN then has the task alone.
        processor: Gives the vocabularies.
        seed: Of what is new.

    Returns:
        A classifier for :func:`hf_ehr.training.visits.fit_visits` and `predict_visits`.

    Raises:
        ValueError: The kind does not exist for this task, nothing reads notes, or an encoder has other vocabularies.
    """
    if kind not in VISIT_READERS or (kind, options.setting) in _IMPOSSIBLE:
        known = [one for one in VISIT_READERS if (one, options.setting) not in _IMPOSSIBLE]
        raise ValueError(f"`baseline` must be one of {', '.join(known)} for {options.task!r}, got {kind!r}.")
    if "note" in VISIT_READERS[kind] and processor.note_tokenizer is None:
        raise ValueError(f"`baseline` {kind!r} reads notes, and these visits have none. Choose one of codes.")
    torch.manual_seed(seed)
    if kind == "cnn" and options.setting == "admission":
        names = names[1:]
    fields: dict[str, Any] = {
        "id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)},
    }  # fmt: skip
    if options.setting != "admission":
        fields["problem_type"] = "multi_label_classification"
    configuration = {"rnn": VisitRnnConfig, "cnn": EhrTextConfig}.get(kind, EhrConcatConfig)
    fields |= config_options(options.model_options, configuration)
    if kind == "rnn":
        return VisitRnnForMedicationRecommendation(_rnn_config(options, processor, fields))
    if kind == "cnn":
        return EhrTextForICDCoding(_cnn_config(options, processor, fields))
    return _new_concat(kind, options, processor, fields)


_IMPOSSIBLE = {("rnn", "admission"), ("rnn", "coding"), ("cnn", "recommendation")}


def _rnn_config(options: VisitBaselineArguments, processor: MedMPLMProcessor, fields: dict) -> VisitRnnConfig:
    sizes: Any = {f"{kind}_vocab_size": len(words) for kind, words in processor.code_tokenizers.items()}
    return (VisitRnnConfig.tiny if options.preset == "tiny" else VisitRnnConfig)(**(sizes | fields))


def _cnn_config(options: VisitBaselineArguments, processor: MedMPLMProcessor, fields: dict) -> EhrTextConfig:
    words = processor.note_tokenizer
    sizes = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    small = {"embedding_size": 32, "hidden_size": 32} if options.preset == "tiny" else {}
    return EhrTextConfig.cnn(**(sizes | small | fields))


def _new_concat(kind: str, options: VisitBaselineArguments, processor: MedMPLMProcessor, fields: dict) -> Any:
    """Encoders end to end, or one alone."""
    readers = VISIT_READERS[kind]
    if options.setting == "coding" and kind != "note":
        fields["read_diagnoses"] = False
    note = codes = None
    if "note" in readers:
        note = options.note_encoder
        if note is None and options.model is not None:
            note = _text_encoder(options)
            fields = {"note_pooling": MedMPLMConfig.from_pretrained(options.model).note_pooling} | fields
        if note is None:
            preset = MedMPLMConfig.tiny if options.preset == "tiny" else MedMPLMConfig
            fields["note_config"] = _text_fields(preset, processor.note_tokenizer, fields.pop("note_config", {}))
    if kind != "note":
        opened = _medbert_of_visits if "medbert" in readers else _gbert_of_visits
        codes, more = opened(options, processor)
        fields = more | fields
    if options.setting == "recommendation":
        return EhrConcatForMedicationRecommendation.from_encoders(note, codes, **fields)
    return EhrConcatForSequenceClassification.from_encoders(note, codes, **fields)


def _gbert_of_visits(options: VisitBaselineArguments, processor: MedMPLMProcessor) -> tuple[Any, dict[str, Any]]:
    """G-BERT over the vocabularies of the processor; and no further fields."""
    tokens = [_tokens(tokenizer) for tokenizer in processor.code_tokenizers.values()]
    if options.code_encoder is None:
        sizes = TINY_SIZES if options.preset == "tiny" else {}
        return GBertModel(GBertConfig.from_vocabularies(*tokens, **sizes)), {}
    theirs = MedMPLMProcessor.from_pretrained(options.code_encoder)
    if [_tokens(tokenizer) for tokenizer in theirs.code_tokenizers.values()] != tokens:
        raise ValueError(
            "`code_encoder` must have the vocabularies of the model, got others. Give the same folder as `model`."
        )
    kind = PreTrainedConfig.get_config_dict(options.code_encoder)[0].get("model_type")
    if kind == GBertConfig.model_type:
        return GBertModel.from_pretrained(options.code_encoder, dtype=torch.float32), {}
    pretrained: Any = MedMPLMConfig.from_pretrained(options.code_encoder)
    gbert = GBertModel(GBertConfig.from_dict(pretrained.code_config.to_dict()))
    take_code_encoder(gbert, options.code_encoder)
    return gbert, {}


def _medbert_of_visits(options: VisitBaselineArguments, processor: MedMPLMProcessor) -> tuple[Any, dict[str, Any]]:
    """Med-BERT and its ids of the codes; a new one has the codes of both kinds."""
    diagnoses, medications = (_tokens(tokenizer) for tokenizer in processor.code_tokenizers.values())
    if options.code_encoder is not None:
        encoder: Any = MedBertModel.from_pretrained(options.code_encoder, dtype=torch.float32)
        own = _tokens(EhrCodeTokenizer.from_pretrained(options.code_encoder))
    else:
        own = list(dict.fromkeys([*diagnoses, *medications]))
        config = MedBertConfig.tiny if options.preset == "tiny" else MedBertConfig.base
        encoder = MedBertModel(config(vocab_size=len(own)))
    return encoder, EhrConcatConfig.code_maps(own, diagnoses, medications)


def _tokens(tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))

"""BiLSTM-CRF taggers: named entities of notes, from word embeddings or from any text encoder (MedM-PLM, Table V).

    tokens ─ embeddings │ text encoder, window by window ─▶ first token of each word ─▶ bi-LSTM ─ linear ─▶ CRF ─▶ tags

Rows are windows, and `note_index` says which note each belongs to. The windows of a note are joined behind the
encoder, so that the LSTM and the tags run over the whole note: a border between windows cuts no entity.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ehrtagger import EhrTaggerConfig
from .modeling_crf import LinearChainCrf, init_crf
from .modeling_ehr import PackedSequences
from .modeling_heads import init_head
from .modeling_icd_coding import checked_notes
from .modeling_note_encoder import new_note_encoder, opened_note_encoder
from .modeling_steps import Steps, TimeMajor


@dataclass
class EhrTaggerOutput(ModelOutput):
    """Output of [`EhrTaggerForTokenClassification`].

    Attributes:
        loss: Scalar, the negative log-likelihood of the notes' tags divided by their number of words.
        tags: (windows, length) int64, the most likely tags, -100 where there is no word. In evaluation mode.
        logits: (windows, length, num_labels), the emissions, 0 where there is no word.
    """

    loss: torch.Tensor | None = None
    tags: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class EhrTaggerPreTrainedModel(PreTrainedModel):
    """Weight initialisation, the frozen encoder, and the declarations the library asks for."""

    config: EhrTaggerConfig
    base_model_prefix = "model"
    _no_split_modules = ["BiLstm"]  # noqa: RUF012 - library's form
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_head(module)
        init_crf(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    @classmethod
    def from_note_encoder(cls, encoder: str | Path | PreTrainedModel, **fields: Any):
        """A new tagger on a trained text encoder.

        Args:
            encoder: Name or folder of a checkpoint, opened in fp32; or a model, which becomes part of the tagger. Of
                MedM-PLM its `note_encoder`.
            **fields: Fields of [`EhrTaggerConfig`].
        """
        note_encoder = opened_note_encoder(encoder, pooler=False)
        model = cls(EhrTaggerConfig(note_config=note_encoder.config, **fields))
        model.base_model.note_encoder = note_encoder
        model.tie_weights()
        return model

    def get_input_embeddings(self):
        """The word embeddings, or those of the text encoder."""
        base = getattr(self, self.base_model_prefix, self)
        return base.note_encoder.get_input_embeddings() if base.word_embeddings is None else base.word_embeddings

    def set_input_embeddings(self, value):
        """Replaces them."""
        base = getattr(self, self.base_model_prefix, self)
        if base.word_embeddings is None:
            base.note_encoder.set_input_embeddings(value)
        else:
            base.word_embeddings = value

    def tie_weights(self, *args, **kwargs):
        """Freezes the text encoder again: loading makes new parameters, and calls this at its end."""
        super().tie_weights(*args, **kwargs)
        for encoder in self._frozen():
            encoder.requires_grad_(False)

    def train(self, mode: bool = True):
        """As always, but a frozen text encoder has no dropout."""
        super().train(mode)
        for encoder in self._frozen():
            encoder.eval()
        return self

    def _frozen(self) -> list[Any]:
        return [getattr(self, self.base_model_prefix, self).note_encoder] if self.config.freeze_note_encoder else []


class BiLstm(nn.Module):
    """An LSTM in each direction, one layer, over the words of each note."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size)
        self.reverse_lstm = nn.LSTM(input_size, hidden_size)

    def forward(self, steps: Steps) -> torch.Tensor:
        """Words (total, input) → states (total, 2 × hidden), first those of the direction of reading."""
        states, _ = TimeMajor.of(steps.packed).run(self.lstm, steps.states)
        back, _ = TimeMajor.of(steps.packed, reverse=True).run(self.reverse_lstm, steps.states)
        return torch.cat([states, back], dim=1)


class EhrTaggerModel(EhrTaggerPreTrainedModel):
    """Tokens of notes → a state for each word."""

    def __init__(self, config: EhrTaggerConfig):
        super().__init__(config)
        self.note_encoder: Any = None
        self.word_embeddings = None
        if config.note_config is None:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
            size = config.embedding_size
        else:
            self.note_encoder = new_note_encoder(config.note_config)
            size = config.note_config.hidden_size  # type: ignore[union-attr]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.lstm = BiLstm(size, config.hidden_size)
        self.post_init()

    def encode(self, input_ids, attention_mask, word_mask, note_index) -> tuple[Steps, torch.Tensor]:
        """The states of the words of whole notes, and where each lies in the flattened `input_ids`, (words,)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = (mask if word_mask is None else word_mask * mask).bool()
        places = words.flatten().nonzero().squeeze(1)
        windows = places // input_ids.shape[1]
        notes, count = checked_notes(note_index, len(input_ids), input_ids.device)
        lengths = notes[windows].bincount(minlength=count)
        if self.word_embeddings is not None:
            embedded = self.word_embeddings(input_ids.flatten()[places])
        else:
            states = self.note_encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
            embedded = states.flatten(0, 1)[places]
        borders = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        packed = PackedSequences.from_cu_seqlens(borders, len(places), max(int(lengths.max()), 1))
        steps = Steps.of(self.dropout(embedded)[None], packed=packed)
        if not len(places):  # a recurrence needs a step
            return steps._replace(states=embedded.new_zeros(0, 2 * self.config.hidden_size)), places
        return steps._replace(states=self.dropout(self.lstm(steps))), places

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        word_mask: torch.Tensor | None = None,
        note_index: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes notes.

        Args:
            input_ids: (windows, length) token ids.
            attention_mask: (windows, length), 1 for tokens and 0 for padding.
            word_mask: (windows, length), 1 for the first token of each word. `None`: every token is a word.
            note_index: (windows,) int64, the note of each window, ascending from 0. `None`: each is a note.
            **kwargs: Not read.

        Returns:
            `last_hidden_state` (windows, length, 2 × hidden), 0 where no word begins.

        Raises:
            ValueError: The `note_index` does not fit.
        """
        steps, places = self.encode(input_ids, attention_mask, word_mask, note_index)
        return BaseModelOutput(last_hidden_state=_spread(steps.states, places, input_ids.shape))


def _spread(values: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Values of words (words, …) at their tokens, (windows, length, …); 0 elsewhere."""
    flat = values.new_zeros(shape.numel(), *values.shape[1:])
    return flat.index_copy(0, places, values).unflatten(0, shape)


class EhrTaggerForTokenClassification(EhrTaggerPreTrainedModel):
    """Tags of words by a CRF over whole notes."""

    def __init__(self, config: EhrTaggerConfig):
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.model = EhrTaggerModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, self.num_labels)
        tags: Any = config.id2label or {}
        self.crf = LinearChainCrf(tags)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        word_mask: torch.Tensor | None = None,
        note_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> EhrTaggerOutput:
        """Tags notes; inputs as in [`EhrTaggerModel`].

        Args:
            labels: (windows, length) tags of the words, -100 elsewhere.
            num_items_in_batch: Number of words of the whole accumulated batch; the loss is the sum over it.

        Raises:
            ValueError: As [`EhrTaggerModel`], or a word has no tag.
        """
        steps, places = self.model.encode(input_ids, attention_mask, word_mask, note_index)
        emissions = self.classifier(steps.states)
        lengths = steps.packed.cu_seqlens.diff().long()
        outputs = EhrTaggerOutput(logits=_spread(emissions, places, input_ids.shape))
        rows = steps.rectangle(emissions)
        if labels is not None:
            found = self._log_likelihood(steps, rows, labels.flatten()[places], lengths)
            words = max(len(places), 1) if num_items_in_batch is None else num_items_in_batch
            outputs.loss = -found / words
        if not self.training:
            tags = self.crf.decode(rows, lengths).flatten()[steps.places]
            every = torch.full_like(input_ids, -100).flatten()
            outputs.tags = every.index_copy(0, places, tags).view_as(input_ids)
        return outputs

    def _log_likelihood(self, steps: Steps, rows, tags: torch.Tensor, lengths) -> torch.Tensor:
        """Of all notes, from the tags of the words (words,)."""
        if (tags < 0).any():
            raise ValueError(
                f"`labels` must hold a tag for each of the {len(tags)} words of `word_mask`, got "
                f"{int((tags < 0).sum())} without. Build both with `hf_ehr.entity_datasets`."
            )
        return self.crf.log_likelihood(rows, steps.rectangle(tags), lengths).sum()


EhrTaggerModel.register_for_auto_class("AutoModel")
EhrTaggerForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

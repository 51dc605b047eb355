"""Small coding models for tests: one with random weights, and one that looks at the words it is told to."""

import re

import pyarrow as pa
import torch

from hf_ehr import EhrBertConfig, EhrBertForICDCoding
from hf_ehr.notes import fit_word_tokenizer

HIP = "Known asthma. Denies chest pain; hip fracture on the left, 1 day ago."


def note_table(*texts):
    return pa.table({"note_id": [f"n{i}" for i in range(len(texts))], "subject_id": [1] * len(texts), "text": texts})


def words_of(*texts, **options):
    """A word tokenizer that knows every word of the texts."""
    return fit_word_tokenizer(
        note_table(*texts), subject_ids=[1], **({"cleaning": "none", "max_length": 64, "min_patients": 1} | options)
    )


def names(*labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def random_coder(tokenizer, *labels, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "initializer_range": 0.3, "hidden_dropout_prob": 0.3}
    config = EhrBertConfig.tiny(**({"vocab_size": len(tokenizer)} | names(*labels) | sizes | fields))
    return EhrBertForICDCoding(config).eval()


@torch.no_grad()
def pointing_coder(tokenizer, words, **fields):
    """Every label looks at its words alone, and is probable exactly where one of them stands in the note.

    Every word has a dimension of its own and the encoder's layer adds nothing to it, so a state is the word's own.

    Args:
        tokenizer: A word tokenizer.
        words: Label → its words.
        **fields: Of the configuration.
    """
    width = -(-(len(tokenizer) + 2) // 4) * 4
    form = {"label_output": "per_label", "label_attention_norm": False, "num_hidden_layers": 1}
    model = random_coder(tokenizer, *words, **(form | {"hidden_size": width, "max_position_embeddings": 64} | fields))
    for module in model.model.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.zero_()
            module.bias.zero_()
    tables = model.model.embeddings
    tables.position_embeddings.weight.zero_()
    tables.token_type_embeddings.weight.zero_()
    # What all words share keeps the layer norm from making an embedding's length, and so its gradient, irrelevant.
    tables.word_embeddings.weight.copy_(torch.eye(len(tokenizer), width))
    tables.word_embeddings.weight[:, -2:] = torch.tensor([0.5, -0.5])
    states = torch.nn.functional.layer_norm(tables.word_embeddings.weight, [width])
    states = states - states.mean(dim=0)
    for label, own in enumerate(words.values()):
        ids = tokenizer.convert_tokens_to_ids([word.lower() for word in own])
        assert tokenizer.unk_token_id not in ids
        # The inner product with the label's own words is 1, and about 0 with others.
        direction = states[ids].sum(dim=0) / states[ids[0]].square().sum()
        model.head.label_vectors[label] = direction * 30 * width**0.5
        model.head.output.weight[label] = direction * 12
        model.head.output.bias[label] = -6
    return model


def places(text, *parts):
    """Characters [start, end) of all places where the parts stand."""
    return sorted(found.span() for part in parts for found in re.finditer(re.escape(part), text))

"""Notes with entities → examples: tags at the first tokens of words, borders of windows, and a tagger that learns."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_ehr import EhrTaggerConfig, EhrTaggerForTokenClassification
from hf_ehr.entity_datasets import (
    ENTITY_TABLE_SCHEMA,
    EntityCollator,
    build_entity_examples,
    entities_by_note,
    entities_of_spans,
    first_tokens,
    predicted_entities,
    tag_names,
)
from hf_ehr.entity_tags import Entity, words_of
from hf_ehr.named_entities import DictionaryMatcher, entity_intervals, entity_scores
from hf_ehr.notes import fit_word_tokenizer
from hf_ehr.schema import EhrDataError
from hf_ehr.sources.synthetic_notes import SyntheticNotesConfig, generate_notes

TAGS = ["O", "B-problem", "I-problem", "B-treatment", "I-treatment"]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def pieces() -> PreTrainedTokenizerFast:
    """WordPiece of single letters but for a few words: nearly every word has several tokens."""
    letters = [chr(place) for place in range(ord("a"), ord("z") + 1)]
    vocabulary = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters), "no", "ill", ".", "-", "1"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def notes_of(*texts: str) -> pa.Table:
    subjects = pa.array(range(len(texts)), pa.int64())
    return pa.table({"note_id": [f"n{n}" for n in range(len(texts))], "subject_id": subjects, "text": list(texts)})


def entity_table(*rows) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(ENTITY_TABLE_SCHEMA.names, row, strict=True)) for row in rows],
                                schema=ENTITY_TABLE_SCHEMA)  # fmt: skip


TEXT = "no fever. ill-fed 1 dose"
ENTITIES = entity_table(("n0", 3, 8, "problem"), ("n0", 10, 17, "problem"), ("n1", 0, 4, "treatment"))


def test_a_words_tag_stands_at_its_first_token_by_hand():
    found = build_entity_examples(notes_of(TEXT, "dose"), pieces(), TAGS, entities=ENTITIES)
    words = ("[CLS]", "no", "f ##e ##v ##e ##r", ".", "ill - f ##e ##d", "1", "d ##o ##s ##e", "[SEP]")
    tokens = " ".join(words).split()
    assert pieces().convert_ids_to_tokens(found[0]["input_ids"]) == tokens
    assert found[0]["word_mask"] == [0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    tags = [TAGS[label] if label >= 0 else "" for label in found[0]["labels"]]
    assert [tag for tag in tags if tag] == [
        *("O", "B-problem", "O", "B-problem", "I-problem", "I-problem", "O", "O"),
    ]
    assert [bool(tag) for tag in tags] == [bool(one) for one in found[0]["word_mask"]]
    spans = zip(found[0]["word_starts"], found[0]["word_ends"], strict=True)
    assert [TEXT[a:b] for a, b in spans] == ["no", "fever", ".", "ill", "-", "fed", "1", "dose"]
    assert [TAGS[label] for label in found[1]["labels"] if label >= 0] == ["B-treatment"]


def word_ids_first(tokenizer, text: str) -> list[tuple[int, int]]:
    """First token of each word as the library aligns them: `word_ids` of text that is split into words before."""
    spans = words_of(text)
    if not spans:
        return []
    encoded = tokenizer([text[a:b] for a, b in spans], is_split_into_words=True, add_special_tokens=False)
    found: dict[int, int] = {}
    for place, word in enumerate(encoded.word_ids()):
        found.setdefault(word, place)
    return [(place, word) for word, place in found.items()]


TEXTS = st.text(st.sampled_from("abno il1.-\né"), max_size=40)


@given(TEXTS, st.integers(3, 9))
@settings(max_examples=60, deadline=None)
def test_first_tokens_are_those_of_word_ids_whatever_the_windows(text, max_length):
    tokenizer = pieces()
    row = build_entity_examples(notes_of(text), tokenizer, TAGS, max_length=max_length)[0]
    special = np.isin(row["input_ids"], [tokenizer.cls_token_id, tokenizer.sep_token_id])
    mask = np.array(row["word_mask"])
    assert not mask[special].any()
    expected = word_ids_first(tokenizer, text)
    assert np.flatnonzero(mask[~special]).tolist() == [place for place, _ in expected]
    words = words_of(text)
    spans = list(zip(row["word_starts"], row["word_ends"], strict=True))
    assert spans == [words[word] for _, word in expected]
    assert sum(row["segment_lengths"]) == len(row["input_ids"])
    assert max(row["segment_lengths"]) <= max_length


def test_tokens_that_begin_with_a_space_or_join_two_words_are_aligned_by_their_characters():
    """Byte-level tokenizers put the space into the token; a token over two words is the first word's."""
    words = [(0, 2), (3, 7), (7, 8), (9, 10)]
    starts, ends = np.array([-1, 0, 2, 5, 7, 8, -1]), np.array([-1, 2, 5, 7, 8, 10, -1])
    mask, owners = first_tokens(starts, ends, words)
    assert (mask.tolist(), owners.tolist()) == ([False, True, True, False, True, True, False], [0, 1, 2, 3])
    mask, owners = first_tokens(np.array([0, 3]), np.array([2, 8]), words)
    assert (mask.tolist(), owners.tolist()) == ([True, True], [0, 1])
    assert first_tokens(np.array([-1]), np.array([-1]), [])[1].tolist() == []


def test_entities_are_characters_of_the_original_text_under_cleaning():
    text = "Seen [**2101-1-1**] for no fever today"
    table = entity_table(("n0", 24, 32, "problem"))
    assert text[24:32] == "no fever"
    found = build_entity_examples(notes_of(text), pieces(), TAGS, entities=table, cleaning="clinicalbert")[0]
    labels = [label for label in found["labels"] if label >= 0]
    tagged = [text[a:b] for a, b, label in zip(found["word_starts"], found["word_ends"], labels, strict=True) if label]
    assert tagged == ["no", "fever"]


def test_a_batch_holds_the_windows_of_its_notes_one_after_the_other():
    tokenizer = pieces()
    examples = build_entity_examples(notes_of(TEXT, "dose"), tokenizer, TAGS, entities=ENTITIES, max_length=8)
    batch = EntityCollator(tokenizer)(list(examples))
    assert batch["note_index"].tolist() == [0, 0, 0, 1]
    there = batch["attention_mask"].bool()
    assert batch["input_ids"][there].tolist() == examples[0]["input_ids"] + examples[1]["input_ids"]
    assert batch["labels"][there].tolist() == examples[0]["labels"] + examples[1]["labels"]
    assert batch["word_mask"][~there].sum() == 0
    assert (batch["labels"][~there] == -100).all()
    assert (batch["input_ids"][~there] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("max_length", [8, 512])
def test_predictions_come_back_as_characters_whatever_the_windows(max_length):
    """A tagger that calls every word but the first a problem."""
    config = EhrTaggerConfig.tiny(vocab_size=len(pieces()), id2label=dict(enumerate(TAGS)))
    model = EhrTaggerForTokenClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        for weight in model.crf.parameters():
            weight.zero_()
        model.crf.starts[0] = 9.0
        model.crf.transitions[0, 1] = model.crf.transitions[1, 2] = model.crf.transitions[2, 2] = 5.0
    examples = build_entity_examples(notes_of(TEXT, "", "no ill"), pieces(), TAGS, max_length=max_length)
    found = predicted_entities(model.train(), examples, EntityCollator(pieces()), batch_size=2)
    assert found == [[Entity(3, 24, "problem")], [], [Entity(3, 6, "problem")]]
    assert model.training


def test_spans_of_signs_are_treatments_and_all_others_problems():
    spans = pa.table({"note_id": ["a", "a"], "code": ["x", "x"], "start": pa.array([0, 5], pa.int32()),
                      "end": pa.array([2, 6], pa.int32()), "kind": ["sign", "negated"]})  # fmt: skip
    assert entities_of_spans(spans)["type"].to_pylist() == ["treatment", "problem"]
    assert tag_names(["treatment", "problem", "problem"]) == TAGS


@pytest.mark.parametrize("row", [("n7", 0, 1, "problem"), ("n0", 0, 99, "problem"), ("n0", 4, 4, "problem")])
def test_entities_outside_of_the_notes_are_refused(row):
    with pytest.raises(EhrDataError, match="entities"):
        entities_by_note(notes_of(TEXT), entity_table(row))


def test_what_does_not_fit_is_refused():
    with pytest.raises(EhrDataError, match="tags"):
        build_entity_examples(notes_of(TEXT), pieces(), TAGS, entities=entity_table(("n0", 0, 2, "test")))
    with pytest.raises(ValueError, match="padding token"):
        EntityCollator(type("Tokenizer", (), {"pad_token_id": None}))
    with pytest.raises(ValueError, match="Each row"):
        EntityCollator(pieces())([{"input_ids": [1], "word_mask": [1]}])


def test_a_tagger_trains_under_the_stock_trainer_and_its_loss_is_that_of_the_words(tmp_path):
    """Two notes a batch, accumulated over two batches: the first step is that of all four at once."""
    notes = notes_of(TEXT, "dose", "no ill-fed", "1 dose no fever")
    table = pa.concat_tables([ENTITIES, entity_table(("n2", 3, 10, "problem"), ("n3", 2, 6, "treatment"))])
    examples, collator = build_entity_examples(notes, pieces(), TAGS, entities=table), EntityCollator(pieces())
    models = []
    for size, steps in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        config = EhrTaggerConfig.tiny(vocab_size=len(pieces()), id2label=dict(enumerate(TAGS)), hidden_dropout_prob=0)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1, optim="sgd",
            learning_rate=1.0, max_grad_norm=0, remove_unused_columns=False, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(EhrTaggerForTokenClassification(config), arguments, collator, train_dataset=examples)
        trainer.train()
        models.append(trainer.model)
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)
    tags = trainer.predict(examples).predictions
    assert np.array_equal(tags >= 0, trainer.predict(examples).label_ids >= 0)


# A tagger on notes whose entities are known (row 40)


def synthetic(patients: int):
    """Notes and ENTITIES of a training and of a test part; no patient is in both."""
    world = generate_notes(SyntheticNotesConfig(patients=patients, codes=24, codes_per_note=4.0, missed=0.02))
    entities, parts = entities_of_spans(world.spans), []
    for test in (False, True):
        notes = world.notes.filter(pa.array((world.notes["subject_id"].to_numpy() % 4 == 0) == test))
        own = pa.array(np.isin(entities["note_id"].to_numpy(), notes["note_id"].to_numpy()))
        parts.append((notes, entities.filter(own)))
    return parts


@pytest.mark.slow
def test_a_small_tagger_finds_the_entities_of_synthetic_notes():
    """Strict F1 above .9 on patients it has not seen, with an interval over patients."""
    (train, train_entities), (test, test_entities) = synthetic(120)
    tokenizer = fit_word_tokenizer(
        train, subject_ids=train["subject_id"].to_numpy(), cleaning="none", min_patients=2, max_length=512
    )
    examples = build_entity_examples(train, tokenizer, TAGS, entities=train_entities, max_length=128)
    torch.manual_seed(0)
    config = EhrTaggerConfig.tiny(
        vocab_size=len(tokenizer), id2label=dict(enumerate(TAGS)), label2id={tag: n for n, tag in enumerate(TAGS)}
    )
    model, collator = EhrTaggerForTokenClassification(config).train(), EntityCollator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(6):
        order = torch.randperm(len(examples)).split(8)
        for rows in order:
            model(**collator([examples[int(row)] for row in rows])).loss.backward()
            nn_clip = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert nn_clip.isfinite()
            optimizer.step()
            optimizer.zero_grad()
    truth = entities_by_note(test, test_entities)
    unseen = build_entity_examples(test, tokenizer, TAGS, max_length=128)
    found = predicted_entities(model, unseen, collator)
    scores = entity_scores(truth, found)
    assert scores["f1"] > 0.9, scores
    matcher = DictionaryMatcher.fit(train["text"].to_pylist(), entities_by_note(train, train_entities))
    dictionary = matcher.predict(test["text"].to_pylist())
    interval = entity_intervals(truth, found, clusters=test["subject_id"].to_numpy(), n_resamples=200)["f1"]
    assert interval.low > 0.85
    # The training notes hold every name of this world: a dictionary is the ceiling, and nothing is claimed over it.
    assert entity_scores(truth, dictionary)["f1"] > 0.99
    # Cut into other windows, the words are the same.
    assert [row["word_starts"] for row in unseen] == [
        row["word_starts"] for row in build_entity_examples(test, tokenizer, TAGS, max_length=40)
    ]

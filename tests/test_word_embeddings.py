"""Supervised word embeddings: planted pairs of a word and a label, files, and a model that takes them (row 66)."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from hf_ehr import EhrTextConfig, EhrTextForICDCoding
from hf_ehr.schema import EhrDataError
from hf_ehr.word_embeddings import WordEmbeddings, supervised_word_embeddings

LABELS, WORDS = 12, 200
UNSEEN_WORD, UNSEEN_LABEL = 199, 11
SIZES = {"vocab_size": WORDS, "num_labels": LABELS, "dim": 32}


def planted_notes(notes: int = 300, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Notes of two labels j, the words 10 + j that give them away, and 20 words of chance."""
    rng = np.random.default_rng(seed)
    words, labels = [], []
    for _ in range(notes):
        own = rng.choice(UNSEEN_LABEL, 2, replace=False)
        words.append(rng.permutation(np.concatenate([own + 10, rng.integers(30, UNSEEN_WORD, 20)])).tolist())
        labels.append(sorted(own.tolist()))
    return words, labels


@pytest.fixture(scope="module")
def learnt() -> WordEmbeddings:
    return supervised_word_embeddings(*planted_notes(), **SIZES, epochs=10)


def cosines(embeddings: WordEmbeddings) -> np.ndarray:
    """(words, labels)."""
    words, labels = (
        table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        for table in (embeddings.words, embeddings.labels)
    )
    return words @ labels.T


def test_a_word_and_the_label_it_gives_away_end_up_close_and_others_do_not(learnt):
    cosine = cosines(learnt)[10 : 10 + UNSEEN_LABEL, :UNSEEN_LABEL]
    planted = np.eye(UNSEEN_LABEL, dtype=bool)
    assert cosine[planted].min() > 0.6
    assert cosine[~planted].max() < 0.45
    assert cosine[~planted].mean() < 0.1


def test_unseen_notes_lie_nearest_to_their_labels(learnt):
    words, labels = planted_notes(100, seed=9)
    bags = np.stack([learnt.words[note].mean(axis=0) for note in words])
    scores = bags @ (learnt.labels / np.maximum(np.linalg.norm(learnt.labels, axis=1, keepdims=True), 1e-12)).T
    top = np.argsort(-scores, axis=1)[:, :2]
    found = np.mean([len({*own} & {*best}) / 2 for own, best in zip(labels, top, strict=True)])
    assert found > 0.6, f"{found}; chance finds {2 / UNSEEN_LABEL:.2f}"


def test_what_training_never_showed_is_zero(learnt):
    assert not learnt.words[UNSEEN_WORD].any()
    assert not learnt.words[:10].any()
    assert not learnt.labels[UNSEEN_LABEL].any()
    assert learnt.words[30:UNSEEN_WORD].any(axis=1).all()


def test_the_same_seed_gives_the_same_vectors_and_another_one_others():
    notes = planted_notes(60)
    first, again, other = (supervised_word_embeddings(*notes, **SIZES, epochs=2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.words, again.words)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.words, other.words)


def test_lists_of_python_of_arrow_and_flat_ones_are_the_same_notes():
    words, labels = planted_notes(40)
    words[3], labels[5] = [], []  # neither teaches anything
    arrow = [pa.chunked_array([pa.array(rows[:7]), pa.array(rows[7:])]) for rows in (words, labels)]
    flat = [(np.concatenate(rows), np.cumsum([0, *map(len, rows)])) for rows in (words, labels)]
    expected = supervised_word_embeddings(words, labels, **SIZES, epochs=1)
    for form in (arrow, flat):
        assert np.array_equal(supervised_word_embeddings(*form, **SIZES, epochs=1).words, expected.words)
    kept = [row for row in range(40) if row not in (3, 5)]
    rest = supervised_word_embeddings([words[r] for r in kept], [labels[r] for r in kept], **SIZES, epochs=1)
    assert np.array_equal(rest.words, expected.words)


def test_a_step_descends_the_loss_of_the_docstring_and_spares_own_labels():
    """One note, its label 0, and no other label in training: nothing may be pushed away."""
    alone = supervised_word_embeddings([[5, 6]], [[0]], vocab_size=8, num_labels=3, dim=4, epochs=3)
    start = supervised_word_embeddings([[5, 6]], [[0]], vocab_size=8, num_labels=3, dim=4, epochs=1)
    assert np.array_equal(alone.words, start.words)
    two = supervised_word_embeddings([[5], [6]], [[0], [1]], vocab_size=8, num_labels=3, dim=4, epochs=200, margin=1.0)
    cosine = cosines(two)
    assert cosine[5, 0] - cosine[5, 1] > 0.99
    assert cosine[6, 1] - cosine[6, 0] > 0.99


def test_they_survive_a_file(learnt, tmp_path):
    learnt.save(tmp_path)
    loaded = WordEmbeddings.load(tmp_path)
    assert np.array_equal(loaded.words, learnt.words)
    assert np.array_equal(loaded.labels, learnt.labels)
    assert loaded.settings == learnt.settings
    assert loaded.settings["epochs"] == 10
    with pytest.raises(EhrDataError, match="missing"):
        WordEmbeddings.load(tmp_path / "elsewhere")


def test_a_model_reads_them_frozen_and_as_large_as_what_they_replace(learnt):
    torch.manual_seed(0)
    config = EhrTextConfig.multi_head_attention(
        vocab_size=WORDS, embedding_size=32, hidden_size=16, num_attention_queries=3
    )
    model = EhrTextForICDCoding(config)
    before = model.get_input_embeddings().weight.detach().clone()
    assert learnt.put_into(model) is model
    table = model.get_input_embeddings().weight
    assert not table.requires_grad
    assert torch.equal(table[:10], before[:10])
    known = learnt.words.any(axis=1)
    ratio = table.detach().numpy()[known] / learnt.words[known]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)
    assert table[known].std().item() == pytest.approx(1, rel=0.05)


def test_a_table_of_another_shape_is_refused(learnt):
    with pytest.raises(ValueError, match="same tokenizer"):
        learnt.put_into(EhrTextForICDCoding(EhrTextConfig.tiny(vocab_size=50)))
    with pytest.raises(ValueError, match="`words` and `labels`"):
        WordEmbeddings(np.zeros((3, 4)), np.zeros((2, 5)), {})


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (([[1]], [[LABELS]]), ValueError, "label_ids"),
    (([[WORDS]], [[0]]), ValueError, "token_ids"),
    (([[-1]], [[0]]), ValueError, "token_ids"),
    (([[1], [2]], [[0]]), ValueError, "a list for each of the 2 notes"),
    (([[1], []], [[], [0]]), EhrDataError, "nothing to learn"),
])  # fmt: skip
def test_what_cannot_be_learnt_from_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        supervised_word_embeddings(*arguments, **SIZES)


@pytest.mark.parametrize("name", ["dim", "epochs", "margin", "negatives", "learning_rate", "batch_size"])
def test_settings_are_above_0(name):
    with pytest.raises(ValueError, match=f"`{name}` must be above 0"):
        supervised_word_embeddings([[1]], [[0]], **(SIZES | {name: 0}))

"""Note examples → batches: packed equals padded, under the stock ``Trainer`` too."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_ehr.models.configuration_ehrbert import EhrBertConfig
from hf_ehr.models.modeling_ehrbert import EhrBertForICDCoding, EhrBertForMaskedLM, EhrBertForPreTraining
from hf_ehr.note_collators import NoteCodingCollator, NotePretrainingCollator
from hf_ehr.note_datasets import build_coding_examples, build_pretraining_examples
from hf_ehr.notes import fit_word_tokenizer, prepare_notes

CODES = ["ICD10CM/I10", "ICD10CM/E11.9", "ICD10CM/J18.9"]
IDS = [f"n{row}" for row in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve notes of six patients, one of them empty."""
    path = tmp_path_factory.mktemp("notes")
    texts = [" ".join(f"word{(row * place) % 37}" for place in range(7 * row)) + "." * (row > 0) for row in range(12)]
    notes = {"note_id": IDS, "subject_id": [row // 2 for row in range(12)], "text": texts}
    labels = {"note_id": ["n1", "n1", "n5", "n8"], "code": [CODES[0], CODES[2], CODES[1], CODES[0]]}
    pq.write_table(pa.table(notes), path / "notes.parquet")
    pq.write_table(pa.table(labels), path / "labels.parquet")
    return prepare_notes("table", path, path / "folder", min_characters=0)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return fit_word_tokenizer(folder.notes(), subject_ids=range(6), cleaning="none", min_patients=1)


@pytest.fixture(scope="module")
def coded(folder, tokenizer) -> Dataset:
    return build_coding_examples(folder, tokenizer, CODES, note_ids=IDS, max_length=16)


@pytest.fixture(scope="module")
def pairs(folder, tokenizer) -> Dataset:
    return build_pretraining_examples(folder, tokenizer, note_ids=IDS, max_length=24)


def config(tokenizer, labels=3, **options) -> EhrBertConfig:
    names = dict(enumerate([*CODES, *map(str, range(labels))][:labels]))
    return EhrBertConfig.tiny(
        vocab_size=len(tokenizer), hidden_dropout_prob=0.0, classifier_dropout=0.0, id2label=names,
        label2id={name: index for index, name in names.items()}, max_position_embeddings=32, **options,
    )  # fmt: skip


def model_of(kind, *args, **options):
    torch.manual_seed(0)
    return kind(config(*args, **options))


# Coding


def test_a_packed_batch_holds_each_note_once_with_labels_first(tokenizer, coded):
    rows = [coded[index] for index in (5, 0, 1)]  # 35 words, none, 7; each with a full stop but the empty one
    batch = NoteCodingCollator(tokenizer, num_labels=3)(rows)
    assert next(iter(batch)) == "labels"
    assert batch["labels"].tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert batch["labels"].dtype == torch.float32
    assert batch["note_index"].tolist() == [0, 0, 0, 1, 2]  # 36 tokens in windows of 14
    assert batch["cu_seqlens"].tolist() == [0, 16, 32, 42, 44, 54]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert (batch["max_seqlen"], type(batch["max_seqlen"])) == (16, int)
    assert batch["input_ids"].tolist() == [[*rows[0]["input_ids"], *rows[1]["input_ids"], *rows[2]["input_ids"]]]


def test_a_padded_batch_has_a_row_for_each_window(tokenizer, coded):
    rows = [coded[index] for index in (5, 0, 1)]
    batch = NoteCodingCollator(tokenizer, num_labels=3, packed=False)(rows)
    assert set(batch) == {"labels", "input_ids", "attention_mask", "note_index"}
    assert batch["attention_mask"].sum(1).tolist() == [16, 16, 10, 2, 10]
    assert batch["input_ids"].shape == (5, 16)
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {tokenizer.pad_token_id}
    flat = [one for row in rows for one in row["input_ids"]]
    assert batch["input_ids"][batch["attention_mask"] == 1].tolist() == flat


@pytest.mark.parametrize("packed", [True, False])
def test_lists_and_numpy_rows_give_the_same_batches(tokenizer, coded, pairs, packed):
    for rows, make in (
        (coded, lambda: NoteCodingCollator(tokenizer, 3, packed)),
        (pairs, lambda: NotePretrainingCollator(tokenizer, packed=packed)),
    ):
        lists = make()([rows[index] for index in range(4)])
        arrays = make()([rows.with_format("numpy")[index] for index in range(4)])
        assert list(lists) == list(arrays)
        assert all(torch.equal(torch.as_tensor(lists[name]), torch.as_tensor(arrays[name])) for name in lists)


def test_rows_without_labels_give_a_batch_without(tokenizer, coded):
    rows = coded.remove_columns("labels")
    assert "labels" not in NoteCodingCollator(tokenizer, 3)([rows[0], rows[1]])


@pytest.mark.parametrize("pooling", ["attention", "max"])
def test_packed_and_padded_batches_give_the_same_loss(tokenizer, coded, pooling):
    model = model_of(EhrBertForICDCoding, tokenizer, segment_pooling=pooling).eval()
    rows = [coded[index] for index in range(len(coded))]
    packed, padded = (model(**NoteCodingCollator(tokenizer, 3, packed)(rows)) for packed in (True, False))
    torch.testing.assert_close(packed.logits, padded.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_note_without_words_and_without_codes_trains(tokenizer, coded, packed, labels):
    rows = [coded[0] | {"labels": []}]
    model = model_of(EhrBertForICDCoding, tokenizer, labels)
    outputs = model(**NoteCodingCollator(tokenizer, labels, packed)(rows))
    outputs.loss.backward()
    assert rows[0]["segment_lengths"] == [2]
    assert outputs.loss.isfinite()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)


def test_a_label_that_the_model_does_not_have_is_refused(tokenizer, coded):
    with pytest.raises(ValueError, match=r"`labels` must be ids in \[0, 2\), got 0 … 2"):
        NoteCodingCollator(tokenizer, 2)([coded[1]])
    with pytest.raises(ValueError, match="`num_labels` must be at least 1"):
        NoteCodingCollator(tokenizer, 0)


def test_a_column_that_the_trainer_dropped_is_named(tokenizer, coded):
    with pytest.raises(ValueError, match=r"must have `segment_lengths`.*remove_unused_columns=False"):
        NoteCodingCollator(tokenizer, 3)([coded.remove_columns("segment_lengths")[1]])


def test_padding_needs_a_padding_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = type(tokenizer).from_pretrained(tmp_path)
    other.pad_token = None
    with pytest.raises(ValueError, match="`tokenizer` must have a padding token"):
        NoteCodingCollator(other, 3, packed=False)
    assert NoteCodingCollator(other, 3, packed=True)


# Pre-training


def test_special_tokens_are_never_chosen_and_labels_are_the_true_tokens(tokenizer, pairs):
    collate = NotePretrainingCollator(tokenizer, mlm_probability=0.5, seed=3)
    rows = [pairs[index] for index in range(len(pairs))]
    batch = collate(rows)
    true = torch.tensor([[one for row in rows for one in row["input_ids"]]])
    chosen = batch["labels"] != -100
    special = torch.isin(true, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()
    assert torch.equal(batch["labels"][chosen], true[chosen])
    assert torch.equal(batch["input_ids"][~chosen], true[~chosen])
    share = chosen.sum() / (~special).sum()
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / int((~special).sum()))
    masked = (batch["input_ids"] == tokenizer.mask_token_id).sum() / chosen.sum()
    assert abs(masked - 0.8) < 4 * np.sqrt(0.16 / int(chosen.sum()))


def test_a_pretraining_batch_has_the_names_that_the_model_takes(tokenizer, pairs):
    rows = [pairs[0], pairs[3]]
    packed = NotePretrainingCollator(tokenizer)(rows)
    names = ["next_sentence_label", "input_ids", "token_type_ids", "labels", "cu_seqlens", "max_seqlen"]
    assert list(packed) == names
    assert packed["next_sentence_label"].tolist() == [row["next_sentence_label"] for row in rows]
    assert packed["token_type_ids"].tolist() == [rows[0]["token_type_ids"] + rows[1]["token_type_ids"]]
    padded = NotePretrainingCollator(tokenizer, packed=False)(rows)
    hidden = padded["attention_mask"] == 1
    for name in ("input_ids", "token_type_ids", "labels"):
        assert padded[name][hidden].tolist() == packed[name][0].tolist()
    padding = ~hidden
    assert set(padded["labels"][padding].tolist()) <= {-100}


def test_masks_repeat_with_the_seed_and_differ_between_batches(tokenizer, pairs):
    def masks(seed):
        collate = NotePretrainingCollator(tokenizer, seed=seed)
        return [collate([pairs[0], pairs[1]])["labels"].tolist() for _ in range(4)]

    assert masks(0) == masks(0)
    assert masks(0) != masks(1)
    assert len({str(labels) for labels in masks(0)}) > 1


def test_worker_processes_do_not_repeat_each_others_masks(tokenizer, pairs):
    same = Dataset.from_list([pairs[len(pairs) - 1]] * 4)
    collate = NotePretrainingCollator(tokenizer, mlm_probability=0.5)
    loader = torch.utils.data.DataLoader(same, batch_size=1, num_workers=2, collate_fn=collate)
    assert len({str(batch["labels"].tolist()) for batch in loader}) > 1


@pytest.mark.parametrize("kind", [EhrBertForPreTraining, EhrBertForMaskedLM])
def test_packed_and_padded_pretraining_batches_give_the_same_loss(tokenizer, pairs, kind):
    model = model_of(kind, tokenizer).eval()
    rows = pairs if kind is EhrBertForPreTraining else pairs.remove_columns("next_sentence_label")
    rows = [rows[index] for index in range(len(rows))]
    packed, padded = (
        model(**NotePretrainingCollator(tokenizer, packed=packed)(rows)).loss for packed in (True, False)
    )
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


# The stock Trainer


def trained(model, examples, collate, path, *, batch, accumulate=1) -> tuple[dict, float]:
    arguments = TrainingArguments(
        path, per_device_train_batch_size=batch, per_device_eval_batch_size=batch, use_cpu=True, max_steps=1,
        gradient_accumulation_steps=accumulate, remove_unused_columns=False, report_to=[], save_strategy="no",
        learning_rate=0.1, optim="sgd", train_sampling_strategy="sequential", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, train_dataset=examples, eval_dataset=examples)
    trainer.train()
    return {name: one.detach().clone() for name, one in model.named_parameters()}, trainer.state.log_history[0]["loss"]


def test_a_step_of_coding_is_the_same_packed_padded_and_accumulated(tokenizer, coded, tmp_path):
    runs = [
        trained(
            model_of(EhrBertForICDCoding, tokenizer), coded, NoteCodingCollator(tokenizer, 3, packed), tmp_path,
            batch=batch, accumulate=len(coded) // batch,
        )
        for packed, batch in ((True, 12), (False, 12), (True, 4))
    ]  # fmt: skip
    start = dict(model_of(EhrBertForICDCoding, tokenizer).named_parameters())
    (expected, loss), *others = runs
    assert any(not torch.equal(expected[name], start[name]) for name in start)
    for weights, other_loss in others:
        assert other_loss == pytest.approx(loss, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_a_step_of_pretraining_runs_packed_and_padded(tokenizer, pairs, tmp_path):
    losses = []
    for packed in (True, False):
        collate = NotePretrainingCollator(tokenizer, packed=packed)
        model = model_of(EhrBertForPreTraining, tokenizer)
        losses.append(trained(model, pairs, collate, tmp_path, batch=4, accumulate=2)[1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_trainer_predicts_a_row_of_scores_for_each_note(tokenizer, coded, tmp_path, packed):
    arguments = TrainingArguments(
        tmp_path,
        per_device_eval_batch_size=5,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model_of(EhrBertForICDCoding, tokenizer), arguments, NoteCodingCollator(tokenizer, 3, packed))
    prediction = trainer.predict(coded)
    assert prediction.predictions.shape == (12, 3)
    assert prediction.label_ids.tolist() == [[float(label in ids) for label in range(3)] for ids in coded["labels"]]
    assert prediction.metrics["test_loss"] > 0

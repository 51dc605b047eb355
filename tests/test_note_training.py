"""Pre-training on notes and training coders: who is read, what is in scope, which thresholds are stored."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_ehr import EhrBertConfig, EhrBertForICDCoding, EhrTextConfig, EhrTextForICDCoding
from hf_ehr.code_thresholds import tune_auto_code, tune_thresholds
from hf_ehr.note_datasets import build_coding_examples
from hf_ehr.notes import fit_word_tokenizer, frequent_codes, prepare_notes
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks.audit import LeakageError, SplitManifest
from hf_ehr.training import (
    CODER_RECIPE,
    CoderArguments,
    NoteArguments,
    NotePretrainArguments,
    codes_in_scope,
    predict_codes,
    pretrain_notes,
    start_at_shares,
    train_coder,
    training_notes,
)
from hf_ehr.training.note_pretraining import extend_if_needed

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "code_notes_with_any_encoder.py"
WORDS = np.array(["pain", "fever", "cough", "stent", "ulcer", "asthma", "sinus", "edema", "gout", "stroke", ". \n"])
CODES = ["ICD10CM/I10", "ICD10CM/E11.9", "ICD10CM/J45.909"]
WORD_OF = {"ICD10CM/I10": "stent", "ICD10CM/E11.9": "ulcer", "ICD10CM/J45.909": "asthma"}


def write_notes(folder, patients=90, change_test=None):
    """Notes whose codes are spelled by one word each; some patients have an uncoded note, some two notes."""
    rng = np.random.default_rng(0)
    notes, labels = [], []
    for subject in range(patients):
        split = "test" if subject % 5 == 0 else "unlabelled" if subject % 5 == 1 else "train"
        for number in range(1 + subject % 2):
            words = list(rng.choice(WORDS, 40))
            name = f"{subject}-{number}"
            if split != "unlabelled":
                codes = [code for code, share in zip(CODES, (0.5, 0.4, 0.3), strict=True) if rng.random() < share]
                words = [w for w in words if w not in WORD_OF.values()] + [WORD_OF[code] for code in codes] * 3
                labels += [(name, code) for code in codes]
            text = " ".join(words) if split != "test" or change_test is None else change_test
            notes.append((name, subject, split, text))
    folder.mkdir()
    columns = zip(*notes, strict=True)
    table = dict(zip(("note_id", "subject_id", "split", "text"), map(list, columns), strict=True))
    pq.write_table(pa.table(table), folder / "notes.parquet")
    names = dict(zip(("note_id", "code"), map(list, zip(*labels, strict=True)), strict=True))
    pq.write_table(pa.table(names), folder / "labels.parquet")
    return folder


def settings(folder, **options) -> TrainingArguments:
    quiet = {"report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "num_train_epochs": 1}
    return TrainingArguments(str(folder), **(quiet | sizes | options))


OPTIONS = NotePretrainArguments(preset="tiny", vocabulary="word", vocab_size=60, min_patients=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> NoteArguments:
    folder = tmp_path_factory.mktemp("notes")
    prepare_notes("table", write_notes(folder / "raw"), folder / "prepared", min_characters=0)
    return NoteArguments(str(folder / "prepared"), max_length=32)


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    figures = pretrain_notes(data, OPTIONS, settings(folder))
    return folder, figures


@pytest.fixture(scope="module")
def coder(data, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coder")
    options = CoderArguments(str(encoder[0]), auto_code_precision=0.9)
    training = settings(folder, num_train_epochs=8, learning_rate=1e-2, per_device_train_batch_size=8)
    return train_coder(data, options, training)


def test_training_and_uncoded_notes_are_read_and_test_notes_never(data, tmp_path):
    weights = []
    for name, change in (("as it is", None), ("changed", "zyzzyva fever"), ("emptied", "")):
        raw = write_notes(tmp_path / f"{name} raw", change_test=change)
        prepare_notes("table", raw, tmp_path / name, min_characters=0)
        arguments = NoteArguments(str(tmp_path / name), max_length=32)
        pretrain_notes(arguments, OPTIONS, settings(tmp_path / f"{name} model", max_steps=2))
        weights.append(load_file(tmp_path / f"{name} model" / "model.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in weights[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "changed model")
    assert "zyzzyva" not in tokenizer.get_vocab()


def test_the_folder_says_who_was_read_and_holds_no_notes(data, encoder):
    folder, figures = encoder
    manifest = SplitManifest.load(folder / "splits.json")
    sizes = {name: len(hashes) for name, hashes in manifest.splits.items()}
    assert sizes == {
        "train": len(data.subjects("train", "unlabelled")),
        "validation": len(data.subjects("validation")),
        "test": 18,
    }
    assert sum(sizes.values()) == 90
    assert not (folder / "examples").exists()
    assert json.loads((folder / "pretraining.json").read_text())["held_out"] == figures


def test_held_out_tokens_are_guessed_better_than_by_frequency_and_pairs_are_counted(encoder):
    _, figures = encoder
    assert set(figures) == {"token_loss", "unigram_loss", "pair_accuracy"}
    assert figures["unigram_loss"] > 2  # eleven words, nearly uniform: log 11 = 2.4
    assert figures["token_loss"] < figures["unigram_loss"] + 0.1
    assert 0 <= figures["pair_accuracy"] <= 1


def test_the_decoder_starts_at_the_frequency_of_the_training_tokens(data, tmp_path):
    frozen = settings(tmp_path, max_steps=1, learning_rate=0.0)
    figures = pretrain_notes(
        data, replace(OPTIONS, next_sentence=False, model_options='{"initializer_range": 1e-6}'), frozen
    )
    assert figures["token_loss"] == pytest.approx(figures["unigram_loss"], abs=1e-3)


def test_a_tokenizer_of_other_patients_is_refused(data, tmp_path):
    notes = pa.concat_tables(data.folder.notes())
    fit_word_tokenizer(notes, subject_ids=data.subjects("test"), min_patients=1).save_pretrained(
        tmp_path / "tokenizer"
    )
    with pytest.raises(LeakageError):
        pretrain_notes(data, replace(OPTIONS, tokenizer=str(tmp_path / "tokenizer")), settings(tmp_path / "model"))


def test_an_encoder_of_the_library_is_trained_further_on_longer_windows(data, encoder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(encoder[0])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForPreTraining(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **sizes)).save_pretrained(
        tmp_path / "r"
    )
    for name in ("bert", "r"):
        tokenizer.save_pretrained(tmp_path / name)
    figures = pretrain_notes(data, NotePretrainArguments(encoder=str(tmp_path / "bert")), settings(tmp_path / "more"))
    assert "pair_accuracy" in figures
    assert BertConfig.from_pretrained(tmp_path / "more").max_position_embeddings == 32
    options = NotePretrainArguments(encoder=str(tmp_path / "r"))
    with pytest.raises(ValueError, match="`next_sentence` must be False for RobertaForMaskedLM"):
        pretrain_notes(data, options, settings(tmp_path / "refused"))
    pretrain_notes(data, replace(options, next_sentence=False), settings(tmp_path / "masked", max_steps=1))


def test_codes_in_scope_are_counted_on_training_notes_and_patients(data):
    train = data.splits["train"]
    labels = data.folder.labels().filter(pc.is_in(data.folder.labels()["note_id"], train))
    notes = {code: pc.sum(pc.equal(labels["code"], code)).as_py() for code in CODES}
    patients = data.patients_of_codes(train)
    rows = list(zip(labels["note_id"].to_pylist(), labels["code"].to_pylist(), strict=True))
    by_hand = {code: len({note.split("-")[0] for note, other in rows if other == code}) for code in CODES}
    assert patients == by_hand
    most = max(notes.values())
    assert codes_in_scope(data, most - 1, 1) == [max(notes, key=notes.get)]
    assert set(codes_in_scope(data, 0, max(patients.values()))) == {
        code for code in CODES if patients[code] == max(patients.values())
    }
    with pytest.raises(EhrDataError, match="`min_patients` must be at most"):
        codes_in_scope(data, 0, 10_000)


def test_subsets_of_training_notes_are_nested_within_a_draw(data):
    few, more, other = (
        training_notes(data, CoderArguments("", train_notes=size, draw=draw)).to_pylist()
        for size, draw in ((5, 1), (9, 1), (9, 2))
    )
    assert few == more[:5]
    assert set(more) <= set(data.splits["train"].to_pylist())
    assert more != other


def test_a_coder_learns_the_words_of_its_codes_and_stores_thresholds_by_name(data, coder):
    model = AutoModelForSequenceClassification.from_pretrained(coder)
    tokenizer = AutoTokenizer.from_pretrained(coder)
    names = [model.config.id2label[i] for i in range(model.num_labels)]
    assert set(names) == set(CODES)
    examples = build_coding_examples(
        data.folder, tokenizer, names, note_ids=data.splits["validation"], max_length=data.max_length
    )
    predictions = predict_codes(model, examples, tokenizer)
    tuned = tune_thresholds(predictions)
    assert model.config.thresholds == pytest.approx(dict(zip(names, tuned.per_label, strict=True)))
    assert model.config.common_threshold == pytest.approx(tuned.common)
    auto = tune_auto_code(predictions, tuned.per_label, precision=0.9)
    assert model.config.auto_code_thresholds == pytest.approx(dict(zip(names, auto, strict=True)))
    assert all(auto[i] >= model.config.thresholds[name] for i, name in enumerate(names))
    hits, predicted, present = predictions.confusion(tuned.common)[1]
    assert 2 * hits.sum() / (predicted.sum() + present.sum()) > 0.9  # one word decides each code


def test_the_pipeline_reads_the_windows_that_the_coder_was_trained_on(data, encoder, tmp_path):
    short = replace(data, max_length=16)  # the encoder takes 32
    options = CoderArguments(str(encoder[0]), max_segments=1, min_patients=1)
    folder = train_coder(short, options, settings(tmp_path, learning_rate=1e-2, num_train_epochs=4))
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (tokenizer.model_max_length, model.config.max_segments) == (16, 1)
    names = [model.config.id2label[i] for i in range(model.num_labels)]
    texts = next(data.folder.notes(data.splits["test"], ["text"]))["text"].to_pylist()
    coder = pipeline("icd-coding", model=folder, device="cpu", top_k=None, evidence=None)
    found = [{code["code"]: code["probability"] for code in codes} for codes in coder(texts)]
    windows = [(16, 1), (16, None), (32, 1)]
    figures = [
        predict_codes(
            model,
            build_coding_examples(
                data.folder, tokenizer, names, note_ids=data.splits["test"], max_length=length, max_segments=most
            ),
            tokenizer,
        ).dense()[: len(texts)]
        for length, most in windows
    ]
    ours = np.array([[row[name] for name in names] for row in found])
    np.testing.assert_allclose(ours, figures[0], atol=1e-5)
    assert all(np.abs(ours - other).max() > 1e-3 for other in figures[1:])


def test_an_epoch_logs_the_figures_that_runs_are_compared_by_and_no_flood(data, encoder, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Trainer, "log", lambda self, values, *rest: logged.append(set(values)))
    options = CoderArguments(str(encoder[0]), train_notes=20, min_patients=1)
    train_coder(data, options, settings(tmp_path, metric_for_best_model="precision_at_5"))
    figures = {"eval_auroc_micro", "eval_auroc_macro", "eval_average_precision_micro", "eval_f1_micro", "eval_map"}
    (evaluation,) = [names for names in logged if "eval_loss" in names]
    assert {name for name in evaluation if name not in ("eval_loss",) and "per_second" not in name} >= figures
    assert "eval_precision_at_5" in evaluation
    assert "eval_jaccard_samples" not in evaluation


def test_the_best_epoch_of_pretraining_can_be_chosen_on_validation_notes(data, tmp_path):
    training = settings(
        tmp_path, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True
    )
    assert pretrain_notes(data, OPTIONS, training)["token_loss"] > 0


def test_predictions_come_in_the_order_of_the_notes_however_they_are_batched(data, coder, monkeypatch):
    model = AutoModelForSequenceClassification.from_pretrained(coder)
    tokenizer = AutoTokenizer.from_pretrained(coder)
    names = [model.config.id2label[i] for i in range(model.num_labels)]
    examples = build_coding_examples(data.folder, tokenizer, names, note_ids=data.splits["test"], max_length=32)
    whole = predict_codes(model, examples, tokenizer)
    monkeypatch.setattr("hf_ehr.training.icd_coding.PREDICT_TOKENS", 50)
    split = predict_codes(model, examples, tokenizer)
    np.testing.assert_allclose(whole.dense(), split.dense(), atol=1e-5)
    blind = predict_codes(model, examples.remove_columns("labels"), tokenizer)
    np.testing.assert_array_equal(blind.dense(), split.dense())
    assert not blind.targets().nnz
    rows = [sorted(row) for row in examples["labels"]]
    assert [np.flatnonzero(row).tolist() for row in whole.targets().toarray()] == rows


def test_what_was_held_out_before_may_not_be_trained_on_now(data, encoder, tmp_path):
    folder, _ = encoder
    moved = replace(data, split_seed=1)
    with pytest.raises(LeakageError):
        train_coder(moved, CoderArguments(str(folder)), settings(tmp_path))


def test_an_encoder_that_saw_held_out_patients_may_not_be_trained_further(data, encoder, tmp_path):
    moved, options = replace(data, split_seed=1), NotePretrainArguments(encoder=str(encoder[0]))
    with pytest.raises(LeakageError):
        pretrain_notes(moved, options, settings(tmp_path))


def test_a_second_run_gives_the_figures_of_the_first_and_another_one_is_refused(data, encoder, coder):
    assert pretrain_notes(data, OPTIONS, settings(encoder[0])) == encoder[1]
    with pytest.raises(EhrDataError, match="`output_dir` must not hold a run of other data"):
        pretrain_notes(replace(data, split_seed=1), OPTIONS, settings(encoder[0]))
    with pytest.raises(EhrDataError, match="`output_dir` must not hold a run of other data"):
        train_coder(data, CoderArguments(str(encoder[0]), train_notes=20), settings(coder))


def test_the_trainer_divides_the_loss_of_other_families_by_the_accumulated_steps(data, encoder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(encoder[0])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")

    def first_norm(name: str, size: int, steps: int) -> float:
        training = settings(
            tmp_path / name, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            logging_strategy="steps", logging_steps=1, max_grad_norm=1e9,
        )  # fmt: skip
        logged = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "log", lambda self, values, *rest: logged.append(values))
            options = NotePretrainArguments(encoder=str(tmp_path / "bert"), next_sentence=False)
            pretrain_notes(data, options, training)
        return float(logged[0]["grad_norm"])

    # Masks differ between the two, so the norms agree roughly; an undivided loss is four times too large.
    assert first_norm("accumulated", 8, 4) == pytest.approx(first_norm("whole", 32, 1), rel=0.4)


def test_only_short_tables_of_positions_are_extended():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    roberta = RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=34, **sizes)).eval()
    assert extend_if_needed(roberta, 32) is roberta
    assert roberta.config.max_position_embeddings == 34  # two rows belong to padding
    for length in (33, 34):
        extend_if_needed(roberta, length)(torch.full((1, length), 7))
    rotary = ModernBertModel(ModernBertConfig(vocab_size=50, max_position_embeddings=32, **sizes, **special)).eval()
    extend_if_needed(rotary, 64)(torch.full((1, 64), 7))


def test_a_cls_head_and_an_untrained_encoder_take_the_same_road(data, encoder, tmp_path):
    options = CoderArguments(str(encoder[0]), head="cls", untrained=True, train_notes=20, min_patients=1)
    folder = train_coder(data, options, settings(tmp_path))
    made = json.loads((folder / "coder.json").read_text())
    assert made["label_init"] is None
    assert made["labels"] == 3


def test_fine_tuning_warms_up_over_a_tenth_of_the_steps_and_decays_to_zero(tmp_path):
    model = torch.nn.Linear(1, 1)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", **CODER_RECIPE))
    trainer.create_optimizer_and_scheduler(100)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [rates[step] for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 1e-5, 2e-5, 1e-5, 0])
    assert trainer.args.num_train_epochs == 3
    assert trainer.args.per_device_train_batch_size == 32


def test_validation_notes_without_codes_in_scope_stop_the_run_before_it_trains(encoder, tmp_path):
    raw = write_notes(tmp_path / "raw")
    labels = pq.read_table(raw / "labels.parquet")
    prepare_notes("table", raw, tmp_path / "prepared", min_characters=0)
    held = NoteArguments(str(tmp_path / "prepared"), max_length=32).splits["validation"]
    pq.write_table(labels.filter(pc.invert(pc.is_in(labels["note_id"], held))), raw / "labels.parquet")
    prepare_notes("table", raw, tmp_path / "again", min_characters=0)
    data = NoteArguments(str(tmp_path / "again"), max_length=32)
    with pytest.raises(EhrDataError, match="`validation` notes must hold a code in scope"):
        train_coder(data, CoderArguments(str(encoder[0])), settings(tmp_path / "model"))


def test_a_field_that_no_configuration_has_is_refused(data, encoder, tmp_path):
    options = CoderArguments(str(encoder[0]), model_options='{"hidden_dropuot": 0.1}')
    with pytest.raises(ValueError, match="hidden_dropuot"):
        train_coder(data, options, settings(tmp_path))


def test_notes_without_any_code_are_named(data):
    none = data.folder.labels().slice(0, 0)
    with pytest.raises(EhrDataError, match="LABELS must hold codes of the training notes"):
        frequent_codes(none, note_ids=data.splits["train"], more_than=0)


def test_unknown_options_are_named(data, tmp_path):
    for field, value in (("preset", "huge"), ("vocabulary", "letters"), ("model_options", "{")):
        with pytest.raises(ValueError, match=f"`{field}` must be"):
            pretrain_notes(data, replace(OPTIONS, **{field: value}), settings(tmp_path))


def test_the_example_trains_a_coder_on_another_encoder_with_the_stock_trainer(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(["--output", str(tmp_path / "coder"), "--max_steps", "2"])
    assert "note.html" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "coder")
    assert model.config.text_config.model_type == "bert"
    assert set(model.config.thresholds) == set(model.config.label2id)
    assert (tmp_path / "coder" / "note.html").read_text().startswith("<!DOCTYPE html>")


def test_training_a_coder_begins_at_the_shares_of_the_labels(data, encoder, tmp_path):
    options = CoderArguments(str(encoder[0]), model_options='{"label_output": "per_label"}')
    folder = train_coder(data, options, settings(tmp_path / "coder", learning_rate=0.0))  # nothing else moves
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    codes = [model.config.id2label[label] for label in range(model.num_labels)]
    train = data.splits["train"]
    labels = data.folder.labels()
    kept = labels.filter(pc.is_in(labels["note_id"], value_set=train))["code"].to_pylist()
    counts = np.array([kept.count(code) for code in codes])
    assert 0 < counts.min() < counts.max() < len(train)
    odds = (counts + 0.5) / (len(train) - counts + 0.5)
    assert model.head.output.bias.exp().tolist() == pytest.approx(odds, rel=1e-4)


def test_a_head_with_a_bias_a_label_starts_at_the_shares_of_the_labels():
    notes = Dataset.from_dict({"labels": [[0], [0, 2], [0], [0, 2]]})  # all, none and half of the notes
    odds = [4.5 / 0.5, 0.5 / 4.5, 2.5 / 2.5]
    names = dict(enumerate("abc"))
    fields = {"vocab_size": 20, "id2label": names, "label2id": {name: label for label, name in names.items()}}
    heads = [EhrBertForICDCoding(EhrBertConfig.tiny(head="cls", **fields))]
    heads += [EhrBertForICDCoding(EhrBertConfig.tiny(label_output="per_label", **fields))]
    heads += [
        EhrTextForICDCoding(getattr(EhrTextConfig, preset)(embedding_size=4, hidden_size=4, **fields))
        for preset in ("cnn", "caml", "laat", "multi_head_attention")
    ]
    for model in heads:
        assert start_at_shares(model, notes)
        layer = model.head if isinstance(model.head, torch.nn.Linear) else model.head.output
        assert layer.bias.exp().tolist() == pytest.approx(odds)
    shared = EhrBertForICDCoding(EhrBertConfig.tiny(**fields))
    before = {name: weight.clone() for name, weight in shared.state_dict().items()}
    assert not start_at_shares(shared, notes)
    assert all(torch.equal(weight, before[name]) for name, weight in shared.state_dict().items())

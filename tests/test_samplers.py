"""Flat buffers, token budgets and bins, and what the stock Trainer makes of them."""

import pickle
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ehr.collators import CodeMasking, PackedCollator
from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer
from hf_ehr.samplers import STREAMS, FlatBatch, FlatExamples, PackedDataset, TokenBudgetBatchSampler

TOKENIZER = EhrCodeTokenizer.from_codes([f"V/{number}" for number in range(100)])


def examples(lengths, labels=None, seed=0, **columns):
    """EXAMPLES of patients with random codes."""
    rng = np.random.default_rng(seed)
    rows = {
        "input_ids": [rng.integers(5, 105, length).tolist() for length in lengths],
        "visit_ids": [(1 + np.arange(length) // 3).tolist() for length in lengths],
        "serial_ids": [(np.arange(length) % 3).tolist() for length in lengths],
        "subject_id": list(range(len(lengths))),
    }
    if labels is not None:
        rows["labels"] = list(labels)
    return datasets.Dataset.from_dict(rows | columns)


def in_pieces(dataset, directory, borders):
    """The same examples from several memory-mapped files."""
    parts = []
    for number, (start, end) in enumerate(zip([0, *borders], [*borders, len(dataset)], strict=True)):
        path = str(directory / f"piece-{number}")
        dataset.select(range(start, end)).save_to_disk(path)
        parts.append(datasets.load_from_disk(path))
    return datasets.concatenate_datasets(parts)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 120), st.integers(0, 3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_epoch_has_every_patient_once_within_the_budget(lengths, slack, epoch, shuffle):
    sampler = TokenBudgetBatchSampler(lengths, max(lengths) + slack, seed=7, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        tokens = [lengths[index] for index in batch]
        assert 0 < sum(tokens) <= max(lengths) + slack
        assert tokens == sorted(tokens)


@given(LENGTHS, st.integers(2, 10))
@settings(deadline=None)
def test_batches_are_nearly_equal_so_ranks_wait_little_for_each_other(lengths, times):
    longest = max(lengths)
    sampler = TokenBudgetBatchSampler(lengths, longest * times)
    share = sum(lengths) / len(sampler)
    for batch in sampler:
        assert abs(sum(lengths[index] for index in batch) - share) < max(longest, share)
    large = TokenBudgetBatchSampler(np.full(4000, 40), 4000)
    tokens = [40 * len(batch) for batch in large]
    assert max(tokens) - min(tokens) <= 40


def test_an_epoch_depends_on_seed_and_number_alone_and_any_batch_can_be_asked_for_directly():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    first = TokenBudgetBatchSampler(lengths, 400, seed=1)
    first.set_epoch(5)
    expected = list(first)
    again = TokenBudgetBatchSampler(lengths, 400, seed=1)
    assert list(again) != expected
    again.set_epoch(5)
    assert again.batch(3).tolist() == expected[3]
    assert list(again) == expected
    assert list(TokenBudgetBatchSampler(lengths, 400, seed=2)) != list(TokenBudgetBatchSampler(lengths, 400, seed=1))


def test_a_budget_that_one_patient_exceeds_or_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="`max_tokens` must exceed the longest example, 9 tokens, got 9"):
        TokenBudgetBatchSampler([3, 9], 9)
    with pytest.raises(ValueError, match="at least one patient"):
        TokenBudgetBatchSampler([], 9)
    with pytest.raises(IndexError):
        TokenBudgetBatchSampler([3, 9], 90).batch(1)


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda dataset: dataset,
        lambda dataset: dataset.select(range(7, 31)),
        lambda dataset: dataset.select([30, 2, 2, 17]),
        lambda dataset: dataset.shuffle(seed=3),
        lambda dataset: dataset.filter(lambda row: row["labels"] == 1, keep_in_memory=True),
    ],
    ids=["whole", "slice", "chosen", "shuffled", "filtered"],
)
@pytest.mark.parametrize("borders", [(), (9, 10, 25)], ids=["one file", "four files"])
def test_gathered_examples_are_the_rows_of_the_data_set(tmp_path, rearranged, borders):
    lengths = np.random.default_rng(1).integers(1, 9, 40)
    multi_hot = [[float(index % 2), 1.0] for index in range(40)]
    whole = examples(lengths, labels=np.arange(40) % 3, prolonged_stay_labels=list(range(40)), ignored=multi_hot)
    dataset = rearranged(in_pieces(whole, tmp_path, borders))
    flat = FlatExamples(dataset)
    assert flat.lengths.tolist() == [len(row) for row in dataset["input_ids"]]
    indices = [len(dataset) - 1, 0, 1, 0]
    gathered = flat.gather(indices)
    joined = FlatBatch.from_rows([dataset[index] for index in indices])
    for name in STREAMS:
        assert gathered.streams[name].tolist() == joined.streams[name].tolist()
    assert gathered.offsets.tolist() == joined.offsets.tolist()
    assert {name: values.tolist() for name, values in gathered.targets.items()} == {
        name: values.tolist() for name, values in joined.targets.items()
    }
    assert set(gathered.targets) == {"labels", "prolonged_stay_labels"}


def test_multi_label_targets_are_gathered_as_rows(tmp_path):
    features = datasets.Features(
        {name: datasets.List(datasets.Value("int32")) for name in STREAMS}
        | {"labels": datasets.List(datasets.Value("float32"), length=2)}
    )
    dataset = examples([2, 1, 3], labels=[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).remove_columns("subject_id")
    flat = FlatExamples(dataset.cast(features).select([2, 0]))
    assert flat.gather([0, 1]).targets["labels"].tolist() == [[1, 1], [0, 1]]


def test_the_buffers_are_views_of_the_arrow_file_and_a_copy_for_a_worker_maps_it_again(tmp_path):
    build = in_pieces(
        examples([3, 4, 5]).cast_column("input_ids", datasets.List(datasets.Value("int32"))), tmp_path, ()
    )
    flat = FlatExamples(build)
    column = build.data.table["input_ids"].chunk(0).values
    assert np.shares_memory(flat._chunks[0].streams["input_ids"], column.to_numpy())
    dump = pickle.dumps(flat)
    assert len(dump) < 5000 + len(pickle.dumps(build))
    assert (
        pickle.loads(dump).gather([2, 0]).streams["input_ids"].tolist()
        == build["input_ids"][2] + build["input_ids"][0]
    )


def test_streams_that_are_missing_or_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"\['serial_ids'\] are missing"):
        FlatExamples(examples([2]).remove_columns("serial_ids"))
    broken = datasets.Dataset.from_dict({"input_ids": [[5, 6]], "visit_ids": [[1]], "serial_ids": [[0, 1]]})
    with pytest.raises(ValueError, match="`visit_ids` must be as long as `input_ids`"):
        FlatExamples(broken)


def test_bins_are_full_of_real_tokens_and_split_no_patient():
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    dataset = examples(lengths)
    bins, collate = PackedDataset(dataset, 300), PackedCollator(TOKENIZER)
    patients = []
    for index in range(len(bins)):
        batch = collate([bins[index]])
        assert batch["input_ids"].shape == (1, int(batch["cu_seqlens"][-1]))
        assert batch["input_ids"].shape[1] <= 300
        assert (batch["input_ids"] != TOKENIZER.pad_token_id).all()
        borders = batch["cu_seqlens"].tolist()
        patients += [tuple(batch["input_ids"][0, start:end].tolist()) for start, end in pairwise(borders)]
    assert sorted(patients) == sorted(map(tuple, dataset["input_ids"]))
    with pytest.raises(IndexError):
        bins[len(bins)]


class MeanOfCodes(torch.nn.Module):
    """The mean of a patient's code embeddings, a class from it, and every code from its own embedding."""

    def __init__(self, labels=2):
        super().__init__()
        torch.manual_seed(0)
        self.codes = torch.nn.Embedding(len(TOKENIZER), 8)
        self.classifier = torch.nn.Linear(8, labels)
        self.decoder = torch.nn.Linear(8, len(TOKENIZER))
        self.seen = []

    def forward(self, input_ids, visit_ids, serial_ids, cu_seqlens, max_seqlen, labels=None):
        assert int(cu_seqlens.diff().max()) == max_seqlen
        self.seen.append((input_ids.tolist(), cu_seqlens.tolist(), None if labels is None else labels.tolist()))
        states = self.codes(input_ids[0])
        if labels is not None and labels.ndim == 2:
            return {"loss": torch.nn.functional.cross_entropy(self.decoder(states), labels[0])}
        owner = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        pooled = torch.zeros(len(cu_seqlens) - 1, 8).index_add(0, owner, states) / cu_seqlens.diff()[:, None]
        logits = self.classifier(pooled)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(directory, dataset, collator, **options):
    defaults = {
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(directory), **(defaults | options))
    return Trainer(MeanOfCodes(), arguments, train_dataset=dataset, data_collator=collator)


@pytest.fixture
def pretraining():
    """Examples and a collator that masks codes."""
    lengths = np.random.default_rng(0).integers(1, 30, 60)
    return examples(lengths), PackedCollator(TOKENIZER, CodeMasking(TOKENIZER, seed=3))


def test_under_the_stock_trainer_two_epochs_have_all_patients_in_different_bins_with_different_masks(
    tmp_path, pretraining
):
    dataset, collator = pretraining
    run = trainer(tmp_path, PackedDataset(dataset, 200), collator)
    run.train()
    per_epoch = len(run.train_dataset)
    seen = run.model.seen
    assert len(seen) == 2 * per_epoch
    for epoch in (seen[:per_epoch], seen[per_epoch:]):
        lengths = [length for _, borders, _ in epoch for length in np.diff(borders).tolist()]
        assert sorted(lengths) == sorted(len(codes) for codes in dataset["input_ids"])
    assert [borders for _, borders, _ in seen[:per_epoch]] != [borders for _, borders, _ in seen[per_epoch:]]


def test_worker_processes_that_persist_see_the_epoch_and_change_no_batch(tmp_path, pretraining):
    dataset, collator = pretraining
    alone = trainer(tmp_path, PackedDataset(dataset, 200), collator)
    alone.train()
    with_workers = trainer(
        tmp_path, PackedDataset(dataset, 200), collator, dataloader_num_workers=2, dataloader_persistent_workers=True
    )
    with_workers.train()
    assert with_workers.model.seen == alone.model.seen


class StopAt(TrainerCallback):
    """Saves at a step and stops there."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_that_was_cut_off_resumes_with_the_very_batches_and_weights(tmp_path, pretraining, step):
    dataset, collator = pretraining
    whole = trainer(tmp_path / "whole", PackedDataset(dataset, 200), collator)
    whole.train()
    cut = trainer(tmp_path / "cut", PackedDataset(dataset, 200), collator)
    assert 2 < len(cut.train_dataset) < 7 < 2 * len(cut.train_dataset)
    cut.add_callback(StopAt(step))
    cut.train()
    resumed = trainer(tmp_path / "cut", PackedDataset(dataset, 200), collator)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert cut.model.seen + resumed.model.seen == whole.model.seen
    for name, weights in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weights, rtol=0, atol=0)


def test_two_ranks_share_the_bins_of_every_epoch_also_after_a_resume(pretraining):
    dataset, collator = pretraining
    single = PackedDataset(dataset, 200)
    loaders = []
    for rank in range(2):
        bins = PackedDataset(dataset, 200)
        plain = DataLoader(bins, batch_size=1, sampler=SequentialSampler(bins), collate_fn=collator)
        loaders.append(prepare_data_loader(plain, num_processes=2, process_index=rank, put_on_device=False))
    for epoch in range(2):
        single.set_epoch(epoch)
        expected = [collator([single[index]])["input_ids"].tolist() for index in range(len(single))]
        for rank, loader in enumerate(loaders):
            loader.set_epoch(epoch)
            mine = [batch["input_ids"].tolist() for batch in loader]
            assert mine[: len(expected[rank::2])] == expected[rank::2]
            rest = skip_first_batches(loader, 1)
            rest.set_epoch(epoch)
            assert [batch["input_ids"].tolist() for batch in rest] == mine[1:]


def test_a_batch_size_above_one_is_refused_instead_of_breaking_the_budget(tmp_path, pretraining):
    dataset, collator = pretraining
    with pytest.raises(ValueError, match="batch size per device to 1"):
        trainer(tmp_path, PackedDataset(dataset, 200), collator, per_device_train_batch_size=2).train()


def test_evaluation_of_packed_rows_keeps_the_order_of_the_data_set(tmp_path):
    lengths = np.random.default_rng(2).integers(1, 30, 11)
    dataset = examples(lengths, labels=np.arange(11) % 2)
    run = trainer(tmp_path, PackedDataset(dataset, 200), PackedCollator(TOKENIZER), per_device_eval_batch_size=4)
    run.train()
    found = run.predict(dataset)
    assert found.label_ids.tolist() == dataset["labels"][:]
    one_by_one = [run.model(**PackedCollator(TOKENIZER)([row]))["logits"][0].tolist() for row in dataset]
    np.testing.assert_allclose(found.predictions, one_by_one, atol=1e-6)
    assert run.evaluate(dataset)["eval_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(torch.tensor(one_by_one), torch.tensor(dataset["labels"][:])).item(),
        abs=1e-5,
    )


def test_a_token_budget_sampler_drives_a_plain_data_loader(pretraining):
    dataset, collator = pretraining
    sampler = TokenBudgetBatchSampler(FlatExamples(dataset).lengths, 200)
    loader = prepare_data_loader(DataLoader(dataset, batch_sampler=sampler, collate_fn=collator), put_on_device=False)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([batch["cu_seqlens"].tolist() for batch in loader])
    assert epochs[0] != epochs[1]
    assert sum(len(borders) - 1 for borders in epochs[1]) == len(dataset)

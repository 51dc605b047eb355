"""The three controls of pre-training: it pays where codes share a cause, and nowhere else.

CI-sized worlds and loose bounds; `hf-ehr quickstart` shows the same at full size.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainingArguments

from hf_ehr import EhrCodeTokenizer, training
from hf_ehr.baselines import bag_of_codes_lr
from hf_ehr.metrics import auroc
from hf_ehr.quickstart import PRETRAINING, RECIPE
from hf_ehr.records import assemble
from hf_ehr.schema import DatasetInfo, shard_name, write_parquet
from hf_ehr.sources.synthetic import SyntheticConfig, generate_shard, labels, shuffle_codes
from hf_ehr.training import DataArguments, FinetuneArguments, PretrainArguments

LABELLED, DRAWS = 200, 3


def prepared(folder: Path, world: str, placebo: bool = False) -> DataArguments:
    config = SyntheticConfig(world=world, patients=9_000, conditions=20, synonyms=80, noise_codes=60, seed=3)
    events, truth = generate_shard(config, 0, 1)
    write_parquet(assemble(shuffle_codes(events, 0) if placebo else events), folder / "records" / shard_name(0, 1))
    write_parquet(labels(truth), folder / "labels" / "synthetic_outcome.parquet")
    DatasetInfo(source="synthetic").save(folder)
    return DataArguments(data=str(folder))


def pretrain(data: DataArguments, folder: Path) -> Path:
    options = PretrainArguments(preset="tiny", model_options=json.dumps(RECIPE), mlm_probability=0.3, max_tokens=1024)
    settings = PRETRAINING | {"num_train_epochs": 7, "save_strategy": "no", "logging_strategy": "no"}
    training.pretrain(
        data, options, TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **settings)
    )
    return folder


def figures(data: DataArguments, model: Path) -> dict[str, float]:
    """Mean test AUROC over draws of the bag of codes, of the frozen pre-trained model and of the untrained one."""
    tokenizer, splits = EhrCodeTokenizer.from_pretrained(model), data.splits()
    rows: dict[str, list[float]] = {"bag": [], "pretrained": [], "untrained": []}
    for draw in range(DRAWS):
        for untrained in (False, True):
            options = FinetuneArguments("synthetic_outcome", str(model), LABELLED, draw, untrained)
            parts = {name: training.examples_of(data, options, tokenizer, splits, name) for name in splits}
            classifier = training.new_classifier(options, seed=0)
            training.start_from_probe(classifier, parts["train"], parts["validation"], tokenizer)
            truth = np.asarray(parts["test"]["labels"])
            name = "untrained" if untrained else "pretrained"
            rows[name].append(auroc(truth, training.predict(classifier, parts["test"], tokenizer)))
        bag = bag_of_codes_lr(*parts.values(), vocab_size=len(tokenizer), seed=0)
        rows["bag"].append(auroc(truth, bag.test))
    return {name: float(np.mean(values)) for name, values in rows.items()}


@pytest.fixture(scope="module")
def world_c(tmp_path_factory) -> tuple[DataArguments, dict[str, float]]:
    folder = tmp_path_factory.mktemp("world-c")
    data = prepared(folder / "data", "C")
    return data, figures(data, pretrain(data, folder / "model"))


def test_pretraining_pays_in_world_c_with_few_labels(world_c):
    _, auc = world_c
    assert auc["pretrained"] > auc["bag"] + 0.02
    assert auc["pretrained"] > auc["untrained"] + 0.05


@pytest.mark.slow
def test_pretraining_on_shuffled_codes_does_not_help(world_c, tmp_path):
    data, auc = world_c
    shuffled = prepared(tmp_path / "shuffled", "C", placebo=True)
    placebo = figures(data, pretrain(shuffled, tmp_path / "model"))
    assert placebo["pretrained"] < auc["pretrained"] - 0.05
    assert placebo["pretrained"] < placebo["bag"]


@pytest.mark.slow
def test_the_gain_vanishes_where_codes_act_one_by_one(tmp_path):
    data = prepared(tmp_path / "data", "null")
    auc = figures(data, pretrain(data, tmp_path / "model"))
    assert auc["pretrained"] < auc["bag"] + 0.02

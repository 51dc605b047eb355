"""Model cards: front matter through the Hub's own parser, figures that equal the table, sections from the records."""

import json
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import hf_ehr
from hf_ehr import MedBertConfig, MedBertForSequenceClassification
from hf_ehr.cards import (
    TRIPOD,
    architecture_card,
    evaluation_card,
    figures_of,
    figures_of_rows,
    front_matter,
    minimal_card,
    with_figures,
)
from hf_ehr.intervals import Interval
from hf_ehr.schema import EhrDataError
from hf_ehr.tasks import SplitManifest
from hf_ehr.tasks.library import get_task

ROOT = Path(__file__).resolve().parents[1]
RELEASED = Path(__file__).parent / "fixtures" / "released"
CONFIGS = [getattr(hf_ehr, name) for name in hf_ehr.__all__ if name.endswith("Config")]
SECTIONS = (
    "## Intended use and misuse", "## Data", "## Cohort and label", "## Splits", "## Leakage audit",
    "## Known differences", "## Privacy", "## Licence", "## Citation", "## TRIPOD+AI",
)  # fmt: skip
TEMPLATE = """---
{meta}
---

# {task}

> Research software.

reads {reads}

{table}

{notes}
"""
ROWS = [
    {"model": "Prevalence", "metrics": {}, "n": 40, "positives": 9, "patients": 38, "n_train": 100},
    {
        "model": "Ours", "n": 40, "positives": 9, "patients": 38, "n_train": 100,
        "metrics": {
            "auroc": {"value": 0.75, "low": 0.5, "high": 0.875},
            "ece": {"value": 0.125, "low": None, "high": None},
            "f1": {"value": None, "low": None, "high": None},
        },
    },
]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A classifier with the records of its training, and the table of its evaluation."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    MedBertForSequenceClassification(MedBertConfig.tiny(vocab_size=9, **sizes)).save_pretrained(tmp_path / "model")
    SplitManifest.of("mimic4", {"train": range(70), "validation": [70, 71], "test": range(80, 120)}).save(
        tmp_path / "model" / "splits.json"
    )
    made = {
        "data": {"data": "/secret/place", "split_seed": 4, "min_patients": 12, "max_length": 128},
        "options": {"task": "readmission_30d", "model": "/secret/other", "train_patients": None},
    }
    (tmp_path / "model" / "finetune.json").write_text(json.dumps(made))
    (tmp_path / "table.json").write_text(json.dumps({"rows": ROWS}))
    (tmp_path / "table.md").write_text("| Ours | 0.750 |\n")
    (tmp_path / "calibration.png").write_bytes(b"\x89PNG figure")
    return tmp_path


def written(folder: Path, **more) -> ModelCard:
    figures = figures_of_rows(folder / "table.md", "Ours")
    evaluation_card(
        folder / "model", "readmission_30d", (folder / "table.md").read_text(), ["a note", "another"],
        template=TEMPLATE, model="Ours", figures=figures, plots=folder, reads="codes", **more,
    )  # fmt: skip
    return ModelCard.load(folder / "model" / "README.md")


# The cards of trained models


def test_the_model_index_holds_the_figures_of_the_table(folder):
    card = written(folder)
    assert {(one.metric_type, one.metric_name): one.metric_value for one in card.data.eval_results} == {
        ("roc_auc", "AUROC"): 0.75, ("ece", "ECE"): 0.125,
    }  # fmt: skip
    assert {one.dataset_type for one in card.data.eval_results} == {"mimic4"}
    assert {one.task_name for one in card.data.eval_results} == {"readmission_30d"}
    assert card.data.model_name == "Ours, readmission_30d"
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["ehr", "ours", "transformers-ehr"]


def test_the_figures_are_kept_with_their_intervals(folder):
    written(folder)
    assert json.loads((folder / "model" / "evaluation.json").read_text()) == {
        "model": "Ours", "architecture": "MedBertForSequenceClassification", "task": "readmission_30d",
        "source": "mimic4", "test_rows": 40, "test_events": 9, "test_patients": 38, "train_rows": 100,
        "metrics": [
            {"type": "auroc", "name": "AUROC", "value": 0.75, "low": 0.5, "high": 0.875},
            {"type": "ece", "name": "ECE", "value": 0.125, "low": None, "high": None},
        ],
    }  # fmt: skip


def test_the_sections_say_what_the_records_of_the_folder_say(folder):
    text = written(folder).text
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)
    assert "reads codes" in text
    assert "- a note\n- another" in text
    assert get_task("readmission_30d").to_yaml().strip() in text
    assert "| train | 70 |\n| validation | 2 |\n| test | 40 |" in text
    assert "100 labelled training rows; 40 test rows; 9 of them with the event; 38 test patients with a row." in text
    assert "fewer than 12 training patients" in text
    assert "`max_length` 128" in text
    assert "npj Digital" in text  # whom to cite
    assert "| id of the mask |" in text  # a difference from the paper
    assert "ynthetic patients" not in text


def test_the_calibration_plot_is_copied_and_shown(folder):
    assert "(calibration.png)" in written(folder).text
    assert (folder / "model" / "calibration.png").read_bytes() == b"\x89PNG figure"


def test_places_on_a_disk_stay_out_of_cards(folder):
    assert "secret" not in written(folder).content
    assert "secret" not in (folder / "model" / "evaluation.json").read_text()


def test_a_model_of_synthetic_patients_says_so_in_its_first_lines(folder):
    SplitManifest.of("synthetic_icu", {"train": [1], "test": [2]}).save(folder / "model" / "splits.json")
    card = written(folder, tags=["icu"])
    assert card.data.tags == ["ehr", "ours", "icu", "synthetic", "transformers-ehr"]
    assert "synthetic patients" in card.text[: card.text.index("Research software")]


def test_tasks_of_ones_own_are_shown_and_lost_ones_named(folder):
    own = folder / "own.yaml"
    own.write_text(get_task("prolonged_stay").to_yaml())
    made = {"data": {}, "options": {"task": str(own)}}
    (folder / "model" / "finetune.json").write_text(json.dumps(made))
    assert get_task("prolonged_stay").to_yaml().strip() in written(folder).text
    own.unlink()
    assert "`readmission_30d`: labels of this name" in written(folder).text
    assert str(folder) not in written(folder).content


def test_a_folder_without_records_gets_a_card_all_the_same(folder):
    for name in ("splits.json", "finetune.json"):
        (folder / "model" / name).unlink()
    assert "Source: `unknown`." in written(folder).text


def test_a_row_that_is_not_there_is_an_error(folder):
    with pytest.raises(EhrDataError, match="must have a row 'Theirs'"):
        figures_of_rows(folder / "table.md", "Theirs")


def test_figures_that_are_not_defined_are_left_out():
    nan = math.nan
    figures = {"a": Interval(0.5, 0.25, 0.75), "b": Interval(nan, nan, nan), "c": Interval(1.0, nan, nan)}
    made = figures_of(figures, {"a": "A", "b": "B", "c": "C"}, test_rows=3)
    assert made == {
        "test_rows": 3,
        "metrics": [
            {"type": "a", "name": "A", "value": 0.5, "low": 0.25, "high": 0.75},
            {"type": "c", "name": "C", "value": 1.0, "low": None, "high": None},
        ],
    }


def test_figures_are_put_into_a_card_that_has_none_and_into_no_other():
    content = {"model": "Ours", "task": "t", "source": "s", "metrics": [{"type": "f1", "name": "F1", "value": 0.5}]}
    plain = f"---\n{front_matter('A name', ['x'], 'EhrTaggerForTokenClassification')}\n---\n\n# Title\n\n---\n\ntext\n"
    assert ModelCard(plain).data.pipeline_tag == "token-classification"
    assert with_figures(plain, None) == plain
    assert with_figures(plain, {"something": "else"}) == plain
    card = ModelCard(with_figures(plain, content))
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("f1", 0.5)]
    assert card.text.strip() == "# Title\n\n---\n\ntext"
    other = content | {"metrics": [{"type": "f1", "name": "F1", "value": 0.75}]}
    assert with_figures(card.content, other) == card.content


def test_every_item_of_tripod_ai_is_mapped_once():
    numbers = [int(number) for row in TRIPOD for number in row[0].split(", ")]
    assert sorted(numbers) == list(range(1, 28))


# The cards of architectures


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_architecture_has_a_card_that_the_hubs_parser_reads(config):
    text = architecture_card(config())
    name = config.__module__.rpartition("configuration_")[2]
    assert text == (ROOT / "model_cards" / f"{name}.md").read_text(), "the package must carry the repository's card"
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert {"ehr", "transformers-ehr"} <= set(card.data.tags)
    assert "not a medical device" in card.text
    for section in ("## What it is", "## Known differences from the paper", "## Use and misuse"):
        assert section in card.text


def test_no_card_is_of_an_architecture_that_is_not_there():
    known = {config.__module__.rpartition("configuration_")[2] for config in CONFIGS}
    assert {path.stem for path in (ROOT / "model_cards").glob("*.md")} <= known


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_a_model_that_nobody_evaluated_has_a_card(config):
    made = config()
    made.architectures = [made.auto_map["AutoModel"].rpartition(".")[2]]
    card = ModelCard(minimal_card(made))
    assert "AutoModel.from_pretrained" in card.text
    assert "has not been evaluated" in card.text
    assert card.data.eval_results is None


# The cards that evaluations wrote


@pytest.mark.parametrize("folder", sorted(RELEASED.glob("*/")), ids=lambda folder: folder.name)
def test_the_card_of_a_released_checkpoint_is_whole(folder):
    card = ModelCard.load(folder / "README.md")
    figures = json.loads((folder / "evaluation.json").read_text())
    assert all(section in card.text for section in SECTIONS)
    assert [one.metric_value for one in card.data.eval_results] == [one["value"] for one in figures["metrics"]]
    assert figures["source"].startswith("synthetic")
    assert "synthetic" in card.data.tags
    assert "synthetic" in folder.name
    assert "not a medical device" in card.text
    assert "| test |" in card.text

"""The command line as a person meets it: help, errors in one sentence, YAML config, the whole road on real tables."""

import json
from pathlib import Path

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_ehr import MedBertConfig, MedBertModel
from hf_ehr.cli.main import COMMANDS, main
from hf_ehr.prepare import prepare

TASKS = Path(__file__).parents[1] / "examples" / "tasks"


def test_help_names_every_command_and_every_command_has_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"example: hf-ehr {name}" in capsys.readouterr().out.replace("\n", " ")


def test_a_command_of_several_models_says_which_have_a_page(capsys):
    for command in ("pretrain", "finetune"):
        pages = {}
        for model in ("medbert", "ehrbert", "medhmp"):
            with pytest.raises(SystemExit):
                main([command, model, "--help"])
            pages[model] = capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([command, "--help"])
        index = capsys.readouterr().out
        assert all(f"hf-ehr {command} {model} --help" in index for model in pages)
        assert "--label_init" not in pages["medbert"]
        assert "--head" in pages["medbert"] or command == "pretrain"
        assert pages["medbert"] != pages["ehrbert"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "`train` is no command"),
        (["prepare", "--output", "x"], "SOURCE is missing"),
        (["pretrain", "gpt", "--data", "x"], "MODEL must be one of medbert"),
        (["prepare", "mimic3", "--input", "nowhere", "--output", "x", "--options", "{"], "`options` must be a JSON"),
        (["evaluate", "--model", "nowhere", "--output", "x"], "finetune.json is missing"),
        (["report", "medbert_table5"], "no specification of the package"),
        (["convert", "medbert", "--checkpoint", "a", "--vocabulary", "b", "--output", "c"], "a"),
        (["fit-tokenizer", "--config"], "must be followed by a YAML file"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match=r"finetune\.json is missing"):
        main(["evaluate", "--model", str(tmp_path), "--output", str(tmp_path), "--debug"])


def test_a_yaml_config_gives_the_arguments_and_the_command_line_wins(tmp_path, capsys):
    config = tmp_path / "prepare.yaml"
    options = json.dumps({"world": "C", "patients": 60, "conditions": 18, "synonyms": 2, "noise_codes": 2})
    config.write_text(f"output: {tmp_path / 'ignored'}\nshards: 2\nworkers: 1\noptions: '{options}'\n")
    assert main(["prepare", "synthetic", "--config", str(config), "--output", str(tmp_path / "data")]) == 0
    assert "60" in capsys.readouterr().out
    assert len(list((tmp_path / "data" / "records").glob("*.parquet"))) == 2
    assert not (tmp_path / "ignored").exists()


def test_a_checkpoint_moves_to_another_vocabulary_and_shows_a_patients_attention(tmp_path, capsys):
    options = {"world": "C", "patients": 60, "conditions": 18, "synonyms": 2, "noise_codes": 2}
    prepare("synthetic", None, tmp_path / "data", shards=2, workers=1, progress=False, options=options)
    words = ["fit-tokenizer", "--data", str(tmp_path / "data"), "--min_patients", "1"]
    assert main([*words, "--output", str(tmp_path / "all")]) == 0
    assert main([*words, "--max_size", "20", "--output", str(tmp_path / "few")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "all")
    MedBertModel(MedBertConfig.tiny(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    moved = tmp_path / "moved"
    assert main(["transfer", "--model", str(tmp_path / "model"), "--tokenizer", str(tmp_path / "few"),
                 "--output", str(moved)]) == 0  # fmt: skip
    assert "20 codes: 20 kept" in capsys.readouterr().out
    assert AutoModel.from_pretrained(moved).config.vocab_size == 25
    words = ["attention", "--model", str(moved), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "view")]
    assert main([*words, "--row", "41"]) == 0
    assert (tmp_path / "view" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "view" / "attention.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert main([*words, "--row", "60"]) == 2
    assert "`row` must be a row of the records" in capsys.readouterr().err


def road(source: str, folder: Path, output: Path, task: str, *more: str) -> str:
    """Raw files → records → tokenizer → pre-training → fine-tuning → table → loaded back."""
    words = ["quickstart", "--source", source, "--input", str(folder), "--output", str(output), "--task", task]
    assert main([*words, "--debug", *more]) == 0
    (model,) = output.glob("model-*")
    assert AutoModelForSequenceClassification.from_pretrained(model).config.thresholds
    return (model / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "data", "task"),
    [
        ("mimic3", "mimic3_demo", "prolonged_stay"),
        ("mimic4", "mimic4_demo", "readmission_30d"),
        ("omop", "synpuf1k_omop", str(TASKS / "omop_atrial_fibrillation.yaml")),
    ],
)
def test_real_tables_go_the_whole_road(source, data, task, real_data, tmp_path):
    card = road(source, real_data(data), tmp_path / "out", task, "--epochs", "1", "--sizes", "60")
    assert "| Untrained Med-BERT |" in card
    assert ("prove nothing" in card) == (source != "omop")


@pytest.mark.slow
def test_the_diabetes_hospitals_go_the_whole_road(real_data, tmp_path):
    more = ("--options", '{"columns": "diabetes130"}', "--epochs", "1", "--sizes", "500")
    card = road("table", real_data("diabetes130"), tmp_path / "out", "readmission_30d", *more)
    assert "| LightGBM on counts |" in card
    assert "prove nothing" not in card

"""The recipes of small checkpoints, and the checkpoints that they made."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from hf_ehr.cli.main import COMMANDS
from hf_ehr.hub import check_publishable
from tests.released import RECIPES, RELEASED, SHOWN, answers, commands, run_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.sh"))
FOLDERS = sorted(path for path in RELEASED.glob("*/") if path.is_dir())


def test_every_pretrained_model_has_a_recipe():
    from hf_ehr.cli.commands import MODELS

    assert set(NAMES) == set(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_evaluates_and_publishes_what_is_named_synthetic(name, tmp_path):
    lines = commands(name, tmp_path)
    verbs = [line[0] for line in lines]
    assert set(verbs) <= set(COMMANDS)
    assert verbs[0].startswith("prepare")
    assert lines[0][1].startswith("synthetic")
    assert {"pretrain", "finetune"} <= set(verbs)
    assert verbs[-2].startswith("evaluate")
    assert lines[-1] == ["publish", lines[-2][2], "--output", str(tmp_path / f"{name}-synthetic-tiny")]
    assert sum(line.startswith("hf-ehr ") for line in (RECIPES / f"{name}.sh").read_text().splitlines()) == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_whole(name, tmp_path):
    published = run_recipe(name, tmp_path)
    check_publishable(published)
    assert AutoConfig.from_pretrained(published).thresholds
    assert "synthetic" in (published / "README.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_released_checkpoint_answers_as_it_did_when_it_was_made(folder):
    expected = json.loads(Path(f"{folder}.json").read_text())
    found = answers(folder)
    assert set(found) == set(expected)
    for name, rows in expected.items():
        assert all(len(row) <= SHOWN for row in rows)
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(rows), atol=1e-5, rtol=1e-4, msg=f"{name} of {folder.name} changed"
        )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_released_checkpoint_is_small_and_may_leave(folder):
    check_publishable(folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 400_000

"""Makes the committed small checkpoints anew from their recipes: `python -m tests.released NAME …`.

The folder is the published one without the code, for the code under test is the package's; `expected.json` holds what
it answers to fixed random input. Without a name the answers alone are recomputed. If a change of the numbers is meant,
say why in CHANGELOG.md and look at the difference before it is committed.
"""

import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from hf_ehr._publish_alone import outputs_of
from hf_ehr._publish_inputs import example_inputs
from hf_ehr.cli.main import main as hf_ehr
from hf_ehr.hub import open_whole

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
RELEASED = Path(__file__).parent / "fixtures" / "released"
SHOWN = 8
"""Numbers of each row that are kept."""


def commands(name: str, output: Path) -> list[list[str]]:
    """The `hf-ehr` lines of a recipe as words, with the folder in its place."""
    lines = (RECIPES / f"{name}.sh").read_text().splitlines()
    words = [shlex.split(line.replace("$1", str(output))) for line in lines if line.startswith("hf-ehr ")]
    return [line[1:] for line in words]


def run_recipe(name: str, output: Path) -> Path:
    """Runs a recipe in this process; returns the published folder."""
    for words in commands(name, output):
        assert hf_ehr([*words, "--debug"]) == 0, words
    return output / f"{name}-synthetic-tiny"


def answers(folder: Path) -> dict[str, list]:
    """The first numbers of every output, row by row."""
    model = open_whole(folder)
    found = outputs_of(model, example_inputs(model, seed=3))
    return {name: value.double().flatten(1)[:, :SHOWN].tolist() for name, value in found.items() if value.ndim > 1}


def main() -> None:
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            published = run_recipe(name, Path(scratch))
            shutil.rmtree(RELEASED / published.name, ignore_errors=True)
            shutil.copytree(published, RELEASED / published.name, ignore=shutil.ignore_patterns("*.py"))
    for folder in sorted(path for path in RELEASED.iterdir() if path.is_dir()):
        (RELEASED / f"{folder.name}.json").write_text(json.dumps(answers(folder), indent=1) + "\n")


if __name__ == "__main__":
    main()

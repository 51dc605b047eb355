"""The house rules: what imports what, what importing costs, and that the documents tell the truth."""

import ast
import configparser
import csv
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from transformers.dynamic_module_utils import get_relative_imports

import hf_ehr
from hf_ehr.cli.main import COMMANDS
from tests.coders import random_coder, words_of

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")

FLOORS = (
    {"version", "schema"},
    {
        "sources",
        "records",
        "_sorting",
        "_event_columns",
        "ontology",
        "vocabulary",
        "notes",
        "hourly",
        "_hourly_fitting",
        "_hourly_stays",
        "_hourly_summary",
        "tasks",
    },
    {
        "prepare",
        "_shards",
        "datasets",
        "_histories",
        "_example_writer",
        "note_datasets",
        "_note_pairs",
        "entity_tags",
        "entity_datasets",
        "entity_corpora",
        "stay_datasets",
        "admission_datasets",
        "visit_datasets",
        "_visit_shards",
        "_visit_slots",
        "drug_classes",
    },
    {"samplers", "collators", "note_collators", "stay_collators", "visit_collators"},
    {
        "metrics",
        "_scores",
        "code_groups",
        "intervals",
        "multilabel_predictions",
        "multilabel",
        "multilabel_intervals",
        "code_thresholds",
        "baselines",
        "code_embeddings",
        "word_embeddings",
        "note_baselines",
        "recommendation",
        "recommendation_baselines",
        "named_entities",
        "_stay_summaries",
        "stay_baselines",
        "decision_curves",
        "subgroups",
        "visualization",
        "attention_maps",
        "_pages",
        "attention_page",
        "cross_attention_maps",
        "cross_attention_page",
        "embedding_map",
        "evidence",
        "highlight_page",
    },
    {
        "",
        "reports",
        "hub",
        "_publish_alone",
        "_publish_checks",
        "_publish_inputs",
        "cards",
        "explanations",
        "risk_explanations",
        "evidence_report",
        "pipelines",
        "prediction_files",
        "validation",
        "doctor",
        "training",
        "gradient_caching",
        "label_embeddings",
        "evaluation",
        "stay_evaluation",
        "visit_evaluation",
        "_visit_rivals",
        "_visit_tables",
        "entity_evaluation",
        "coding_report",
        "coding_tables",
        "coder_evaluation",
        "quickstart",
        "transfer",
        "convert",
        "experiments",
        "cli",
    },
)
"""A file sees its own floor and those before it; the empty name is the package's ``__init__``."""
TOP = FLOORS[-1]
MODELS_SEEN_BELOW_THE_TOP = {
    "vocabulary": {"tokenization_ehr", "code_hierarchy"},  # its product is the tokenizer
    "hourly": {"feature_extraction_hourly"},  # its product
    "_hourly_fitting": {"feature_extraction_hourly", "hourly_grid"},
    "ontology": {"code_hierarchy"},
    "sources": {"code_hierarchy"},
    "tasks": {"code_hierarchy"},
    "stay_datasets": {"feature_extraction_hourly"},
    "visit_datasets": {"processing_medmplm"},
    "drug_classes": {"code_hierarchy"},
    "admission_datasets": {"processing_medhmp"},
    "notes": {"note_windows"},
    "code_thresholds": {"code_decisions"},
    "evidence": {"evidence_spans"},
    "highlight_page": {"code_decisions", "evidence_spans"},
    "attention_maps": {"any_encoder"},
    "cross_attention_maps": {"any_encoder"},
}
MODELS_MAY_IMPORT = {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub"} | sys.stdlib_module_names
HEAVY = {"polars", "ibis", "datasets", "sklearn", "evaluate", "matplotlib", "lightgbm", "duckdb", "pyspark", "pyarrow"}


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# Imports


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the package."""
    names = {}
    for path in sorted((SRC / "hf_ehr").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def own_imports(name: str, *, runtime_only: bool = False) -> set[str]:
    """Modules of the package that ``name`` imports anywhere in its file, inside functions too."""
    path = modules()[name]
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if runtime_only and node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names}
    return {target for target in found if target.split(".")[0] == "hf_ehr"}


def room(name: str) -> str:
    """``hf_ehr.sources.engine`` → ``sources``; the package itself → the empty name."""
    return [*name.split("."), ""][1]


def floor(name: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if room(name) in rooms:
            return level
    pytest.fail(f"{name} stands on no floor: say in tests/test_house.py (FLOORS) and ARCHITECTURE.md where it belongs")


def may_import(name: str, target: str) -> bool:
    if room(target) == "models":
        return room(name) in TOP or target.split(".")[-1] in MODELS_SEEN_BELOW_THE_TOP.get(room(name), ())
    return floor(target) <= floor(name)


@pytest.mark.parametrize("name", [name for name in modules() if room(name) != "models"])
def test_a_file_imports_only_from_its_own_floor_and_below(name):
    assert floor(name) in range(len(FLOORS))
    assert {target for target in own_imports(name) if not may_import(name, target)} == set()


def test_the_import_law_forbids_what_it_should():
    assert not may_import("hf_ehr.schema", "hf_ehr.records")
    assert not may_import("hf_ehr.records", "hf_ehr.datasets")
    assert not may_import("hf_ehr.metrics", "hf_ehr.models.modeling_medbert")
    assert not may_import("hf_ehr.sources.engine", "hf_ehr.models.tokenization_ehr")
    assert not may_import("hf_ehr.collators", "hf_ehr")
    assert may_import("hf_ehr.cli.main", "hf_ehr.models.modeling_medbert")
    assert may_import("hf_ehr.vocabulary", "hf_ehr.models.tokenization_ehr")


def test_no_import_runs_in_a_circle():
    graph = {name: own_imports(name, runtime_only=True) - {name} for name in modules()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' → '.join(reversed(error.args[1]))}")


def test_no_file_takes_a_private_name_of_another():
    taken = [
        f"{name} takes {alias.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_")
        and alias.name != "__version__"
        and not any(known.endswith(f".{alias.name}") for known in modules())  # a private file of its own folder
    ]
    assert taken == []


@pytest.mark.parametrize("path", sorted((SRC / "hf_ehr" / "models").glob("*.py")), ids=lambda path: path.stem)
def test_a_model_file_imports_siblings_and_the_packages_that_the_hub_has(path):
    siblings = {sibling.stem for sibling in path.parent.glob("*.py")}
    absolute = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, node.module in siblings) == (1, True), (
                f"line {node.lineno}: not `from .sibling import X`"
            )
        elif isinstance(node, ast.ImportFrom):
            absolute.add(node.module.split(".")[0])
    assert absolute <= MODELS_MAY_IMPORT
    # The Hub's loader finds relative imports by a regular expression, in docstrings as well.
    assert set(get_relative_imports(path)) <= siblings


def test_the_models_folder_is_flat():
    """A checkpoint holds all its code in one folder, where files of equal names would overwrite each other."""
    folders = [path.name for path in (SRC / "hf_ehr" / "models").iterdir() if path.is_dir()]
    assert set(folders) <= {"__pycache__"}


IMPORTS = {"hf_ehr": "import hf_ehr", "transformers": "from transformers import AutoModel, PreTrainedModel"}


def import_alone(name: str) -> tuple[float, set[str]]:
    """CPU seconds of an import in a process of its own, and the top-level modules it loads.

    The clock on the wall would measure what else the machine does.
    """
    code = f"""
import sys, time
start = time.process_time()
{IMPORTS[name]}
print(time.process_time() - start, *{{module.split(".")[0] for module in sys.modules}})
"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, *loaded = printed.stdout.split()
    return float(seconds), set(loaded)


@pytest.fixture(scope="module")
def imports() -> dict[str, tuple[float, set[str]]]:
    return {name: import_alone(name) for name in IMPORTS}


def test_importing_the_package_costs_little_more_than_transformers(imports):
    """Best of at most three, in turns."""
    best = {name: seconds for name, (seconds, _) in imports.items()}
    for _ in range(2):
        if best["hf_ehr"] <= 1.2 * best["transformers"]:
            break
        best = {name: min(seconds, import_alone(name)[0]) for name, seconds in best.items()}
    assert best["hf_ehr"] <= 1.2 * best["transformers"], best


def test_importing_the_package_loads_no_data_or_plotting_library(imports):
    assert HEAVY & (imports["hf_ehr"][1] - imports["transformers"][1]) == set()


# Public names


def test_all_lists_every_public_name_and_nothing_else():
    own = {
        name
        for name, value in vars(hf_ehr).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("hf_ehr") and name.isidentifier()
    }
    assert set(hf_ehr.__all__) == own | {"__version__"}
    assert sorted(hf_ehr.__all__) == list(hf_ehr.__all__)


@pytest.mark.parametrize("entry", pyproject()["project"]["scripts"].values())
def test_a_console_script_names_a_function_that_exists(entry):
    module, function = entry.split(":")
    inspect.signature(getattr(importlib.import_module(module), function)).bind()


# The acceptance table


def acceptance() -> list[dict[str, str]]:
    with (ROOT / "tests" / "acceptance.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, restval=""))


def test_the_acceptance_table_has_every_row_once():
    rows = acceptance()
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 111)]
    assert all(row["what"] and None not in row for row in rows)


@pytest.mark.parametrize("row", [row for row in acceptance() if row["shown_by"]], ids=lambda row: row["row"])
def test_what_the_acceptance_table_names_exists(row):
    shown_by = row["shown_by"]
    if shown_by.startswith("tests/"):
        assert [node for node in shown_by.split() if not is_defined(node)] == []
    elif shown_by.startswith("make "):
        assert shown_by.split()[1] in make_targets()
    else:
        assert shown_by.startswith("hf-ehr "), "must name tests (tests/…), or a command (make …, hf-ehr …)"
        assert shown_by.split()[1] in COMMANDS


def is_defined(node: str) -> bool:
    """Whether the file of a node id defines its function, or its class does or inherits it."""
    file, *names = node.partition("[")[0].split("::")
    path = ROOT / file
    if not path.is_file() or not 1 <= len(names) <= 2:
        return False
    return names[-1].startswith("test") and (
        names[0] in definitions(path, ast.FunctionDef) if len(names) == 1 else defines_method(path, *names)
    )


def definitions(path: Path, kind: type) -> dict:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, kind)}


def defines_method(path: Path, class_name: str, method: str) -> bool:
    found = definitions(path, ast.ClassDef).get(class_name)
    if found is None:
        return any(defines_method(origin, class_name, method) for origin in imported_from(path, class_name))
    if any(isinstance(node, ast.FunctionDef) and node.name == method for node in found.body):
        return True
    return any(defines_method(path, ast.unparse(base).split(".")[-1], method) for base in found.bases)


def imported_from(path: Path, name: str) -> list[Path]:
    """The test files that ``path`` may have ``name`` from."""
    origins = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            folder = path.parents[node.level - 1] if node.level else ROOT
            origins.append(folder / f"{node.module.replace('.', '/')}.py")
    return [origin for origin in origins if origin.is_file()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


# Documents


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_links_and_points_only_to_what_exists(document):
    text = (ROOT / document).read_text()
    links = {link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link}
    files = set(re.findall(r"`((?:src|tests|benchmarks|examples|model_cards)/[\w./-]*)`", text))
    assert {name for name in links | files if not (ROOT / name).exists()} == set()
    assert set(re.findall(r"\bmake ([a-z-]+)`", text)) <= make_targets()


def test_the_readme_lists_every_command():
    assert set(re.findall(r"^\| `hf-ehr ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)) == set(COMMANDS)


def test_the_map_of_files_in_the_readme_is_complete():
    listed = re.findall(r"^  ([\w/]+(?:\.py)?) {2,}\S", (ROOT / "README.md").read_text(), re.MULTILINE)
    package = SRC / "hf_ehr"
    assert [name for name in listed if not (package / name).exists()] == []
    rooms = {room(name) for name in modules()} - {""}
    assert {name for name in rooms if not name.startswith("_")} == {Path(name).stem for name in listed}


def test_the_python_code_in_the_readme_runs(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "classifier"
    tokenizer = hf_ehr.EhrCodeTokenizer.from_codes(["ICD10CM/I10", "ICD10CM/E11"])
    torch.manual_seed(0)
    config = hf_ehr.MedBertConfig.tiny(vocab_size=len(tokenizer), num_labels=2)
    hf_ehr.MedBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "classifier-published")
    words = words_of("Known asthma. Hip fracture on the left.")
    random_coder(words, "ICD10CM/J45.909", "ICD10CM/S72.002A").save_pretrained(tmp_path / "coder")
    words.save_pretrained(tmp_path / "coder")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in code_blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert 0 < names["risk"] < 1
    assert names["code"]["spans"]


# One fact, one place


def test_the_version_is_written_in_one_file_only():
    version = re.compile(rf"(?<![\d.]){re.escape(hf_ehr.__version__)}(?![\d.])")
    holders = ("pyproject.toml", "setup.cfg", "CITATION.cff", "Makefile", "README.md")
    assert [name for name in holders if version.search((ROOT / name).read_text())] == []
    assert [path.name for path in modules().values() if version.search(path.read_text())] == ["version.py"]


def test_no_tool_is_set_up_in_two_files():
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read(ROOT / "setup.cfg")
    tools = {re.split(r"[:-]", section)[0] for section in setup_cfg.sections()}
    assert tools == {"mypy", "codespell", "coverage"}
    assert tools.isdisjoint(pyproject()["tool"])


def requirements() -> dict[str, str]:
    """Name → version rule of every requirement and extra that pyproject.toml names."""
    project = pyproject()["project"]
    lines = [line for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group]
    parts = [re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(.*)", line) for line in lines]
    return {part[1].lower().replace("_", "-"): part[2] for part in parts}


def test_constraints_pin_every_requirement_of_the_development_install():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert set(requirements()) - pinned == {"transformers-ehr", "es-aces"}  # itself, and what no one develops with
    assert pins["torch"].count(".") == 2, "no build suffix: any build of this release will do"


def test_continuous_integration_covers_the_lowest_versions_that_are_promised():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert pyproject()["project"]["requires-python"] == f">={matrix['python'][0]}"
    assert requirements()["transformers"].startswith(f">={matrix['transformers'][0].removesuffix('.*')},")
    commands = {step.get("run") for step in job["steps"]}
    assert {"make check", "make test"} <= commands


# What is committed


@cache
def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what is committed cannot be seen")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_a_machine_is_committed():
    machine_path = re.compile(rb"(?<![\w./])/(?:work|farm|tmp|root|opt|home|Users)/")
    assert [path.name for path in tracked_files() if machine_path.search(path.read_bytes())] == []


def test_no_large_file_is_committed():
    assert [path.name for path in tracked_files() if path.stat().st_size > 1_000_000] == []

"""From a finished model folder to one that loads alone, and to the Hub.

model folder ─ assemble ─▶ what may leave ─ verify ─▶ loaded without the package, numbers compared ─ push ─▶ Hub

Nothing is pushed before the folder has been opened in a process that cannot import this package, and gave the numbers
that the model gives here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hf_ehr

from . import _publish_alone as alone
from ._publish_checks import FIGURES, PublishingError, check_contents, check_vocabularies
from ._publish_inputs import STREAMS, example_inputs
from .cards import minimal_card, with_figures
from .explanations import code_descriptions
from .pipelines import TASK
from .schema import EhrDataError

MODELS = Path(hf_ehr.models.__file__).parent
"""The modules that travel."""
TOLERANCE = 1e-5
"""Largest difference of an output, relative to its size or absolute, whichever is larger."""
READERS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
PATIENT_MODELS = {
    "ehr_medbert", "ehr_rnn", "ehr_gbert", "ehr_medmplm", "ehr_medhmp", "ehr_visitrnn", "ehr_concat",
}  # fmt: skip
PIPELINES: dict[str, tuple[set[str], tuple[str, ...], str]] = {
    "icd-coding": ({"ehr_bert"}, ("ForICDCoding",), "pipeline_icd_coding.ICDCodingPipeline"),
    "medication-recommendation": (
        PATIENT_MODELS,
        ("ForMedicationRecommendation",),
        "pipeline_patient_tasks.MedicationRecommendationPipeline",
    ),
    "risk-prediction": (
        PATIENT_MODELS,
        ("ForSequenceClassification", "ForReadmission", "ForStayClassification", "ForAdmissionClassification"),
        "pipeline_patient_tasks.RiskPredictionPipeline",
    ),
    "patient-feature-extraction": (
        PATIENT_MODELS,
        ("Model",),
        "pipeline_patient_tasks.PatientFeatureExtractionPipeline",
    ),
}
"""Task → families and ends of the names of its models, and its class among the modules that travel."""
STALE = ["*.py", "*.safetensors", "*.json"]
"""Files of an earlier version of a repository that go when the new one lacks them."""


@dataclass
class PublishArguments:
    """Arguments of `hf-ehr publish`, beside the folder."""

    output: str | None = field(
        default=None, metadata={"help": "Folder to write; that of the model with `-published` when left out."}
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "Repository to push to, as ORG/NAME; nothing is pushed when left out."}
    )
    public: bool = field(default=False, metadata={"help": "Make a new repository public; private when left out."})


def publish(model: str | Path, arguments: PublishArguments | None = None) -> str:
    """Assembles a folder, proves that it loads alone, and pushes it where a repository is named.

    Args:
        model: Folder of a trained model, with its tokenizer or processor.
        arguments: Where to.

    Returns:
        Path of the folder, or the address of the repository.

    Raises:
        EhrDataError: The folder holds no whole model of this package.
        PublishingError: Something in it must not leave, or it gives other numbers without the package.
    """
    arguments = arguments or PublishArguments()
    source = Path(model)
    output = Path(arguments.output or f"{source.resolve()}-published")
    if arguments.repo_id:
        _check_repository(arguments.repo_id, arguments.public)
    assemble(source, output)
    return push(output, arguments.repo_id, public=arguments.public) if arguments.repo_id else str(output)


def assemble(source: Path, output: Path) -> Path:
    """Writes what may leave of a model folder, loads it without the package and compares; returns `output`.

    Weights, configuration, code, tokenizer or processor are read and written anew, so that they are whole; the card,
    `evaluation.json` and figures over all patients are copied. Everything else stays behind.

    Args:
        source: Folder of a trained model.
        output: Folder to write. One that an earlier call wrote is replaced, any other is refused.

    Raises:
        EhrDataError: `source` holds no whole model of this package, or `output` something else.
        PublishingError: Something must not leave, or it gives other numbers without the package.
    """
    check_vocabularies(source)
    _check_replaceable(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        staged = Path(scratch) / "model"
        write_folder(source, staged)
        check_publishable(staged, source)
        verify({staged: source})
        if output.exists():
            shutil.rmtree(output)
        os.replace(staged, output)
    return output


def write_folder(source: Path, target: Path) -> None:
    """Writes what may leave of the model folder `source` to `target`, unchecked."""
    model = open_whole(source)
    pipelines = _pipelines(source, model)
    if pipelines:
        model.config.custom_pipelines = pipelines
    if TASK in pipelines:
        model.config.label_descriptions = _descriptions(model)
    model.save_pretrained(target)
    _save_reading(source, target)
    for path in _pipeline_code(pipelines):
        shutil.copy(path, target / path.name)
    for name in ("evaluation.json", *FIGURES):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    written = source / "README.md"
    card = written.read_text(encoding="utf-8") if written.is_file() else minimal_card(model.config)
    figures = target / "evaluation.json"
    content = json.loads(figures.read_text()) if figures.is_file() else None
    (target / "README.md").write_text(with_figures(card, content), encoding="utf-8")


def open_whole(folder: Path) -> Any:
    """The model of a folder as the class that its configuration names.

    Raises:
        EhrDataError: It is none of this package's, or weights are missing or too many.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise EhrDataError(f"{folder / 'config.json'} is missing. Name the folder of a trained model.")
    config = AutoConfig.from_pretrained(folder)
    names = config.architectures or [""]
    if config.model_type not in STREAMS or not hasattr(hf_ehr, names[0]):
        raise EhrDataError(
            f"{folder} must hold a model of this package, got {names[0] or config.model_type}. Publish others with "
            "their own `push_to_hub`."
        )
    model, info = getattr(hf_ehr, names[0]).from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise EhrDataError(
                f"{folder} must hold all weights of {names[0]} and no others, got {kind.replace('_', ' ')}: "
                f"{sorted(map(str, info[kind]))[:5]}. Save the model again with `save_pretrained`."
            )
    return model.eval()


def check_publishable(folder: Path, source: Path | None = None) -> None:
    """Raises unless everything in a folder may be published.

    Args:
        folder: What is to be published.
        source: Folder that it was made from; its path may occur nowhere.

    Raises:
        PublishingError: With the file, what is wrong with it and what to do.
    """
    from huggingface_hub import ModelCard, get_token

    token = get_token()
    places = {str(path.resolve()) for path in (folder, source or folder)} | {str(Path.home())} - {"/", "/root"}
    check_contents(folder, code=MODELS, secrets=[token.encode()] if token else [], places=places)
    check_vocabularies(folder)
    for needed in ("config.json", "README.md"):
        if not (folder / needed).is_file():
            raise PublishingError(f"{needed} must be in a published folder, and is missing. Assemble it again.")
    if not ModelCard.load(folder / "README.md").data.license:
        raise PublishingError("README.md must name a `license` in its front matter. Add one.")


def verify(folders: Mapping[Path, Path], timeout: float = 1800) -> None:
    """Loads folders in one process that cannot import this package, and compares all outputs.

    Args:
        folders: Published folder → the model folder it was made from, whose numbers it must give.
        timeout: Seconds for all of them.

    Raises:
        PublishingError: A folder does not load alone, or gives other numbers or another vocabulary.
    """
    with tempfile.TemporaryDirectory() as scratch:
        expected: dict[str, Any] = {}
        plan = []
        for number, (folder, source) in enumerate(folders.items()):
            plan.append(_step(folder, source, Path(scratch) / str(number), expected))
        (Path(scratch) / "plan.json").write_text(json.dumps(plan))
        _run_alone(Path(scratch), timeout)
        for step in plan:
            _compare(step, *expected[step["folder"]])


def _step(folder: Path, source: Path, scratch: Path, expected: dict[str, Any]) -> dict[str, str]:
    """Writes the input of one folder and keeps in `expected` what has to come out."""
    from safetensors.torch import save_file

    model = open_whole(source)
    inputs = example_inputs(model)
    scratch.mkdir()
    # Under one name the library takes the class of the first folder for all of them, whatever their task.
    link = scratch / f"model_{scratch.name}"
    link.symlink_to(folder.resolve())
    expected[str(link)] = alone.outputs_of(model, inputs), alone.reading_of(source), type(model).__name__
    save_file({name: value.contiguous() for name, value in inputs.items()}, scratch / "inputs.safetensors")
    return {
        "name": folder.name,
        "folder": str(link),
        "auto_class": type(model)._auto_class,
        "inputs": str(scratch / "inputs.safetensors"),
        "outputs": str(scratch / "outputs.safetensors"),
    }


def _run_alone(scratch: Path, timeout: float) -> None:
    """The plan in `scratch`, in a process without this package, without a token and without the network."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE", "PYTHON"))
    }
    settings = {"HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-I", str(Path(alone.__file__)), str(scratch / "plan.json")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=kept | settings, timeout=timeout)
    if result.returncode:
        raise PublishingError(
            "The folder must load where this package is not installed, and does not:\n"
            f"{result.stderr.strip()[-1500:]}\nSave the model again with this version of the package."
        )


def _compare(step: dict[str, str], outputs: dict[str, torch.Tensor], reading: dict[str, Any], name: str) -> None:
    """Raises unless a step gave, without the package, what it gives with it."""
    from safetensors.torch import load_file

    target, folder = Path(step["outputs"]), step["name"]
    found, told = load_file(target), json.loads(target.with_suffix(".json").read_text())
    if told["class"] != name or told["module"].startswith("hf_ehr"):
        raise PublishingError(f"{folder} must load as {name} from its own code, got {told['module']}.{told['class']}.")
    if told["reading"] != reading:
        raise PublishingError(
            f"The tokenizer or processor of {folder} must be the same without the package, got {told['reading']} for "
            f"{reading}. Save it again with this version of the package."
        )
    for key in outputs.keys() | found.keys():
        if key not in found or key not in outputs or not _equal(found[key], outputs[key]):
            raise PublishingError(
                f"`{key}` of {folder} must be the same without the package, and is not. Save the model again with "
                "this version of the package."
            )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True
    )


def push(folder: Path, repo_id: str, *, public: bool = False) -> str:
    """Pushes an assembled folder as one commit; returns the address of the repository.

    The address of the Hub and the token are the client's own (`HF_ENDPOINT`, `HF_TOKEN` or `hf auth login`). Code,
    weights and JSON of an earlier version that the folder lacks are deleted.

    Args:
        folder: Of :func:`assemble`.
        repo_id: ORG/NAME.
        public: Whether a new repository is public.

    Raises:
        PublishingError: Something in it must not leave, or the repository is public and `public` was not asked for.
    """
    from huggingface_hub import HfApi

    check_publishable(folder)
    api = HfApi()
    url = api.create_repo(repo_id, private=not public, exist_ok=True)
    if not public and not api.repo_info(repo_id).private:
        raise PublishingError(
            f"{repo_id} must be private, and is a public repository. Make it private, or say `--public`."
        )
    api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=f"Publish {_architecture(folder)}", delete_patterns=STALE
    )
    return str(url)


def _architecture(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


def _check_repository(repo_id: str, public: bool) -> None:
    """Fails before the work is done where it could not be pushed afterwards."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if get_token() is None:
        kind = "public" if public else "private"
        raise PublishingError(f"A token must be there to push to the {kind} {repo_id}. Run `hf auth login`.")


def _check_replaceable(output: Path) -> None:
    """An output folder is new, empty, or one that was published before."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        check_contents(output, code=MODELS)
    except (PublishingError, OSError, ValueError) as error:
        raise EhrDataError(
            f"`output` must be a new folder, and {output} holds something else ({error}). Choose another."
        ) from error


def _pipelines(source: Path, model: Any) -> dict[str, Any]:
    """What a folder says of the pipeline that travels with it; nothing where nothing reads what the model is asked."""
    if not any((source / reader).is_file() for reader in READERS):
        return {}
    name, family = type(model).__name__, model.config.model_type
    for task, (families, ends, impl) in PIPELINES.items():
        if family in families and name.endswith(ends):
            return {task: {"impl": impl, "pt": [type(model)._auto_class], "type": "text", "default": {}}}
    return {}


def _pipeline_code(pipelines: dict[str, Any]) -> set[Path]:
    """The files of pipelines, with all that they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    first = {MODELS / f"{pipeline['impl'].partition('.')[0]}.py" for pipeline in pipelines.values()}
    return first | {Path(path) for one in first for path in get_relative_import_files(one)}


def _descriptions(model: Any) -> dict[str, str] | None:
    """What a coder's codes mean: the public lists stay behind, and what they say of its labels goes along."""
    codes = list(model.config.label2id)
    known = zip(codes, code_descriptions(model, codes), strict=True)
    return {code: name for code, name in known if name} or None


def _save_reading(source: Path, target: Path) -> None:
    """The tokenizer, feature extractor or processor of a folder, with the code that travels."""
    from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

    openers: Sequence[Any] = (AutoProcessor, AutoFeatureExtractor, AutoTokenizer)
    found = [opener for name, opener in zip(READERS, openers, strict=True) if (source / name).is_file()]
    for opener in found[:1] if found[:1] == [AutoProcessor] else found:  # a processor saves its parts
        opener.from_pretrained(source).save_pretrained(target)


__all__ = ["PublishArguments", "PublishingError", "assemble", "check_publishable", "publish", "push", "verify"]

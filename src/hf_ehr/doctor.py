"""What is installed, on which devices models run and how, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata

DISTRIBUTION = "transformers-ehr"
NAMESAKE = "hf-ehr"
"""Another project's distribution that installs a package of this package's name."""
EXTRAS = {
    "baselines": "LightGBM beside every model",
    "viz": "figures",
    "spark": "`--engine spark`",
    "icd10": "ICD-10-CM titles and validity",
    "aces": "running ACES itself; its labels are read without it",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        part: Heading that it stands under.
        name: What was looked at.
        state: What was found.
        fix: The line that installs or repairs it; None where nothing is to be done.
        needed: Whether the package does not work without the fix.
    """

    part: str
    name: str
    state: str
    fix: str | None = None
    needed: bool = False


def examine() -> list[Finding]:
    """Looks at versions, extras, devices and attention backends; loads torch, and reaches for no network."""
    return [*_python(), *_packages(), *_devices(), *_attention()]


def report(findings: list[Finding]) -> str:
    """The findings as text, part by part, and last what is to be done."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for part in dict.fromkeys(finding.part for finding in findings):
        lines += ["", part]
        lines += [f"  {one.name:{width}}  {one.state}" for one in findings if one.part == part]
    fixes = [finding for finding in findings if finding.fix]
    lines += ["", "To do" if fixes else "Nothing is missing."]
    for one in fixes:
        lines.append(f"  {one.name:{width}}  {'needed' if one.needed else 'optional'}: {one.fix}")
    return "\n".join(lines).strip()


def _python() -> list[Finding]:
    return [
        Finding("Machine", "Python", platform.python_version()),
        Finding("Machine", "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
    ]


def _packages() -> list[Finding]:
    """The requirements of the distribution, and of its extras, against what is installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        line = f"pip install {DISTRIBUTION}"
        return [Finding("Packages", DISTRIBUTION, "the package is on the path but not installed", line)]
    found = [Finding("Packages", DISTRIBUTION, metadata.version(DISTRIBUTION))]
    missing: dict[str, list[str]] = {}
    for line in lines:
        requirement, extra = _requirement(line)
        if extra is None:
            found.append(_required(requirement))
        elif extra in EXTRAS and (name := _unmet(requirement)):
            missing.setdefault(extra, []).append(name)
    for extra, purpose in EXTRAS.items():
        lacking = missing.get(extra, [])
        state = f"missing {', '.join(lacking)}: no {purpose}" if lacking else f"there: {purpose}"
        fix = f'pip install "{DISTRIBUTION}[{extra}]"' if lacking else None
        found.append(Finding("Extras", extra, state, fix))
    if importlib.util.find_spec("pyspark") and not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        found.append(Finding("Extras", "java", "not found: Spark cannot start", "install Java 17 and set JAVA_HOME"))
    if _version(NAMESAKE):
        both = f"pip uninstall {NAMESAKE} && pip install --force-reinstall --no-deps {DISTRIBUTION}"
        found.append(Finding("Packages", NAMESAKE, "another project's package of the same name", both, needed=True))
    return found


def _requirement(line: str) -> tuple[str, str | None]:
    """A line of the metadata → the requirement and the extra that it belongs to."""
    requirement, _, marker = line.partition(";")
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
    return requirement.strip(), extra[1] if extra else None


def _required(requirement: str) -> Finding:
    name = re.split(r"[\[<>=!~ ]", requirement, maxsplit=1)[0]
    version = _version(name)
    if not _unmet(requirement):
        return Finding("Packages", name, str(version))
    state = "missing" if version is None else f"{version}, but {requirement} is asked for"
    return Finding("Packages", name, state, f'pip install "{requirement}"', needed=True)


def _unmet(requirement: str) -> str | None:
    """The name of what is missing or of another version; None where the requirement is met."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    version = _version(wanted.name)
    met = version is not None and wanted.specifier.contains(version, prereleases=True)
    return None if met else wanted.name


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    import torch

    found = [Finding("Devices", "cpu", f"{torch.get_num_threads()} threads, bfloat16 and float32")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        found.append(Finding("Devices", f"cuda:{index}", f"{device.name}, {memory}, {bf16} bfloat16"))
    if torch.backends.mps.is_available():
        found.append(Finding("Devices", "mps", "Apple GPU"))
    if len(found) == 1:
        if shutil.which("nvidia-smi"):
            line = "install the CUDA build of torch: https://pytorch.org/get-started/locally"
            return [*found, Finding("Devices", "cuda", f"a driver is there, torch {torch.__version__} has none", line)]
        found.append(Finding("Devices", "gpu", "none: training runs on the CPU"))
    return found


def _attention() -> list[Finding]:
    """The backends that `set_attn_implementation` takes."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    flex = "there; compiled on first use" if is_torch_flex_attn_available() else "needs torch 2.5"
    found = [
        Finding("Attention", "sdpa", "there, the default"),
        Finding("Attention", "eager", "there; the one that returns attention maps"),
        Finding("Attention", "flex_attention", flex),
    ]
    if is_flash_attn_2_available():
        return [*found, Finding("Attention", "flash_attention_2", "there")]
    if not torch.cuda.is_available():
        return [*found, Finding("Attention", "flash_attention_2", "needs an NVIDIA GPU")]
    line = "pip install flash-attn --no-build-isolation"
    return [*found, Finding("Attention", "flash_attention_2", "missing; sdpa takes its place", line)]

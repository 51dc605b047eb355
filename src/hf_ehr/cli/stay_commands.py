"""The commands of intensive care stays and admissions: parse, call the library, print what a person wants to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_ehr.cli._arguments import parse
from hf_ehr.hourly import fit_hourly_features, format_hourly_summary, summarise_measurements
from hf_ehr.tasks import TaskSpec, get_task
from hf_ehr.training import task_name
from hf_ehr.training._runs import json_options
from hf_ehr.training.stays import (
    STAY_RECIPE,
    StayArguments,
    StayFinetuneArguments,
    StayPretrainArguments,
    finetune_stays,
    pretrain_stays,
)

LEVELS = ("stay", "admission")
# The papers' recipes, but for epochs, batches and warm-up that suit any data.
STAY_DEFAULTS = STAY_RECIPE | {
    "num_train_epochs": 30.0, "warmup_steps": 0.1, "logging_steps": 50, "save_total_limit": 2,
}  # fmt: skip
ADMISSION_DEFAULTS = {
    "per_device_train_batch_size": 512, "num_train_epochs": 30.0, "warmup_steps": 0.1, "logging_steps": 10,
    "save_total_limit": 2,
}  # fmt: skip
FINETUNE_DEFAULTS = {
    "learning_rate": 5e-4, "weight_decay": 0.01, "num_train_epochs": 30.0, "per_device_train_batch_size": 64,
    "logging_steps": 50,
}  # fmt: skip


@dataclass
class HourlyArguments:
    """Arguments of `hf-ehr fit-hourly`, beside the stays."""

    output: str = field(metadata={"help": "Folder to write."})
    n_hours: int = field(default=48, metadata={"help": "Longest window in hours."})
    form: str = field(default="binned", metadata={"help": "`binned` (FIDDLE's one-hot features) or `continuous`."})
    min_patients: int = field(default=11, metadata={"help": "Fewest patients of a variable or category."})
    options: str = field(
        default="{}",
        metadata={"help": 'Further arguments of fit_hourly_features as JSON, e.g. {"static": ["CINC2012/ICUType"]}.'},
    )


@dataclass
class StageArguments:
    """Which of MedHMP's two stages."""

    stage: int = field(
        default=1, metadata={"help": "1: hours of stays. 2: admissions, whose page is `--stage 2 --help`."}
    )


@dataclass
class LevelArguments:
    """What a MedHMP classifier is of."""

    level: str | None = field(
        default=None, metadata={"help": "stay or admission; when left out, what the task is asked in."}
    )


def fit_hourly(words: list[str]) -> None:
    """``hf-ehr fit-hourly --data DIR --output DIR``."""
    example = "hf-ehr fit-hourly --data data/ --output features/"
    data, arguments = parse("fit-hourly", example, words, StayArguments, HourlyArguments)
    options = json_options(arguments.options, "options")
    train = data.splits()["train"]
    counted = {name: options[name] for name in ("rename", "valid_ranges", "as_text") if name in options}
    summary = summarise_measurements(data.data, subject_ids=train, n_hours=arguments.n_hours, **counted)
    print(format_hourly_summary(summary))
    extractor = fit_hourly_features(
        data.data, subject_ids=train, n_hours=arguments.n_hours, form=_form(arguments.form),
        min_patients=arguments.min_patients, **options,
    )  # fmt: skip
    extractor.save_pretrained(arguments.output)
    print(
        f"\n{extractor.num_hourly_features} features an hour and {extractor.num_demographics} of the patient in "
        f"{arguments.output}.\nNext: hf-ehr pretrain medhmp --data {data.data} --features {arguments.output} "
        "--output_dir encoder/"
    )


def _form(form: str) -> Any:
    if form not in ("binned", "continuous"):
        raise ValueError(f"`form` must be binned or continuous, got {form!r}.")
    return form


def pretrain_medhmp(words: list[str]) -> None:
    """``hf-ehr pretrain medhmp --stage 1|2 --data DIR --output_dir DIR``; the arguments depend on the stage."""
    stage = chosen(words, "--stage", ("1", "2"), "1")
    (_pretrain_stays if stage == "1" else _pretrain_admissions)(words)


def _pretrain_stays(words: list[str]) -> None:
    example = "hf-ehr pretrain medhmp --stage 1 --data data/ --output_dir encoder/"
    kinds = (StageArguments, StayArguments, StayPretrainArguments, TrainingArguments)
    _, data, options, arguments = parse("pretrain medhmp", example, words, *kinds, defaults=STAY_DEFAULTS)
    figures = pretrain_stays(data, options, arguments)
    if arguments.process_index == 0:
        share = figures["reconstruction_loss"] / figures["mean_loss"]
        next_step = f"--data {data.data} --stays {arguments.output_dir} --output_dir DIR"
        print(
            f"Hours of validation stays: squared error {figures['reconstruction_loss']:.4f}, {share:.1%} of that of "
            f"guessing the training mean ({figures['mean_loss']:.4f}).\n"
            f"Next: hf-ehr finetune medhmp --data {data.data} --model {arguments.output_dir} --task icu_mortality_t48 "
            f"--output_dir DIR\n  or: hf-ehr pretrain medhmp --stage 2 {next_step}"
        )


def _pretrain_admissions(words: list[str]) -> None:
    from hf_ehr.training.admissions import STAGE2_RECIPE, AdmissionPretrainArguments, pretrain_admissions

    example = "hf-ehr pretrain medhmp --stage 2 --data data/ --stays encoder/ --output_dir model/"
    kinds = (StageArguments, StayArguments, AdmissionPretrainArguments, TrainingArguments)
    defaults = STAGE2_RECIPE | ADMISSION_DEFAULTS
    _, data, options, arguments = parse("pretrain medhmp", example, words, *kinds, defaults=defaults)
    figures = pretrain_admissions(data, options, arguments)
    if arguments.process_index == 0:
        lines = [f"  {name.replace('_', ' ')}: {value:.4f}" for name, value in figures.items()]
        print("Validation admissions:\n" + "\n".join(lines))
        print(
            f"Next: hf-ehr finetune medhmp --data {data.data} --model {arguments.output_dir} --task readmission_30d "
            "--output_dir DIR"
        )


def finetune_medhmp(words: list[str]) -> None:
    """``hf-ehr finetune medhmp --data DIR --model DIR --task TASK --output_dir DIR``."""
    example = "hf-ehr finetune medhmp --data data/ --model encoder/ --task icu_mortality_t48 --output_dir classifier/"
    kinds = (StayArguments, StayFinetuneArguments, LevelArguments, TrainingArguments)
    data, options, wanted, arguments = parse("finetune medhmp", example, words, *kinds, defaults=FINETUNE_DEFAULTS)
    level = wanted.level or task_level(options.task)
    if level not in LEVELS:
        raise ValueError(f"`level` must be one of {', '.join(LEVELS)}, got {level!r}.")
    if level == "admission":
        from hf_ehr.training.admissions import AdmissionFinetuneArguments, finetune_admissions

        folder = finetune_admissions(data, AdmissionFinetuneArguments(**vars(options)), arguments)
    else:
        folder = finetune_stays(data, options, arguments)
    if arguments.process_index == 0:
        print(f"Next: hf-ehr evaluate --model {folder} --output {folder}/evaluation")


def task_level(task: str) -> str:
    """``stay`` where the task is asked of intensive care stays, else ``admission``.

    Raises:
        ValueError: The task is neither a named one nor a YAML definition, so that nobody knows what it is asked of.
    """
    try:
        spec = get_task(task) if task_name(task) == task else TaskSpec.from_yaml(task)
    except ValueError as error:
        raise ValueError(f"{error} For labels of your own, give `--level stay` or `--level admission`.") from None
    return "stay" if spec.predicates[spec.trigger].kind in ("stay", "stay_end") else "admission"


def chosen(words: Sequence[str], name: str, known: tuple[str, ...], default: str) -> str:
    """The value of an argument on which the others depend, as ``NAME VALUE`` or ``NAME=VALUE``."""
    value = default
    for place, word in enumerate(words):
        if word == name and place + 1 < len(words):
            value = words[place + 1]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    if value not in known:
        raise ValueError(f"`{name.lstrip('-')}` must be one of {', '.join(known)}, got {value!r}.")
    return value

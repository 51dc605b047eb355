"""One function per command: parse, call the library, print what a person wants to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from transformers import AutoConfig, TrainingArguments

from hf_ehr import convert as convert_run
from hf_ehr import entity_evaluation, evaluation, experiments, stay_evaluation, training, visit_evaluation
from hf_ehr import quickstart as quickstart_run
from hf_ehr import transfer as transfer_run
from hf_ehr.cli import note_commands, stay_commands, visit_commands
from hf_ehr.cli._arguments import model_of, parse, positional
from hf_ehr.cli.dry_runs import rehearsed
from hf_ehr.cli.figure_commands import attention, embedding_map, explain
from hf_ehr.cli.note_commands import (
    check_notes,
    evaluate_coder,
    evaluate_evidence,
    fit_text_tokenizer,
    highlight,
    prepare_notes,
)
from hf_ehr.cli.publish_commands import publish
from hf_ehr.cli.stay_commands import fit_hourly
from hf_ehr.cli.tool_commands import doctor, validate
from hf_ehr.cli.visit_commands import map_drugs
from hf_ehr.models.configuration_ehrtagger import EhrTaggerConfig
from hf_ehr.models.configuration_medhmp import MedHMPConfig
from hf_ehr.prepare import SourceName, format_summary
from hf_ehr.prepare import plan as plan_preparation
from hf_ehr.prepare import prepare as prepare_data
from hf_ehr.training._runs import json_options
from hf_ehr.vocabulary import coverage
from hf_ehr.vocabulary import fit_tokenizer as fit

MODELS = ("medbert", "ehrbert", "medhmp", "medmplm", "gbert")
VISIT_MODELS = ("medmplm", "gbert")
FINETUNED = (*MODELS, *visit_commands.BASELINES, "ehrtagger")
"""Models that are fine-tuned; those that are not pre-trained here start from what their arguments name."""
VISIT_TYPES = ("ehr_medmplm", "ehr_gbert", "ehr_visitrnn", "ehr_concat", "ehr_text")
PRETRAIN_EXAMPLE = "hf-ehr pretrain medbert --data data/ --output_dir model/ --preset tiny --learning_rate 3e-3"
FINETUNE_EXAMPLE = (
    "hf-ehr finetune medbert --data data/ --model model/ --task readmission_30d --output_dir classifier/"
)
PRETRAIN_DEFAULTS = {  # section "Pretraining" of the Med-BERT paper, but for steps and warm-up that fit any data
    "learning_rate": 5e-5, "weight_decay": 0.01, "adam_epsilon": 1e-6, "warmup_steps": 0.1, "num_train_epochs": 10.0,
    "logging_steps": 50, "save_total_limit": 2,
}  # fmt: skip
FINETUNE_DEFAULTS = {
    "learning_rate": 3e-4, "weight_decay": 0.01, "num_train_epochs": 5.0, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 256, "logging_steps": 50,
}  # fmt: skip


@dataclass
class PrepareArguments:
    """Arguments of `hf-ehr prepare`."""

    output: str = field(metadata={"help": "Folder to write; a second run goes on where the first stopped."})
    input: str | None = field(default=None, metadata={"help": "Folder of the raw tables (not for `synthetic`)."})
    engine: str = field(default="duckdb", metadata={"help": "`duckdb` in process, or `spark` (extra `spark`)."})
    shards: int | None = field(default=None, metadata={"help": "Number of shards; by input size when left out."})
    workers: int | None = field(default=None, metadata={"help": "Processes; one per core when left out."})
    options: str = field(
        default="{}", metadata={"help": 'The source\'s own options as JSON, e.g. {"part": "a"} of physionet2012.'}
    )
    dry_run: bool = field(default=False, metadata={"help": "Look at the columns, say what would be done; do nothing."})


@dataclass
class TokenizerArguments:
    """Arguments of `hf-ehr fit-tokenizer`, beside the data."""

    output: str = field(metadata={"help": "Folder to write."})
    kinds: list[str] = field(
        default_factory=lambda: ["diagnoses"], metadata={"help": "Code lists: diagnoses, procedures, medications."}
    )
    min_count: int = field(default=1, metadata={"help": "Fewest occurrences of a code of its own."})
    max_size: int | None = field(default=None, metadata={"help": "Most codes."})
    code_exact: bool = field(default=False, metadata={"help": "Med-BERT's released ids: 0 is padding and mask."})
    behrt: bool = field(default=False, metadata={"help": "BEHRT's input: [CLS], [SEP] after each visit, and ages."})
    days: bool = field(default=False, metadata={"help": "Days between visits, for models that read them (HiTANet)."})


def prepare(words: list[str]) -> None:
    """``hf-ehr prepare SOURCE --input DIR --output DIR``."""
    example = "hf-ehr prepare mimic4 --input mimic-iv/ --output data/"
    source, words = positional(words, "SOURCE", example)
    (arguments,) = parse("prepare SOURCE", example, words, PrepareArguments)
    if arguments.dry_run:
        return print(
            plan_preparation(
                cast(SourceName, source), arguments.input, arguments.output, engine=cast(Any, arguments.engine),
                shards=arguments.shards, options=json_options(arguments.options, "options"),
            )
        )  # fmt: skip
    info = prepare_data(
        cast(SourceName, source), arguments.input, arguments.output, engine=cast(Any, arguments.engine),
        shards=arguments.shards, workers=arguments.workers, options=json_options(arguments.options, "options"),
    )  # fmt: skip
    print(format_summary(info))
    model = "medbert" if info.summary["codes"] else "medhmp --stage 1"
    print(f"\nNext: hf-ehr pretrain {model} --data {arguments.output} --output_dir model/")


def fit_tokenizer(words: list[str]) -> None:
    """``hf-ehr fit-tokenizer --data DIR --output DIR``."""
    example = "hf-ehr fit-tokenizer --data data/ --output tokenizer/"
    data, arguments = parse("fit-tokenizer", example, words, training.DataArguments, TokenizerArguments)
    splits = data.splits()
    tokenizer = fit(
        data.data, subject_ids=splits["train"], kinds=tuple(arguments.kinds), min_count=arguments.min_count,
        min_patients=data.min_patients, max_size=arguments.max_size, code_exact=arguments.code_exact,
        visit_separators=arguments.behrt, ages=arguments.behrt, days=arguments.days,
    )  # fmt: skip
    tokenizer.save_pretrained(arguments.output)
    known = coverage(tokenizer, data.data, splits["validation"])
    print(f"{len(tokenizer)} tokens in {arguments.output}; on validation patients: {known}")


def pretrain(words: list[str]) -> None:
    """``hf-ehr pretrain MODEL --data DIR --output_dir DIR``; what follows MODEL depends on it."""
    model, words = model_of("pretrain", words, MODELS, PRETRAIN_EXAMPLE)
    rehearsed(words, partial(_pretrain, model))


def _pretrain(model: str, words: list[str]) -> None:
    if model == "ehrbert":
        return note_commands.pretrain_ehrbert(words)
    if model in VISIT_MODELS:
        return visit_commands.pretrain(model, words)
    if model == "medhmp":
        return stay_commands.pretrain_medhmp(words)
    kinds = (training.DataArguments, training.PretrainArguments, TrainingArguments)
    data, options, arguments = parse("pretrain medbert", PRETRAIN_EXAMPLE, words, *kinds, defaults=PRETRAIN_DEFAULTS)
    figures = training.pretrain(data, options, arguments)
    if arguments.process_index == 0:
        gain = figures["unigram_loss"] - figures["code_loss"]
        verdict = f"{abs(gain):.3f} {'better' if gain >= 0 else 'worse'}"
        stay = f" Prolonged stay: AUROC {figures['stay_auroc']:.3f}." if "stay_auroc" in figures else ""
        print(
            f"Hidden codes of validation patients: {figures['code_loss']:.3f} nats, {verdict} than guessing "
            f"by frequency ({figures['unigram_loss']:.3f}).{stay}\n"
            f"Next: hf-ehr finetune medbert --data {data.data} --model {arguments.output_dir} --task TASK "
            "--output_dir DIR"
        )


def finetune(words: list[str]) -> None:
    """``hf-ehr finetune MODEL --data DIR --model DIR --output_dir DIR``; what follows MODEL depends on it."""
    model, words = model_of("finetune", words, FINETUNED, FINETUNE_EXAMPLE)
    rehearsed(words, partial(_finetune, model))


def _finetune(model: str, words: list[str]) -> None:
    if model == "ehrbert":
        return note_commands.finetune_ehrbert(words)
    if model in VISIT_MODELS:
        return visit_commands.finetune(model, words)
    if model in visit_commands.BASELINES:
        return visit_commands.finetune_baseline(model, words)
    if model == "ehrtagger":
        return visit_commands.finetune_tagger(words)
    if model == "medhmp":
        return stay_commands.finetune_medhmp(words)
    kinds = (training.DataArguments, training.FinetuneArguments, TrainingArguments)
    data, options, arguments = parse("finetune medbert", FINETUNE_EXAMPLE, words, *kinds, defaults=FINETUNE_DEFAULTS)
    folder = training.finetune(data, options, arguments)
    if arguments.process_index == 0:
        print(f"Next: hf-ehr evaluate --model {folder} --output {folder}/evaluation")


def evaluate(words: list[str]) -> None:
    """``hf-ehr evaluate --model DIR --output DIR``."""
    example = "hf-ehr evaluate --model classifier/ --output classifier/evaluation"
    (arguments,) = parse("evaluate", example, words, visit_evaluation.VisitEvaluateArguments)
    evaluation.written_by_finetune(arguments.model)
    kind = AutoConfig.from_pretrained(arguments.model).model_type
    if kind in VISIT_TYPES:
        table = visit_evaluation.evaluate(arguments)
    elif arguments.ddi is not None:
        raise ValueError(f"`ddi` must be left out for models of type {kind!r}, which recommend no drugs.")
    else:
        others: Any = {MedHMPConfig.model_type: stay_evaluation, EhrTaggerConfig.model_type: entity_evaluation}
        table = others.get(kind, evaluation).evaluate(arguments)
    print(table.read_text())


def report(words: list[str]) -> None:
    """``hf-ehr report SPEC``."""
    example = "hf-ehr report medbert_table4 --output reports/"
    name, words = positional(words, "SPEC", example)
    (arguments,) = parse("report SPEC", example, words, experiments.ReportArguments)
    spec = experiments.load_spec(name)
    if arguments.dry_run:
        return print(experiments.plan(spec, arguments))
    paths = experiments.report(spec, arguments)
    print(paths[0].read_text())
    print("Written: " + ", ".join(map(str, paths)))


def transfer(words: list[str]) -> None:
    """``hf-ehr transfer --model DIR --tokenizer DIR --output DIR``."""
    example = "hf-ehr transfer --model site-a/ --tokenizer site-b-tokenizer/ --output site-b-start/"
    (arguments,) = parse("transfer", example, words, transfer_run.TransferArguments)
    print(transfer_run.transfer(arguments))


def convert(words: list[str]) -> None:
    """``hf-ehr convert medbert --checkpoint FILE --vocabulary FILE --output DIR``."""
    example = "hf-ehr convert medbert --checkpoint weights.safetensors --vocabulary types.json --output model/"
    _, words = model_of("convert", words, ("medbert",), example)
    (arguments,) = parse("convert medbert", example, words, convert_run.ConvertArguments)
    print(convert_run.convert(arguments))


def quickstart(words: list[str]) -> None:
    """``hf-ehr quickstart --output DIR``."""
    example = "hf-ehr quickstart --output quickstart-output"
    (arguments,) = parse("quickstart", example, words, quickstart_run.QuickstartArguments)
    quickstart_run.quickstart(arguments)


def leave_ranks() -> None:
    """Ends the process group of a run on several ranks; without it a rank may abort while it exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


__all__ = [
    "attention", "check_notes", "convert", "doctor", "embedding_map", "evaluate", "evaluate_coder",
    "evaluate_evidence", "explain", "finetune", "fit_hourly", "fit_text_tokenizer", "fit_tokenizer", "highlight",
    "leave_ranks", "map_drugs", "prepare", "prepare_notes", "pretrain", "publish", "quickstart", "report",
    "transfer", "validate",
]  # fmt: skip

"""The commands that read visits: parse, call the library, print what a person wants to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_ehr import drug_classes
from hf_ehr.cli._arguments import parse
from hf_ehr.training.entities import ENTITY_RECIPE, EntityArguments, EntityTrainArguments, train_tagger
from hf_ehr.training.visit_baselines import VISIT_BASELINE_RECIPE, VisitBaselineArguments, finetune_visit_baseline
from hf_ehr.training.visits import (
    VISIT_FINETUNE_RECIPE,
    VISIT_PRETRAIN_RECIPE,
    VisitArguments,
    VisitFinetuneArguments,
    VisitPretrainArguments,
    finetune_visits,
    pretrain_visits,
)

BASELINES = {"visitrnn": "rnn", "ehrconcat": "note+gbert", "ehrtext": "cnn"}
"""Model → what `--baseline` is if it is left out."""


@dataclass
class MapDrugsArguments:
    """Arguments of `hf-ehr map-drugs`."""

    data: str = field(metadata={"help": "Prepared folder."})
    table: str = field(metadata={"help": "CSV or Parquet of `code` and `atc`; a code may have several rows."})
    output: str = field(metadata={"help": "Prepared folder to write; it appears when it is whole."})
    level: int = field(default=3, metadata={"help": "ATC level that classes are cut to: 3 (C07A), 4 (C07AB), …"})
    vocabulary: str = field(default="NDC", metadata={"help": "Vocabulary of codes that do not name theirs."})


def map_drugs(words: list[str]) -> None:
    """``hf-ehr map-drugs --data DIR --table FILE --output DIR``."""
    example = "hf-ehr map-drugs --data data/ --table ndc_atc.csv --output data-atc/"
    (arguments,) = parse("map-drugs", example, words, MapDrugsArguments)
    classes = drug_classes.DrugClasses.read(arguments.table, level=arguments.level, vocabulary=arguments.vocabulary)
    print(drug_classes.map_drugs(arguments.data, arguments.output, classes))
    print(f"Next: hf-ehr pretrain medmplm --data {arguments.output} --output_dir model/")


def pretrain(model: str, words: list[str]) -> None:
    """``hf-ehr pretrain medmplm|gbert --data DIR --output_dir DIR``."""
    example = f"hf-ehr pretrain {model} --data data/ --output_dir model/ --preset tiny --learning_rate 1e-2"
    kinds = (VisitArguments, VisitPretrainArguments, TrainingArguments)
    defaults = {**VISIT_PRETRAIN_RECIPE, "architecture": model}
    data, options, arguments = parse(f"pretrain {model}", example, words, *kinds, defaults=defaults)
    figures = pretrain_visits(data, options, arguments)
    if arguments.process_index == 0:
        print("Average precision of the codes of validation visits, part of them hidden:")
        for name, value in figures.items():
            if name != "loss":
                print(f"  {name.replace('_', ' '):32} {value:.3f}")
        print(
            f"Next: hf-ehr finetune {model} --data {data.data} --model {arguments.output_dir} "
            "--task medication_recommendation --output_dir DIR"
        )


def finetune(model: str, words: list[str]) -> None:
    """``hf-ehr finetune medmplm|gbert --data DIR --model DIR --task TASK --output_dir DIR``."""
    example = (
        f"hf-ehr finetune {model} --data data/ --model model/ --task medication_recommendation --output_dir drugs/"
    )
    kinds = (VisitArguments, VisitFinetuneArguments, TrainingArguments)
    defaults = {**VISIT_FINETUNE_RECIPE, "architecture": model}
    data, options, arguments = parse(f"finetune {model}", example, words, *kinds, defaults=defaults)
    folder = finetune_visits(data, options, arguments)
    if arguments.process_index == 0:
        print(f"Written: {folder}, with its processor and the thresholds tuned on validation patients.")
        print(f"Next: hf-ehr evaluate --model {folder} --output {folder}/evaluation")


def finetune_baseline(model: str, words: list[str]) -> None:
    """``hf-ehr finetune visitrnn|ehrconcat|ehrtext --data DIR --task TASK --output_dir DIR``."""
    example = f"hf-ehr finetune {model} --data data/ --task TASK --output_dir baseline/"
    kinds = (VisitArguments, VisitBaselineArguments, TrainingArguments)
    defaults = {**VISIT_BASELINE_RECIPE, "baseline": BASELINES[model]}
    data, options, arguments = parse(f"finetune {model}", example, words, *kinds, defaults=defaults)
    folder = finetune_visit_baseline(data, options, arguments)
    if arguments.process_index == 0:
        print(f"Written: {folder}, with its processor and the thresholds tuned on validation patients.")
        print(f"Next: hf-ehr evaluate --model {folder} --output {folder}/evaluation")


def finetune_tagger(words: list[str]) -> None:
    """``hf-ehr finetune ehrtagger --data DIR --output_dir DIR``."""
    example = "hf-ehr finetune ehrtagger --data notes/ --output_dir tagger/"
    kinds = (EntityArguments, EntityTrainArguments, TrainingArguments)
    data, options, arguments = parse("finetune ehrtagger", example, words, *kinds, defaults=ENTITY_RECIPE)
    folder = train_tagger(data, options, arguments)
    if arguments.process_index == 0:
        print(f"Next: hf-ehr evaluate --model {folder} --output {folder}/evaluation")

"""MedHMP on intensive care stays with the stock ``Trainer``: stage 1, and classifiers of what comes after some hours.

records ─ hourly features, fitted on the training patients ─▶ stays ─▶ reconstruction (stage 1)
        ─ a task's labels ─▶ stays up to the prediction time ─▶ classifier
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_ehr.hourly import fit_hourly_features
from hf_ehr.metrics import best_f1_threshold
from hf_ehr.models.configuration_medhmp import MedHMPConfig
from hf_ehr.models.feature_extraction_hourly import HourlyFeatureExtractor
from hf_ehr.models.hourly_series import HourlySeries
from hf_ehr.models.modeling_medhmp import MedHMPForStayClassification, MedHMPForStayPreTraining
from hf_ehr.stay_collators import StayCollator, VariableHiding
from hf_ehr.stay_datasets import build_stay_examples
from hf_ehr.tasks.audit import SplitManifest, check_fitted_on
from hf_ehr.training._runs import (
    PRETRAIN_FILE,
    SPLITS_FILE,
    Run,
    config_options,
    json_options,
    output_of,
    patient_splits,
    run_arguments,
    salted_manifest,
    train_from_last_checkpoint,
)
from hf_ehr.training.finetuning import (
    FINETUNE_FILE,
    FINETUNE_SETTINGS,
    check_earlier_stage,
    fit_best_epoch,
    positive,
    set_probe,
    task_labels,
    task_name,
)

if TYPE_CHECKING:
    import datasets

STAY_RECIPE = {
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 128,
    "num_train_epochs": 200.0,
    "weight_decay": 1e-8,
}
"""MedHMP, stage 1 (papers of the model and its code): AdamW, 200 epochs."""
STAYS_AT_A_TIME = 512


@dataclass
class StayArguments:
    """Which stays a run reads."""

    data: str = field(metadata={"help": "Prepared folder with intensive care stays (output of `hf-ehr prepare`)."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split by patient (7:1:2)."})

    def splits(self) -> dict[str, np.ndarray]:
        """Patients of `train`, `validation` and `test`."""
        return patient_splits(self.data, self.split_seed)

    def manifest(self, splits: dict[str, np.ndarray]) -> SplitManifest:
        """The splits as hashes, salted with a secret that stays in the prepared folder."""
        return salted_manifest(Path(self.data), splits)


@dataclass
class StayPretrainArguments:
    """What is pre-trained on stays, on which features."""

    preset: str = field(default="base", metadata={"help": "`base` (the authors' sizes), `paper` or `tiny`."})
    model_options: str = field(default="{}", metadata={"help": "Further MedHMPConfig fields as JSON."})
    features: str | None = field(
        default=None, metadata={"help": "Folder of hourly features (`hf-ehr fit-hourly`); fitted here when left out."}
    )
    feature_options: str = field(default="{}", metadata={"help": "Arguments of fit_hourly_features as JSON."})
    hidden_variables: float = field(
        default=0.0,
        metadata={"help": "Share of a stay's variables to hide and still reconstruct; the paper hides none."},
    )


@dataclass
class StayFinetuneArguments:
    """What is predicted of a stay, from which checkpoint, with how many patients."""

    task: str = field(metadata={"help": "Named task, e.g. icu_mortality_t48, or a YAML definition."})
    model: str = field(metadata={"help": "Folder or Hub id of a MedHMP pre-trained on stays."})
    train_patients: int | None = field(
        default=None, metadata={"help": "Use this many training patients only (nested subsets for one `draw`)."}
    )
    draw: int = field(default=0, metadata={"help": "Which random order the subset is taken from."})
    untrained: bool = field(default=False, metadata={"help": "Keep the architecture, forget the weights."})
    linear_probe: bool = field(default=True, metadata={"help": "Start the head from a regression on frozen stays."})


def pretrain_stays(
    data: StayArguments, options: StayPretrainArguments, training: TrainingArguments
) -> dict[str, float]:
    """Stage 1: reconstructs the hours of the training patients' stays from one state each (MedHMP, Eq. 3).

    Writes model, feature extractor, split manifest and `pretraining.json` to `output_dir`.

    Returns:
        Of validation stays: `reconstruction_loss`, and `mean_loss` of guessing the training mean of each feature.

    Raises:
        LeakageError: The features were not fitted on the training patients of this split.
        EhrDataError: The folder holds no stay, or `output_dir` holds another run.
        ValueError: An option is not known.
    """
    if not 0 <= options.hidden_variables < 1:
        raise ValueError(
            f"`hidden_variables` must be at least 0 and below 1, got {options.hidden_variables}. 0 hides none."
        )
    splits, run = data.splits(), Run(training, PRETRAIN_FILE, data, options)
    if run.finished:
        return run.record()["held_out"]
    extractor = features_of(data, options, splits["train"])
    examples = {
        name: build_stay_examples(
            data.data, extractor, subject_ids=splits[name], cache_dir=output_of(training) / "examples" / name
        )
        for name in ("train", "validation")
    }
    torch.manual_seed(training.seed)
    model = MedHMPForStayPreTraining(stay_config(options, extractor))
    collate = StayCollator(_hiding(options, extractor, training))
    trainer = Trainer(
        model, run_arguments(training, remove_unused_columns=False), collate,
        train_dataset=examples["train"].with_format("numpy"),
    )  # fmt: skip
    train_from_last_checkpoint(trainer)
    figures = held_out_stays(model, examples["validation"], examples["train"])
    if trainer.is_world_process_zero():
        trainer.save_model(str(training.output_dir))
        extractor.save_pretrained(output_of(training))
        data.manifest(splits).save(output_of(training) / SPLITS_FILE)
        run.finish({"held_out": figures, **asdict(options)})
    return figures


def features_of(data: StayArguments, options: StayPretrainArguments, train: np.ndarray) -> HourlyFeatureExtractor:
    """The features named by the options, or new ones fitted on the training patients."""
    if options.features is None:
        return fit_hourly_features(
            data.data, subject_ids=train, **json_options(options.feature_options, "feature_options")
        )
    extractor = HourlyFeatureExtractor.from_pretrained(options.features)
    check_fitted_on(extractor.fitted_on or "", train)
    return extractor


def _hiding(
    options: StayPretrainArguments, extractor: HourlyFeatureExtractor, training: TrainingArguments
) -> VariableHiding | None:
    if not options.hidden_variables:
        return None
    return VariableHiding(extractor.recipe.variables[extractor.kept], options.hidden_variables, training.seed)


def stay_config(options: StayPretrainArguments, extractor: HourlyFeatureExtractor, **fields: Any) -> MedHMPConfig:
    """Preset, options, the sizes of the features, and further `fields`, over which options go."""
    presets: dict[str, Any] = {"base": MedHMPConfig, "paper": MedHMPConfig.paper, "tiny": MedHMPConfig.tiny}
    if options.preset not in presets:
        raise ValueError(f"`preset` must be one of {', '.join(presets)}, got {options.preset!r}.")
    sizes = {name: getattr(extractor, name) for name in ("num_hourly_features", "num_demographics", "n_hours")}
    options_given = config_options(options.model_options, MedHMPConfig)
    return presets[options.preset](**({"note_size": None} | sizes | fields | options_given))


class Level(NamedTuple):
    """What classifiers of stays and of admissions do each in its own way, for :func:`fine_tuned`."""

    open_processor: Callable[[str], Any]
    """Folder → what encodes examples."""
    fitted_on: Callable[[Any], list[str | None]]
    """Fingerprints of the patients that its parts were fitted on."""
    new_classifier: Callable[..., Any]
    labelled: Callable[..., datasets.Dataset]
    """As :func:`labelled_stays`, with the model before."""
    fit: Callable[..., None]
    predict: Callable[..., np.ndarray]


def finetune_stays(data: StayArguments, options: StayFinetuneArguments, training: TrainingArguments) -> Path:
    """Fine-tunes a classifier of stays; the folder holds model, features, threshold, splits and how it was made.

    The model may be of stage 1 or of stage 2, whose stay encoder is taken. The best epoch by validation AUROC is kept,
    the linear probe itself included; the F1 threshold is tuned on validation and stored in `config.thresholds`.

    Raises:
        LeakageError: A patient held out here was seen in pre-training, or the features saw other patients.
        EhrDataError: No label is asked within a stay, or `output_dir` holds another run.
    """
    stays = Level(
        HourlyFeatureExtractor.from_pretrained, lambda extractor: [extractor.fitted_on], new_stay_classifier,
        lambda model, *arguments: labelled_stays(*arguments), fit_stay_classifier, predict_stays,
    )  # fmt: skip
    return fine_tuned(data, options, training, stays)


def fine_tuned(data: StayArguments, options: StayFinetuneArguments, training: TrainingArguments, level: Level) -> Path:
    """What :func:`finetune_stays` and :func:`hf_ehr.training.finetune_admissions` share: all but the `level`."""
    splits = data.splits()
    check_earlier_stage(options.model, data.manifest(splits))
    output, run = output_of(training), Run(training, FINETUNE_FILE, data, options)
    if run.finished:
        return output
    processor = level.open_processor(options.model)
    for fingerprint in level.fitted_on(processor):
        check_fitted_on(fingerprint or "", splits["train"])
    model = level.new_classifier(options, training.seed)
    examples = {
        name: level.labelled(model, data, options, processor, splits, name, output / "examples" / name)
        for name in ("train", "validation")
    }
    level.fit(model, examples["train"], examples["validation"], training, options.linear_probe)
    held = np.asarray(examples["validation"]["labels"])
    threshold = best_f1_threshold(held, level.predict(model, examples["validation"]))
    model.config.thresholds = {task_name(options.task): float(threshold)}
    if training.process_index == 0:
        model.save_pretrained(output)
        processor.save_pretrained(output)
        data.manifest(splits).save(output / SPLITS_FILE)
        settings = {name: getattr(training, name) for name in FINETUNE_SETTINGS}
        run.finish({"data": asdict(data), "options": asdict(options), "training": settings})
    return output


def labelled_stays(
    data: StayArguments,
    options: StayFinetuneArguments,
    extractor: HourlyFeatureExtractor,
    splits: dict[str, np.ndarray],
    name: str,
    cache: Path | None = None,
) -> datasets.Dataset:
    """Examples of one split for a task; the training split is cut to `train_patients` (nested within a `draw`)."""
    labels, ids = asked_of(data, options, splits, name)
    return build_stay_examples(data.data, extractor, labels=labels, subject_ids=ids, cache_dir=cache)


def asked_of(
    data: StayArguments, options: StayFinetuneArguments, splits: dict[str, np.ndarray], name: str
) -> tuple[pa.Table, np.ndarray]:
    """LABELS of a task, and the patients of a split; those of `train` are cut to `train_patients`."""
    labels, ids = task_labels(data, options.task), splits[name]  # type: ignore[arg-type]
    if name == "train" and options.train_patients is not None:
        asked = np.intersect1d(ids, labels["subject_id"].to_numpy())
        ids = np.random.default_rng(options.draw).permutation(asked)[: options.train_patients]
    return labels, ids


def label_names(options: StayFinetuneArguments) -> dict[str, Any]:
    """What a classifier's configuration says of its two classes."""
    task = task_name(options.task)
    return {"id2label": {0: "no", 1: task}, "label2id": {"no": 0, task: 1}}


def new_stay_classifier(options: StayFinetuneArguments, seed: int) -> MedHMPForStayClassification:
    """A classifier on the weights of `options.model`, or on fresh ones under `untrained`; its head is random."""
    torch.manual_seed(seed)
    names = label_names(options)
    if options.untrained:
        return MedHMPForStayClassification(MedHMPConfig.from_pretrained(options.model, **names))
    return MedHMPForStayClassification.from_pretrained(options.model, **names)


def fit_stay_classifier(
    model: Any,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    training: TrainingArguments,
    linear_probe: bool = True,
    patience: int | None = None,
) -> None:
    """Trains a classifier of stays in place; the epoch that ranks validation stays best is kept.

    Args:
        model: :class:`MedHMPForStayClassification`, or another of the same batches.
        train: Of :func:`hf_ehr.stay_datasets.build_stay_examples`, with labels.
        validation: As `train`.
        training: Settings of the run.
        linear_probe: Start from a regression on the frozen stays.
        patience: Epochs without a better one after which to stop; None runs all.
    """
    fit_probed(model, train, validation, StayCollator(), training, linear_probe, patience)


def fit_probed(
    model: Any,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    collate: Callable[..., dict[str, torch.Tensor]],
    training: TrainingArguments,
    linear_probe: bool,
    patience: int | None,
) -> None:
    """As :func:`fit_stay_classifier`, for the batches that `collate` makes."""
    if linear_probe:
        states, held = (outputs_of(model, part, collate, "pooler_output") for part in (train, validation))
        set_probe(model.classifier, states, np.asarray(train["labels"]), held, np.asarray(validation["labels"]))
    fit_best_epoch(
        model, train.with_format("numpy"), validation.with_format("numpy"), collate,
        lambda tuned: positive(outputs_of(tuned, validation, collate, "logits")), training, patience=patience,
    )  # fmt: skip


def predict_stays(model: Any, examples: datasets.Dataset) -> np.ndarray:
    """Probability of the outcome, (examples,), in the order of `examples`."""
    return positive(stay_outputs(model, examples, "logits"))


def stay_outputs(model: Any, examples: datasets.Dataset, name: str) -> np.ndarray:
    """One output of the model for each stay, (examples, features)."""
    return outputs_of(model, examples, StayCollator(), name)


def outputs_of(model: Any, examples: datasets.Dataset, collate: Callable, name: str) -> np.ndarray:
    """One output of the model for each example, (examples, features)."""
    found = [getattr(outputs, name).float().cpu().numpy() for outputs, _ in _forward(model, examples, collate)]
    return np.concatenate(found)


def held_out_stays(
    model: MedHMPForStayPreTraining, validation: datasets.Dataset, train: datasets.Dataset
) -> dict[str, float]:
    """Mean squared error over the hours and features of validation stays, and that of guessing training means."""
    width = model.config.num_hourly_features
    total, hours = np.zeros(width), 0
    for series in _series(train, width):
        total, hours = total + series.values.sum(dim=(0, 1)).double().numpy(), hours + int(series.mask.sum())
    mean = torch.from_numpy(total / max(hours, 1)).float()
    error = guess = 0.0
    cells = 0
    for outputs, batch in _forward(model, validation, StayCollator()):
        series = HourlySeries.of(width, **{name: batch[name] for name in HOURLY_INPUTS if name in batch})
        mask = series.mask[..., None]
        error += float((((outputs.reconstruction.float().cpu() - series.values) ** 2) * mask).sum())
        guess += float((((mean - series.values) ** 2) * mask).sum())
        cells += int(mask.sum()) * width
    return {"reconstruction_loss": error / max(cells, 1), "mean_loss": guess / max(cells, 1)}


HOURLY_INPUTS = ("stay_hours", "feature_ids", "feature_counts", "feature_values")


def _series(examples: datasets.Dataset, width: int):
    for batch in loader_of(examples, StayCollator(), STAYS_AT_A_TIME):
        yield HourlySeries.of(width, **{name: batch[name] for name in HOURLY_INPUTS if name in batch})


def _forward(model: Any, examples: datasets.Dataset, collate: Callable):
    """Outputs and inputs of each batch, in order."""
    model.eval()
    for batch in loader_of(examples, collate, STAYS_AT_A_TIME):
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            yield model(**inputs), batch


def loader_of(examples: datasets.Dataset, collate: Callable, size: int) -> DataLoader:
    """Batches of `size` examples, in order."""
    return DataLoader(examples.with_format("numpy"), batch_size=size, collate_fn=collate)

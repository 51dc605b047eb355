"""The rows of a report of visits that are no networks: each sees training and validation, and predicts test visits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from hf_ehr.baselines import bag_of_codes_lr, lightgbm_counts
from hf_ehr.entity_datasets import entities_by_note
from hf_ehr.entity_tags import Entity
from hf_ehr.experiments.shared import SPLITS
from hf_ehr.experiments.visits.corpora import ENTITIES, corpus_notes
from hf_ehr.experiments.visits.materials import VisitCohort
from hf_ehr.experiments.visits.spec import ADMISSION, ORACLE, RECOMMENDATION, setting_of
from hf_ehr.named_entities import DictionaryMatcher
from hf_ehr.note_baselines import CodedTexts, tfidf_logistic_regression
from hf_ehr.recommendation_baselines import RECOMMENDATION_BASELINES, AskedVisits
from hf_ehr.schema import EhrDataError, shard_paths
from hf_ehr.sources.synthetic_text_codes import DRUGS
from hf_ehr.training.visits import asked_visits

if TYPE_CHECKING:
    import datasets

    Parts = dict[str, datasets.Dataset]

_RECOMMENDERS = {
    "repeat_last_visit": "Repeat last visit", "popularity": "Popularity", "lr": "L2 LR", "lightgbm": "LightGBM",
}  # fmt: skip


def classical(model: str, cohort: VisitCohort, task: str, parts: Parts, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of validation and test visits, in the order of their examples.

    Args:
        model: Of ``CLASSICAL``.
        cohort: The data set.
        task: What is asked.
        parts: Examples of the splits; those of ``test`` carry no labels.
        seed: Of what is random.
    """
    if model == ORACLE:
        return _oracle(cohort, task, parts["validation"]), _oracle(cohort, task, parts["test"])
    if model == "tfidf_lr":
        return _words(cohort, task, parts)
    if setting_of(task) == RECOMMENDATION:
        sizes = [len(tokenizer) for tokenizer in cohort.processor().code_tokenizers.values()]
        asked = [AskedVisits.of(parts[split], *sizes) for split in SPLITS]
        found: Any = RECOMMENDATION_BASELINES[_RECOMMENDERS[model]](*asked, seed=seed)
        return found.validation, found.test
    if model == "popularity":
        return _shares(cohort, task, parts)
    words = cohort.processor().code_tokenizers
    size = len(words["diagnosis"])
    tables = [_codes(parts[split], size) for split in SPLITS]
    fit = {"lr": bag_of_codes_lr, "lightgbm": lightgbm_counts}[model]
    return fit(*tables, vocab_size=size + len(words["medication"]), seed=seed)


def dictionary(cohort: VisitCohort, train: datasets.Dataset, test: datasets.Dataset) -> list[list[Entity]]:
    """The entities that the training notes name, found again in the test notes."""
    data = cohort.arguments.data
    known = corpus_notes(data, np.unique(train["subject_id"]))
    entities = pq.read_table(Path(data) / ENTITIES)
    own = entities.filter(pc.is_in(entities["note_id"], known["note_id"]))
    matcher = DictionaryMatcher.fit(known["text"].to_pylist(), entities_by_note(known, own))
    unseen = corpus_notes(data, np.unique(test["subject_id"]))
    texts = dict(zip(unseen["note_id"].to_pylist(), unseen["text"].to_pylist(), strict=True))
    return matcher.predict([texts[note_id] for note_id in test["note_id"]])


def _oracle(cohort: VisitCohort, task: str, examples: datasets.Dataset) -> np.ndarray:
    """The generator's own probabilities."""
    folder = Path(cohort.arguments.data)
    if not (folder / "truth").is_dir():
        raise EhrDataError(f"`oracle` must be a row of a synthetic world, and {cohort.spec.name!r} has no truth.")
    truth = pl.concat([pl.DataFrame(pq.read_table(path)) for path in shard_paths(folder, "truth")])
    drugs = setting_of(task) == RECOMMENDATION
    names = cohort.label_names(task)
    visits = asked_visits(examples, len(names)).visit_ids if drugs else [one[0] for one in examples["visit_ids"]]
    column = "medication_probabilities" if drugs else "oracle_probability"
    found = pl.DataFrame({"visit_id": visits}, schema={"visit_id": pl.Int64}).join(
        truth.select("visit_id", column), on="visit_id", how="left", maintain_order="left"
    )[column]
    if found.null_count():
        raise EhrDataError(f"The truth of {cohort.spec.name!r} must hold every visit that is asked about.")
    if not drugs:
        return found.to_numpy()
    values = np.array(found.to_list())
    return np.column_stack([values[:, DRUGS.index(name)] if name in DRUGS else values[:, 0] * 0 for name in names])


def _words(cohort: VisitCohort, task: str, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression on the words that the text encoder reads too."""
    words, names = cohort.words(), cohort.label_names(task)
    yes_or_no = setting_of(task) == ADMISSION
    texts = []
    for split in SPLITS:
        part = parts[split]
        notes = words.batch_decode([note[0] for note in part["note_input_ids"]], skip_special_tokens=True)
        if yes_or_no:
            texts.append(CodedTexts.of(notes, sparse.csr_array(np.asarray(part["labels"])[:, None]), 1))
        else:
            texts.append(CodedTexts.of(notes, [ids[0] for ids in part["label_ids"]], len(names)))
    found = tfidf_logistic_regression(*texts)
    return (found.validation[:, 0], found.test[:, 0]) if yes_or_no else (found.validation, found.test)


def _shares(cohort: VisitCohort, task: str, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """The share of the training visits, for every visit alike."""
    if setting_of(task) == ADMISSION:
        share = float(np.mean(parts["train"]["labels"]))
        return np.full(len(parts["validation"]), share), np.full(len(parts["test"]), share)
    shares = asked_visits(parts["train"], len(cohort.label_names(task))).truth.mean(axis=0)
    validation, test = (np.tile(shares, (len(parts[split]), 1)) for split in SPLITS[1:])
    return validation, test


def _codes(examples: datasets.Dataset, num_diagnoses: int) -> pa.Table:
    """Admissions as EXAMPLES of ``baselines``: drugs behind diagnoses in one vocabulary."""
    frame = pl.DataFrame(examples.with_format("arrow")[:].select(["labels", "diagnosis_ids", "medication_ids"]))
    diagnoses, drugs = (pl.col(f"{kind}_ids").list.get(0) for kind in ("diagnosis", "medication"))
    ids = pl.concat_list(diagnoses, drugs.list.eval(pl.element() + num_diagnoses))
    return frame.select("labels", input_ids=ids).to_arrow()

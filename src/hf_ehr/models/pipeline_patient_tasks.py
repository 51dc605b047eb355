"""The pipelines over patients: the risk of an outcome, drugs for a visit, and vectors of patients.

``import hf_ehr`` registers them by task name. The file travels with a checkpoint whose ``custom_pipelines`` name it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .code_decisions import DEFAULT_THRESHOLD, thresholds_of
from .pipeline_patients import PatientPipeline

STATES = ("admission_state", "stay_state", "pooler_output", "visit_state")
"""Where a model keeps its patients' vectors, the best first; models of visits have those of VISIT_STATES."""
VISIT_STATES = (
    *("note_diagnosis_state", "note_medication_state", "diagnosis_state", "medication_state"),
    *("note_state", "code_state"),
)


class RiskPredictionPipeline(PatientPipeline):
    """``pipeline("risk-prediction")``: the probability of an outcome, with a decision at the model's threshold.

    Example:
    ```python
    import hf_ehr
    from transformers import pipeline

    risk = pipeline("risk-prediction", model="folder of a classifier")
    risk({"visits": [["ICD10CM/E11.9", "ICD10CM/I10"], ["ICD10CM/I50.9"]]})
    ```
    """

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        _check_names(given, ("threshold",))
        _check_share(given.get("threshold"), "threshold")
        return {}, {}, given

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:
        return {"logits": self.model(**input_tensors).logits.float()}

    def postprocess(self, model_outputs: dict[str, Any], threshold: float | None = None) -> list[dict[str, Any]]:
        """Logits → answers.

        Args:
            model_outputs: `logits` (patients, labels).
            threshold: In place of `config.thresholds`.

        Returns:
            Of a model of two classes `probability` (of the second), `threshold` and `positive` for each patient; of
            several classes `label` and `probabilities`; of several labels `positive`, a list, and `probabilities`.
        """
        config, logits = self.model.config, model_outputs["logits"].double()
        names = [config.id2label[place] for place in range(logits.shape[-1])]
        if config.problem_type == "multi_label_classification":
            cuts = thresholds_of(config, names, threshold)
            return [_labelled(names, row, cuts) for row in logits.sigmoid().tolist()]
        probabilities = logits.softmax(dim=-1).tolist()
        if len(names) != 2:
            best = logits.argmax(dim=-1).tolist()
            shares = [dict(zip(names, row, strict=True)) for row in probabilities]
            return [{"label": names[place], "probabilities": share} for place, share in zip(best, shares, strict=True)]
        stored = list((getattr(config, "thresholds", None) or {}).values())
        cut = threshold if threshold is not None else stored[0] if len(stored) == 1 else DEFAULT_THRESHOLD
        return [{"probability": row[1], "threshold": cut, "positive": row[1] >= cut} for row in probabilities]

    def frame_rows(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """One row; probabilities of several labels are a column each."""
        return [
            {name: value for name, value in answer.items() if name != "probabilities"}
            | answer.get("probabilities", {})
        ]


class MedicationRecommendationPipeline(PatientPipeline):
    """``pipeline("medication-recommendation")``: drugs for the last visit, from its diagnoses and the visits before.

    The last visit's own medications and note are not read, even where they are given.

    Example:
    ```python
    import hf_ehr
    from transformers import pipeline

    drugs = pipeline("medication-recommendation", model="folder of a recommender")
    drugs({"visits": [{"diagnoses": ["ICD10CM/I10"], "medications": ["ATC/C07A"]}, {"diagnoses": ["ICD10CM/I50.9"]}]})
    ```
    """

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        _check_names(given, ("top_k", "threshold"))
        _check_share(given.get("threshold"), "threshold")
        top_k = given.get("top_k")
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, or None for all, got {top_k}.")
        return {}, {}, given

    def visit_batch(self, patients: list[dict[str, Any]]) -> Mapping[str, Any]:
        """Patients with all their visits, of the last one the diagnoses alone."""
        histories = []
        for place, patient in enumerate(patients):
            *history, last = self.history(patient, place)
            if not history:
                raise ValueError(
                    f"`visits` of patient {place} must be two at least, got one. The model recommends from a history."
                )
            asked = {name: value for name, value in last.items() if name not in ("medications", "note")}
            histories.append([*history, asked])
        return self.whole_patients(histories)

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:
        last = input_tensors.pop("visits", torch.ones(1, dtype=torch.long)) - 1
        logits = self.model(**input_tensors).logits.float()
        if logits.ndim != 3:
            raise ValueError(f"`model` must recommend medications, got {type(self.model).__name__}.")
        return {"logits": logits[torch.arange(len(last), device=last.device), last]}

    def postprocess(
        self, model_outputs: dict[str, Any], top_k: int | None = 20, threshold: float | None = None
    ) -> list[list[dict[str, Any]]]:
        """Logits → for each patient `code`, `probability` and `recommended` of the `top_k` most probable drugs."""
        config, logits = self.model.config, model_outputs["logits"].double()
        names = [config.id2label[place] for place in range(logits.shape[-1])]
        cuts = thresholds_of(config, names, threshold)
        best = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        scores = logits.sigmoid().gather(1, best)
        return [
            [_drug(names[place], p, cuts[place]) for place, p in zip(*row, strict=True)]
            for row in zip(best.tolist(), scores.tolist(), strict=True)
        ]

    def frame_rows(self, answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A row per drug."""
        return answer


class PatientFeatureExtractionPipeline(PatientPipeline):
    """``pipeline("patient-feature-extraction")``: the vector of each patient, for search, maps and linear models.

    The library's own `feature-extraction` takes texts; a checkpoint may give this class for that name.

    Example:
    ```python
    import hf_ehr
    from transformers import pipeline

    vectors = pipeline("patient-feature-extraction", model="folder of a pre-trained model")
    vectors([{"visits": [["ICD10CM/E11.9"]]}, {"visits": [["ICD10CM/I50.9"]]}])
    ```
    """

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        _check_names(given, ("return_tensors",))
        return {}, {}, given

    def visit_batch(self, patients: list[dict[str, Any]]) -> Mapping[str, Any]:
        """The last admission of each patient, or of models of visits all of them, since some read what was before."""
        if hasattr(self.processor, "feature_extractor"):
            return super().visit_batch(patients)
        return self.whole_patients([self.history(patient, place) for place, patient in enumerate(patients)])

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:
        visits = input_tensors.pop("visits", None)
        outputs = self.model(**input_tensors)
        saved = (getattr(self.model.config, "architectures", None) or [""])[0]
        if outputs.get("admission_state") is not None and "Stay" in saved:
            raise ValueError(
                f"`model` must be a `MedHMPStayModel` for a checkpoint of {saved}. Load it by that class."
            )
        found = next((outputs[name] for name in STATES if outputs.get(name) is not None), None)
        if found is None:
            parts = [outputs[name] for name in VISIT_STATES if outputs.get(name) is not None]
            found = torch.cat(parts, dim=-1) if parts else None
        if found is None:
            raise ValueError(f"`model` must give a vector a patient, and {type(self.model).__name__} gives none.")
        if visits is not None:
            found = found[torch.arange(len(found), device=found.device), visits - 1]
        return {"features": found.float()}

    def postprocess(self, model_outputs: dict[str, Any], return_tensors: bool = False) -> list[Any]:
        """(patients, size) → a list of numbers a patient, or with `return_tensors` a tensor (size,)."""
        features = model_outputs["features"]
        return list(features) if return_tensors else features.tolist()

    def frame_rows(self, answer: Any) -> list[dict[str, Any]]:
        """One row with the list `features`."""
        return [{"features": list(map(float, answer))}]


def _labelled(names: list[str], probabilities: list[float], cuts: list[float]) -> dict[str, Any]:
    rows = list(zip(names, probabilities, cuts, strict=True))
    return {"positive": [name for name, p, cut in rows if p >= cut], "probabilities": {name: p for name, p, _ in rows}}


def _drug(code: str, probability: float, threshold: float) -> dict[str, Any]:
    return {"code": code, "probability": probability, "recommended": probability >= threshold}


def _check_names(given: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"Arguments must be among {', '.join((*known, 'batch_size'))}, got {', '.join(unknown)}.")


def _check_share(value: float | None, name: str) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")

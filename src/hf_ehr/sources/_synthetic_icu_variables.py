"""The variables of the PhysioNet/CinC Challenge 2012 in the synthetic intensive care world: normal values and limits.

Means, spreads and rates are rounded impressions of such data, not estimates from any. MechVent is the 36th series: it
follows the treatment.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Variable(NamedTuple):
    """One series, in the unit of the challenge.

    Attributes:
        name: Its name there.
        mean: Set-point of a man or woman of average age; of the logarithm's exponential where ``logarithmic``.
        spread: Standard deviation, of the natural logarithm where ``logarithmic``.
        logarithmic: Whether the logarithm is what varies evenly.
        rate: Share of hours with a value.
        panel: What is measured together.
        decimals: Of the value as it is written down.
        low, high: Values beyond are written as these.
        loadings: On the four factors (perfusion, respiration, kidney, inflammation).
        age: Shift of the set-point per sd of age (16 years), in spreads. It runs along the factors, so that an old
            patient looks like a sicker young one: otherwise so many variables give the age away, and knowing it
            helps nobody.
        male: Shift of men against women, in spreads; likewise.
    """

    name: str
    mean: float
    spread: float
    logarithmic: bool
    rate: float
    panel: str
    decimals: int
    low: float
    high: float
    loadings: tuple[float, float, float, float]
    age: float
    male: float


ICU_VARIABLES = (
    Variable("ALP", 85, 0.5, True, 0.02, "liver", 0, 10, 2_000, (0.0, 0.0, 0.1, 0.6), 0.65, 0.45),
    Variable("ALT", 35, 0.9, True, 0.02, "liver", 0, 3, 9_000, (0.4, 0.0, 0.0, 0.6), 0.3, 0.15),
    Variable("AST", 50, 0.9, True, 0.02, "liver", 0, 4, 15_000, (0.5, 0.0, 0.0, 0.6), 0.25, 0.1),
    Variable("Albumin", 3.0, 0.6, False, 0.015, "liver", 1, 0.9, 5.5, (-0.2, 0.0, -0.1, -0.8), -0.55, -0.35),
    Variable("BUN", 22, 0.55, True, 0.09, "chemistry", 0, 2, 200, (0.3, 0.0, 1.0, 0.0), 0.9, 0.7),
    Variable("Bilirubin", 0.9, 0.8, True, 0.02, "liver", 1, 0.1, 50, (0.1, 0.0, 0.0, 0.8), 0.45, 0.25),
    Variable("Cholesterol", 155, 40, False, 0.006, "lipids", 0, 30, 450, (0.0, 0.0, 0.0, -0.6), -0.5, -0.3),
    Variable("Creatinine", 1.05, 0.45, True, 0.09, "chemistry", 1, 0.2, 20, (0.2, 0.0, 1.0, 0.1), 1.0, 0.75),
    Variable("DiasABP", 60, 12, False, 0.9, "arterial line", 0, 15, 140, (-0.7, 0.0, 0.1, -0.2), 0.2, 0.2),
    Variable("FiO2", 0.4, 0.1, False, 0.12, "breathing", 2, 0.21, 1.0, (0.0, 1.0, 0.0, 0.1), 0.85, 0.05),
    Variable("GCS", 12, 2.5, False, 0.28, "neurology", 0, 3, 15, (-0.5, -0.5, -0.1, -0.2), -0.65, -0.05),
    Variable("Glucose", 135, 0.3, True, 0.11, "chemistry", 0, 30, 900, (0.2, 0.0, 0.4, 0.4), 0.95, 0.65),
    Variable("HCO3", 24, 4, False, 0.09, "chemistry", 0, 5, 48, (-0.5, 0.3, -0.6, -0.2), -0.4, -0.5),
    Variable("HCT", 31, 5, False, 0.1, "blood count", 1, 12, 58, (-0.4, 0.0, -0.3, -0.4), -0.65, 0.4),
    Variable("HR", 86, 16, False, 0.95, "monitor", 0, 30, 200, (0.8, 0.4, 0.0, 0.5), 0.4, 0.0),
    Variable("K", 4.1, 0.6, False, 0.1, "chemistry", 1, 2.0, 8.5, (0.1, 0.0, 0.8, 0.0), 0.95, 0.75),
    Variable("Lactate", 1.9, 0.55, True, 0.05, "lactate", 1, 0.3, 25, (0.9, 0.1, 0.2, 0.4), 0.3, 0.1),
    Variable("MAP", 80, 14, False, 0.9, "arterial line", 0, 25, 180, (-0.9, 0.0, 0.0, -0.2), 0.1, 0.15),
    Variable("Mg", 2.0, 0.35, False, 0.08, "chemistry", 1, 0.7, 5.0, (0.0, 0.0, 0.7, 0.0), 1.0, 0.8),
    Variable("NIDiasABP", 58, 13, False, 0.5, "cuff", 0, 15, 140, (-0.7, 0.0, 0.1, -0.2), 0.2, 0.2),
    Variable("NIMAP", 78, 14, False, 0.5, "cuff", 0, 25, 180, (-0.9, 0.0, 0.0, -0.2), 0.1, 0.15),
    Variable("NISysABP", 119, 21, False, 0.5, "cuff", 0, 45, 240, (-0.8, 0.0, 0.0, -0.2), 0.05, 0.1),
    Variable("Na", 139, 4, False, 0.09, "chemistry", 0, 110, 170, (0.0, 0.0, 0.5, 0.2), 1.1, 0.85),
    Variable("PaCO2", 41, 9, False, 0.1, "blood gas", 0, 12, 120, (0.0, 0.8, -0.3, 0.0), 0.4, -0.3),
    Variable("PaO2", 110, 0.4, True, 0.1, "blood gas", 0, 25, 500, (0.0, -0.9, 0.0, 0.0), -0.8, 0.0),
    Variable("Platelets", 190, 0.45, True, 0.08, "blood count", 0, 5, 1_200, (-0.2, 0.0, -0.1, -0.7), -0.55, -0.35),
    Variable("RespRate", 19, 5, False, 0.6, "monitor", 0, 5, 60, (0.2, 0.9, 0.2, 0.2), 1.0, 0.2),
    Variable("SaO2", 96.5, 2.2, False, 0.12, "blood gas", 0, 60, 100, (-0.2, -1.0, 0.0, 0.0), -0.75, 0.05),
    Variable("SysABP", 121, 21, False, 0.9, "arterial line", 0, 45, 240, (-0.8, 0.0, 0.0, -0.2), 0.05, 0.1),
    Variable("Temp", 37.0, 0.75, False, 0.35, "temperature", 1, 33, 41.5, (0.0, 0.1, 0.0, 1.0), 0.6, 0.3),
    Variable("TroponinI", 1.0, 1.2, True, 0.006, "troponin I", 1, 0.3, 50, (0.9, 0.0, 0.2, 0.0), 0.0, 0.0),
    Variable("TroponinT", 0.15, 1.2, True, 0.02, "troponin T", 2, 0.01, 25, (0.9, 0.0, 0.2, 0.0), 0.0, 0.0),
    Variable("Urine", 90, 0.6, True, 0.65, "urine", 0, 0, 1_500, (-0.6, 0.0, -0.7, 0.0), -0.65, -0.5),
    Variable("WBC", 11.5, 0.45, True, 0.08, "blood count", 1, 0.1, 150, (0.1, 0.2, 0.0, 0.9), 0.65, 0.25),
    Variable("pH", 7.37, 0.07, False, 0.1, "blood gas", 2, 6.8, 7.75, (-0.6, -0.5, -0.4, 0.0), -0.75, -0.25),
)
LOADINGS = np.array([variable.loadings for variable in ICU_VARIABLES])
SPREAD = 0.7
"""Share of the variance between stays, and between hours, that the four factors carry."""
ROW = {variable.name: row for row, variable in enumerate(ICU_VARIABLES)}
PANELS = tuple(dict.fromkeys(variable.panel for variable in ICU_VARIABLES))
LABORATORY = ("chemistry", "blood count")
"""Panels of the admission, drawn in the first hour of nearly every stay."""

ON_VASOPRESSOR = {
    "MAP": 1.2, "SysABP": 1.2, "DiasABP": 0.8, "NIMAP": 1.2, "NISysABP": 1.2, "NIDiasABP": 0.8, "HR": 0.3,
}  # fmt: skip
"""What a vasopressor adds, in spreads."""
ON_VENTILATOR = {"FiO2": 2.0, "SaO2": 0.9, "PaO2": 0.8, "PaCO2": -0.7, "RespRate": -0.6, "GCS": -0.8}
"""What ventilation adds, in spreads."""

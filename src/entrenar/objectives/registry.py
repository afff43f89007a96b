"""Every objective by name."""

from entrenar.objectives.objective import Objective
from entrenar.objectives.supervised import SUPERVISED

OBJECTIVES: dict[str, Objective] = {"supervised": SUPERVISED}

"""quantkit: quantize Llama 4 checkpoints, one expert at a time, and prove the result.

    import quantkit

    result = quantkit.convert("Llama-4-Scout-17B-16E-Instruct", to=["fp8-dynamic", "w4a16-rtn"], output="out")
    for artifact in result.artifacts:
        quantkit.verify(artifact.directory)

``__all__`` is the public API.  A few functions carry the name of the module they live in (``quantkit.convert``,
``quantkit.plan``, ``quantkit.verify``): as attributes of the package these are the functions; import other names with ``from
quantkit.plan import ...``.
"""

from __future__ import annotations

from quantkit.calibrate import CalibrateResult, calibrate
from quantkit.calibration import CalibrationOptions
from quantkit.convert import ArtifactResult, ConvertResult, Progress, convert, plan
from quantkit.errors import (
    AlreadyQuantizedError,
    ArtifactError,
    CalibrationError,
    CheckpointError,
    CorpusError,
    GateError,
    Interrupted,
    LedgerError,
    OutputError,
    QuantkitError,
    RecipeError,
    ResumeError,
    UnsupportedModelError,
    WeightError,
)
from quantkit.estimate import CostEstimate, GpuFit, estimate_cost, gpu_fits
from quantkit.evaluate import EvaluationProgress, evaluate
from quantkit.evaluation import ArtifactEvaluation, Difference, Estimate, Evaluation, GoldenAnswers, Scores
from quantkit.gates import Gate, failed_gates, parse_gate
from quantkit.inspection import Inspection, inspect
from quantkit.plan import ArtifactPlan, Plan, RoleSummary, summarize_roles
from quantkit.recipe import GGUF_PRESETS, PACKED_PRESETS, PRESETS, Recipe, Rule, load_recipe, parse_recipe
from quantkit.repack import RepackResult, repack
from quantkit.report import write_report
from quantkit.targets import resolve_targets
from quantkit.verify import VerifyResult, verify
from quantkit.version import __version__

__all__ = [
    "GGUF_PRESETS",
    "PACKED_PRESETS",
    "PRESETS",
    "AlreadyQuantizedError",
    "ArtifactError",
    "ArtifactEvaluation",
    "ArtifactPlan",
    "ArtifactResult",
    "CalibrateResult",
    "CalibrationError",
    "CalibrationOptions",
    "CheckpointError",
    "ConvertResult",
    "CorpusError",
    "CostEstimate",
    "Difference",
    "Estimate",
    "Evaluation",
    "EvaluationProgress",
    "Gate",
    "GateError",
    "GoldenAnswers",
    "GpuFit",
    "Inspection",
    "Interrupted",
    "LedgerError",
    "OutputError",
    "Plan",
    "Progress",
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "RepackResult",
    "ResumeError",
    "RoleSummary",
    "Rule",
    "Scores",
    "UnsupportedModelError",
    "VerifyResult",
    "WeightError",
    "__version__",
    "calibrate",
    "convert",
    "estimate_cost",
    "evaluate",
    "failed_gates",
    "gpu_fits",
    "inspect",
    "load_recipe",
    "parse_gate",
    "parse_recipe",
    "plan",
    "repack",
    "resolve_targets",
    "summarize_roles",
    "verify",
    "write_report",
]

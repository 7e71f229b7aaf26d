"""Weight error of every scheme against compressed-tensors' own round-to-nearest, with and without clip search.

    python benchmarks/weight_error.py

Random matrices (Gaussian, Laplace, Student-t with 4 degrees of freedom) and all quantizable matrices of the bundled tiny Scout, in
BF16.  The error is relative L2, of the stored numbers: |weight - stored value| / |weight|, over all matrices of a source.

The library is measured twice: computing in BF16, as it does when llm-compressor quantizes a BF16 model, and in float32, which is
more exact.  The gain is that of the search over the better of both.  Exits with status 1 when quantkit without a search is above
the library in float32, with a search is above either, or gains less than 3 % for int4-g128.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import torch

from quantkit import grid
from quantkit.checkpoint import Checkpoint
from quantkit.evidence import Evidence
from quantkit.grid import QuantizationStatistics
from quantkit.llama4 import units
from quantkit.methods.rtn import quantize
from quantkit.scheme import KEEP, Scheme, parse_scheme, scheme_names
from quantkit.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from library_rtn import library_quantize  # noqa: E402

SHAPE = (1024, 4096)
LEAST_GAIN = 0.03  # promised for int4-g128
SEEN = Evidence(1, torch.ones(1), torch.ones(1))  # for static activations; errors of weights do not depend on it
ROUNDING = 1e-6  # our own sums are of float32 numbers


@dataclass(frozen=True)
class Errors:
    """Relative errors of one scheme on one source of weights."""

    library_bfloat16: float
    library_float32: float
    fitted: float
    searched: float

    @property
    def gain(self) -> float:
        """How much lower the search is than the better of the library's two."""
        return 1 - self.searched / min(self.library_bfloat16, self.library_float32)


def random_matrices() -> dict[str, list[torch.Tensor]]:
    """One BF16 matrix of each distribution, with the spread that trained weights have."""
    torch.manual_seed(0)
    distributions = {
        "Gaussian": torch.distributions.Normal(0.0, 0.02),
        "Laplace": torch.distributions.Laplace(0.0, 0.02),
        "Student-t, 4 degrees of freedom": torch.distributions.StudentT(4.0, 0.0, 0.02),
    }
    return {name: [distribution.sample(SHAPE).bfloat16()] for name, distribution in distributions.items()}


def trained_matrices() -> list[torch.Tensor]:
    """Every linear weight of the bundled tiny Scout that a preset quantizes."""
    with Checkpoint.open(ROOT / "demo" / "tiny-scout") as checkpoint:
        matrices = [matrix for unit in units(checkpoint.config) for matrix in unit.matrices if matrix.role != "attention"]
        return [checkpoint.read_matrix(matrix).clone() for matrix in matrices]


def relative(statistics: Sequence[QuantizationStatistics]) -> float:
    """Relative error over several matrices."""
    return float((sum(s.squared_error for s in statistics) / sum(s.squared_weight for s in statistics)) ** 0.5)


def measure(weights: Sequence[torch.Tensor], scheme: Scheme) -> Errors:
    """All four errors of a scheme; every one is summed by the same float64 code."""
    workspace = Workspace()

    def ours(clip_search: bool) -> float:
        results = (quantize([weight], scheme, clip_search=clip_search, workspace=workspace, evidence=SEEN) for weight in weights)
        return relative([grid.measure(weight, result[0][0]) for weight, result in zip(weights, results, strict=True)])

    def library(dtype: torch.dtype) -> float:
        return relative([grid.measure(weight, library_quantize(weight.to(dtype), scheme)) for weight in weights])

    return Errors(library(torch.bfloat16), library(torch.float32), ours(False), ours(True))


def complaints(scheme: Scheme, errors: Errors) -> list[str]:
    """What breaks a promise."""
    found = []
    if errors.fitted > errors.library_float32 * (1 + ROUNDING):
        found.append("above the library without search")
    if errors.gain < 0:
        found.append("above the library with search")
    if scheme.name == "int4-g128" and errors.gain < LEAST_GAIN:
        found.append(f"gains only {errors.gain:.2%}")
    return found


def main() -> int:
    """Measure everything, write the results file, return the exit status."""
    load = common.load_average()
    schemes = [scheme for name in scheme_names() if name != KEEP and (scheme := parse_scheme(name))]
    text = common.header("Weight error of every scheme", Path(tempfile.gettempdir()), load)
    text += f"- weights: BF16, random ones [{SHAPE[0]}, {SHAPE[1]}] from seed 0; relative L2 error in percent\n"
    broken = []
    for source, weights in {**random_matrices(), "tiny-scout": trained_matrices()}.items():
        rows = []
        for scheme in schemes:
            fitting = [weight for weight in weights if scheme.misfit(*weight.shape) is None]
            errors = measure(fitting, scheme)
            broken += [f"{source}, {scheme.name}: {complaint}" for complaint in complaints(scheme, errors)]
            numbers = (errors.library_bfloat16, errors.library_float32, errors.fitted, errors.searched)
            rows.append((scheme.name, *(f"{100 * number:.4f}" for number in numbers), f"{errors.gain:.2%}"))
        columns = ("scheme", "library, BF16", "library, float32", "quantkit", "quantkit, searched", "gain")
        text += f"\n## {source}\n\n" + common.table(columns, rows)
    text += "\n" + ("Broken promises:\n" + "\n".join(f"- {line}" for line in broken) if broken else "All promises hold.") + "\n"
    common.write_results("weight_error.md", text)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""What one transformers + compressed-tensors pair makes of artifacts.  Runs in any environment: it imports nothing of quantkit.

    python client_check.py JOBS.json

JOBS.json is a list of {"artifact": directory, "reference": directory}; the reference is the same model, unquantized, holding the
artifact's dequantized weights in float32.  One JSON object per job goes to standard output, on a line that begins with ``RESULT``.

Checked per artifact: every weight finds its place (no missing, unexpected, mismatched or newly initialised one), and float32 logits
agree with the reference.  Schemes with quantized activations make the client round activations at run time, which no reference with
plain weights does; for those the agreement is measured on the same weight files under a config without ``input_activations``, and
the difference that the activations add is reported beside it.  Clients expand 4-bit floats to bfloat16 whatever the model's dtype
is, so those models are loaded in bfloat16, artifact and reference alike, and then run in float32.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

TOKENS = 48
SEQUENCES = 2


def check(artifact: Path, reference: Path) -> dict[str, Any]:
    """Load ``artifact`` and compare with ``reference``.

    Returns loading problems by kind, ``logits``: largest logit difference relative to the largest reference logit, with weights
    alone, and ``activations``: the same as served, None when the client quantizes no activations.
    """
    dtype = torch.bfloat16 if has_float4(artifact) else torch.float32
    model, problems = load(artifact, dtype)
    ids = token_ids(model)
    wanted, scale = reference_logits(reference, ids, dtype)
    served = relative_difference(logits(model, ids), wanted, scale)
    del model
    if not has_quantized_activations(artifact):
        return {"problems": problems, "logits": served, "activations": None}
    with tempfile.TemporaryDirectory() as directory:
        model, more = load(without_activations(artifact, Path(directory)), dtype)
        more = without_input_scales(more)
        alone = relative_difference(logits(model, ids), wanted, scale)
    return {"problems": problems or more, "logits": alone, "activations": served}


def load(directory: Path, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """The model in ``dtype`` with eager attention, and its loading problems: kind -> tensor names, empty when all is well."""
    import transformers

    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), {kind: sorted(map(str, names)) for kind, names in info.items() if names}


def token_ids(model: Any) -> torch.Tensor:
    """Fixed text tokens [SEQUENCES, TOKENS]; special ones (image, padding) lie at the end of the vocabulary and are avoided."""
    config = model.config.get_text_config()
    return torch.randint(0, config.vocab_size // 2, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits [SEQUENCES, TOKENS, vocabulary]."""
    with torch.no_grad():
        if model.dtype != torch.float32:
            model(input_ids=ids, use_cache=False)  # the first forward expands the weights
            torch.nn.Module.float(model)  # the model's own float() refuses quantized models
        return model(input_ids=ids, use_cache=False).logits


def reference_logits(reference: Path, ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Logits of the reference and their largest magnitude."""
    model, problems = load(reference, dtype)
    if problems:
        raise RuntimeError(f"the unquantized reference does not load cleanly: {problems}")
    wanted = logits(model, ids)
    return wanted, float(wanted.abs().max())


def relative_difference(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> float:
    return float((found - wanted).abs().max()) / scale if torch.isfinite(found).all() else float("inf")


def without_input_scales(problems: dict[str, list[str]]) -> dict[str, list[str]]:
    """The problems less the stored scales of activations, for which a model that does not quantize them has no place."""
    others = {kind: [name for name in names if not name.endswith(".input_scale")] for kind, names in problems.items()}
    return {kind: names for kind, names in others.items() if names}


def has_quantized_activations(artifact: Path) -> bool:
    return any(group.get("input_activations") for group in config_groups(artifact))


def has_float4(artifact: Path) -> bool:
    return any((group["weights"]["type"], group["weights"]["num_bits"]) == ("float", 4) for group in config_groups(artifact))


def config_groups(artifact: Path) -> list[dict[str, Any]]:
    return list(json.loads((artifact / "config.json").read_text())["quantization_config"]["config_groups"].values())


def without_activations(artifact: Path, directory: Path) -> Path:
    """The same files under a config that asks for no activation quantization."""
    for path in artifact.iterdir():
        if path.name != "config.json":
            (directory / path.name).symlink_to(path.resolve())
    config = json.loads((artifact / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group.pop("input_activations", None)
        group.setdefault("format", config["quantization_config"]["format"])
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}


def main(jobs_file: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    print("RESULT", json.dumps(versions()), flush=True)
    for job in json.loads(Path(jobs_file).read_text()):
        try:
            result = check(Path(job["artifact"]), Path(job["reference"]))
        except Exception as error:  # a client that fails is a result of the matrix, whatever it raises
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        print("RESULT", json.dumps(job | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""Which client loads which preset: every artifact, in fresh environments of three generations of transformers + compressed-tensors.

    python benchmarks/client_matrix.py --directory DIR [--environment 4.57.6+0.12.2 ENV ...] [--preset NAME ...]

Every preset, and recipes that mix schemes, keep a layer or quantize attention, is made from the bundled tiny Scout and from a
random tiny Maverick; what needs calibration is given random activation ranges.  Each client loads each artifact and is held
against the same model with plain, dequantized weights; see ``client_check.py`` for what is compared.  Environments that are not
given are made under DIR with venv and pip.

The notes that quantkit gives out with a plan (``client_notes``) must announce whatever is found here: a failure that they do not
announce, or one that they announce and that does not happen, is printed and makes the exit status 1.  What the notes say of vLLM,
SGLang and TGI was read in their sources; it stands in a table of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import client_reference
import common
import generate_checkpoint

from quantkit.convert import convert, plan
from quantkit.formats.base import ClientNote
from quantkit.formats.compressed_tensors_clients import TRANSFORMERS_4_57, TRANSFORMERS_5_17, TRANSFORMERS_5_23
from quantkit.llama4 import Role
from quantkit.recipe import FEED_FORWARD_ROLES, PRESETS, Recipe, Rule

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.calibrated_artifact import write_calibrated  # noqa: E402

TORCH = "2.13.0"
CLIENTS = {  # client as the notes call it -> versions of transformers + compressed-tensors
    TRANSFORMERS_4_57: "4.57.6+0.12.2",
    TRANSFORMERS_5_17: "5.17.0+0.19.0",
    TRANSFORMERS_5_23: "5.23.0+0.20.0",
}
TOLERANCE = 1e-3  # of the largest logit

ATTENTION: Role = "attention"
INT4, KEEP_REST = Rule("int4-g128", FEED_FORWARD_ROLES), Rule("keep")
RECIPES = [  # beyond the presets: what per-layer rules and opt-in roles make
    Recipe("int8-layer-in-int4", (Rule("int8-g128", FEED_FORWARD_ROLES, "1"), INT4, KEEP_REST)),
    Recipe("fp8-layer-in-int4", (Rule("fp8-channel-dynamic", FEED_FORWARD_ROLES, "1"), INT4, KEEP_REST)),
    Recipe("kept-layer-in-int4", (Rule("keep", FEED_FORWARD_ROLES, "1"), INT4, KEEP_REST)),
    Recipe("fp8-with-attention", (Rule("fp8-channel-dynamic", (*FEED_FORWARD_ROLES, ATTENTION)), KEEP_REST)),
]


def main() -> int:
    """Make artifacts, run every client over them, write the matrix.  Returns 1 when the notes and the findings differ."""
    arguments = _arguments()
    models = _models(arguments.directory)
    recipes: list[Recipe] = [PRESETS[name] for name in arguments.preset or PRESETS]
    if not arguments.preset:
        recipes += RECIPES
    release = arguments.directory / "release" / "config.json"
    release.parent.mkdir(parents=True, exist_ok=True)
    release.write_text(json.dumps(generate_checkpoint.release_config("scout", 4, 2048, 16, 0)), encoding="utf-8")
    notes = {(RELEASE, artifact.name): artifact.notes for artifact in plan(release, recipes).artifacts}
    jobs = []
    for model, source in models.items():
        notes |= {(model, artifact.name): artifact.notes for artifact in plan(source, recipes).artifacts}
        output = arguments.directory / "artifacts" / model
        data_free = [recipe for recipe in recipes if not recipe.needs_calibration]
        made = [result.directory for result in convert(source, data_free, output, force=True).artifacts] if data_free else []
        for recipe in (recipe for recipe in recipes if recipe.needs_calibration):
            shutil.rmtree(output / recipe.name, ignore_errors=True)
            made.append(write_calibrated(source, recipe, output))
        for artifact in made:
            reference = arguments.directory / "references" / model / artifact.name
            client_reference.write_reference(artifact, source, reference)
            jobs.append({"model": model, "name": artifact.name, "artifact": str(artifact), "reference": str(reference)})
    load = common.load_average()
    found, versions = {}, {}
    for client, key in CLIENTS.items():
        environment = arguments.environment.get(key) or _make_environment(arguments.directory / "environments", key)
        used, *results = _run_client(environment / "bin" / "python", jobs, arguments.directory)
        versions[client] = ", ".join(f"{name} {version}" for name, version in used.items())
        found |= {(client, result["model"], result["name"]): result for result in results}
    names = [recipe.name for recipe in recipes]
    text = common.header("Which client loads which preset", arguments.directory, load)
    text += "\nEnvironments:\n\n" + "".join(f"- {client}: {used}\n" for client, used in versions.items())
    text += _measured(list(models), names, found, notes) + _read_in_sources(names, notes)
    common.write_results("client_matrix.md", text)
    return 1 if _surprises(found, notes) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for artifacts and environments; the latter take about 10 GB")
    parser.add_argument("--environment", nargs=2, action="append", default=[], metavar=("VERSIONS", "ENV"), help="use this one")
    parser.add_argument("--preset", action="append", choices=list(PRESETS), help="only these (default: all, and mixed recipes)")
    arguments = parser.parse_args()
    arguments.environment = {versions: Path(path) for versions, path in arguments.environment}
    return arguments


def _models(directory: Path) -> dict[str, Path]:
    sys.path.append(str(ROOT))
    from tests.tiny_models import write_tiny_model

    write_tiny_model(directory / "maverick", "maverick", seed=0)
    return {"tiny Scout": ROOT / "demo" / "tiny-scout", "random Maverick": directory / "maverick"}


def _make_environment(parent: Path, key: str) -> Path:
    """An environment with one client generation; one that an earlier run made is used again."""
    environment = parent / key
    ready = environment / "ready"
    if not ready.exists():
        transformers, _, compressed_tensors = key.partition("+")
        wanted = [f"torch=={TORCH}", f"transformers=={transformers}", f"compressed-tensors=={compressed_tensors}", "accelerate"]
        venv.create(environment, clear=True, with_pip=True)
        subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted], check=True)
        ready.touch()
    return environment


def _run_client(python: Path, jobs: Sequence[Mapping[str, str]], directory: Path) -> list[dict[str, Any]]:
    """Versions, then one result per job."""
    file = directory / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("client_check.py")
    output = subprocess.run([python, script, file], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return [json.loads(line.removeprefix("RESULT")) for line in output.splitlines() if line.startswith("RESULT")]


# ---------------------------------------------------------------------------------------------------------------- report

MEASURED = f"""
## Measured: transformers

A number says that the artifact loads with no missing, unexpected, mismatched or newly initialised weight; it is the largest
difference of any float32 logit from the same model with plain dequantized weights, relative to the largest logit (bound
{TOLERANCE:g}).  In parentheses: the same with the client's run-time quantization of activations, which rounds where the reference
does not.
"""
SOURCES = """
## Read in the sources: vLLM, SGLang, TGI

Not run here.  For the widths of the Scout and Maverick releases.

"""
RELEASE = "release"  # stands for a model of the releases' widths among the notes
Notes = Mapping[tuple[str, str], Sequence[ClientNote]]  # (model, artifact) -> notes
Findings = Mapping[tuple[str, str, str], Mapping[str, Any]]  # (client, model, artifact) -> what client_check returned


def _verdict(result: Mapping[str, Any]) -> str:
    """``loads``, ``differs`` (loads, but computes something else) or ``fails``."""
    if "error" in result or result["problems"]:
        return "fails"
    return "loads" if result["logits"] <= TOLERANCE else "differs"


def _cell(result: Mapping[str, Any]) -> str:
    verdict = _verdict(result)
    if verdict == "fails":
        return "fails"
    served = "" if result["activations"] is None else f" ({result['activations']:.2g})"
    return f"{'' if verdict == 'loads' else 'differs, '}{result['logits']:.2g}{served}"


def _surprises(found: Findings, notes: Notes) -> list[str]:
    """Where the findings are not what the notes announce.  A note that it loads, with a remark, covers a difference."""
    surprises = []
    for (client, model, name), result in found.items():
        note, verdict = _note(notes[model, name], client), _verdict(result)
        if note.loads == (verdict == "fails") or (verdict == "differs" and not note.why):
            surprises.append(f"{client}, {model}, {name}: {verdict}; announced: {'loads' if note.loads else 'fails'} {note.why}")
    return surprises


def _measured(models: Sequence[str], names: Sequence[str], found: Findings, notes: Notes) -> str:
    """The section on clients that were run."""
    parts = [MEASURED]
    for model in models:
        rows = [[name, *(_cell(found[client, model, name]) for client in CLIENTS)] for name in names]
        parts += [f"\n### {model}\n\n", common.table(["artifact", *CLIENTS], rows)]
    parts.append("\n### What fails or differs\n\n")
    for (client, model, name), result in found.items():
        if _verdict(result) != "loads":
            said = result.get("error") or result["problems"] or f"logits differ by {result['logits']:.2g}"
            parts.append(f"- {client}, {model}, {name}: {_note(notes[model, name], client).why}. Found: `{str(said)[:120]}`\n")
    surprises = _surprises(found, notes)
    parts.append(f"\nFindings that differ from what the notes announce: {len(surprises) or 'none'}\n\n")
    return "".join([*parts, *(f"- {surprise}\n" for surprise in surprises)])


def _read_in_sources(names: Sequence[str], notes: Notes) -> str:
    """The section on clients that were not run, for the widths of the releases."""
    clients = [note.client for note in notes[RELEASE, names[0]] if note.client not in CLIENTS]
    rows, reasons = [], dict[tuple[str, str], list[str]]()
    for name in names:
        cells = [_note(notes[RELEASE, name], client) for client in clients]
        rows.append([name, *(("loads" if note.loads else "no") + (" *" if note.why else "") for note in cells)])
        for note in cells:
            if note.why:
                reasons.setdefault((note.client, note.why), []).append(name)
    text = SOURCES + common.table(["artifact", *clients], rows) + "\n"
    for (client, why), where in reasons.items():
        text += f"- {client} ({'all' if len(where) == len(names) else ', '.join(where)}): {why}\n"
    return text


def _note(notes: Sequence[ClientNote], client: str) -> ClientNote:
    return next(note for note in notes if note.client == client)


if __name__ == "__main__":
    sys.exit(main())

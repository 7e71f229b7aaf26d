"""The commands: the small ones, and where each of the others is registered with its examples."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from .calibrate import calibrate_command
from .convert import convert_command
from .evaluation import compare_command, evaluate_command
from .options import AsJson, Revision, expand
from .plan import plan_command
from .presets import GGUF_ROWS, packed_rows, preset_rows
from .repack import repack_command
from .run import print_json, reporting

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _examples(*lines: str) -> str:
    return "\n\n".join(("[bold]Examples[/]", *lines))


def _print_version(value: bool) -> None:
    if value:
        print(f"quantkit {metadata.version('quantkit')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Quantize Llama 4 checkpoints to FP8, INT8 and INT4 safetensors and to GGUF, one expert at a time, and prove the result."""


app.command(
    "convert",
    epilog=_examples(
        "quantkit convert ./scout --to w4a16-rtn -o out",
        "quantkit convert meta-llama/Llama-4-Scout-17B-16E-Instruct --to fp8-dynamic --to w4a16-rtn -o out",
        "quantkit convert ./scout --to fp8-static -o out --calibration text.jsonl --samples 256",
        "quantkit convert ./scout --to Q4_K_M -o out --method gptq --tensor-type ffn_down_exps=Q6_K --mmproj BF16",
        "quantkit convert ./scout --to IQ2_XXS -o out --statistics imatrix.gguf",
        "quantkit convert ./scout --to recipe.toml -o out --dry-run",
    ),
)(convert_command)
app.command(
    "calibrate",
    epilog=_examples(
        "quantkit calibrate ./scout -o scout-statistics",
        "quantkit calibrate ./scout -o scout-statistics --calibration text.jsonl --samples 512 --min-expert-tokens 64",
        "quantkit convert ./scout --to fp8-static -o out --statistics scout-statistics",
        "quantkit calibrate ./scout -o scout-statistics --imatrix imatrix.gguf",
    ),
)(calibrate_command)
app.command(
    "plan",
    epilog=_examples(
        "quantkit plan meta-llama/Llama-4-Scout-17B-16E-Instruct --to w4a16-rtn",
        "quantkit plan ./config.json --to fp8-dynamic --to w4a16-rtn --context 1000000",
        "quantkit plan ./scout --to Q4_K_M --tensor-type ffn_down_exps=Q6_K",
        "quantkit plan ./scout --to recipe.toml --json",
    ),
)(plan_command)


@app.command(
    epilog=_examples(
        "quantkit inspect ./scout",
        "quantkit inspect out/w4a16-rtn --json",
        "quantkit inspect model-Q4_K_M.gguf",
        "quantkit inspect statistics",
    )
)
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            callback=expand,
            help="A checkpoint, artifact, safetensors or GGUF file, statistics, or a hub repository id.",
        ),
    ],
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint or artifact holds: tensors by role, schemes and sizes, from headers alone.

    Of the statistics of a calibration it shows what every expert received.
    """
    with reporting(as_json):
        from quantkit import inspect as inspect_path
        from quantkit.statistics import is_statistics

        if revision is None and is_statistics(Path(path)):
            _show_statistics(Path(path), as_json)
            return
        inspection = inspect_path(path, revision)
        if as_json:
            from .data import inspection_data

            print_json(inspection_data(inspection))
        else:
            from rich.console import Console

            from .tables import print_inspection

            print_inspection(Console(), inspection)


def _show_statistics(directory: Path, as_json: bool) -> None:
    from quantkit.statistics import load_statistics

    statistics = load_statistics(directory)
    if as_json:
        from .data import statistics_data

        print_json({"path": str(directory), "kind": "statistics", **statistics_data(statistics)})
    else:
        from rich.console import Console

        from .coverage import warn_of_cold
        from .tables import print_statistics

        print_statistics(Console(), directory, statistics)
        warn_of_cold(statistics)


@app.command(epilog=_examples("quantkit verify out/w4a16-rtn", "quantkit verify out/w4a16-rtn --source ./scout --sample 64"))
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact.")],
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", callback=expand, help="The BF16 checkpoint it was made from, to compare with.")
    ] = None,
    revision: Revision = None,
    sample: Annotated[int, typer.Option(min=0, help="Quantized matrices to decode and compare.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses the sample.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Re-open an artifact and check that it is what it says it is.

    Manifest hashes, headers, names, shapes and dtypes, scales, ledger.
    With --source: kept tensors byte for byte, and a sample of quantized matrices against the original.
    The exit code is 7 when a check fails.
    """
    with reporting(as_json):
        from quantkit import verify as verify_artifact

        from .progress import hashing_progress

        with hashing_progress(shown=not as_json) as progress:
            result = verify_artifact(directory, source, revision=revision, sample=sample, seed=seed, progress=progress)
        if as_json:
            from .data import verify_data

            print_json(verify_data(result))
        else:
            from rich.console import Console

            from .tables import print_verification

            print_verification(Console(), result)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the presets that --to takes, with the bits that each stores per weight: safetensors first, then packed, then GGUF."""
    with reporting(as_json):
        rows, packed = preset_rows(), packed_rows()
        if as_json:
            from .data import presets_data

            print_json(presets_data(rows, GGUF_ROWS, packed))
        else:
            from rich.console import Console

            from .tables import print_gguf_presets, print_packed_presets, print_presets

            print_presets(Console(), rows)
            print_packed_presets(Console(), packed)
            print_gguf_presets(Console(), GGUF_ROWS)


app.command(
    "eval",
    epilog=_examples(
        "quantkit eval out/w4a16-gptq --reference ./scout",
        "quantkit eval scout-Q4_K_M.gguf --reference ./scout --text wiki.test.raw --convention llama.cpp",
        "quantkit eval out/w4a16-gptq --reference ./scout --golden questions.jsonl --fail-if 'kld > 0.02' --json",
    ),
)(evaluate_command)
app.command(
    "compare",
    epilog=_examples(
        "quantkit compare out/fp8-dynamic out/w4a16-gptq out/Q4_K_M --reference ./scout -o report",
        "quantkit compare out/* --reference ./scout --windows 64 --fail-if 'w4a16-gptq: agreement < 95%'",
    ),
)(compare_command)
app.command(
    "repack",
    epilog=_examples(
        "quantkit repack out/w4a16-gptq -o packed/w4a16-gptq",
        "quantkit repack packed/w4a16-gptq --to compressed-tensors -o back/w4a16-gptq",
    ),
)(repack_command)

"""The commands: each parses its options, makes one library call and renders the result."""

from __future__ import annotations

import os
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .evaluation import compare_command, evaluate_command
from .options import (
    CALIBRATION_TOKENS,
    DEFAULT_CONTEXT,
    DEFAULT_SEQUENCE_LENGTH,
    MAXIMUM_WORKERS,
    AsJson,
    Context,
    Corpus,
    Device,
    Method,
    MinimumTokens,
    Packing,
    Revision,
    Samples,
    Seed,
    SequenceLength,
    ShardSize,
    Source,
    Targets,
    TensorTypes,
    VisionType,
    Workers,
    expand,
    shard_bytes,
)
from .presets import GGUF_ROWS, packed_rows, preset_rows
from .repack import repack_command
from .run import print_json, reporting, what_calibration_left, what_is_left
from .signals import stopping_on_signals

if TYPE_CHECKING:
    from quantkit import Plan, RoleSummary

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


@app.command(
    epilog=_examples(
        "quantkit convert ./scout --to w4a16-rtn -o out",
        "quantkit convert meta-llama/Llama-4-Scout-17B-16E-Instruct --to fp8-dynamic --to w4a16-rtn -o out",
        "quantkit convert ./scout --to fp8-static -o out --calibration text.jsonl --samples 256",
        "quantkit convert ./scout --to Q4_K_M -o out --method gptq --tensor-type ffn_down_exps=Q6_K --mmproj BF16",
        "quantkit convert ./scout --to IQ2_XXS -o out --statistics imatrix.gguf",
        "quantkit convert ./scout --to recipe.toml -o out --dry-run",
    )
)
def convert(
    source: Source,
    to: Targets,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Each artifact is written to OUT/PRESET.")],
    revision: Revision = None,
    workers: Workers = None,
    max_shard_size: ShardSize = None,
    method: Method = None,
    tensor_type: TensorTypes = None,
    mmproj: VisionType = None,
    corpus: Corpus = None,
    samples: Samples = None,
    sequence_length: SequenceLength = DEFAULT_SEQUENCE_LENGTH,
    device: Device = "cpu",
    seed: Seed = 0,
    packing: Packing = "packed",
    minimum_tokens: MinimumTokens = 0,
    sequential: Annotated[
        bool,
        typer.Option("--sequential/--no-sequential", help="Later layers see quantized ones.", rich_help_panel="Calibration"),
    ] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Use these statistics of quantkit calibrate, or an importance file (imatrix) of llama.cpp.",
            rich_help_panel="Calibration",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the source, print the plan and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace finished artifacts of the same name.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print the artifacts' directories only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to one or several quantized artifacts.

    The source is read once for all targets. Memory stays within a few experts, however large the model is.
    A run that was killed or stopped is resumed by the same command.
    An artifact gets its final name only when it is complete, read back and checked.
    """
    stated = corpus is not None or samples is not None or sequential
    if statistics is not None and (stated or (sequence_length, seed, packing) != (DEFAULT_SEQUENCE_LENGTH, 0, "packed")):
        raise typer.BadParameter(
            "saved statistics take the place of a calibration: leave out --calibration, --samples, --sequence-length, --seed, "
            "--packing and --sequential",
            param_hint="--statistics",
        )
    with reporting(as_json, lambda: what_is_left(to, method, output, sys.argv[1:])):
        from quantkit import CalibrationOptions, RecipeError, resolve_targets

        given = "--calibration" if statistics is None else "--statistics"
        targets = resolve_targets(to, method=method, tensor_types=tensor_type or (), vision=mmproj)
        idle = [recipe.name for recipe in targets if not recipe.needs_calibration]
        if (statistics is not None or corpus is not None) and len(idle) == len(targets):
            names = ", ".join(idle)
            raise RecipeError(
                f"{names}: nothing here is calibrated, so {given} would change nothing. Leave it out; or, for GGUF file types, add "
                "--method importance"
            )
        if (statistics is not None or corpus is not None) and idle:
            typer.echo(f"Note: these targets are not calibrated: {', '.join(idle)}", err=True)
        options = CalibrationOptions(
            corpus, samples, sequence_length, seed, packing, minimum_tokens, sequential, statistics, device
        )
        if dry_run:
            from quantkit import plan as make_plan

            planned = make_plan(
                source, targets, revision=revision, max_shard_bytes=shard_bytes(max_shard_size), calibration=options
            )
            _show_plan(
                planned, source, output, workers, DEFAULT_CONTEXT, as_json, (samples or 0) * sequence_length or CALIBRATION_TOKENS
            )
            return
        if quiet or as_json:
            _silence_downloads(source)
        from rich.console import Console

        from quantkit import convert as run_convert

        from .data import convert_data
        from .progress import ProgressDisplay
        from .tables import print_conversion

        stop = threading.Event()
        with stopping_on_signals(stop, announce=not as_json), ProgressDisplay(Console(stderr=True), stop) as display:
            result = run_convert(
                source,
                targets,
                output,
                revision=revision,
                workers=workers,
                max_shard_bytes=shard_bytes(max_shard_size),
                calibration=options,
                force=force,
                restart=restart,
                progress=None if quiet or as_json else display.update,
                stop=stop,
            )
        if result.statistics is not None:
            from .coverage import warn_of_cold

            warn_of_cold(result.statistics)
        if quiet:
            for artifact in result.artifacts:
                print(artifact.directory)
            return
        if as_json:
            print_json(convert_data(result))
        else:
            print_conversion(Console(), result)


@app.command(
    epilog=_examples(
        "quantkit calibrate ./scout -o scout-statistics",
        "quantkit calibrate ./scout -o scout-statistics --calibration text.jsonl --samples 512 --min-expert-tokens 64",
        "quantkit convert ./scout --to fp8-static -o out --statistics scout-statistics",
        "quantkit calibrate ./scout -o scout-statistics --imatrix imatrix.gguf",
    )
)
def calibrate(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory of the statistics.")],
    revision: Revision = None,
    workers: Annotated[int | None, typer.Option(min=1, max=MAXIMUM_WORKERS, help="Cores to compute on. Default: all.")] = None,
    corpus: Corpus = None,
    samples: Samples = None,
    sequence_length: SequenceLength = DEFAULT_SEQUENCE_LENGTH,
    device: Device = "cpu",
    seed: Seed = 0,
    packing: Packing = "packed",
    minimum_tokens: MinimumTokens = 0,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write an importance file for llama.cpp.", rich_help_panel="GGUF")
    ] = None,
    imatrix_legacy: Annotated[
        bool, typer.Option("--imatrix-legacy", help="Write it in llama.cpp's older format (.dat).", rich_help_panel="GGUF")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace finished statistics, and the importance file.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished run instead of resuming it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print the directory only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run text through the model and keep what every expert receives.

    Shows how many tokens each expert of each layer got, which experts got too few, and which kinds of text reach them.
    DIR holds the statistics, for convert --statistics, and the heat map coverage.svg.
    With --imatrix, statistics of the same text that are finished are not measured again.
    A run that was killed or stopped is resumed by the same command.
    """
    if imatrix_legacy and imatrix is None:
        raise typer.BadParameter("says how --imatrix FILE is written: name the file", param_hint="--imatrix-legacy")
    with reporting(as_json, lambda: what_calibration_left(output, sys.argv[1:])):
        if quiet or as_json:
            _silence_downloads(source)
        from rich.console import Console

        from quantkit import CalibrationOptions
        from quantkit import calibrate as run_calibrate

        from .coverage import warn_of_cold
        from .progress import ProgressDisplay, unit_progress

        stop = threading.Event()
        with stopping_on_signals(stop, announce=not as_json), ProgressDisplay(Console(stderr=True), stop) as display:
            result = run_calibrate(
                source,
                output,
                calibration=CalibrationOptions(corpus, samples, sequence_length, seed, packing, minimum_tokens, device=device),
                revision=revision,
                workers=workers,
                force=force,
                restart=restart,
                imatrix=imatrix,
                legacy_imatrix=imatrix_legacy,
                progress=None if quiet or as_json else unit_progress(display.update),
                stop=stop,
            )
        if quiet:
            print(result.directory)
        elif as_json:
            from .data import statistics_data

            written = {} if result.imatrix is None else {"imatrix": str(result.imatrix)}
            places = {"directory": str(result.directory), **written}
            print_json({**places, "seconds": result.seconds, **statistics_data(result.statistics)})
        else:
            from .tables import print_statistics

            print_statistics(Console(), result.directory, result.statistics)
            if result.imatrix is not None:
                Console().print(f"\nImportance for llama.cpp: {result.imatrix}", markup=False, highlight=False, soft_wrap=True)
        if not as_json:
            warn_of_cold(result.statistics)


def _silence_downloads(source: str) -> None:
    """No progress bars of the hub client, which only a hub source brings in."""
    if not os.path.exists(source):
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


@app.command(
    epilog=_examples(
        "quantkit plan meta-llama/Llama-4-Scout-17B-16E-Instruct --to w4a16-rtn",
        "quantkit plan ./config.json --to fp8-dynamic --to w4a16-rtn --context 1000000",
        "quantkit plan ./scout --to Q4_K_M --tensor-type ffn_down_exps=Q6_K",
        "quantkit plan ./scout --to recipe.toml --json",
    )
)
def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            callback=expand,
            help="Checkpoint directory, a config.json or its directory, or a hub repository id.",
        ),
    ],
    to: Targets,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Where the run would write; its disk is measured.")
    ] = Path("."),
    revision: Revision = None,
    workers: Workers = None,
    max_shard_size: ShardSize = None,
    method: Method = None,
    tensor_type: TensorTypes = None,
    mmproj: VisionType = None,
    context: Context = DEFAULT_CONTEXT,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="Samples times their length, for recipes that need calibration.")
    ] = CALIBRATION_TOKENS,
    as_json: AsJson = False,
) -> None:
    """Say what a conversion would make and cost, from the config alone.

    Sizes by role and file, bits per weight, which clients load the result, which GPUs hold it with room for the KV cache,
    and the memory, disk and time that the run takes on this machine.
    No weights are needed, and none are downloaded.
    """
    with reporting(as_json):
        from quantkit import plan as make_plan
        from quantkit import resolve_targets

        targets = resolve_targets(to, method=method, tensor_types=tensor_type or (), vision=mmproj)
        planned = make_plan(source, targets, revision=revision, max_shard_bytes=shard_bytes(max_shard_size))
        _show_plan(planned, source, output, workers, context, as_json, calibration_tokens)


def _show_plan(
    plan: Plan, source: str, output: Path, workers: int | None, context: int, as_json: bool, calibration_tokens: int
) -> None:
    from quantkit import estimate_cost, gpu_fits, summarize_roles

    from .data import plan_data
    from .tables import print_plan

    sample = next(iter(sorted(Path(source).glob("*.safetensors"))), None) if Path(source).is_dir() else None
    cost = estimate_cost(plan, output, workers=workers, sample=sample, calibration_tokens=calibration_tokens)
    roles: dict[str, list[RoleSummary]] = {artifact.name: summarize_roles(plan, artifact) for artifact in plan.artifacts}
    fits = {artifact.name: gpu_fits(artifact.tensor_bytes, plan.config, context) for artifact in plan.artifacts}
    if as_json:
        print_json(plan_data(plan, roles, cost, context, fits))
    else:
        from rich.console import Console

        print_plan(Console(), plan, roles, cost, context, fits)


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

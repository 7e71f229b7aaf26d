"""Before anything is computed: are these the files they claim to be, one model in several forms, with one tokenizer?

A figure from damaged files, from another model's tokenizer or from a model of other shape would look like any other figure, so each
of these is one error here.  Files are compared with the manifest that lies beside them, where there is one: a bit that flipped in a
tensor is found by its sha256, not by a strange perplexity.  What no manifest vouches for is read as a whole as well, since names,
sizes and times of change do not tell files apart everywhere; the digests are remembered.

Text goes through the models as token ids, so what must agree of two tokenizers is what each id stands for.  Equal files need no
closer look; others (clients write ``tokenizer.json`` anew) are compared token by token.  GGUF files hold the tokens themselves.

Where a fault lies shows in the class of its error, and with it in the exit code: what is wrong with an artifact is an
ArtifactError, what is wrong with the reference a CheckpointError, although both are read by the same code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from gguf.constants import Keys

from quantkit.corpus import load_tokenizer
from quantkit.errors import (
    AlreadyQuantizedError,
    ArtifactError,
    CheckpointError,
    CorpusError,
    LedgerError,
    OutputError,
    RecipeError,
)
from quantkit.file_digests import RememberedDigests
from quantkit.formats.gguf_tokenizer import TOKENIZER_FILE, tokenizer_metadata
from quantkit.scheme import KEEP
from quantkit.stored_model import CheckpointModel, GgufModel, StoredModel, open_model
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import SIDECAR_BYTES, read_small_file
from quantkit.verify import check_manifest
from quantkit.writer import MANIFEST

# What a config says of names, of storage and of what lies beyond the text is no part of the model's arithmetic; nor are fields
# that GGUF files do not state, where frequencies are compared instead, and llama.cpp's own constants.
_SHAPES = (
    "hidden_size",
    "expert_width",
    "num_layers",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "experts_per_token",
    "moe_layers",
    "rope_layers",
    "use_qk_norm",
    "rms_norm_eps",
)
_FLOATING = frozenset((KEEP, "F32", "F16", "BF16"))
_SHOWN = 3  # schemes that a message names
_AGAIN = re.compile(
    r"\b(?:copy or )?download (it|them|this file|the files?|the index|the model's safetensors shards)(?: again| and \S+)"
    r"(?:, from one revision)?",
    re.IGNORECASE,
)
_WANTED_CHECKPOINT = "Give the directory of a Llama 4 checkpoint as downloaded."
_PATH_BYTES, _NAME_BYTES = 4096, 255  # that a path has less than, and that a name in it has at most
_CLOSE = 1e-5  # relative, for numbers that GGUF files hold as float32


def artifact_paths(artifacts: object) -> list[str | Path]:
    """The paths of artifacts, of which there may be one.  Raises RecipeError for what is none, and for one that was given twice."""
    several = artifacts if isinstance(artifacts, Iterable) and not isinstance(artifacts, str | bytes | os.PathLike) else [artifacts]
    paths = [checked_path("an artifact", path) for path in several]
    if not paths:
        raise RecipeError("No artifact was given. Give the directory or the GGUF file of at least one.")
    _check_distinct([((os.path.realpath(os.path.expanduser(path)),), path) for path in paths])
    return paths


def checked_path(name: str, value: object) -> str | Path:
    """The path that an argument of that name has to be: text as it is.  Raises RecipeError."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not _may_be_path(path):
        raise RecipeError(f"{name} is {brief(value)}; expected a path")
    return value if isinstance(value, str) else Path(path)


def _may_be_path(text: str) -> bool:
    """Whether an operating system takes it as one; a text in place of its file is no path, but too long for one."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) < _PATH_BYTES and b"\0" not in encoded and max(map(len, encoded.split(b"/"))) <= _NAME_BYTES


def cache_directory(cache: object) -> Path:
    """The directory that ``cache`` names; None: the usual one.  Raises RecipeError for what is no path, OutputError for a file."""
    if cache is None:
        return Path.home() / ".cache" / "quantkit" / "evaluation"
    place = Path(os.path.expanduser(checked_path("cache", cache)))
    if os.path.exists(place) and not os.path.isdir(place):
        raise OutputError(f"{place} is a file: name a directory for the cache (--cache)")
    return place


def check_arguments(
    *,
    round_activations: object,
    revision: object,
    progress: object,
    stop: object,
    window: int,
    windows: int | None,
    seed: int,
    workers: int | None,
    batch_tokens: int | None,
    resamples: int,
    cache_limit: int | None,
) -> None:
    """Raise CorpusError for numbers that choose no text, RecipeError for others that mean nothing."""
    chosen = (("window", window, 3), ("windows", windows, 1), ("seed", seed, 0))
    others = (
        *(("workers", workers, 1), ("batch_tokens", batch_tokens, 1)),
        *(("resamples", resamples, 0), ("cache_limit", cache_limit, 0)),
    )
    for numbers, kind in ((chosen, CorpusError), (others, RecipeError)):
        for name, value, least in numbers:
            if value is None and name in ("windows", "workers", "batch_tokens", "cache_limit"):
                continue
            if type(value) is not int or value < least:
                raise kind(f"{name} is {brief(value)}; expected an integer of at least {least}")
    fitting = (
        ("round_activations", round_activations, isinstance(round_activations, bool), "True or False"),
        ("revision", revision, revision is None or isinstance(revision, str), "text, or None"),
        ("progress", progress, progress is None or callable(progress), "a function, or None"),
        ("stop", stop, stop is None or isinstance(stop, threading.Event), "a threading.Event, or None"),
    )
    for name, found, fits, wanted in fitting:
        if not fits:
            raise RecipeError(f"{name} is {brief(found)}; expected {wanted}")


def check_window(window: int, models: Sequence[StoredModel]) -> None:
    """Raise CorpusError for a window that is longer than what one of the models knows."""
    for model in models:
        if window > model.config.max_positions:
            raise CorpusError(
                f"A window of {window:,} tokens is more than the {model.config.max_positions:,} positions that {model.path} knows. "
                "Ask for a shorter one (--window)."
            )


@contextmanager
def artifact_errors() -> Iterator[None]:
    """What is wrong with a checkpoint in the body is wrong with an artifact, which is copied or converted, not downloaded."""
    try:
        yield
    except CheckpointError as error:
        raise _of_artifact(error) from error


def _of_artifact(error: Exception) -> ArtifactError:
    text = str(error).replace(_WANTED_CHECKPOINT, "Give the directory of a finished artifact, or a GGUF file.")
    return ArtifactError(_AGAIN.sub(_made_again, text))


def _made_again(found: re.Match[str]) -> str:
    return f"{'Copy' if found[0][0].isupper() else 'copy'} {found[1]} again, or convert again"


@contextmanager
def reference_errors() -> Iterator[None]:
    """What is wrong with a file of ours in the body is wrong with the reference."""
    try:
        yield
    except ArtifactError as error:
        raise CheckpointError(f"the reference cannot be used: {error}") from error


def open_artifact(path: str | Path) -> StoredModel:
    """Open what shall be measured.  Raises ArtifactError."""
    with artifact_errors():
        return open_model(path)


def open_reference(path: str | Path) -> StoredModel:
    """Open the unquantized model: a checkpoint, or GGUF files of floats.  Raises CheckpointError, AlreadyQuantizedError."""
    with reference_errors():
        model = open_model(path)
    schemes = sorted(set(model.schemes.values()) - _FLOATING)
    if schemes:
        model.close()
        named = ", ".join(schemes[:_SHOWN]) + (", ..." if len(schemes) > _SHOWN else "")
        raise AlreadyQuantizedError(
            f"{path}: the reference is quantized ({named}). Give the BF16 checkpoint that the artifacts were made from."
        )
    return model


def check_distinct(models: Sequence[StoredModel]) -> None:
    """Raise RecipeError when two are the same files, whatever their paths look like."""
    files = (tuple(sorted(map(os.path.realpath, (model_directory(model), *model.files.paths)))) for model in models)
    _check_distinct([(own, model.path) for own, model in zip(files, models, strict=True)])


def _check_distinct(known: Iterable[tuple[tuple[str, ...], str | Path]]) -> None:
    """By what tells artifacts apart, their paths."""
    seen: dict[tuple[str, ...], str | Path] = {}
    for own, path in known:
        if own in seen:
            other = "" if str(seen[own]) == str(path) else f", the second time as {path}"
            raise RecipeError(f"{seen[own]} was given twice{other}. Give each artifact once.")
        seen[own] = path


def model_directory(model: StoredModel) -> Path:
    """Where the sidecars of a model lie: tokenizer, manifest, ledger."""
    if isinstance(model, CheckpointModel):
        return model.checkpoint.directory
    return model.path if os.path.isdir(model.path) else model.path.parent


def read_manifest(model: StoredModel) -> dict[str, Any] | None:
    """The manifest that vouches for the files of a model; None where there is none.  Raises ArtifactError when it is damaged."""
    directory = model_directory(model)
    if not os.path.lexists(directory / MANIFEST):
        return None
    try:
        content = parse_object(read_small_file(directory / MANIFEST, SIDECAR_BYTES), str(directory / MANIFEST))
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    listed = content.get("files")
    if not isinstance(listed, dict):
        raise ArtifactError(f"{directory / MANIFEST} lists no files. Do not use the artifact; convert again.")
    return content if all(path.name in listed for path in model.files.paths) or os.path.isdir(model.path) else None


def check_files(
    model: StoredModel, manifest: dict[str, Any] | None, digests: RememberedDigests, progress: Callable[[int, int], None]
) -> str:
    """What the states of this model depend on: a digest of its files, after comparing them with the manifest.

    digests: of files that no manifest vouches for.  Raises ArtifactError for files that differ from it, or cannot be read.
    """
    directory = model_directory(model)
    if manifest is not None:
        try:
            check_manifest(directory, progress)
        except (ArtifactError, CheckpointError, LedgerError) as error:
            raise ArtifactError(
                f"{directory} is not what its manifest says: {error}. Do not use it; download or convert it again."
            ) from error
        except OSError as error:
            raise _unreadable(directory, error) from error
        identity: Any = {path.name: manifest["files"].get(path.name) for path in model.files.paths}
    else:
        files = sorted(model.files.paths)
        try:
            identity = dict(zip((path.name for path in files), digests.of(files, progress), strict=True))
        except OSError as error:
            raise _unreadable(directory, error) from error
    config = dataclasses.asdict(dataclasses.replace(model.config, prefix=""))
    content = {"files": identity, "config": config, "schemes": model.schemes, "format": model.format}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _unreadable(directory: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{directory} cannot be read: {error.strerror or error}. Check its permissions.")


def check_same_model(reference: StoredModel, artifact: StoredModel) -> None:
    """Raise ArtifactError when the two are not one model in two forms."""
    ours, theirs = (dataclasses.asdict(model.config) for model in (reference, artifact))
    names = list(_SHAPES)
    if not all(reference.config.moe_layers):
        names.insert(2, "dense_width")
    if not isinstance(artifact, GgufModel) and not isinstance(reference, GgufModel):
        names += ["attention_chunk_size", "temperature_tuning", "floor_scale", "attn_scale"]
    differing = [name for name in names if not _equal(ours[name], theirs[name])]
    if not differing and not all(map(_equal, reference.frequencies.tolist(), artifact.frequencies.tolist())):
        differing = ["the rotary frequencies"]
    if differing:
        what = "; ".join(f"{name}: {brief(theirs.get(name))} against {brief(ours.get(name))}" for name in differing if name in ours)
        raise ArtifactError(
            f"{artifact.path} is another model than the reference {reference.path}: they differ in "
            f"{what or differing[0]}. Give the checkpoint that the artifact was made from."
        )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return bool(one == other)


def check_same_tokenizer(reference: StoredModel, artifact: StoredModel) -> None:
    """Raise ArtifactError when a token id stands for something else in the artifact than in the reference.

    An artifact that brings no tokenizer is taken at its word.
    """
    ours = model_directory(reference)
    if isinstance(artifact, GgufModel):
        entry = next(entry for entry in tokenizer_metadata(ours, reference.config) if entry.key == Keys.Tokenizer.LIST)
        found = artifact.files.sets[0].header.value(Keys.Tokenizer.LIST)
        if isinstance(found, tuple) and isinstance(entry.value, tuple):
            _compare(artifact, ours, found, entry.value)
        return
    theirs = model_directory(artifact)
    if not os.path.isfile(theirs / TOKENIZER_FILE) or os.path.samefile(ours, theirs):
        return
    one, one_digest = load_tokenizer(ours)
    try:
        other, other_digest = load_tokenizer(theirs)
    except CorpusError as error:
        raise _of_artifact(error) from error
    if one_digest != other_digest:
        ids = range(reference.config.vocab_size)
        _compare(artifact, ours, [other.id_to_token(token) for token in ids], [one.id_to_token(token) for token in ids])


def _compare(artifact: StoredModel, directory: Path, theirs: Sequence[Any], ours: Sequence[Any]) -> None:
    differing = [number for number, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other]
    if differing or len(ours) != len(theirs):
        first = differing[0] if differing else min(len(ours), len(theirs))
        shown = ["nothing" if first >= len(tokens) else brief(tokens[first]) for tokens in (theirs, ours)]
        raise ArtifactError(
            f"{artifact.path} has another tokenizer than {directory}: token {first} is {shown[0]}, there it is {shown[1]} "
            f"({len(differing) + abs(len(ours) - len(theirs)):,} differ). Its figures would mean nothing: give the checkpoint that "
            "it was made from."
        )

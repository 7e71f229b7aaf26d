"""Verification: re-open an artifact and find out whether it is what it says it is.

Everything is read from the artifact's own bytes.  The checks, from cheap to dear:

* manifest: every listed file is there with its size and sha256, and beside them lies nothing that a loader would read;
* headers: every tensor file parses, index or splits agree with the files;
* tensors: config and quantization section (GGUF: header and recipe; packed: config and headers) say which tensors must exist with
  which shape and dtype: exactly these do; metadata (GGUF): every key is as that config and recipe have it;
* blocks (packed): every byte is as the checksums stored beside it say;
* scales: every scale is finite and, in safetensors and packed, positive;
* ledger: one entry for each tensor, each as the recipe asked;
* source: with the source at hand, kept tensors, routed experts included, are equal to it, widened where the format widens, and are
  as many as the ledger says, and a sample of quantized tensors, decoded, is as far from it as the ledger says; the header of a GGUF
  file is the one that its conversion would make today.  Without it, the sample is decoded and must be finite.

What depends on the format is behind :class:`quantkit.comparison.Artifact`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit import ledger
from quantkit.checkpoint import CONFIG_NAME, Checkpoint
from quantkit.comparison import Artifact, Item, check_decodes, check_source, choose
from quantkit.errors import ArtifactError, CheckpointError, LedgerError, QuantkitError
from quantkit.file_digests import hash_files
from quantkit.formats import FORMATS
from quantkit.gguf_artifact import GgufArtifact
from quantkit.gguf_files import is_gguf
from quantkit.packed_artifact import PackedArtifact
from quantkit.packed_files import is_packed
from quantkit.recipe import GGUF, PACKED
from quantkit.safetensors_artifact import SafetensorsArtifact
from quantkit.scheme import KEEP, Scheme
from quantkit.strict_json import brief, parse_object
from quantkit.tensor_files import SIDECAR_BYTES, listing, read_small_file
from quantkit.writer import JOURNAL, MANIFEST

LEDGER = "ledger.json"
# Files that a loader would read although the manifest does not vouch for them.  What uploads and downloads leave is none of these.
_LOADED = re.compile(r".*\.(safetensors|packed|bin|pth?|py|gguf|index\.json)|config\.json|ledger\.json", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Check:
    """One check and its outcome."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """All checks of one artifact.  sampled: number of quantized tensors decoded."""

    directory: Path
    checks: tuple[Check, ...]
    tensors: int
    bytes: int
    sampled: int


def verify(
    directory: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    sample: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """Verify the artifact in ``directory``, against its BF16 ``source`` if given.

    sample: how many quantized tensors to decode, chosen by ``seed``, one of each role and scheme first; kept tensors are all
    compared.  progress: told, while files are hashed, how many bytes of how many are done; one call at a time.
    Raises ArtifactError that lists every failed check, and CheckpointError when nothing failed but the source cannot be opened.
    """
    path = Path(directory)
    if os.path.isfile(path):
        raise ArtifactError(f"{path} is a file. Give the directory of the artifact, which holds {MANIFEST} too.")
    kind = artifact_kind(path)
    if kind is not GgufArtifact and not os.path.isfile(path / CONFIG_NAME):
        raise ArtifactError(f"{path} is not an artifact: it has no {CONFIG_NAME}, and no GGUF files")
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, check()))
        except (QuantkitError, OSError) as error:
            checks.append(Check(name, False, str(error)))

    run("manifest", lambda: check_manifest(path, progress))
    entries, damage = _read_ledger(path)
    try:
        artifact: Artifact = kind(path, entries)
    except CheckpointError as error:
        checks.append(Check("headers", False, str(error)))
        raise _failure(path, checks) from error
    with artifact.files as files:
        checks.append(Check("headers", True, f"{len(files.tensors)} tensors, files: {len(files.paths)}"))
        chosen: list[tuple[Item, Scheme]] = []
        (first, find_tensors), *others = artifact.checks.items()
        run(first, find_tensors)
        if checks[-1].ok:  # else nothing is known of what must be there
            for name, check in others:
                run(name, check)
            run("ledger", lambda: _check_ledger(artifact, entries, damage))
            chosen = choose(artifact.schemes, sample, seed)
            if source is None:
                run("sample", lambda: check_decodes(artifact, chosen))
            else:
                try:
                    checkpoint = Checkpoint.open(source, revision)
                except CheckpointError as error:
                    if all(check.ok for check in checks):
                        raise  # which says nothing against the artifact
                    checks.append(Check("source", False, str(error)))
                else:
                    with checkpoint:
                        run("source", lambda: check_source(artifact, chosen, entries, checkpoint))
        if not all(check.ok for check in checks):
            raise _failure(path, checks)
        size = sum(tensor.nbytes for tensor in files.tensors.values())
        return VerifyResult(path, tuple(checks), len(files.tensors), size, len(chosen))


def artifact_kind(path: Path) -> type[SafetensorsArtifact | GgufArtifact | PackedArtifact]:
    """What the manifest of a directory says it is; if it says nothing known, what the directory looks like."""
    kinds: dict[str, type[GgufArtifact | PackedArtifact]] = {GGUF: GgufArtifact, PACKED: PackedArtifact}
    if not os.path.isdir(path):
        return SafetensorsArtifact
    try:
        stated = parse_object(read_small_file(path / MANIFEST, SIDECAR_BYTES), MANIFEST).get("format")
    except CheckpointError:  # which the check of the manifest will tell
        stated = None
    if isinstance(stated, str) and stated in FORMATS:
        return kinds.get(stated, SafetensorsArtifact)
    return PackedArtifact if is_packed(path) else GgufArtifact if is_gguf(path) else SafetensorsArtifact


def _read_ledger(path: Path) -> tuple[dict[str, ledger.LedgerEntry], QuantkitError | None]:
    """The entries by name, or what is wrong with the ledger."""
    try:
        return {entry.name: entry for entry in ledger.read_ledger(read_small_file(path / LEDGER, SIDECAR_BYTES))}, None
    except QuantkitError as error:
        return {}, error


def _failure(path: Path, checks: list[Check]) -> ArtifactError:
    failed = [check for check in checks if not check.ok]
    lines = "\n".join(f"  {check.name}: {check.detail}" for check in failed)
    advice = "Do not use it; convert again."
    if os.path.lexists(path / JOURNAL):
        advice = "Run the same convert command again, which completes it; then verify again."
    return ArtifactError(f"{path} fails {len(failed)} of {len(checks)} checks:\n{lines}\n{advice}")


def check_manifest(path: Path, progress: Callable[[int, int], None] | None) -> str:
    """Compare all that the manifest of ``path`` lists with the files; says what was found.  Raises ArtifactError, CheckpointError.

    progress: told how many bytes of how many are hashed; one call at a time.
    """
    listed = parse_object(read_small_file(path / MANIFEST, SIDECAR_BYTES), MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise ArtifactError(f"{MANIFEST} lists no files")
    strays = sorted(name for name in os.listdir(path) if name not in listed and name not in (MANIFEST, JOURNAL))
    problems = [f"{name} is not listed" for name in strays if _LOADED.fullmatch(name)]
    if os.path.lexists(path / JOURNAL):
        problems.append(f"{JOURNAL} is left: publishing was cut short")
    whole: list[Path] = []
    for name, entry in listed.items():
        file = path / name
        if Path(name).name != name or not name.isprintable():
            problems.append(f"{brief(name)} is listed, which is no file name")
        elif not os.path.isfile(file):
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry.get("size"):
            problems.append(f"{name} has {file.stat().st_size} bytes; the manifest says {entry.get('size')}")
        else:
            whole.append(file)
    for file, digest in zip(whole, hash_files(whole, progress), strict=True):
        if digest != listed[file.name].get("sha256"):
            problems.append(f"{file.name} has another sha256 than the manifest says: its content was changed or damaged")
    if problems:
        raise ArtifactError("; ".join(problems))
    others = f"; not listed, and not read by loaders: {listing(strays)}" if strays else ""
    size = sum(file.stat().st_size for file in whole)
    return f"{len(listed)} files, {size:,} bytes, every sha256 as listed{others}"


def _check_ledger(artifact: Artifact, entries: Mapping[str, ledger.LedgerEntry], damage: QuantkitError | None) -> str:
    if damage is not None:
        raise damage
    wanted = {item.name: scheme.name if scheme else KEEP for item, scheme in artifact.schemes.items()}
    for name, scheme in wanted.items():
        if name not in entries:
            raise LedgerError(f"the ledger has no entry for {name}")
        entry = entries[name]
        if not entry.asked == entry.applied == scheme:
            raise LedgerError(f"{name}: asked {entry.asked}, applied {entry.applied}, but the artifact says {scheme}")
    if len(entries) != len(wanted):
        raise LedgerError(f"the ledger has {len(entries)} entries; expected {len(wanted)}")
    quantized = [entry.relative_error for entry in entries.values() if entry.applied != KEEP]
    kept, worst = len(entries) - len(quantized), max(quantized, default=0.0)
    return f"{len(quantized)} matrices quantized as asked, {kept} tensors kept, worst error {worst:.4f}"

"""Hidden states of a running calibration on disk, so that a killed one resumes at the layer where it was.

    <name>.partial/
        journal.jsonl             fingerprint, then one line for each layer whose input is complete
        hidden-00007.bin          what enters layer 7: float32 [rows, hidden], row-major
        layer-00006/              the statistics of layer 6
        scratch-*.bin             worthless after a kill

The inputs of the two layers reached last are kept.  A line is written after the data that it speaks of was synced, and holds its
checksum: a file that changed since is not used, the one before it is, and at worst calibration begins anew.  Within a layer nothing
is kept here: finished experts stand in the journals of the artifacts, and what is still lacking is computed again, bit for bit.

Files are allocated at full size first, so that a full disk is an error here and not a signal while a mapped page is written.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from quantkit.datafiles import allocate_file
from quantkit.errors import CalibrationError, OutputError, ResumeError
from quantkit.journal import Journal, output_errors, sync_directory
from quantkit.statistics import Statistics, load_statistics, save_statistics

JOURNAL = "journal.jsonl"
KEPT = 2  # layer inputs


class CalibrationState:
    """The state of one calibration; holds the lock of its journal until closed."""

    def __init__(self, directory: Path, fingerprint: Mapping[str, Any], shape: tuple[int, int], *, restart: bool = False) -> None:
        """Begin or resume in ``directory``.  shape: of the hidden states.

        Raises OutputError when it cannot be written or another run works there, ResumeError when it was begun from something else.
        """
        self.directory = directory
        self._shape = shape
        self._maps: dict[Path, mmap.mmap] = {}
        with output_errors(f"begin {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            if not (directory / JOURNAL).exists() and any(directory.iterdir()):
                raise OutputError(f"{directory} has no {JOURNAL}, so it is not known to be an unfinished calibration: move it away")
            self._journal = Journal(directory / JOURNAL)
            try:
                stored = next((record["fingerprint"] for record in self._journal.records if "fingerprint" in record), None)
                if stored is None or restart:
                    self._journal.start(fingerprint)
                elif stored != dict(fingerprint):
                    differing = ", ".join(sorted(key for key in {*stored, *fingerprint} if stored.get(key) != fingerprint.get(key)))
                    raise ResumeError(
                        f"{directory} was begun from something else (different: {differing}); repeat the former command to finish "
                        "it, choose another output directory, or discard it with --restart"
                    )
                self._journal.sign()
                for path in directory.glob("scratch-*.bin"):
                    path.unlink()
            except BaseException:
                self._journal.close()
                raise

    def resume(self, wanted: int) -> int:
        """The last layer up to ``wanted`` whose input is here and sound, and for which all statistics before it are; else 0."""
        layers = {record["layer"]: record["hidden"] for record in self._journal.records if "layer" in record}
        for layer in sorted((layer for layer in layers if layer <= wanted), reverse=True):
            if self._digest(self._hidden(layer)) == layers[layer] and all(map(self._is_known, range(layer))):
                return int(layer)
        return 0

    def _is_known(self, layer: int) -> bool:
        """Whether the statistics of a layer are here and sound; if not, it is worth calibrating it again."""
        try:
            self.statistics(layer)
        except CalibrationError:
            return False
        return True

    def hidden(self, layer: int) -> torch.Tensor:
        """What enters ``layer``, float32 ``[rows, hidden]``, mapped; zeros when it was not there.  Raises OutputError."""
        return self._map(self._hidden(layer), self._shape)

    def scratch(self, name: str, width: int) -> torch.Tensor:
        """A mapped array ``[rows, width]`` that need not survive.  Raises OutputError."""
        return self._map(self.directory / f"scratch-{name}.bin", (self._shape[0], width))

    def commit(self, layer: int, statistics: Statistics | None) -> None:
        """Say that ``hidden(layer)`` is complete, with the statistics of the layer before.  Raises OutputError."""
        path = self._hidden(layer)
        with output_errors(f"write {path}", resumable=True):
            self._maps[path].flush()
            if statistics is not None:
                folder = self._statistics(layer - 1)
                folder.mkdir(exist_ok=True)
                save_statistics(folder, statistics)
            sync_directory(self.directory)
            self._journal.append([{"layer": layer, "hidden": self._digest(path)}])
            for former in self.directory.glob("hidden-*.bin"):
                if not layer - KEPT < int(former.stem.partition("-")[2]) <= layer:
                    self._unmap(former)
                    former.unlink()

    def statistics(self, layer: int) -> Statistics:
        """The saved statistics of a layer.  Raises CalibrationError."""
        return load_statistics(self._statistics(layer))

    def remove(self) -> None:
        """Remove the directory: its work is done.  Raises OutputError.

        The journal goes last: what a kill leaves is then known for what it is.
        """
        self._maps.clear()
        with output_errors(f"remove {self.directory}"):
            for path in self.directory.iterdir():
                if path.name != JOURNAL:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            (self.directory / JOURNAL).unlink()
            self.close()
            self.directory.rmdir()

    def close(self) -> None:
        """Let go of files and lock.  Harmless when repeated."""
        self._maps.clear()  # unmapped when the last tensor over them is gone
        self._journal.close()

    def _hidden(self, layer: int) -> Path:
        return self.directory / f"hidden-{layer:05d}.bin"

    def _statistics(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:05d}"

    def _digest(self, path: Path) -> str:
        """Checksum of a file of the right size; empty when there is none."""
        digest = xxhash.xxh3_64()
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != 4 * self._shape[0] * self._shape[1]:
                    return ""
                while chunk := file.read(8 << 20):
                    digest.update(chunk)
        except FileNotFoundError:
            return ""
        return digest.hexdigest()

    def _map(self, path: Path, shape: tuple[int, int]) -> torch.Tensor:
        if path not in self._maps:
            with output_errors(f"make {path}", resumable=True), path.open("a+b") as file:
                allocate_file(file.fileno(), 4 * shape[0] * shape[1])
                self._maps[path] = mmap.mmap(file.fileno(), 4 * shape[0] * shape[1])
        return torch.from_numpy(np.frombuffer(self._maps[path], np.float32)).view(shape)

    def _unmap(self, path: Path) -> None:
        self._maps.pop(path, None)

"""Writes one artifact: planned files filled in place, resumable at any moment, published by one rename.

    out/name.partial/            all work happens here: data files at their full planned size, sidecars, journal.jsonl
    out/name/                    appears by renaming that directory, when everything in it was written, checked and synced
    out/name.replaced/           with ``force``: the former out/name, between the rename that moves it away and its removal

What is durable when.  Opening creates the journal (fingerprint first), then allocates each file, writes its header and syncs
files and directory; only then are units written.  A unit counts once its line is in the journal, and that line is written after
the unit's data was synced (see :mod:`quantkit.journal`).  So a kill or a power cut loses at most the units that were in flight
or in the backlog.

What resuming trusts.  The fingerprint must be equal, else ResumeError.  A file that is missing, has another size or another
header is made anew and the units that had written to it are done again, with a warning.  Other data is taken on the journal's
word for now: every file is read back from front to back, following the units that write it, and each tensor is compared with the
checksum of what was to be written; units that a difference hits are struck from the journal and a rerun does them again.  Reading
back mostly finds the page cache: it proves that the right bytes went to the right place in the file, and on resuming that they are
still there.  What the disk makes of them later is for ``verify`` to find.

Why renaming the directory publishes.  A rename is atomic, so ``out/name`` either does not exist or is complete, never partly
there; all that it holds was synced before.  The journal goes along and is removed last: a directory with a final name and a
journal says that publishing was cut short between artifacts or before the clean-up, and the same command finishes that without
doing anything again. A replaced artifact is moved aside, not deleted, until the new one stands; if a kill falls between the two
renames, the next run moves it back.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import xxhash

from quantkit.datafiles import STOPPED, BackgroundChecks, DataFiles, FileCheck
from quantkit.errors import CheckpointError, Interrupted, OutputError, ResumeError
from quantkit.formats.base import OutputFile
from quantkit.journal import GroupCommit, Journal, Record, output_errors, sync_directory, write_all

JOURNAL = "journal.jsonl"
MANIFEST = "manifest.json"
COPY_BYTES = 8 << 20

_logger = logging.getLogger(__name__)


class ArtifactWriter:
    """One artifact in the making; see the module's text.

    completed: unit key -> its journal record ``{"unit", "tensors", "ledger"}``, units of former runs included.
    resumed: how many units former runs had completed.
    """

    def __init__(
        self,
        final_directory: Path,
        files: Sequence[OutputFile],
        fingerprint: Mapping[str, Any],
        *,
        force: bool = False,
        restart: bool = False,
    ) -> None:
        """Begin or resume an artifact.  Whatever is wrong with the output directory is found here.

        fingerprint: JSON-able; what must be equal for a partial output to be resumed.  force: replace a finished artifact of that
        name.  restart: discard a partial one.  Raises OutputError or ResumeError.
        """
        self.final = Path(os.path.realpath(final_directory))
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.completed: dict[str, Record] = {}
        self.resumed = 0
        self._former = self.final.with_name(self.final.name + ".replaced")
        self._data = DataFiles(self.partial, files)
        self._journal: Journal | None = None
        self._commits: GroupCommit | None = None
        self._checker: BackgroundChecks | None = None
        self._created: list[Path] = []  # directories, innermost first
        self._force = force
        self._owned = False  # the partial directory is this run's to remove
        self._published = False
        self._stop = threading.Event()
        self._turn = threading.Condition()
        self._digests: dict[str, str] = {}  # of every tensor written
        self._unwritten = {file.name: {tensor.name for tensor in file.tensors} for file in files}
        self._checks: dict[str, Future[FileCheck]] = {}
        self._checked_bytes = 0
        self._on_checked: Callable[[int], None] = lambda count: None
        try:
            with output_errors(f"begin {self.partial}"):
                if not self._adopt_published(fingerprint, restart):
                    self._open(fingerprint, restart)
        except BaseException:
            self.close()
            raise

    def _adopt_published(self, fingerprint: Mapping[str, Any], restart: bool) -> bool:
        """Whether the final directory is this very artifact and publishing was cut short before its journal was removed."""
        if restart or not (self.final / JOURNAL).is_file():
            return False
        journal = Journal(self.final / JOURNAL)
        if _stored_fingerprint(journal) != _canonical(fingerprint):
            journal.close()
            return False
        self._journal, self._published = journal, True
        self.completed = _completed(journal.records, self._data.places)
        self.resumed = len(self.completed)
        return True

    def _open(self, fingerprint: Mapping[str, Any], restart: bool) -> None:
        if not self._former.exists():
            self._check_final()
        if self.partial.is_symlink():
            raise OutputError(f"{self.partial} is a symbolic link, which cannot become an artifact: remove it")
        self._make_directory()
        if not (self.partial / JOURNAL).exists() and any(self.partial.iterdir()):
            raise ResumeError(
                f"{self.partial} has no {JOURNAL}, so it is not known to be unfinished work: look at it and move it away"
            )
        self._journal = journal = Journal(self.partial / JOURNAL)
        stored = _stored_fingerprint(journal)
        self._owned = stored is None
        self._repair_replacement()
        self._check_final()
        if stored is not None and stored != _canonical(fingerprint) and not restart:
            differences = "\n  ".join(_differences(stored, _canonical(fingerprint)))
            raise ResumeError(
                f"{self.partial} cannot be resumed, because it was begun from something else:\n  {differences}\n"
                "repeat the former command to finish it, choose another output directory, or discard it with --restart"
            )
        if stored is None and not restart and any(path.name in self._data.files for path in self.partial.iterdir()):
            _logger.warning("%s is damaged from its beginning; all units are done again", journal.path)
        self._owned = True
        if restart or stored is None:
            journal.start(fingerprint)
        self.completed = _completed(journal.records, self._data.places)
        self.resumed = len(self.completed)
        journal.sign()
        self._remove_strays(keep=set() if restart else set(self._data.files))
        faults = self._data.open()
        self._strike_units_in(faults)
        self.resumed = len(self.completed)
        self._data.allocate(faults)
        for directory in {self.partial.parent, *(path.parent for path in self._created)}:
            sync_directory(directory)
        self._commits = GroupCommit(journal, self._data.sync)
        self._checker = BackgroundChecks()
        for record in self.completed.values():
            self._note_written(record)

    def _check_final(self) -> None:
        """Raise OutputError when what stands under the final name, if anything, must not be replaced."""
        if not self.final.exists():
            return
        if not self.final.is_dir():
            raise OutputError(f"{self.final} is a file: remove it or choose another output directory")
        if not self._force:
            raise OutputError(f"{self.final} exists already: choose another output directory, or replace it with --force")
        if any(self.final.iterdir()) and not _is_artifact(self.final):
            raise OutputError(f"{self.final} has no {MANIFEST} of quantkit, so it is no artifact and is not replaced: move it away")

    def _make_directory(self) -> None:
        for path in reversed([path for path in (self.partial, *self.partial.parents) if not path.exists()]):
            path.mkdir(exist_ok=True)
            self._created.insert(0, path)

    def _repair_replacement(self) -> None:
        """Undo or complete a replacement that was cut short; see the module's text."""
        if not self._former.exists():
            return
        if not self.final.exists():
            self._former.rename(self.final)
            sync_directory(self.final.parent)
        elif self._force and (self.final / JOURNAL).exists():  # that run was killed before it could
            shutil.rmtree(self._former)
        elif self._force:
            raise OutputError(f"{self._former} is in the way: move it away or remove it")

    def _remove_strays(self, keep: set[str]) -> None:
        """Sidecars of a run that was killed while sealing, and anything else that is not planned."""
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() or path.name not in keep | {JOURNAL}:
                path.unlink()

    def _strike_units_in(self, faults: Mapping[str, str]) -> None:
        """Units that wrote to a file which is no longer what it was are done again."""
        struck: set[str] = set()
        for name, reason in faults.items():
            tensors = {tensor.name for tensor in self._data.files[name].tensors}
            units = {key for key, record in self.completed.items() if not tensors.isdisjoint(record["tensors"])}
            if units:
                _logger.warning("%s %s: %d finished units are done again", self.partial / name, reason, len(units))
            struck |= units
        self._strike(struck)

    def _strike(self, units: set[str]) -> None:
        assert self._journal is not None
        for unit in units:
            del self.completed[unit]
        if units:
            with output_errors(f"write {self._journal.path}", resumable=True):
                self._journal.append([{"struck": sorted(units)}])

    # ------------------------------------------------------------------------------------------------------------- units

    def write(self, name: str, data: bytes | bytearray | memoryview) -> str:
        """Write a whole tensor at its place; returns the xxh3_64 of its bytes.  Thread-safe.

        data: flat bytes, as many as planned; they are not copied.  Raises OutputError when the disk refuses.
        """
        if len(data) != self._data.places[name].nbytes:
            raise ValueError(f"{name}: got {len(data)} bytes, planned were {self._data.places[name].nbytes}")
        self.write_part(name, 0, data)
        return xxhash.xxh3_64_hexdigest(data)

    def write_part(self, name: str, position: int, data: bytes | bytearray | memoryview) -> None:
        """Write a piece of a tensor, ``position`` bytes from its start.  Thread-safe."""
        self._data.write(name, position, memoryview(data))

    def read(self, name: str) -> bytes:
        """The bytes of a tensor of a finished unit.  Raises OutputError."""
        return self._data.read(name)

    def commit(self, unit: str, tensors: Mapping[str, str], ledger: Sequence[Mapping[str, Any]]) -> None:
        """Say that a unit is written: it becomes durable soon, and a resumed run skips it.  Thread-safe.

        tensors: name -> xxh3_64 of each tensor that the unit wrote, which formats with checksums store in the file, too.  ledger:
        its ledger lines, kept for it.  Raises OutputError when this or earlier units could not be made durable.
        """
        assert self._commits is not None
        self._data.write_checksums(tensors)
        record: Record = _canonical({"unit": unit, "tensors": dict(tensors), "ledger": list(ledger)})  # as a resumed run sees it
        self._commits.put(record, {self._data.places[name].file for name in tensors})
        self.completed[unit] = record
        self._note_written(record)

    def _note_written(self, record: Record) -> None:
        """Files are read back in the background while units run, in file order, as far as their tensors have been written."""
        assert self._checker is not None
        with self._turn:
            self._digests.update(record["tensors"])
            touched = {self._data.places[name].file for name in record["tensors"]}
            for file in sorted(touched):
                self._unwritten[file].difference_update(record["tensors"])
                if file not in self._checks:
                    self._checks[file] = self._checker.submit(functools.partial(self._check, file))
            self._turn.notify_all()

    def _await_digest(self, tensor: str) -> str:
        """The checksum that a tensor was written with, as soon as it is written.  Raises Interrupted when the run ends before."""
        with self._turn:
            self._turn.wait_for(lambda: tensor in self._digests or self._stop.is_set())
            if tensor not in self._digests:
                raise Interrupted(STOPPED)
            return self._digests[tensor]

    def _halt_checks(self) -> None:
        with self._turn:
            self._stop.set()
            self._turn.notify_all()

    # ------------------------------------------------------------------------------------------------------------ finish

    def seal(
        self,
        sidecars: Mapping[str, bytes],
        carried: Sequence[Path],
        manifest: Callable[[dict[str, dict[str, Any]]], bytes],
        *,
        workers: int = 2,
        stop: threading.Event | None = None,
        checked: Callable[[int], None] | None = None,
    ) -> None:
        """Check and complete the partial directory: afterwards only the rename is missing, and all is durable.

        sidecars: small files, name -> content.  carried: files copied along under their own names.  manifest: gets
        ``{file: {"size", "sha256"}}`` of every other file, returns the content of the manifest.  workers: files read back at once.
        stop: set it to end early, by Interrupted.  checked: told, from other threads, how many bytes have just been read back.

        Raises OutputError when a unit could not be made durable, a tensor was never written, or one reads back wrong; Interrupted.
        """
        if self._published:
            return
        try:
            checks = self._read_back(workers, stop or threading.Event(), checked or (lambda count: None))
            files: dict[str, dict[str, Any]] = {check.name: {"size": check.size, "sha256": check.sha256} for check in checks}
            for name, content in sidecars.items():
                files[name] = self._add_file(name, [content])
            for path in carried:
                files[path.name] = self._add_file(path.name, _read_pieces(path))
            self._add_file(MANIFEST, [manifest(files)])
            with output_errors(f"complete {self.partial}", resumable=True):
                self._data.sync(self._data.files)
                sync_directory(self.partial)
        except KeyboardInterrupt as error:
            raise Interrupted(STOPPED) from error

    def _read_back(self, workers: int, stop: threading.Event, checked: Callable[[int], None]) -> list[FileCheck]:
        """Check all files that the background has not checked, and again those that changed since; then judge all."""
        assert self._commits is not None
        self._commits.drain()
        unwritten = sorted(set().union(*self._unwritten.values()))
        if unwritten:
            raise OutputError(f"{self.partial}: {len(unwritten)} tensors were never written, the first is {unwritten[0]}")
        with self._turn:
            checked(self._checked_bytes)
            self._on_checked = checked
        names = list(self._data.files)
        with ThreadPoolExecutor(workers, "quantkit-check") as pool:
            self._check_on(pool, [name for name in names if name not in self._checks or self._checks[name].cancel()], stop)
            self._check_on(pool, [name for name in names if self._checks[name].result().stamp != self._data.stamp(name)], stop)
        checks = [self._checks[name].result() for name in names]
        wrong = [(name, check.name) for check in checks for name in check.wrong]
        if wrong:
            hit = {name for name, _ in wrong}
            self._strike({key for key, record in self.completed.items() if not hit.isdisjoint(record["tensors"])})
            listed = ", ".join(f"{name or 'header, padding or size'} in {file}" for name, file in wrong[:10])
            raise OutputError(
                f"{self.partial}: {len(wrong)} tensors read back different from what was written ({listed}): the disk or memory "
                "is faulty, or something else wrote there. Check them, then run the same command again: it redoes these units"
            )
        return checks

    def _check_on(self, pool: ThreadPoolExecutor, names: Sequence[str], stop: threading.Event) -> None:
        """Check the named files on the pool; returns when these and those in the background are done."""
        try:
            for name in names:
                self._checks[name] = pool.submit(self._check, name)
            while not stop.is_set() and wait(self._checks.values(), timeout=0.1).not_done:
                pass
            if stop.is_set():
                raise Interrupted(STOPPED)
        except BaseException:
            self._halt_checks()  # or the pool would be waited for
            raise

    def _check(self, name: str) -> FileCheck:
        return self._data.check(name, self._await_digest, self._stop, self._count_checked)

    def _count_checked(self, count: int) -> None:
        with self._turn:
            self._checked_bytes += count
            self._on_checked(count)

    def _add_file(self, name: str, pieces: Iterable[bytes]) -> dict[str, Any]:
        """Write a small file durably; returns its manifest entry."""
        path, size, digest = self.partial / name, 0, hashlib.sha256()
        with output_errors(f"write {path}", resumable=True):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                for piece in pieces:
                    write_all(descriptor, piece, size)
                    digest.update(piece)
                    size += len(piece)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return {"size": size, "sha256": digest.hexdigest()}

    # ------------------------------------------------------------------------------------------------------- publish, end

    def _rename(self) -> None:
        if self._published:
            return
        with output_errors(f"rename {self.partial} to {self.final}", resumable=True):
            self._check_final()  # once more: it may have come meanwhile
            if self.final.exists():
                self.final.rename(self._former)
            self.partial.rename(self.final)
            self._published = True
            sync_directory(self.final.parent)

    def close(self) -> None:
        """End the run, whatever its state; what was committed stays resumable.  Does not raise; harmless when repeated.

        A run that completed no unit removes what it made.
        """
        self._halt_checks()
        if self._checker is not None:
            self._checker.close()
        if self._commits is not None:
            self._commits.close()
        self._data.close()
        done = self.resumed + (self._commits.durable if self._commits is not None else 0)
        if self._journal is not None and self._owned and not self._published and not done:
            shutil.rmtree(self.partial, ignore_errors=True)
        if self._journal is not None:
            self._journal.close()
        if not self._published:
            for directory in self._created:
                with contextlib.suppress(OSError):  # not empty: somebody else's work, or ours that can be resumed
                    directory.rmdir()


def publish(writers: Sequence[ArtifactWriter]) -> None:
    """Give sealed artifacts their final names: all renames first, then all clean-up.

    A run that is killed in between finds, when repeated, the renamed ones complete and goes on with the rest.  The last act is to
    remove the journals, one right after the other; the run is over with the first of them, and a repetition removes the rest
    (:func:`finish_clean_up`).  Raises OutputError.
    """
    for writer in writers:
        writer._rename()
    with output_errors("clean up after " + ", ".join(str(writer.final) for writer in writers)):
        for writer in writers:
            if writer._former.exists():
                shutil.rmtree(writer._former)
        for writer in writers:
            (writer.final / JOURNAL).unlink()
        for writer in writers:
            sync_directory(writer.final)


def _read_pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(COPY_BYTES):
                yield piece
    except OSError as error:
        raise CheckpointError(f"cannot read {path}, which is to be carried along: {error.strerror}") from error


def _canonical(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _stored_fingerprint(journal: Journal) -> Any:
    return journal.records[0].get("fingerprint") if journal.records else None


def _completed(records: Sequence[Record], places: Container[str]) -> dict[str, Record]:
    """The finished units.  A record that is not what this program writes counts for nothing: its unit is done again."""
    completed: dict[str, Record] = {}
    for record in records:
        unit, tensors, struck = record.get("unit"), record.get("tensors"), record.get("struck")
        whole = isinstance(tensors, dict) and all(name in places and isinstance(digest, str) for name, digest in tensors.items())
        if isinstance(unit, str) and whole and isinstance(record.get("ledger"), list):
            completed[unit] = record
        for name in struck if isinstance(struck, list) else ():
            completed.pop(str(name), None)
    return completed


def _is_artifact(directory: Path) -> bool:
    """Whether a directory was published by this program: its manifest says so."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "quantkit_manifest" in manifest


def finish_clean_up(final_directory: Path, fingerprint: Mapping[str, Any]) -> None:
    """Complete the clean-up of a published artifact, if it is the one of this fingerprint and its run was killed before the end.

    For a run that does not go on because another of its artifacts exists already: this one is complete too.  Raises OutputError.
    """
    final = Path(final_directory).resolve()
    if not (final / JOURNAL).is_file():
        return
    journal = Journal(final / JOURNAL)
    try:
        if _stored_fingerprint(journal) == _canonical(fingerprint):
            with output_errors(f"clean up after {final}"):
                shutil.rmtree(final.with_name(final.name + ".replaced"), ignore_errors=True)
                (final / JOURNAL).unlink()
                sync_directory(final)
    finally:
        journal.close()


def _differences(stored: Any, wanted: Any, where: str = "") -> list[str]:
    """Lines that say which parts of two fingerprints differ and how."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = [*stored, *(key for key in wanted if key not in stored)]
        return [
            line
            for key in keys
            for line in _differences(stored.get(key, "absent"), wanted.get(key, "absent"), f"{where}.{key}" if where else key)
        ]
    return [] if stored == wanted else [f"{where or 'fingerprint'}: was {_short(stored)}, is now {_short(wanted)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

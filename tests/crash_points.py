"""Kills a run that makes two artifacts at every single system call that changes the disk, and repeats it until it succeeds.

Run as a script with an empty directory and the number of workers: prints one JSON line with what was tried and exits non-zero
on the first violation.  It stands apart from the tests because it forks, which wants a process without threads.

One artifact replaces a finished one (``force``), the other is new, with a file that holds checksums.  After each kill must hold:
under each final name stands the former artifact, the new one, or, between two renames, nothing while the former one stands aside;
no partial content anywhere under a final name.  After the repetitions: the bytes of an uninterrupted run, no leftovers, and no unit
done again that the journal had claimed. Once the first journal is removed, the run is over: both artifacts are complete, and a
repetition, which finds the first existing, completes the clean-up of the other.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantkit.writer import ArtifactWriter, finish_clean_up, publish
from tests.synthetic_artifact import FINGERPRINT, Artifact, contents, journalled_units, make_artifact, seal, write_rest

CALLS = ("open", "pwrite", "fsync", "fdatasync", "posix_fallocate", "ftruncate", "rename", "unlink", "rmdir", "mkdir")
FORMER = {"manifest.json": b'{"quantkit_manifest": 1}', "old.safetensors": b"former weights"}


def kill_before(call: int, calls: Sequence[str] = CALLS) -> None:
    """Patch this process to die just before its ``call``-th change of the disk; half of a write that it hits is done.

    calls: names of the functions of ``os`` that count, besides ``flock``.
    """
    lock, count = threading.Lock(), 0

    def deadly(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                if count == call:
                    if name == "pwrite":
                        descriptor, data, offset = arguments
                        original(descriptor, data[: len(data) // 2], offset)
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return patched

    for name in calls:
        setattr(os, name, deadly(name, getattr(os, name)))
    fcntl.flock = deadly("flock", fcntl.flock)


def run(output: Path, artifacts: dict[str, Artifact], workers: int) -> None:
    """The run under test; says in ``<output>.done`` which units it did."""
    writers = {
        name: ArtifactWriter(output / name, artifact.files, FINGERPRINT | {"name": name}, force=name == "old")
        for name, artifact in artifacts.items()
    }
    resumed = {name: writer.resumed for name, writer in writers.items()}
    for name, writer in writers.items():
        write_rest(writer, artifacts[name], workers)
    for name, writer in writers.items():
        seal(writer, artifacts[name])
    publish(list(writers.values()))
    for writer in writers.values():
        writer.close()
    output.with_suffix(".done").write_text(json.dumps(resumed))


def in_child(work: Callable[[], None]) -> bool:
    """Do the work in a forked process; False when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        sys.exit("a run failed instead of succeeding")
    return True


def demand(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(message)


def check_after_kill(output: Path, artifacts: dict[str, Artifact], where: str) -> dict[str, int]:
    """Returns how many units each artifact's journal claims."""
    claimed = {}
    for name, artifact in artifacts.items():
        final = output / name
        if final.exists():
            found = contents(final)
            found.pop("journal.jsonl", None)
            whole = found == artifact.expected or (name == "old" and found == FORMER)
            demand(whole, f"{where}: {name} stands under its final name with {sorted(found)}")
        elif name == "old":
            demand(contents(output / "old.replaced") == FORMER, f"{where}: the former artifact is lost")
        claimed[name] = len(journalled_units(output / f"{name}.partial") or journalled_units(final))
    return claimed


def is_over(output: Path, artifacts: dict[str, Artifact]) -> bool:
    """Whether the kill came after the end: all stand under their final names, and not all journals are there any more."""
    journals = [name for name in artifacts if (output / name / "journal.jsonl").exists()]
    over = len(journals) < len(artifacts) and all((output / name / "manifest.json").exists() for name in artifacts)
    over = over and all(contents(output / name).items() >= artifact.expected.items() for name, artifact in artifacts.items())
    if over:
        for name in journals:
            finish_clean_up(output / name, FINGERPRINT | {"name": name})
    return over


def main(directory: Path, workers: int) -> None:
    generator = random.Random(7)
    artifacts = {
        name: make_artifact(directory, seed=seed, unit_count=3, checksums=name == "new") for seed, name in enumerate(("old", "new"))
    }
    kills = repeated = 0
    call = 1
    finished = False
    while not finished:
        output = directory / f"run-{call}"
        (output / "old").mkdir(parents=True)
        for name, content in FORMER.items():
            (output / "old" / name).write_bytes(content)
        where = f"call {call}"

        def attempt(deadline: int, output: Path = output) -> bool:
            def work() -> None:
                kill_before(deadline)
                run(output, artifacts, workers)

            return in_child(work)

        finished = attempt(call)
        if not finished:
            kills += 1
            claimed = check_after_kill(output, artifacts, where)
            over = is_over(output, artifacts)
            while not over and generator.random() < 0.5 and not attempt(second := generator.randint(1, call + 20)):
                repeated += 1
                where += f", then call {second}"
                after = check_after_kill(output, artifacts, where)
                over = is_over(output, artifacts)
                lost = [name for name in claimed if not over and after[name] < claimed[name]]
                demand(not lost, f"{where}: finished units of {lost} were forgotten: {claimed}, {after}")
                claimed = after
            if not over:
                if not (done := output.with_suffix(".done")).exists():
                    demand(attempt(1 << 30), "killed by something else")
                resumed = json.loads(done.read_text())
                again = [name for name in claimed if claimed[name] > resumed[name]]
                demand(not again, f"{where}: journalled units of {again} were done again: {claimed}, {resumed}")
        demand(sorted(path.name for path in output.iterdir()) == ["new", "old"], f"{where}: leftovers {sorted(output.iterdir())}")
        for name, artifact in artifacts.items():
            demand(contents(output / name) == artifact.expected, f"{where}: {name} differs from an uninterrupted run")
        shutil.rmtree(output)
        output.with_suffix(".done").unlink(missing_ok=True)
        call += 1
    print(json.dumps({"kills": kills, "kills_while_resuming": repeated}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""What the measuring scripts share: the header of a results file, Markdown tables, page cache control, child processes.

A result without its circumstances is worth nothing, so every file under ``results/`` starts with the date, the hardware, the
versions and the command.  Nothing about the place on disk is recorded except the kind of file system.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import functools
import importlib.metadata
import mmap
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "numba", "llvmlite", "numpy", "xxhash", "safetensors", "transformers", "compressed-tensors")


# ------------------------------------------------------------------------------------------------------------ circumstances


def describe_processor() -> str:
    """Model, number of cores this process may use, vector extensions that matter here."""
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    known = ("avx2", "avx512f", "avx512_bf16", "sha_ni")
    flags = [flag for flag in known if flag in fields.get("flags", "").split()]
    family = f", family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    virtual = ", virtual machine" if "hypervisor" in fields.get("flags", "") else ""
    cores = len(os.sched_getaffinity(0))
    return f"{fields.get('model name', platform.processor())}{family}, {cores} cores{virtual} ({', '.join(flags)})"


def describe_file_system(directory: Path) -> str:
    """Kind of the file system that holds ``directory``, and the kind of its device as the kernel tells it."""
    target, best = str(directory.resolve()), ("", "unknown")
    for line in _read("/proc/mounts").splitlines():
        device, mount, kind = line.split()[:3]
        inside = mount == "/" or target == mount or target.startswith(mount + "/")
        if inside and len(mount) >= len(best[0]):
            best = (mount, f"{kind} on {'a virtual disk' if device.startswith('/dev/vd') else 'a disk'}")
    return best[1]


def describe_versions() -> str:
    """Python, quantkit and the packages that do the work."""
    found = []
    for package in ("quantkit", *PACKAGES):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, " + ", ".join(found)


def describe_commit() -> str:
    """The commit measured, and whether the package differed from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "../quantkit", "../cli")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (", with changes" if changed else "")


def load_average() -> float:
    """Of the last minute; printed with the results because other work on the machine spoils them."""
    return os.getloadavg()[0]


def wait_until_quiet(limit: float, patience: float) -> float:
    """Wait until the load average is below ``limit``, at most ``patience`` seconds; returns the load average found."""
    deadline = time.monotonic() + patience
    while load_average() >= limit and time.monotonic() < deadline:
        time.sleep(5)
    return load_average()


def header(title: str, directory: Path, load: float) -> str:
    """The head of a results file."""
    memory = _memory("MemTotal")
    lines = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line(),
        "processor": describe_processor(),
        "memory": f"{memory / 2**30:.1f} GiB",
        "disk": describe_file_system(directory),
        "system": f"Linux {platform.release().split('-')[0]}",
        "versions": describe_versions(),
        "commit": describe_commit(),
        "load before": f"{load:.2f}",
    }
    return f"# {title}\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items())


def command_line() -> str:
    """The command that ran this script, with absolute directories as DIR and other absolute paths reduced to their last part."""
    words = [("DIR" if Path(word).is_dir() else Path(word).name) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return "`" + shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]) + "`"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_results(name: str, text: str) -> None:
    """Print a results file and store it under ``results/``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text, encoding="utf-8")
    print(text)


# ------------------------------------------------------------------------------------------------------------------ files


def files_of(directory: Path) -> list[Path]:
    """Regular files of a directory, sorted."""
    return sorted(path for path in directory.iterdir() if path.is_file())


def size_of(directory: Path) -> int:
    """Bytes of all files of a directory."""
    return sum(path.stat().st_size for path in files_of(directory))


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Ask the kernel to drop the pages of these files, dirty ones written first, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bring_into_cache(paths: Iterable[Path]) -> None:
    """Read these files once and throw the bytes away."""
    buffer = bytearray(16 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class Ballast:
    """A sparse file that is read until nearly all memory is in use, by page cache that can be reclaimed at once.

    That is the steady state of a long run.  A virtual machine may also give free memory back to its host, and then the first use of
    a page is ten times slower than the disk; memory that holds page cache stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0  # where the last reading ended: what follows was read longest ago, so it is not in the cache

    def fill_cache(self, leave_free: int = 3 << 29) -> None:
        """Read on until less than ``leave_free`` bytes are free, once round the file at most."""
        total, buffer = _memory("MemTotal"), bytearray(16 << 20)
        with self.path.open("a+b") as file:
            file.truncate(total)
            for _ in range(0, total, len(buffer)):
                if _memory("MemFree") < leave_free:
                    break
                os.preadv(file.fileno(), [buffer], self._position)
                self._position = (self._position + len(buffer)) % total


def cached_share(paths: Iterable[Path]) -> float:
    """Share of the pages of these files that the page cache holds; proves that a run was cold or warm."""
    library = ctypes.CDLL(None, use_errno=True)
    held = total = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            pages = np.zeros(-(-view.size // mmap.PAGESIZE), np.uint8)
            if library.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size), ctypes.c_void_p(pages.ctypes.data)):
                raise OSError(ctypes.get_errno(), f"mincore of {path.name}")
            held, total = held + int((pages & 1).sum()), total + pages.size
            del view  # a map cannot be closed while it is viewed
    return held / total if total else 0.0


# -------------------------------------------------------------------------------------------------------------- processes


def run_script(script: str, *arguments: str, python: str = sys.executable, environment: Mapping[str, str] | None = None) -> str:
    """Run a script of this directory in a fresh process; returns its standard output.  Its errors go to ours."""
    command = [python, str(HERE / script), *arguments]
    completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    return completed.stdout


def _memory(field: str) -> int:
    """A field of /proc/meminfo in bytes."""
    return int(next(line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith(field + ":"))) * 1024


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, cwd=HERE).stdout.strip()


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def timed(seconds: dict[str, float], step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with its wall time added to ``seconds[step]``."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started

    return wrapper

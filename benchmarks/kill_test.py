"""Kill -9 at random points of a two-target conversion: does every run resume to the bytes of an uninterrupted one?

    python benchmarks/kill_test.py --directory DIR [--kills 200] [--seed 0] [--source demo/tiny-scout]
    python benchmarks/kill_test.py --directory DIR --calibrated [--calibration TEXT]
    python benchmarks/kill_test.py --directory DIR --gguf [--seconds 360]

Each trial starts `quantkit.convert` for two targets in a process group of its own and kills the group after a time drawn uniformly
from the whole duration of an uninterrupted run.  The end, where files are read back, completed and renamed, is short, so every
fourth trial kills there: a few random milliseconds after the last manifest or the first final name appears, and, when calibrated,
after the statistics appear.  The same call is then repeated: with probability 0.5 it is killed again, until one is left to finish.
Then must hold

- both artifacts (and the statistics of a calibrated run) stand under their final names, byte for byte as in the uninterrupted run,
  and nothing else stands beside them;
- after each kill: whatever stands under a final name is complete;
- the last run resumed exactly as many units as the journals claimed before it, and no kill made that number smaller.

``--gguf`` kills a calibrated conversion to two GGUF targets, one of them calibrated, each in several files.  ``--seconds`` ends a
campaign early, after the trial that is under way.

Runs are forked from a process that has imported quantkit but has not used it, so that all of a run's time is conversion and not
import.  A kill that comes after the end of its run is counted apart and does not count as a trial.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import common

import quantkit

SHARD_BYTES = 3_000_000  # several files per artifact
WORKERS = 2
JOURNAL = "journal.jsonl"
TITLE = "Kill -9 at random points of a two-target conversion"
SAMPLES, SEQUENCE_LENGTH = 8, 128  # of a calibrated run: it shall take seconds
BEGINNING, UNITS, READING, SIDECARS = "allocation and first units", "units", "reading back", "sidecars"
SOME_RENAMED, ALL_RENAMED = "publishing: some renamed", "publishing: all renamed"


class Violation(Exception):
    """A promise was broken."""


@dataclass(frozen=True)
class Campaign:
    """What is killed.  gguf: to GGUF, calibrated.  corpus: of a calibrated run, None for the bundled one."""

    source: Path
    calibrated: bool
    corpus: Path | None
    gguf: bool = False

    @property
    def targets(self) -> tuple[str, str]:
        if self.gguf:
            return ("QK4_MOE-gptq", "Q4_K_M")
        return ("w4a16-gptq", "fp8-dynamic") if self.calibrated else ("fp8-dynamic", "w4a16-rtn")

    @property
    def ends(self) -> tuple[tuple[str, float], ...]:
        """What kills at the end wait for, below the output, and roughly how long the run still takes from there, in seconds."""
        ends = ((f"{self.targets[-1]}.partial/manifest.json", 0.03), (self.targets[0], 0.003))
        return (*ends, ("calibration-*/statistics.json", 0.03)) if self.calibrated else ends

    def convert(self, output: Path) -> quantkit.ConvertResult:
        given = quantkit.CalibrationOptions(self.corpus, SAMPLES, SEQUENCE_LENGTH) if self.calibrated else None
        return quantkit.convert(self.source, self.targets, output, workers=WORKERS, max_shard_bytes=SHARD_BYTES, calibration=given)


def start(campaign: Campaign, output: Path) -> int:
    """Fork a run in a process group of its own; it leaves the numbers of resumed units in ``<output>.result``."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    status = 1
    try:
        result = campaign.convert(output)
        resumed = {artifact.name: artifact.units_resumed for artifact in result.artifacts}
        output.with_suffix(".result").write_text(json.dumps(resumed))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise Violation(f"a run that was not killed ended with status {status}")


@dataclass(frozen=True)
class Kill:
    """When to kill a run: so long after its start, or after something below the output matches a pattern."""

    seconds: float
    after: str = ""


def kill_at(child: int, kill: Kill, output: Path) -> bool:
    """Whether the run was killed, rather than finished before."""
    while kill.after and not any(output.glob(kill.after)):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break  # it has ended by itself
        time.sleep(0.0002)
    time.sleep(kill.seconds)
    os.kill(child, signal.SIGKILL)  # the group exists only once the child has made it
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise Violation(f"a run failed by itself with status {status}")
    return os.WIFSIGNALED(status)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def claimed_units(output: Path, name: str) -> set[str]:
    """Units that the journal of an artifact, wherever it is, claims; not read by quantkit's own reader."""
    claimed: set[str] = set()
    for directory in (output / f"{name}.partial", output / name):
        if (directory / JOURNAL).exists():
            for line in (directory / JOURNAL).read_bytes().split(b"\n")[:-1]:
                record = json.loads(line[17:])
                claimed |= {record["unit"]} if "unit" in record else set()
                claimed -= set(record.get("struck", ()))
    return claimed


def state(campaign: Campaign, output: Path, reference: dict[str, dict[str, str]], unit_count: int) -> str:
    """Where a kill hit; raises Violation when something incomplete stands under a final name."""
    present = [name for name in reference if (output / name).exists()]
    for name in present:
        found = digests(output / name)
        found.pop(JOURNAL, None)
        if found != reference[name]:
            raise Violation(f"{name} stands under its final name incomplete")
    finals = [name for name in campaign.targets if name in present]
    if len(finals) == len(campaign.targets):
        return ALL_RENAMED if all((output / name / JOURNAL).exists() for name in finals) else "over"
    if finals:
        return SOME_RENAMED
    counts = [len(claimed_units(output, name)) for name in campaign.targets]
    sidecar = "Modelfile" if campaign.gguf else "config.json"
    if any((output / f"{name}.partial" / sidecar).exists() for name in campaign.targets):
        return SIDECARS
    calibrations = list(output.glob("calibration-*.partial"))
    if calibrations:
        return "calibration: clean-up" if len(present) else f"calibration: {reached(calibrations[0])}"
    if min(counts) == unit_count:
        return READING
    if max(counts):
        return UNITS
    return BEGINNING


def reached(calibration: Path) -> str:
    """The layer that an unfinished calibration was at."""
    journal = calibration / JOURNAL
    records = [json.loads(line[17:]) for line in journal.read_bytes().split(b"\n")[:-1]] if journal.exists() else []
    layers = [record["layer"] for record in records if "layer" in record]
    return f"layer {layers[-1]}" if layers else "embedding"


def trial(campaign: Campaign, output: Path, reference: dict[str, dict[str, str]], kills: list[Kill], unit_count: int) -> list[str]:
    """Kill a run and its repetitions, then let one finish; returns where the kills hit (``over``: too late)."""
    hits: list[str] = []
    claimed = dict.fromkeys(campaign.targets, 0)
    for kill in kills:
        if not kill_at(start(campaign, output), kill, output):
            hits.append("over")
            break
        hits.append(state(campaign, output, reference, unit_count))
        if hits[-1] == "over":  # the journals go last, one right after the other: with the first of them the run is over
            for name in campaign.targets:
                (output / name / JOURNAL).unlink(missing_ok=True)
            break
        now = {name: len(claimed_units(output, name)) for name in campaign.targets}
        if any(now[name] < claimed[name] for name in campaign.targets):
            raise Violation(f"a kill made finished units disappear: {claimed}, then {now}")
        claimed = now
    if "over" not in hits:
        finish(start(campaign, output))
        resumed = json.loads(output.with_suffix(".result").read_text())
        if resumed != claimed:
            raise Violation(f"the journals claimed {claimed} units, but {resumed} were resumed")
    for name in reference:
        if digests(output / name) != reference[name]:
            raise Violation(f"{name} differs from the uninterrupted run")
    if sorted(path.name for path in output.iterdir()) != sorted(reference):
        raise Violation(f"leftovers: {sorted(path.name for path in output.iterdir())}")
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="where to write; must exist")
    parser.add_argument("--source", type=Path, default=common.HERE.parent / "demo" / "tiny-scout")
    parser.add_argument("--kills", type=int, default=200, help="trials, each killed at least once before its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrated", action="store_true", help="kill a calibrated conversion")
    parser.add_argument("--gguf", action="store_true", help="kill a calibrated conversion to GGUF")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after so long")
    parser.add_argument("--calibration", type=Path, help="its text; the bundled corpus if not given")
    options = parser.parse_args()
    campaign = Campaign(options.source, options.calibrated or options.gguf, options.calibration, options.gguf)
    title = f"Kill -9 at random points of a calibrated conversion{' to GGUF' * campaign.gguf}" if campaign.calibrated else TITLE
    generator = random.Random(options.seed)
    # Now, not at the end: what is imported by now is what is tested, whatever is committed meanwhile.
    text = common.header(title, options.directory, common.load_average())
    work = options.directory / "kill-test"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()

    durations = []
    for number in range(3):  # the first one also fills the caches
        began = time.monotonic()
        finish(start(campaign, work / f"reference-{number}"))
        durations.append(time.monotonic() - began)
    reference = {path.name: digests(path) for path in (work / "reference-2").iterdir()}
    if any(digests(work / "reference-0" / name) != reference[name] for name in reference):
        raise Violation("two uninterrupted runs differ")
    duration = statistics.median(durations[1:])
    unit_count = len(quantkit.plan(options.source, campaign.targets, max_shard_bytes=SHARD_BYTES).units)

    hits: collections.Counter[str] = collections.Counter()
    in_a_row: collections.Counter[int] = collections.Counter()
    trials = too_late = 0
    began = time.monotonic()
    while trials < options.kills and time.monotonic() - began < options.seconds:
        after, longest = campaign.ends[trials // 4 % len(campaign.ends)] if trials % 4 == 3 else ("", duration)
        kills = [Kill(generator.uniform(0, longest), after)]
        while generator.random() < 0.5:
            kills.append(Kill(generator.uniform(0, duration)))
        output = work / f"trial-{trials}"
        try:
            found = trial(campaign, output, reference, kills, unit_count)
        except Violation as violation:
            sys.exit(f"trial {trials} of seed {options.seed}, {kills}: {violation} (left in {output})")
        shutil.rmtree(output)
        output.with_suffix(".result").unlink(missing_ok=True)
        effective = [hit for hit in found if hit != "over"]
        too_late += len(found) - len(effective)
        if effective:
            trials += 1
            hits.update(effective)
            in_a_row[len(effective)] += 1
    shutil.rmtree(work)

    made = f"`{options.source.name}` to {' and '.join(campaign.targets)}"
    if campaign.calibrated:
        made += f", {SAMPLES} samples of {SEQUENCE_LENGTH} tokens of {options.calibration or 'the bundled corpus'}"
    text += f"""- run: {made}, {unit_count} units, {WORKERS} workers, shards of {SHARD_BYTES / 1e6:g} MB
- seed: {options.seed}; an uninterrupted run takes {duration:.2f} s; the campaign took {time.monotonic() - began:.0f} s

**{trials} of {trials} killed runs resumed to byte-identical artifacts**, and no unit that a journal claimed was done again.
{hits.total()} kills in all ({too_late} more came after the end of their run and do not count).

"""
    phases = [BEGINNING, UNITS, *sorted(name for name in hits if name.startswith("calibration")), READING, SIDECARS]
    text += (
        common.table(["where the kill hit", "kills"], [(name, hits[name]) for name in (*phases, SOME_RENAMED, ALL_RENAMED)]) + "\n"
    )
    text += common.table(["kills in a row before a run was left to finish", "trials"], sorted(in_a_row.items()))
    kind = "_gguf" if campaign.gguf else "_calibrated" if campaign.calibrated else ""
    common.write_results(f"kill_test{kind}.md", text)


if __name__ == "__main__":
    main()

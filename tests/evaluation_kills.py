"""Kills an evaluation at many places and lets the same call go on: ``python -m tests.evaluation_kills DIRECTORY STRIDE``.

States are saved after every layer.  A forked child counts its calls to the functions below and ends itself with SIGKILL before the
n-th one, of a write in the middle of it; then another child runs the same evaluation to its end, sometimes after one more kill.
Its figures must be those of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from quantkit import evaluation_pass
from quantkit.convert import convert
from quantkit.evaluate import evaluate
from tests.crash_points import demand, in_child, kill_before
from tests.speaking_models import write_random_texts, write_speaking_model

CALLS = ("pwrite", "fsync", "replace", "unlink", "rmdir")


def run(directory: Path, cache: Path, result: Path) -> None:
    evaluation_pass.SAVE_SECONDS = -1.0
    texts = directory / "texts.jsonl"
    options: dict[str, Any] = {"text": texts, "window": 24, "workers": 1, "batch_tokens": 50, "resamples": 10, "cache": cache}
    found = evaluate([directory / "w4a16-rtn", directory / "w8a16"], directory / "source", **options).to_dict()
    found.pop("seconds")
    for artifact in found["artifacts"]:
        artifact.pop("seconds")
    result.write_text(json.dumps(found, sort_keys=True))


def main(directory: Path, stride: int) -> None:
    torch.set_num_threads(1)
    generator = random.Random(3)
    source = write_speaking_model(directory / "source")
    convert(source, ["w4a16-rtn", "w8a16"], directory, workers=1)
    write_random_texts(directory / "texts.jsonl")
    expected, result, cache = directory / "expected.json", directory / "result.json", directory / "cache"

    def attempt(deadline: int, to: Path) -> bool:
        def work() -> None:
            kill_before(deadline, CALLS)
            run(directory, cache, to)

        return in_child(work)

    demand(attempt(1 << 30, expected), "killed by something else")
    call, kills = 1, 0
    while True:
        shutil.rmtree(cache)
        result.unlink(missing_ok=True)
        if attempt(call, result):
            break
        kills += 1
        if generator.random() < 0.5:
            kills += not attempt(generator.randint(1, stride), result)
        demand(attempt(1 << 30, result), "killed by something else")
        demand(result.read_text() == expected.read_text(), f"call {call}: other figures than those of an undisturbed run")
        left = sorted(path.name for path in cache.glob("*/*") if path.is_file() and not path.name.endswith(".tmp"))
        demand({name.partition("-")[0] for name in left} == {"scores", "states"}, f"call {call}: leftovers {left}")
        call += generator.randint(1, 2 * stride)
    print(json.dumps({"kills": kills, "calls": call}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

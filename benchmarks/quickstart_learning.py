"""How well the quickstart's LoRA learns with one recipe or another: the measures of its page, for several seeds.

python -m benchmarks.quickstart_learning --out /tmp/tune --learning_rate 1e-3 2e-3 4e-3 --rank 16 --steps 200

Clips and caches in `--out` are shared by all runs; each run leaves its page and its contact sheet in a `run_N` there.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wanlora.foundation.devices import find_device
from wanlora.foundation.log import setup_logging
from wanlora.quickstart.run import Recipe, Run, learn


def main(argv: Sequence[str] | None = None) -> int:
    """Run every combination and print a row for each."""
    usual = Recipe.for_device(find_device(None), seed=0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[usual.learning_rate])
    parser.add_argument("--rank", type=int, nargs="+", default=[usual.rank])
    parser.add_argument("--steps", type=int, nargs="+", default=[usual.steps])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--device")
    options = parser.parse_args(argv)
    setup_logging()
    rows = []
    for rate, rank, steps, seed in itertools.product(options.learning_rate, options.rank, options.steps, options.seeds):
        recipe = replace(usual, learning_rate=rate, rank=rank, steps=steps, seed=seed)
        rows.append(measured(options.out, recipe, options.device))
    sys.stdout.write("\n".join(["rate rank steps seed  look  motion  seconds  run", *rows, ""]))
    return 0


def measured(out: Path, recipe: Recipe, device: str | None) -> str:
    """Train with a recipe; the shares of the distance that were closed, as a row."""
    start = time.monotonic()
    if learn(out, recipe, find_device(device)):
        raise SystemExit("a program failed; its message is above")
    seconds = time.monotonic() - start
    folder = max(out.glob("run_*"), key=lambda path: int(path.name.removeprefix("run_")))
    found = json.loads(Run(folder=folder).measured.read_text(encoding="utf-8"))
    shares = "  ".join(f"{found[name]['closed']:6.2f}" for name in ("look", "motion"))
    return (
        f"{recipe.learning_rate:g} {recipe.rank} {recipe.steps} {recipe.seed}  {shares}  {seconds:.0f}  {folder.name}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Kills workers and drivers of a run at random moments, and wants every row once. A slow command: `python tests/kills.py`.

Each turn starts the run, or finds it running, and kills (SIGKILL) a worker of it or the driver. Whatever was stored before must
be there afterwards, no row twice; and once nothing is killed any more, the rows must be those of one process that was left alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from crews import ray_workers  # noqa: E402

from results.record import Key  # noqa: E402
from results.store import read_rows  # noqa: E402

KILLS = 20
GRID = ["--suite", "smoke", "--model", "reference", "--methods", "full,snapkv,h2o,ada_snapkv", "--budgets", "16,64,25%"]
GRID += ["--benchmarks", "recall(length=512),two_hop(length=512)", "--limit", "60", "--device", "cpu"]
ON_WORKERS = ["--ray", "local", "--workers", "2"]
PATIENCE_S = 120.0  # for a worker to be there, or a row


def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "run_all.py"), "run", *GRID, "--out", str(out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def stored(out: Path) -> list[str]:
    """Ids of the whole lines with an `ok` row, one for each line."""
    found = []
    for path in (out / "rows").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by a kill, and closed by the next row
            found += [Key(**row["key"]).id] if row["status"] == "ok" else []
    return found


def kill_one(run: subprocess.Popen[bytes], out: Path, rng: random.Random) -> str:
    """Kills a worker or the driver, mostly once it has stored something."""
    until, before = time.monotonic() + PATIENCE_S, len(stored(out))
    early = rng.random() < 0.25  # while workers start, or models load
    while run.poll() is None and time.monotonic() < until:
        if ray_workers(run.pid) if early else len(stored(out)) > before:
            break
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 2))
    workers = ray_workers(run.pid)
    try:
        if workers and rng.random() < 0.6:
            os.kill(rng.choice(workers), signal.SIGKILL)
            return "worker"
        run.kill()
        run.wait()
        return "driver"
    except ProcessLookupError:
        return "nothing"


def main() -> int:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        out, alone = Path(folder) / "killed", Path(folder) / "alone"
        before: set[str] = set()
        counts = {"worker": 0, "driver": 0, "nothing": 0}
        lost = doubled = grew = 0
        run = start(out, *ON_WORKERS)
        while counts["worker"] + counts["driver"] < KILLS:
            if run.poll() is not None:
                run = start(out, *ON_WORKERS)
            what = kill_one(run, out, rng)
            counts[what] += 1
            now = stored(out)
            lost += len(before - set(now))
            doubled += len(now) - len(set(now))
            grew += len(set(now)) > len(before)
            before |= set(now)
            print(f"{what} killed; {len(now)} rows stored", flush=True)
        run.wait()
        code = start(out, *ON_WORKERS).wait()
        start(alone).wait()
        now = stored(out)
        lost, doubled = lost + len(before - set(now)), doubled + len(now) - len(set(now))
        mine, theirs = ({row.key.id: replace(row, env="") for row in read_rows(path)} for path in (out, alone))
        differ = sum(mine.get(key) != row for key, row in theirs.items()) + len(mine.keys() - theirs.keys())
        print(json.dumps({**counts, "rows": len(now), "kills_with_new_rows": grew, "lost": lost, "doubled": doubled,
                          "differing_from_one_process": differ, "exit_code": code}))  # fmt: skip
    return 1 if lost or doubled or differ or code else 0


if __name__ == "__main__":
    sys.exit(main())

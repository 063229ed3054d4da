"""Start ranks on this host with torch's variables and nothing else: ``start_ranks.py RANKS PORT PROGRAM ...``.

Launchers import torch and DeepSpeed themselves, one process after another, before a rank begins to. This one does
without: tests that are not about a launcher start several seconds sooner. If a rank fails, the others are ended.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

GRACE = 30.0
"""Seconds that the other ranks have to end by themselves once they are told to."""


def main(ranks: int, port: str, command: list[str]) -> int:
    """Run the command as each of the ranks; the exit code of the first that failed, or 0."""
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen([sys.executable, *command], env=environment))
    while True:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), 0)
        if failed or None not in codes:
            break
        time.sleep(0.02)
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
    return failed if failed >= 0 else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))

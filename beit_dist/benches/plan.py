"""The plan: start-up, memory and cost of a step's picks for 10⁸ samples, 10,000 shards and 1,024 ranks."""

from __future__ import annotations

import tracemalloc

from beit_dist.benches.measuring import Row, in_turn, row, seconds
from beit_dist.stream.plan import Plan


def measure(quick: bool) -> list[Row]:
    """Global batch 65,536 in 8,192 lanes; a rank asks for its 64 rows."""
    samples, shards = (10**6, 100) if quick else (10**8, 10_000)
    batch, ranks, lanes = 65_536, 1_024, 8_192
    case = f"{samples:.0e} samples, {shards} shards"
    repetitions = 2 if quick else 5

    def build() -> Plan:
        plan = Plan(shard_samples=[samples // shards] * shards, views=1, seed=0, lanes=lanes)
        plan.picks(0, batch // lanes, range(batch // ranks))
        for lane in range(lanes // ranks):  # what a rank that reads a store asks for first
            plan.window(lane, plan.window(lane, 0).end)
        return plan

    starts = [seconds(build) for _ in range(repetitions)]
    tracemalloc.start()
    plan = build()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    position = iter(range(1, 10**6))
    steps = in_turn({"ours": lambda: plan.picks(next(position), batch // lanes, range(batch // ranks))}, 200)[
        "ours"
    ]
    windows = in_turn({"ours": lambda: plan.window(3, next(position))}, 200)["ours"]
    # A lane that looks ahead over the end of an epoch holds the orders of two.
    tracemalloc.start()
    plan = build()
    plan.window(0, samples // lanes + 1)
    both = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return [
        row("plan", case, "start, first picks", starts, "s"),
        row("plan", case, "memory held", [held / 1e6], "MB"),
        row("plan", case, "memory held, two epochs", [both / 1e6], "MB"),
        row("plan", case, "memory peak", [peak / 1e6], "MB"),
        row("plan", case, "picks of a step", [1e6 * t for t in steps], "us"),
        row("plan", case, "a lane's next window", [1e6 * t for t in windows], "us"),
    ]

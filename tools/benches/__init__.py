"""One module for each benchmark of ``tools/bench.py``; each has ``measure(quick) -> list[Row]``."""

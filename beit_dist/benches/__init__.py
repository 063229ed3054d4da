"""One module for each benchmark of ``beit bench``; each has ``measure(quick) -> list[Row]``."""

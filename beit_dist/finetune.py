"""``beit finetune`` for launchers that take a file, or ``-m beit_dist.finetune``."""

from __future__ import annotations

import sys
from pathlib import Path

# `deepspeed beit_dist/finetune.py` puts beit_dist/ first on the path, where our modules would hide others of the
# same name; its parent is what lets an uninstalled checkout run.
_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

from beit_dist.commands.finetune import main  # noqa: E402
from beit_dist.errors import exit_cleanly  # noqa: E402

if __name__ == "__main__":
    exit_cleanly(main)

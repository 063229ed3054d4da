"""Programs that come as wheels, in the environment that runs the tests; it need not be activated."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def program(name: str) -> str:
    """The path of a program of this environment, else of PATH.

    Raises:
        FileNotFoundError: it is in neither.
    """
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=folders)
    if found is None:
        raise FileNotFoundError(f"{name}: not found; pip install -e '.[test]' brings it")
    return found

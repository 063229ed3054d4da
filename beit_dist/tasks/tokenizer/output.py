"""The tokenizer's file, and the picture beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit_dist.errors import UserError
from beit_dist.models.dvae import DVAE
from beit_dist.storage.durable import write_whole
from beit_dist.weights.tokenizer_files import beside, check_writable, save_tokenizer


class Output:
    """Where a training writes its result.

    Args:
        file: of the tokenizer; held-out images over their reconstructions lie beside it.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.picture = file, beside(file, ".png")

    def check(self) -> None:
        """Refuse a place that cannot be written to, while there is nothing to lose yet."""
        check_writable(self.file)

    def write(self, model: DVAE, about: Mapping[str, Any], png: bytes) -> str:
        """Write both; the tokenizer's digest.

        Raises:
            UserError: one cannot be written.
        """
        # The file first: a picture without a tokenizer beside it would be one of the images if it lies among them.
        digest = save_tokenizer(self.file, model, model.config, dict(about))
        try:
            write_whole(self.picture, png)
        except OSError as error:
            raise UserError(f"{self.picture}: cannot be written ({error.strerror})") from None
        print(f"wrote {self.file} (digest {digest[:16]}) and {self.picture}")
        return digest

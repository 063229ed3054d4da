"""What a dVAE is made of."""

from __future__ import annotations

from pydantic import Field, model_validator

from beit_dist.config.reading import Section
from beit_dist.errors import ConfigError


class DVAEConfig(Section):
    """The size of the discrete VAE. The defaults are those of DALL-E (arXiv 2102.12092)."""

    vocabulary: int = Field(8192, ge=2, le=32768)
    """Number of visual tokens. Pre-training must use the same number."""
    hidden: int = Field(256, ge=4)
    """Channels of the first group, a multiple of 4. The other three groups have 2, 4 and 8 times as many."""
    blocks_per_group: int = Field(2, ge=1)
    """Residual blocks in each of the four groups."""
    decoder_input: int = Field(128, ge=0)
    """Width of the codebook: the number of channels that the decoder makes from a token. 0 leaves the decoder out;
    such a tokenizer makes tokens but cannot draw them as images."""

    @model_validator(mode="after")
    def _check(self) -> DVAEConfig:
        if self.hidden % 4:
            raise ConfigError("model.hidden", self.hidden, "a multiple of 4 (residual paths are a quarter wide)")
        return self

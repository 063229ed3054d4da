"""What a measured tokenizer is worth: beside drawings of single colours, in a picture, and in a verdict."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from beit_dist.config.tokenizer import TokenizerConfig
from beit_dist.models.dvae import DVAE
from beit_dist.models.palette import single_colours
from beit_dist.models.verdict import Drawn, SingleColours, judge
from beit_dist.step_numbers import Baseline, KnownBaselines
from beit_dist.tasks.tokenizer.pictures import Pictures
from beit_dist.tasks.tokenizer.quality import Quality
from beit_dist.tasks.tokenizer.sheet import draw_sheet

_PALETTE_IMAGES = 128
"""Of those that are trained on, that the palette of the baselines is made from."""


class Judging:
    """Rank 0's; the images must have been read.

    Args:
        config: the recipe.
        pictures: the images.
    """

    def __init__(self, config: TokenizerConfig, pictures: Pictures) -> None:
        self._config, self._pictures = config, pictures

    @cached_property
    def colours(self) -> SingleColours:
        """The baselines of the PSNR."""
        views = self._pictures.training_views(_PALETTE_IMAGES)
        return single_colours(views, self._pictures.held_out, self._config.model.vocabulary)

    def baselines(self) -> KnownBaselines:
        """The same, as every training has them; none before the images were read."""
        if not self._pictures.were_read:
            return KnownBaselines()
        palette, mean_colour = self.colours
        return KnownBaselines(
            held_out={"psnr": [Baseline("palette", palette), Baseline("mean colour", mean_colour)]}
        )

    def picture(self, model: DVAE, quality: Quality, step: int) -> bytes:
        """A PNG of held-out images over what their tokens draw, and of the codebook."""
        images, names = self._pictures.held_out, self._pictures.held_out_names
        return draw_sheet(model, images, names, quality, Drawn(quality.psnr, self.colours), step)

    def verdict(self, quality: Quality) -> tuple[str, dict[str, Any]]:
        """For a person, and as JSON takes it."""
        drawn = Drawn(quality.psnr, self.colours)
        verdict = judge(quality.use, drawn, self._config.least_perplexity)
        text = f"{drawn}\ntokens: {quality.use}\nverdict: {verdict}"
        return text, {"baselines": self.colours._asdict(), "verdict": verdict._asdict()}

"""What a tokenizer's training says of its steps, and of what it measures."""

from __future__ import annotations

from beit_dist.engine.metrics import Metric
from beit_dist.step_numbers import Number

NUMBERS = (
    Number(
        name="loss",
        help="The loss that is minimised, in nats per pixel value.",
        metric="beit_train_loss",
        text="loss {:.4f}",
    ),
    Number(
        name="nll",
        help="First part of the loss: -ln likelihood of the pixels, in nats per pixel value.",
        metric="beit_tokenizer_nll",
    ),
    Number(
        name="kl",
        help="KL of a position's token distribution to the uniform one, in nats.",
        metric="beit_tokenizer_kl",
        text="KL {:.2f} nats",
    ),
    Number(
        name="usage_kl",
        help="KL of the batch's average token distribution to the uniform one, in nats.",
        metric="beit_tokenizer_usage_kl",
    ),
)
KNOWN = (
    Number(
        name="perplexity",
        help="Number of tokens in use, weighted by how evenly they are used, over about 50 steps.",
        metric="beit_tokenizer_perplexity",
        text="perplexity {:.0f}",
    ),
    Number(
        name="dead",
        help="Tokens that were the most likely one nowhere in about 200 steps.",
        metric="beit_tokenizer_dead_tokens",
        text="dead tokens {}",
    ),
    Number(
        name="temperature",
        help="Gumbel-softmax temperature.",
        metric="beit_tokenizer_temperature",
        text="temperature {:.3f}",
    ),
    Number(name="kl_weight", help="Weight of the KL term.", metric="beit_tokenizer_kl_weight"),
)
MEASURED = (
    Number(
        name="psnr",
        help="PSNR of reconstructions from hard tokens, in dB.",
        held_out="beit_validation_psnr_decibels",
        text="PSNR {:.2f} dB",
        better="higher",
    ),
    Number(
        name="perplexity",
        help="Number of tokens in use, weighted by how evenly they are used.",
        held_out="beit_validation_perplexity",
        text="perplexity {:.1f}",
    ),
    Number(name="used", help="Tokens that occur.", text="tokens in use {}"),
    Number(
        name="commonest_share",
        help="Share of the positions with the commonest token.",
        held_out="beit_validation_commonest_token_ratio",
        text="commonest token {:.1%}",
    ),
    Number(name="dead", help="Tokens that do not occur.", held_out="beit_validation_dead_tokens"),
)
METRICS = (Metric("beit_tokenizer_vocabulary", "gauge", "Tokens in the vocabulary."),)

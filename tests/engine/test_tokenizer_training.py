"""Training a tokenizer is reproducible, learns, and refuses at start what cannot work."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from beit_dist.config import TokenizerRecipe, validate
from beit_dist.data.crops import CropBatches, ImagePool, find_images
from beit_dist.engine import tokenizer_training
from beit_dist.engine.tokenizer_training import (
    MOST_SKIPPED,
    Quality,
    Training,
    choose_device,
    choose_precision,
    train_tokenizer,
)
from beit_dist.errors import ConfigError, DataError, TokenizerError, UserError
from beit_dist.visual_tokens.weights import load_tokenizer, tokenizer_extra

TINY = {
    "model": {"vocabulary": 16, "hidden": 8, "blocks_per_group": 1, "decoder_input": 8},
    "view_size": 32,
    "image_size": 16,
    "batch": 4,
    "steps": 6,
    "held_out": 3,
    "precision": "fp32",
}


def recipe(**changes):
    return validate(TokenizerRecipe, TINY | changes)


def picture(number, side=40):
    """Two colours meeting at a slanted edge, different for each number."""
    draw = np.random.Generator(np.random.Philox(number))
    y, x = np.mgrid[:side, :side] / side
    edge = np.cos(a := draw.uniform(0, 6.3)) * (x - 0.5) + np.sin(a) * (y - 0.5) > 0
    return np.where(edge[..., None], draw.integers(0, 256, 3), draw.integers(0, 256, 3)).astype(np.uint8)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(12):
        where = folder / "sub" if number % 2 else folder
        Image.fromarray(picture(number)).save(where / f"{number:02d}.png")
    return folder


def test_same_seed_gives_the_same_file_and_another_seed_another(tmp_path, images):
    first = train_tokenizer(str(images), tmp_path / "a.safetensors", recipe())
    train_tokenizer(str(images), tmp_path / "b.safetensors", recipe(workers=1))
    other = train_tokenizer(str(images), tmp_path / "c.safetensors", recipe(seed=1))
    one, two = load_tokenizer(tmp_path / "a.safetensors"), load_tokenizer(tmp_path / "b.safetensors")
    assert one.digest == two.digest == first.digest
    assert other.digest != first.digest


def test_file_loads_and_records_how_it_was_made(tmp_path, images):
    trained = train_tokenizer(str(images), tmp_path / "t.safetensors", recipe())
    model, about = load_tokenizer(trained.path), tokenizer_extra(trained.path)
    assert model.config.vocabulary == 16
    assert about["recipe"]["steps"] == 6
    assert about["images"] == 12
    assert about["quality"]["psnr"] == pytest.approx(trained.quality.psnr)
    assert 1 <= trained.quality.used <= 16
    assert Image.open(trained.picture).size == (3 * 32, 2 * 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "t.png", "t.safetensors"]


def test_training_lowers_the_loss(images):
    """The loss at temperature 1 and without KL, before and after."""
    training = Training(recipe(steps=60, lr=5e-3, warmup_steps=0, kl_weight=0.0), torch.device("cpu"))
    batch = torch.stack([torch.from_numpy(picture(n, 16)) for n in range(8)]).permute(0, 3, 1, 2)
    losses = [float(training.step(batch.contiguous()).loss) for _ in range(60)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2


def test_a_tar_trains_like_the_folder_it_was_made_of(tmp_path, images):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, arcname=".")
    from_tar = train_tokenizer(str(tmp_path / "images.tar"), tmp_path / "a.safetensors", recipe())
    from_folder = train_tokenizer(str(images), tmp_path / "b.safetensors", recipe())
    assert from_tar.digest == from_folder.digest


def test_images_past_the_memory_budget_are_decoded_again_with_the_same_result(tmp_path, images):
    kept = train_tokenizer(str(images), tmp_path / "a.safetensors", recipe())
    again = train_tokenizer(str(images), tmp_path / "b.safetensors", recipe(cache_gib=0))
    assert kept.digest == again.digest


def test_a_broken_image_is_left_out_and_named(tmp_path, images, capsys):
    (images / "00.png").write_bytes(b"not an image")
    trained = train_tokenizer(str(images), tmp_path / "t.safetensors", recipe())
    assert tokenizer_extra(trained.path)["images"] == 11
    assert "00.png" in capsys.readouterr().err


def test_crops_are_the_same_whatever_the_threads_and_every_image_comes_once_per_epoch(images):
    pool = ImagePool(find_images(str(images)), 32, 1 << 30, 1, 1)
    settings = {"batch": 6, "side": 40, "scale": (1.0, 1.0), "share": 1.0, "seed": 2}
    runs = []
    for workers in (1, 3):
        batches = CropBatches(pool, range(12), workers=workers, **settings)
        runs.append(np.concatenate([next(batches) for _ in range(4)]))
        batches.close()
    assert np.array_equal(*runs)
    for epoch in (runs[0][:12], runs[0][12:]):
        colours = {frozenset(map(tuple, crop[:, [2, -3]][:, :, [2, -3]].reshape(3, -1).T)) for crop in epoch}
        assert len(colours) == 12


def test_large_images_are_kept_small(tmp_path):
    Image.new("RGB", (400, 200)).save(tmp_path / "large.png")
    pool = ImagePool(find_images(str(tmp_path)), 50, 1 << 30, 1, 1)
    assert pool[0].shape == (50, 100, 3)


def test_schedules_reach_their_ends(images):
    training = Training(recipe(steps=100, warmup_steps=10, lr=1e-3, min_lr=1e-5), torch.device("cpu"))
    assert (training.temperature, training.kl_weight) == (1.0, 0.0)
    assert training.lr == pytest.approx(1e-3 / 11)
    training.step_number = 100
    assert (training.temperature, training.kl_weight) == (1 / 16, 6.6)
    assert training.lr == pytest.approx(1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_bounded(images):
    training = Training(recipe(), torch.device("cpu"))
    batch = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    training._noise = None
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_training, "gumbel_noise", lambda shape, _: torch.full(shape, torch.nan))
        for _ in range(MOST_SKIPPED - 1):
            training.step(batch)
        assert training.skipped == MOST_SKIPPED - 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())
        with pytest.raises(UserError, match="without a finite gradient"):
            training.step(batch)


def test_averaged_weights_follow_the_trained_ones(images):
    training = Training(recipe(ema=0.5), torch.device("cpu"))
    start = training.model.encoder.blocks[0].w.detach().clone()
    training.step(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    trained, averaged = (m.encoder.blocks[0].w.detach() for m in (training.model, training.averaged))
    torch.testing.assert_close(averaged, start + (1 - 0.1) * (trained - start))


def test_too_few_images_are_refused(tmp_path, images):
    with pytest.raises(DataError, match="got 12 usable images, expected at least 13"):
        train_tokenizer(str(images), tmp_path / "t.safetensors", recipe(held_out=12))


def test_no_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image found"):
        train_tokenizer(str(tmp_path / "empty"), tmp_path / "t.safetensors", recipe())
    with pytest.raises(ConfigError, match="--images"):
        train_tokenizer(str(tmp_path / "nowhere"), tmp_path / "t.safetensors", recipe())


def test_an_unwritable_output_is_refused_before_reading_images(tmp_path):
    with pytest.raises(TokenizerError, match="got a folder"):
        train_tokenizer("nowhere", tmp_path, recipe())


def test_an_absent_device_is_refused():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no GPU"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cuda", "avx2", "bf16"),
        ("cpu", "avx512_bf16 amx_bf16 amx_tile", "bf16"),
        ("cpu", "avx512_bf16", "fp32"),
        ("cpu", None, "fp32"),
    ],
)
def test_automatic_precision_is_bf16_only_where_that_is_fast(tmp_path, device, flags, expected):
    processor = tmp_path / "cpuinfo"
    if flags is not None:
        processor.write_text(f"flags\t: fpu {flags}\n")
    assert choose_precision("auto", torch.device(device), processor) == expected
    assert choose_precision("bf16", torch.device(device), processor) == "bf16"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"image_size": 20}, "image_size"),
        ({"image_size": 64}, "image_size"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale"),
        ({"temperature": [0.1, 1.0]}, "temperature"),
        ({"min_lr": 1.0}, "min_lr"),
        ({"stepz": 1}, "steps"),
    ],
)
def test_contradictory_recipes_are_refused(changes, field):
    with pytest.raises(ConfigError, match=field):
        recipe(**changes)


def test_an_interrupt_leaves_no_file(tmp_path, images, monkeypatch):
    steps = iter([False, False, True])

    def step(self, batch, original=Training.step):
        if next(steps):
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Training, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(str(images), tmp_path / "t.safetensors", recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_a_collapsed_codebook_is_recognised():
    assert Quality(20.0, 1.5, 2, 512).collapsed
    assert Quality(20.0, 9.0, 30, 512).collapsed
    assert not Quality(20.0, 90.0, 200, 512).collapsed


def test_grey_and_transparent_images_are_welcome(tmp_path):
    raw = io.BytesIO()
    Image.new("LA", (40, 40), (90, 0)).save(raw, "PNG")
    (tmp_path / "x.png").write_bytes(raw.getvalue())
    assert ImagePool(find_images(str(tmp_path)), 32, 1 << 30, 1, 1)[0].tolist()[0][0] == [255, 255, 255]

"""A recipe is refused at start with field, got, expected and way out, or it is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.config.reading import load_recipe
from beit_dist.errors import ConfigError, UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("beit_*.yaml"))


def recipe(*overrides: str) -> PretrainingConfig:
    return load_recipe(PretrainingConfig, None, ["run=r", *overrides])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(PretrainingConfig, path).model.grid == 14


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.siz=base", "Did you mean model.size?"),
        ("modle={}", "Did you mean model?"),
        ("optimizer.lr=fast", "optimizer.lr: got 'fast'"),
        ("epochs=-1", "epochs: got -1, expected greater than 0"),
        ("model.patch_size=15", "a divisor of model.image_size (224)"),
        ("model.heads=7", "a divisor of model.width (768)"),
        ("loader.lanes=7", "a divisor of global_batch (2048). The nearest divisors: 1, 2, 4, 8"),
        ("optimizer.min_lr=1", "at most optimizer.lr"),
        ("model.vocabulary=65536", "model.vocabulary: got 65536"),
        ("seed=-1", "seed: got -1"),
        ("epochs", "key=value"),
        ("run.x=1", "run.x"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(override)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        recipe("model.siz=1", "epochs=no")
    assert "model.siz" in str(caught.value)
    assert "epochs" in str(caught.value)


def test_what_there_is_to_set_is_listed_once() -> None:
    """As when a DeepSpeed file is given for the recipe."""
    with pytest.raises(UserError) as caught:
        recipe("zero_optimization={}", "bf16={}", "model.width_=1", "model.depth_=1")
    assert str(caught.value).count("global_batch, ") == 1
    assert str(caught.value).count("depth, ") == 1
    assert str(caught.value).count("expected one of the known settings") == 4


def test_only_one_form_of_warm_up_is_accepted() -> None:
    with pytest.raises(ConfigError, match=r"only one of .* for example optimizer\.warmup_epochs=null"):
        recipe("optimizer.warmup_epochs=1", "optimizer.warmup_steps=1")
    assert recipe("optimizer.warmup_epochs=1", "optimizer.warmup_epochs=null", "optimizer.warmup_steps=1")


def test_overrides_win_over_the_file_and_over_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run: a\nepochs: 3\nmodel: {size: tiny, drop_path: 0.3}\n")
    config = load_recipe(PretrainingConfig, path, ["epochs=4", "epochs=5", "model.depth=2", "optimizer.lr=1e-3"])
    assert (config.epochs, config.model.depth, config.model.width) == (5, 2, 192)
    assert config.model.drop_path == 0.3
    assert config.optimizer.lr == 1e-3  # YAML alone would read 1e-3 as text


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run: a\nepochs: 3\nepochs: 4\n")
    with pytest.raises(ConfigError, match=r"epochs.*twice.*line 3"):
        load_recipe(PretrainingConfig, path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("run: café\n".encode("latin-1"), r"text in UTF-8\. Byte 8, in line 1, is not UTF-8\. Save"),
        ("run: a\n".encode("utf-16"), "The file is in UTF-16. Save it as UTF-8"),
        ("run: a\n".encode("utf-16-be"), "holds null bytes"),
        (b"run: a\n\0", "holds null bytes"),
        (b"#" * (1 << 24) + b"#", "up to 16 MiB"),
        (b"run: 2001-99-99", "valid YAML"),
        (b"? [a]\n: 1", "a name as the key"),
        (b"run: a\n1: 2", r"1: got 1, expected a name as the key\. .* line 2"),
        (b"[" * 5000, "valid YAML"),
    ],
)
def test_a_file_that_is_no_text_or_no_recipe_is_refused_in_a_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        load_recipe(PretrainingConfig, path)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run: a\nepochs: 3\n", encoding="utf-8-sig")
    assert load_recipe(PretrainingConfig, path).run == "a"


@pytest.mark.parametrize(("content", "said"), [("a: [", "valid YAML"), ("- 1", "a YAML mapping")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_recipe(PretrainingConfig, path)
    with pytest.raises(ConfigError, match="a readable YAML file"):
        load_recipe(PretrainingConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "option",
    [
        "s3.secret=hidden",
        "s3.client_kwargs.aws_session_token=hidden",
        "https.client_kwargs.headers.Authorization=hidden",
        "https.client_kwargs.headers={Cookie: hidden}",
        "abfs.connection_string=hidden",
        "s3.s3_additional_kwargs.SSECustomerKey=hidden",
        "s3.endpoint_url=https://user:hidden@store.example",
        "s3.config_kwargs.proxies={https: 'http://user:hidden@proxy'}",
        "x.list=[{password: hidden}]",
    ],
)
def test_credentials_in_options_are_refused_and_not_repeated(option: str) -> None:
    with pytest.raises(ConfigError, match="got 'a credential'") as raised:
        recipe(f"storage.options.{option}")
    assert "hidden" not in str(raised.value)


def test_lanes_default_to_the_largest_divisor_up_to_an_eighth_of_the_batch() -> None:
    assert recipe().lanes == 256
    assert recipe("global_batch=60").lanes == 6
    assert recipe("global_batch=7").lanes == 1
    assert recipe("global_batch=64", "loader.lanes=16").lanes == 16


def test_drop_path_rises_linearly_from_the_first_block() -> None:
    rates = recipe("model.drop_path=0.22").model.drop_path_rates
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.22)
    assert rates[1] == pytest.approx(0.02)

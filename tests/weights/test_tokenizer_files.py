"""A tokenizer's file is verified before anything in it is used."""

import json
import pickle

import pytest
import safetensors.torch
import torch

from beit_dist.config.dvae import DVAEConfig
from beit_dist.errors import TokenizerError
from beit_dist.models.dvae import DVAE
from beit_dist.weights import tokenizer_files as weights
from beit_dist.weights.tokenizer_files import (
    check_writable,
    load_tokenizer,
    save_tokenizer,
    tokenizer_digest,
    tokenizer_extra,
)

TINY = DVAEConfig(vocabulary=8, hidden=4, blocks_per_group=1, decoder_input=2)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(path, DVAE(TINY, seed=1), TINY, {"psnr": 21.5})
    return path


def test_loading_gives_back_configuration_weights_and_digest(saved):
    model, original = load_tokenizer(saved), DVAE(TINY, seed=1).state_dict()
    assert model.config == TINY
    assert len(model.digest) == 64
    assert model.digest == tokenizer_digest(saved)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer_extra(saved) == {"psnr": 21.5}


def test_digest_covers_weights_and_configuration_but_not_notes(tmp_path, saved):
    digest = tokenizer_digest(saved)
    assert save_tokenizer(tmp_path / "a", DVAE(TINY, seed=1), TINY, {"note": "another"}) == digest
    assert save_tokenizer(tmp_path / "b", DVAE(TINY, seed=2), TINY) != digest


def test_equal_tokenizers_are_equal_files(tmp_path, saved):
    save_tokenizer(tmp_path / "again", DVAE(TINY, seed=1), TINY, {"psnr": 21.5})
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_a_flipped_byte_anywhere_is_found_or_harmless(tmp_path, saved):
    raw, original = saved.read_bytes(), DVAE(TINY, seed=1).state_dict()
    broken, found = tmp_path / "broken", 0
    for position in range(0, len(raw), 97):
        broken.write_bytes(raw[:position] + bytes([raw[position] ^ 0x10]) + raw[position + 1 :])
        try:
            model = load_tokenizer(broken)
        except TokenizerError:
            found += 1
            continue
        assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert found >= len(range(0, len(raw), 97)) - 2


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(TokenizerError, match="expected a whole tokenizer"):
        load_tokenizer(saved)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere\.safetensors: got no file"):
        load_tokenizer(tmp_path / "nowhere.safetensors")


def test_foreign_safetensors_are_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(TokenizerError, match="a safetensors file of something else"):
        load_tokenizer(tmp_path / "foreign")


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_a_pickle_is_refused_without_running_it(tmp_path):
    for name, dump in {"plain": pickle.dumps(Boom()), "torch": None}.items():
        path = tmp_path / name
        if dump is None:
            torch.save({"x": Boom()}, path)
        else:
            path.write_bytes(dump)
        with pytest.raises(TokenizerError, match="not safetensors"):
            load_tokenizer(path)


def rewrite(path, change):
    """The file with its metadata changed and re-encoded."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[weights.FORMAT])
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, {weights.FORMAT: json.dumps(metadata)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update(version=9), "expected version 1"),
        (lambda m, t: m.pop("digest"), "unreadable metadata"),
        (lambda m, t: m["config"].update(hidden=8), "the file was altered"),
        (lambda m, t: m["config"].update(hidden="wide"), "its configuration is wrong: hidden"),
        (lambda m, t: t["encoder.blocks.input.b"].add_(1), "the file was altered"),
        (lambda m, t: m.update(extra="{}"), "do not match their seal"),
    ],
)
def test_changed_metadata_is_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(saved)


def test_tensors_that_do_not_fit_the_configuration_are_refused(tmp_path):
    save_tokenizer(tmp_path / "t", DVAE(TINY), TINY.model_copy(update={"decoder_input": 3}))
    with pytest.raises(TokenizerError, match=r"decoder\.blocks.* of shape .* expected shape"):
        load_tokenizer(tmp_path / "t")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("beit_dist.storage.durable.os.fsync", full)
    with pytest.raises(TokenizerError, match="No space left"):
        save_tokenizer(saved, DVAE(TINY, seed=2), TINY)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_unwritable_output_is_refused_early(tmp_path):
    check_writable(tmp_path / "new" / "t.safetensors")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(TokenizerError, match="got a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="cannot be written"):
        check_writable(tmp_path / "file" / "t.safetensors")

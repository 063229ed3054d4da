"""The command writes a corpus and refuses with the way out."""

import runpy
import sys
from pathlib import Path

import pytest

TOOL = str(Path(__file__).parents[2] / "tools" / "make_corpus.py")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(TOOL, run_name="__main__")
    return end.value.code


def test_writes_images_once(tmp_path, monkeypatch, capsys):
    out = tmp_path / "corpus"
    assert run(monkeypatch, "--out", out, "--images", 2, "--size", 16) == 0
    assert len(list((out / "images").rglob("*.jpg"))) == 2
    assert run(monkeypatch, "--out", out, "--images", 2, "--size", 16) == 0
    assert "already there" in capsys.readouterr().out


def test_a_wrong_number_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--out", tmp_path, "--images", -1) == 2
    assert "error: --images: got -1, expected at least 1" in capsys.readouterr().err


def test_help_describes_the_result(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "labels/<class>" in text
    assert "examples:" in text

"""The page of runs: whole in a real browser, without a request or a script, whatever names and files hold."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.browser import Browser
from support.object_store import ObjectStore
from support.reported import SMALL, make_run, steps_of

from beit_dist.checkpoints.layout import sealed
from beit_dist.commands.report import main
from beit_dist.config.finetuning import SegmentationConfig
from beit_dist.config.labelled import SegmentationViewConfig
from beit_dist.config.model import BackboneConfig
from beit_dist.errors import ConfigError, DataError
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.preparing import Preparation
from beit_dist.inference.provenance import Provenance
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.models.classifier import ImageClassifier
from beit_dist.models.segmenter import ImageSegmenter
from beit_dist.reports.html import models
from beit_dist.reports.html.predictions import Cell
from beit_dist.storage.opening import open_place

TAG = "<script>document.title='taken'"
QUOTE = "\"><img src=x onerror=document.title='taken'>"
CLASSES = (TAG, "a&b", "c'd\"e")
ERROR = f"Traceback (most recent call last):\n  File x\nValueError: {QUOTE}\x1b[31m"


class Elements(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def with_checkpoint(run: Path) -> Path:
    """As if it had saved one; what is loaded from it, :func:`loaded` says."""
    step = run / "checkpoints" / "step-00000040.a0001"
    step.mkdir(parents=True)
    (step / "manifest.json").write_bytes(sealed({"step": 40, "saved_at": 1500.0}))
    return run


def loaded(source: str, **_: Any) -> ClassificationModel | SegmentationModel:
    """Stands for a checkpoint: a model with random weights, of the run's kind."""
    config = BackboneConfig(**SMALL)
    about = Provenance(source, "classification", "d")
    torch.manual_seed(0)
    if "segment" in source:
        segmenter = ImageSegmenter(config, 3)
        segmenter.initialise(0)
        found = SegmentationModel(
            segmenter, about, Preparation(config), CLASSES, SegmentationViewConfig(), SegmentationConfig()
        )
        return found.eval()
    classifier = ImageClassifier(config, 3)
    classifier.initialise(0)
    return ClassificationModel(classifier, about, Preparation(config), CLASSES).eval()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Runs whose names, classes, errors and images are written to break a page: two that are fine-tuned, and one
    that failed."""
    folder, random = tmp_path_factory.mktemp("hostile"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / "val" / name).mkdir(parents=True)
        for number in range(3):
            pixels = random.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "val" / name / f"{number}{QUOTE}.png")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(random.integers(0, 3, (40, 48), np.uint8)).save(folder / "labels" / f"{number}.png")
    (folder / "labels" / "classes.txt").write_text("\n".join(CLASSES))
    measured = {"step": 40, "loss": 1.0, "accuracy": 0.5, "mean_iou": 0.2, "seconds": 1.0}
    iou = {"iou": {CLASSES[0]: 0.5, CLASSES[1]: 0.1}}
    classes = make_run(
        folder / QUOTE,
        "classification",
        recipe={"data": str(folder / "val"), "validation": {"data": str(folder / "val")}},
        steps=steps_of(40),
        measured=[measured],
    )
    segments = make_run(
        folder / "segment",
        "segmentation",
        recipe={
            "data": str(folder / "images"),
            "validation": {"data": str(folder / "images")},
            "maps": {"ids": [0, 2]},
        },
        steps=steps_of(40),
        measured=[{**measured, **iou}],
    )
    failed = make_run(
        folder / TAG, recipe={"data": "/nowhere/<b>"}, steps=steps_of(3), marker=("FAILED", {"error": ERROR})
    )
    return [str(with_checkpoint(classes)), str(with_checkpoint(segments)), str(failed)]


@pytest.fixture(scope="module")
def page(hostile: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of them all."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "load", loaded)
        assert main([*hostile, "--out", str(out), "--samples", "3", "--device", "cpu"]) == 0
    return out


def test_names_labels_and_errors_are_text_and_nothing_comes_from_elsewhere(page: Path) -> None:
    found = Elements(page.read_text())
    assert {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in found.tags} == set()
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in page.read_text()
    assert found.text.count(TAG) > 5
    assert "a&b" in found.text
    assert f"ValueError: {QUOTE}\\x1b[31m" in found.text


def test_every_section_of_the_runs_is_there(page: Path) -> None:
    found = Elements(page.read_text())
    ids = {attributes["id"] for tag, attributes in found.tags if tag == "section"}
    assert {
        "verdict",
        "curves",
        "settings",
        "confusion",
        "segmentation",
        "attention",
        "data",
        "time",
        "about",
    } == ids
    assert "Most confident mistakes" in found.text
    assert "10.0%" in found.text  # the IoU of the second class
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(pictures) > 20
    assert all(str(each["src"]).startswith("data:image/webp;base64,") for each in pictures)


def test_what_is_left_out_is_named_with_its_reason(page: Path) -> None:
    text = Elements(page.read_text()).text
    assert re.search(r"Reconstructions of .*: The run has no checkpoint yet", text)
    assert re.search(r"Data of .*/nowhere/<b>", text)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_without_a_request_a_complaint_or_sideways_scrolling(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    seen = browser.open(page, width, dark=dark)
    assert seen.requests == [page.as_uri()]
    assert seen.complaints == []
    assert browser.value("document.title") == "3 runs side by side · beit report"
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("[...document.images].filter(each => !each.complete || !each.naturalWidth).length") == 0
    assert browser.poor_contrasts() == []
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 19, 23)") == dark


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_of_the_confusion_matrix_are_readable_on_any_shade(
    browser: Browser, page: Path, dark: bool
) -> None:
    browser.open(page, dark=dark)
    for right in ("right", ""):
        for share in np.linspace(0.01, 1, 34):
            cell = Cell(1, float(share))
            name = f"{right} {'strong' if cell.is_strong else ''}"
            style = f"--s:{cell.shade}"
            browser.value(
                "document.querySelectorAll('.matrix tbody td').forEach("
                f"each => {{ each.className = '{name}'; each.style = '{style}'; }})"
            )
            assert browser.poor_contrasts() == [], share


def test_a_browser_finds_what_those_need_who_do_not_see_it(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.value("document.documentElement.lang") == "en"
    assert browser.value("document.querySelectorAll('h1').length") == 1
    levels = browser.value("[...document.querySelectorAll('h1, h2, h3')].map(each => +each.tagName[1])")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert browser.value("[...document.images].filter(each => !each.alt).length") == 0
    assert browser.value("[...document.querySelectorAll('svg[role=img]')].filter(s => !s.ariaLabel).length") == 0
    assert browser.value("document.querySelectorAll('svg[role=img]').length") > 4
    assert (
        browser.value("[...document.querySelectorAll('table')].filter(t => !t.querySelector('th[scope]')).length")
        == 0
    )
    assert browser.value("document.querySelectorAll('th:not([scope])').length") == 0


@pytest.mark.parametrize("kind", ["pretraining", "tokenizer", "classification", "segmentation"])
@pytest.mark.parametrize(
    "marker", [None, ("DONE", {}), ("PREEMPTED", {"reason": "SIGTERM"}), ("FAILED", {"error": "disk full"})]
)
def test_a_run_of_any_kind_and_state_with_its_numbers_alone_has_a_page(
    tmp_path: Path, kind: str, marker: tuple[str, Mapping[str, Any]] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", kind, steps=steps_of(60), marker=marker)
    assert main([str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    text = Elements((tmp_path / "new" / "page.html").read_text()).text
    state = {"PREEMPTED": "preempted", "FAILED": "failed", "DONE": "done"}[marker[0]] if marker else "stalled"
    assert state in text
    assert {"FAILED": "disk full", "PREEMPTED": "SIGTERM"}.get(marker[0] if marker else "", "") in text
    assert "Not on this page" in text
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {tmp_path / 'new' / 'page.html'}: 1 run, 0.")
    )


@pytest.mark.parametrize("damaged", ["run.json", "config.yaml", "metrics.jsonl", "validation.jsonl", "probe.json"])
def test_a_damaged_file_does_not_stop_the_page(tmp_path: Path, damaged: str) -> None:
    run = make_run(tmp_path / "run", steps=steps_of(4), measured=[{"step": 4, "loss": 1.0}])
    (run / damaged).write_bytes(b'\xff{"layers": 3\n[]\n{"step": 9, "loss": {}}\n')
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert damaged in (tmp_path / "page.html").read_text() or damaged == "probe.json"


def test_runs_of_several_kinds_have_one_colour_each_on_the_whole_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / kind, kind, steps=steps_of(60)) for kind in ("pretraining", "tokenizer")]
    assert main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    content = (tmp_path / "page.html").read_text()
    assert re.search(r'swatch c0" aria-hidden="true"></span>pretraining', content)
    assert re.search(r'swatch c1" aria-hidden="true"></span>tokenizer', content)
    losses = {title: re.findall(r'<path class="smooth (c\d)', chart) for title, chart in charts(content).items()}
    assert losses["Loss of the pretraining"] == ["c0"]
    assert losses["Loss of the tokenizer"] == ["c1"]
    assert losses["Gradient norm"] == ["c0", "c1"]


def test_a_stop_is_told_with_the_way_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=steps_of(9), marker=("PREEMPTED", {"reason": "SIGTERM", "step": 9}))
    for runs in ([str(run)], [str(run), str(make_run(tmp_path / "other", steps=steps_of(9)))]):
        assert main([*runs, "--out", str(tmp_path / "page.html")]) == 0
        text = (tmp_path / "page.html").read_text()
        assert text.count("<p>Stopped: SIGTERM. The same command continues it.</p>") == 1


def test_data_that_runs_have_in_common_are_shown_once(hostile: list[str], tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(hostile[0], twin)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "load", loaded)
        assert main([hostile[0], str(twin), "--out", str(tmp_path / "page.html"), "--device", "cpu"]) == 0
    (section,) = re.findall(r'<section id="data".*?</section>', (tmp_path / "page.html").read_text(), re.DOTALL)
    assert section.count("<h3>") == 2
    assert section.count("held-out images of each class") == 1


def test_an_accuracy_of_tokens_and_one_of_classes_have_charts_of_their_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / kind, kind, steps=steps_of(60)) for kind in ("pretraining", "classification")]
    assert main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    titles = charts((tmp_path / "page.html").read_text())
    assert {"Accuracy of the pretraining", "Accuracy of the classification", "Learning rate"} <= titles.keys()


def charts(content: str) -> dict[str, str]:
    """By title."""
    found = re.findall(r'<figure class="chart card">\s*<figcaption>([^<]+)<(.*?)</figure>', content, re.DOTALL)
    return dict(found)


@pytest.mark.slow
def test_a_real_pretraining_is_painted_and_its_attention_is_shown(
    tmp_path: Path, make_shards: Callable[..., Any]
) -> None:
    from support.finished_runs import pretrained

    run = pretrained(tmp_path, make_shards)
    assert main([str(run), "--out", str(tmp_path / "page.html"), "--samples", "2"]) == 0
    found = Elements((tmp_path / "page.html").read_text())
    ids = {attributes["id"] for tag, attributes in found.tags if tag == "section"}
    assert {"reconstructions", "attention", "data"} <= ids
    assert "masked tokens predicted, decoded" in found.text
    assert "layer 3, the mean of 2 heads" in found.text


def test_a_run_at_a_url_has_a_page(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment(object_store.endpoint_url).items():
        monkeypatch.setenv(name, value)
    run = with_checkpoint(make_run(tmp_path / "run", steps=steps_of(60), measured=[{"step": 60, "loss": 1.0}]))
    place = open_place(f"s3://{object_store.new_bucket()}/run")
    for path in sorted(run.rglob("*")):
        if path.is_file():
            place.write(str(path.relative_to(run)), path.read_bytes())
    assert main([str(place), "--out", str(tmp_path / "page.html")]) == 0
    text = Elements((tmp_path / "page.html").read_text()).text
    assert "2.95 below frequency (4.0000)" in text or "3.00 below frequency (4.0000)" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a run folder in which training has begun"):
        main([str(tmp_path), "--out", str(tmp_path / "page.html")])


def test_the_page_goes_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=steps_of(2))
    with pytest.raises(ConfigError, match="a file, and not a folder"):
        main([str(run), "--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a file that can be written"):
        main([str(run), "--out", str(tmp_path / "file" / "page.html")])
    with pytest.raises(SystemExit):
        main([str(run)])
    assert "expected --out F.html" in capsys.readouterr().err

"""The offline job from the command line, with a real (tiny) dVAE."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from support.processes import left_of, members

from beit_dist.commands import shards
from beit_dist.config.dvae import DVAEConfig
from beit_dist.errors import ConfigError, DataError, SpaceError, TokenizerError, UserError
from beit_dist.models.dvae import DVAE
from beit_dist.shards.manifest import load_manifest
from beit_dist.shards.statistics import lines, load_statistics
from beit_dist.shards.verification import verify
from beit_dist.storage.local import LocalPlace
from beit_dist.storage.opening import open_place
from beit_dist.tokenizing import measuring
from beit_dist.weights.tokenizer_files import save_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--image-size", "32", "--patch-size", "8", "--shard-samples", "4", "--batch", "3"]


class Command:
    """``beit shards`` in this process, on a small folder of images."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.tokenizer = root / "images", root / "dvae.safetensors"
        self.digest = save_dvae(self.tokenizer, seed=0)

    def options(self, out: str, *extra: str) -> list[str]:
        return [
            *("--images", str(self.images), "--out", str(self.root / out)),
            *("--tokenizer", str(self.tokenizer), "--decoders", "0", "--device", "cpu", *SMALL, *extra),
        ]

    def __call__(self, out: str, *extra: str) -> int:
        return int(shards.main(self.options(out, *extra)))

    def plain(self, *arguments: str) -> int:
        return int(shards.main(list(arguments)))


def save_dvae(path: Path, seed: int) -> str:
    config = DVAEConfig(vocabulary=32, hidden=4, blocks_per_group=1, decoder_input=4)
    return save_tokenizer(path, DVAE(config, seed), config, {})


@pytest.fixture
def command(tmp_path: Path) -> Command:
    for number in range(10):
        path = tmp_path / "images" / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return Command(tmp_path)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in [*out.glob("v*/*"), out / "manifest.json"]}


def test_one_command_freezes_writes_and_finishes(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("out", "--views", "2") == 0
    assert "10 samples × 2 views in 6 shards" in capsys.readouterr().out
    manifest = load_manifest(str(command.root / "out"))
    assert (manifest.tokenizer, manifest.layout.vocabulary) == (command.digest, 32)
    assert not list(verify(str(command.root / "out"), manifest))


def test_several_workers_by_scheduler_write_the_same_bytes(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command("alone")
    assert command("out", "--index-only") == 0
    finish = ("--out", str(command.root / "out"), "--finish")
    monkeypatch.setenv("BEIT_WORKERS", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    for task in ("0", "2"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert command("out") == 0
    assert not (command.root / "out/manifest.json").exists()
    with pytest.raises(DataError, match=r"Of 3 workers, these make them: 1\. .*--array=1;"):
        command.plain(*finish)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")  # --array=1, as it says
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert command("out") == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "When all workers are done: beit shards " in printed
    assert printed.endswith(" ".join(finish))
    assert command.plain(*finish) == 0
    assert files(command.root / "out") == files(command.root / "alone")


def test_several_workers_without_a_list_are_refused(command: Command) -> None:
    with pytest.raises(DataError, match="--index-only"):
        command("out", "--index", "0", "--count", "2")
    assert not (command.root / "out").exists()


def test_a_complete_job_says_so_and_another_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("out")
    before = files(command.root / "out")
    capsys.readouterr()
    assert command("out") == 0
    assert capsys.readouterr().out.startswith("already complete: ")
    assert command.plain("--out", str(command.root / "out"), "--finish") == 0
    assert capsys.readouterr().out.startswith("already complete: ")
    for extra in (["--views", "2"], ["--seed", "1"], ["--augment", "center"], ["--precision", "bf16"]):
        with pytest.raises((DataError, ConfigError), match=f"{extra[0].lstrip('-')}: got"):
            command("out", *extra)
    save_dvae(command.tokenizer, seed=1)
    with pytest.raises(DataError, match="another job: tokenizer: got"):
        command("out")
    assert files(command.root / "out") == before


def test_a_damaged_data_set_is_repaired_by_the_same_command(command: Command) -> None:
    command("out")
    before = files(command.root / "out")
    (command.root / "out/v00/shard-000001.tar").unlink()
    assert command("out") == 0
    assert files(command.root / "out") == before


def test_no_finish_leaves_the_manifest_out(command: Command) -> None:
    assert command("out", "--no-finish") == 0
    assert not (command.root / "out/manifest.json").exists()
    assert command("out", "--finish") == 0
    assert (command.root / "out/manifest.json").exists()


def test_finish_refuses_flags_that_contradict_the_job(command: Command) -> None:
    command("out", "--no-finish")
    with pytest.raises(DataError, match="views: got 3, expected 1"):
        command("out", "--finish", "--views", "3")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_job_records_precision_device_and_versions(command: Command, precision: str) -> None:
    command("out", "--precision", precision)
    job = json.loads((command.root / "out/job.json").read_text())
    assert (job["precision"], job["device"]) == (precision, "cpu")
    assert (job["torch"], job["numpy"]) == (torch.__version__, np.__version__)
    assert job["pillow"].partition(" with pillow-heif ")[0] == PIL.__version__


def test_other_versions_are_refused_in_a_job_and_do_not_matter_to_a_complete_one(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command("out", "--no-finish")
    monkeypatch.setattr(PIL, "__version__", "9.9")
    with pytest.raises(DataError, match=r"pillow: got '9\.9.*', expected .*one environment"):
        command("out")
    command.plain("--out", str(command.root / "out"), "--finish")
    capsys.readouterr()
    assert command("out") == 0
    assert capsys.readouterr().out.startswith("already complete: ")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (["--tokenizer", "nowhere.safetensors"], TokenizerError, "no file"),
        (["--patch-size", "7"], ConfigError, "patch_size: got 7"),
        (["--views", "0"], ConfigError, "--views"),
        (["--device", "abacus"], ConfigError, "--device"),
        (["--device", "meta"], ConfigError, "--device"),
        (["--decoders", "-1"], ConfigError, "--decoders"),
        (["--max-rejected", "some"], ConfigError, "--max-rejected"),
        (["--index", "2"], ConfigError, "--count"),
        (["--images", "nowhere"], ConfigError, "--images"),
        (["--out", "s3://key:secret@bucket/x"], ConfigError, "without user, password"),
        (["--storage", "options.s3.secret=x"], ConfigError, "options.s3.secret: got 'a credential'"),
        (["--storage", "retry_seconds=x", "--storage", "connections=2"], ConfigError, "retry_seconds"),
        (["--metrics-textfile", "nowhere/x.prom"], ConfigError, "--metrics-textfile"),
        (["--metrics-port", "70000"], ConfigError, "--metrics-port"),
        (["--held-out", "some"], ConfigError, "--held-out: got 'some', expected a number of images"),
        (["--measure"], ConfigError, "--measure: got True, expected --dry-run beside it"),
        (["--no-measure"], ConfigError, "--measure: got False, expected --dry-run beside it"),
        (["--dry-run", "--finish"], ConfigError, "--dry-run: .*Leave --finish out"),
        (["--dry-run", "--patch-size", "7"], ConfigError, "patch_size: got 7"),
        (["--dry-run", "--held-out", "100%"], ConfigError, "--held-out: .*of which there are 10"),
        (["--dry-run", "--images", "nowhere"], ConfigError, "--images"),
    ],
)
def test_wrong_input_is_refused_before_any_work(
    command: Command, change: list[str], kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        command("out", *change)
    assert caught.value.exit_code == 2
    assert not (command.root / "out").exists()


def test_needed_flags_are_asked_for(command: Command) -> None:
    with pytest.raises(ConfigError, match="--images"):
        command.plain("--out", str(command.root / "out"))
    with pytest.raises(ConfigError, match="--tokenizer"):
        command.plain("--out", str(command.root / "out"), "--images", str(command.images))


def test_images_tokenizer_and_shards_may_all_be_at_urls(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (command.images / "class-0/0.png").write_bytes(b"no image")
    command("local", "--max-rejected", "1")
    place = open_place(f"memory://{uuid.uuid4()}/place")
    for path in [*command.images.rglob("*.png"), command.tokenizer]:
        place.write(path.relative_to(command.root).as_posix(), path.read_bytes())
    where = ("--images", f"{place}/images", "--out", f"{place}/shards", "--tokenizer", f"{place}/dvae.safetensors")
    options = [*where, "--decoders", "0", "--device", "cpu", *SMALL]
    assert command.plain(*options, "--index-only") == 0
    for index in "01":
        assert command.plain(*options, "--index", index, "--count", "2", "--max-rejected", "1") == 0
    assert "rejected, not an image: 1\n  class-0/0.png: not an image that Pillow reads" in capsys.readouterr().out
    assert command.plain(*where[2:4], "--finish", "--max-rejected", "1") == 0
    out = capsys.readouterr().out
    assert "9 samples × 1 views in 3 shards" in out
    assert "rejected, not an image: 1\n" in out
    local = command.root / "local"
    for name in [*files(local), "rejected.jsonl"]:
        assert (place / "shards").read(name) == (local / name).read_bytes(), name
    assert command.plain(*options, "--max-rejected", "1") == 0
    assert capsys.readouterr().out.startswith("already complete: ")
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SpaceError, match="a copy of the tokenizer"):
        command.plain(*options)
    place.remove("dvae.safetensors")
    with pytest.raises(TokenizerError, match=r"dvae\.safetensors: got no file"):
        command.plain(*options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_job_says_what_it_reads_and_writes_and_what_is_next(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("out", "--views", "2", "--held-out", "15%") == 0
    said, out = capsys.readouterr().out.splitlines(), command.root / "out"
    assert said[:4] == [
        f"images     10 in {command.images}, 2 of them held out",
        f"writes     {out}: 8 images × 2 views in 4 shards, 0.1 MB",
        f"held out   {out}/held-out: 2 images × 1 view in 1 shard, 0.0 MB",
        f"tokenizer  {command.tokenizer}, 32 tokens, on cpu in fp32",
    ]
    manifest, held_out = load_manifest(out), load_manifest(out / "held-out")
    statistics, measured = load_statistics(out, manifest), load_statistics(out / "held-out", held_out)
    assert statistics is not None
    assert measured is not None
    assert said[4:6] == [
        f"{out}: 8 samples × 2 views in 4 shards (0.1 MB), 0 images rejected, digest {manifest.digest}",
        f"{out}/held-out: 2 held-out samples, on which runs are measured, 0 images rejected, "
        f"digest {held_out.digest}",
    ]
    assert said[6:9] == lines(statistics)
    assert said[9:] == [
        f"baselines on the held-out images: loss {measured.cross_entropy(statistics):.2f} (frequency); accuracy "
        f"{measured.share_of(statistics.commonest_token):.2%} (commonest token)",
        f"next: beit train --config small_data --data {out} --run runs/first model.image_size=32 "
        "model.vocabulary=32",
    ]


def test_workers_share_the_split_that_was_frozen(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command("alone", "--held-out", "3")
    assert command("out", "--held-out", "3", "--index-only") == 0
    assert "10 images with labels are frozen, 3 of them held out" in capsys.readouterr().out
    for index, split in (("0", ()), ("1", ("--held-out", "30%"))):
        assert command("out", "--index", index, "--count", "2", *split) == 0
    with pytest.raises(ConfigError, match="--held-out: got '4', expected 3 of 10 images"):
        command("out", "--index", "0", "--count", "2", "--held-out", "4")
    assert command.plain("--out", str(command.root / "out"), "--finish") == 0
    for part in (".", "held-out"):
        assert files(command.root / "out" / part) == files(command.root / "alone" / part)


def test_a_worker_counts_the_rejected_images_of_both_parts_together(command: Command) -> None:
    command("out", "--index-only", "--held-out", "5")
    entries = (command.root / "out/sources.jsonl").read_text().splitlines()
    for line in (entries[1], entries[-1]):  # one to train on, one held out
        path = command.images / json.loads(line)["name"]
        path.write_bytes(b"?" * path.stat().st_size)
    with pytest.raises(DataError, match="2 images rejected, more than the 1 that"):
        command("out", "--no-finish", "--max-rejected", "1")
    assert command("out", "--no-finish", "--max-rejected", "2") == 0


def test_commits_without_counts_are_told_with_the_way_out(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("out", "--no-finish")
    for path in (command.root / "out/commits").iterdir():
        fields = json.loads(path.read_text())
        del fields["tally"]
        path.write_text(json.dumps(fields))
    command.plain("--out", str(command.root / "out"), "--finish")
    assert (
        f"so runs show no baselines. To count them: beit inspect {command.root / 'out'}" in capsys.readouterr().out
    )


def test_a_dry_run_tells_all_and_writes_nothing(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    (command.images / "notes.txt").write_text("no image")
    (command.images / "class-0/0.png").rename(command.images / "class-0/0.jpg")
    before, out = tree(command.root), command.root / "out"
    assert command("out", "--views", "2", "--held-out", "3", "--dry-run", "--no-measure") == 0
    said = capsys.readouterr().out.splitlines()
    assert tree(command.root) == before
    assert not out.exists()
    assert said[0] == f"images     10 in {command.images}, 3 of them held out"
    assert said[1] == f"writes     {out}: 7 images × 2 views in 4 shards, 0.1 MB"
    assert said[2].startswith(f"held out   {out}/held-out: 3 images × 1 view in 1 shard")
    assert said[4] == "kinds      9 .png, 1 .jpg"
    assert said[5] == "           1 .txt left out"
    assert said[6].startswith("space      0.1 MB needed, ")
    assert said[7] == "time       unknown; without --no-measure it is estimated from a few images"
    assert command("out", "--views", "2", "--held-out", "3") == 0
    written = sum(len(content) for name, content in tree(out).items() if name.endswith(".tar"))
    assert f"space      {written / 1e6:,.1f} MB needed, " in "\n".join(said)


def test_a_dry_run_of_a_job_that_has_begun_or_is_complete(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("out", "--index-only", "--held-out", "2")
    command("out", "--index", "0", "--count", "2")
    capsys.readouterr()
    before = tree(command.root)
    assert command("out", "--dry-run") == 0
    assert f"list       {command.root}/out/sources.jsonl, frozen earlier; 6 of its images are done" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="--held-out: got '5', expected 2 of 10"):
        command("out", "--dry-run", "--held-out", "5")
    assert tree(command.root) == before
    command("out")
    capsys.readouterr()
    assert command("out", "--dry-run") == 0
    assert capsys.readouterr().out == f"{command.root}/out: complete, so there is nothing left to do\n"


def test_a_dry_run_measures_each_stage_on_a_few_images(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.1)
    (command.images / "class-1/1.png").write_bytes(b"?")
    before = tree(command.root)
    assert command("out", "--dry-run", "--index", "1", "--count", "3") == 0
    said = capsys.readouterr().out.splitlines()[-6:]
    for line, name in zip(said, ("decode", "encode", "write"), strict=False):
        assert re.fullmatch(rf"{name} +[\d.,]+ ms an image, 1 process: [\d,]+ images/s", line), line
    assert re.fullmatch(
        r"cores +[\d.,]+ ms an image, all stages together, on \d+ cores?: [\d,]+ images/s", said[3]
    )
    assert re.match(r"limit +(decode|encode|write|cores): [\d,]+ images/s to expect\. ", said[4]), said[4]
    assert re.fullmatch(
        r"time +about \d+ seconds for this worker's share of 3 to write 0\.0 MB; "
        r"10 images looked at, 1 of which cannot be used",
        said[5],
    ), said[5]
    for path in command.images.rglob("*.png"):
        path.write_bytes(b"?")
    assert command("out", "--dry-run", "--measure") == 0
    assert "time       unknown: none of 10 images can be used (class-0/0.png: " in capsys.readouterr().out
    assert tree(command.root).keys() == before.keys()


def test_what_is_written_to_measure_goes_to_the_output_folder_and_is_removed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.1)
    (command.root / "out").mkdir()
    seen, honest = [], LocalPlace.remove

    def noted(place: LocalPlace, name: str) -> None:
        seen.append((place.path, (place.path / name).stat().st_size))
        honest(place, name)

    monkeypatch.setattr(LocalPlace, "remove", noted)
    assert command("out", "--dry-run", "--views", "2") == 0
    assert [folder for folder, _ in seen] == 2 * [command.root / "out"]
    assert min(size for _, size in seen) > 10_000
    assert not list((command.root / "out").iterdir())


def test_several_encoders_share_the_images_and_the_cores(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.1)
    monkeypatch.setattr(measuring.os, "sched_getaffinity", lambda _: set(range(8)))
    assert command("out", "--dry-run", "--encoders", "2", "--decoders", "6") == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"(?:encode|write) .*, 2 processes: ", said)) == 2
    assert re.search(r"cores .* on 8 cores: ", said)


def test_a_dry_run_finds_a_disk_that_is_too_small(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SpaceError, match=r"got 0\.0 MB of free space, expected 0\.1 MB"):
        command("out", "--dry-run")
    assert "space      0.1 MB needed, 0.0 MB free" in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_killed_by_sigkill_is_run_again_and_leaves_no_process(command: Command) -> None:
    command("whole")
    tool = [sys.executable, str(REPOSITORY / "tools" / "shard_tokens.py")]
    options = command.options("out", "--decoders", "1")
    process = subprocess.Popen([*tool, *options], start_new_session=True)
    first = command.root / "out/commits/shard-000000.json"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.exists()
    assert not left_of(members(process.pid), seconds=120), "the decoding processes outlived their parent"
    assert subprocess.run([*tool, *options], check=False, capture_output=True).returncode == 0
    assert files(command.root / "out") == files(command.root / "whole")


def test_a_folder_that_cannot_be_written_is_a_user_error(command: Command) -> None:
    (command.root / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file.*: (Not a directory|File exists)"):
        command("file")


def test_a_full_disk_is_a_user_error(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SpaceError, match=r"No space left.*Make room"):
        command("out")


def test_user_errors_end_without_a_traceback(command: Command) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "shard_tokens.py")]
    done = subprocess.run(
        [*tool, "--images", "nowhere", "--out", str(command.root / "x"), "--index-only"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --images: got 'nowhere'")
    assert "Traceback" not in done.stderr

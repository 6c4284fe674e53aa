"""Whatever is done to a source between runs of precompute, wherever these are killed: the folder ends as a fresh one.

And what a run finds of the source in the folder it does not encode again.
"""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import raw_sets
import tiny
from PIL import Image

from dreamlite_jax import json_files, precompute
from dreamlite_jax.data import encoding, latents
from dreamlite_jax.text import load

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dreamlite_jax.precompute", "jax"])
SHAPES = ((16, 16), (48, 16), (16, 48))
EDITS = ("words", "picture", "turn", "order", "add", "remove", "touch", "break", "again", "tear")


class Source:
    """A folder of generations and edits, and a hand that changes it at random."""

    def __init__(self, root: Path, seed: int, count: int):
        self.root, self.dice, self.made = root, random.Random(seed), 0
        root.mkdir()
        self.rows = [self._row() for _ in range(count)]
        self.write()

    def _picture(self, size: tuple[int, int]) -> str:
        self.made += 1
        return self._draw(f"{self.made:05d}.png", size)

    def _draw(self, name: str, size: tuple[int, int]) -> str:
        pixels = np.random.default_rng(self.dice.randrange(2**32)).integers(0, 255, (*size[::-1], 3), np.uint8)
        (self.root / name).write_bytes(raw_sets.encoded(Image.fromarray(pixels)))
        return name

    def _words(self) -> str:
        return " ".join(self.dice.choice(("red", "blue", "car", "cat", "on", "of")) for _ in range(4)) + f" {self.made}"

    def _row(self) -> dict[str, str]:
        size = self.dice.choice(SHAPES)
        if self.dice.random() < 0.6:
            return {"image": self._picture(size), "caption": self._words()}
        row = {"source": self._picture(size), "target": self._picture(size), "instruction": self._words()}
        return row | ({"mask": self._picture(size)} if self.dice.random() < 0.5 else {})

    def edit(self) -> None:
        """One random change."""
        row = self.dice.choice(self.rows)
        pictures = [value for name, value in row.items() if name in ("image", "source", "target", "mask")]
        path = self.root / self.dice.choice(pictures)
        match self.dice.choice(
            ("words", "picture", "turn", "order", "add", "remove", "touch", "break", "again", "tear")
        ):
            case "words":
                row["caption" if "image" in row else "instruction"] = self._words()
            case "picture":
                self._draw(path.name, self._size(path))
            case "turn":
                for name in pictures:
                    self._draw(name, self._size(path)[::-1])
            case "order":
                place = self.dice.randrange(len(self.rows))
                self.rows = self.rows[place:] + self.rows[:place]
            case "add":
                self.rows.insert(self.dice.randrange(len(self.rows) + 1), self._row())
            case "remove":
                self.rows.remove(row)
            case "touch":
                path.touch()
            case "break":
                row["caption" if "image" in row else "instruction"] = self.dice.choice((None, "", "\ud83d", 7))
            case "again":
                self.rows.append(dict(row))
            case "tear":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self.write()

    def _size(self, path: Path) -> tuple[int, int]:
        with Image.open(path) as opened:
            return opened.size

    def write(self) -> None:
        raw_sets.write_rows(self.root, self.rows)


def run(raw: Path, output: Path, vae: Path, log: Path, hosts: tuple[int, int] = (0, 1), mortal: int = 0) -> None:
    """Precompute in this process; the contents that it decodes to encode go to the log.

    Args:
      mortal: number of the file operation at which the process kills itself; 0 is none.
    """
    load.load_encoder = lambda *args, **options: tiny.WordEncoder()
    decode = precompute.Run._load

    def logged(self, entry):
        item = decode(self, entry)
        if not isinstance(item, precompute.BadRecord):
            with log.open("a") as file:
                file.write(entry.content + "\n")
        return item

    precompute.Run._load = logged
    if mortal:
        fragile = Fragile(mortal)
        for place, name in ((os, "replace"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "rmdir")):
            setattr(place, name, fragile(getattr(place, name)))
        for place in (json_files, precompute):
            place.write_json = fragile(place.write_json)
        encoding.Encoder.latents = fragile(encoding.Encoder.latents)
        latents.pack = fragile(latents.pack)
    settings = {
        "source.kind": "folder", "source.path": raw, "source.name": "''", "vae": vae, "buckets.size": 32,
        "buckets.multiple": 16, "buckets.max_ratio": 3, "max_bad_fraction": 1.0, "batch_size": 4, "shard_size": 8,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    flags += ["--host", str(hosts[0]), "--hosts", str(hosts[1])]
    try:
        assert precompute.main(["--config", "configs/precompute.py", "--output", str(output), *flags]) == 0
    finally:
        precompute.Run._load = decode


class Fragile:
    """Functions after or before one of whose calls the process is killed."""

    def __init__(self, last: int):
        self.left = last

    def __call__(self, function):
        def counting(*args, **options):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return counting


def in_process(*args) -> int:
    child = PROCESSES.Process(target=run, args=args)
    child.start()
    child.join(600)
    return child.exitcode


def known(output: Path) -> set[str]:
    """Contents that a folder holds, by its own account."""
    found = set()
    for path in (output / "made_from").glob("latents-*.json"):
        if (output / f"{path.stem}.array_record").is_file():
            found |= {content for _, content, _ in json.loads(path.read_text())["records"]}
    return found


def whole(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "bad_records"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def encoded(log: Path) -> list[str]:
    found = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


@pytest.mark.slow
def test_300_edits_between_runs_that_are_killed_at_random_end_in_what_a_fresh_run_makes(tmp_path):
    """Prints its figures: run it with -s."""
    vae, log, output = tiny.write_vae(tmp_path / "vae.safetensors"), tmp_path / "log", tmp_path / "latents"
    source = Source(tmp_path / "raw", seed=1, count=60)
    assert in_process(source.root, output, vae, log) == 0
    first = len(encoded(log))
    dice, figures, edits = random.Random(2), {"runs": 0, "killed": 0, "encoded": 0, "kept": 0}, 0
    while edits < 300:
        for _ in range(number := min(dice.randint(1, 20), 300 - edits)):
            source.edit()
        edits += number
        before, mortal = known(output), dice.randint(1, 60)
        hosts = (dice.randrange(2), 2) if dice.random() < 0.3 else (0, 1)
        code = in_process(source.root, output, vae, log, hosts, mortal)
        assert code in (0, -signal.SIGKILL)
        again = encoded(log)
        assert not before & set(again)  # what is there is not encoded again
        whole_now = (output / "info.json").is_file()
        assert (
            code == 0
            or not whole_now
            or set(json.loads((output / "info.json").read_text())["files"]) <= {path.name for path in output.iterdir()}
        )
        figures["runs"] += 1
        figures["killed"] += code != 0
        figures["encoded"] += len(again)
    before = known(output)
    assert in_process(source.root, output, vae, log) == 0
    last = encoded(log)
    assert not before & set(last)
    assert in_process(source.root, tmp_path / "fresh", vae, log) == 0
    fresh = encoded(log)
    assert set(fresh) - before == set(last)
    figures |= {"first": first, "last": len(last), "fresh": len(fresh)}
    print(figures)
    assert whole(output) == whole(tmp_path / "fresh")


@pytest.mark.parametrize("seed", [0, 1])
def test_edits_between_runs_that_break_off_end_in_what_a_fresh_run_makes(tmp_path, monkeypatch, seed):
    """As above in one process, which goes on after the exception that stands for a kill."""
    monkeypatch.setattr(load, "load_encoder", load.load_encoder)  # to be put back
    vae, log, output = tiny.write_vae(tmp_path / "vae.safetensors"), tmp_path / "log", tmp_path / "latents"
    source, dice = Source(tmp_path / "raw", seed, count=20), random.Random(seed)
    pack, killed = latents.pack, 0
    for _ in range(5):
        for _ in range(dice.randint(1, 8)):
            source.edit()
        before, left = known(output), [dice.randint(1, 12)]

        def breaking(example, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return pack(example)

        monkeypatch.setattr(latents, "pack", breaking)
        try:
            run(source.root, output, vae, log)
        except KeyboardInterrupt:
            killed += 1
        monkeypatch.setattr(latents, "pack", pack)
        assert not before & set(encoded(log))
    assert killed
    before = known(output)
    run(source.root, output, vae, log)
    last = encoded(log)
    run(source.root, tmp_path / "fresh", vae, log)
    assert set(encoded(log)) - before == set(last)
    assert whole(output) == whole(tmp_path / "fresh")

"""Sizes of all pictures of a source, from their headers: what buckets are planned with. Kept beside the data.

The file `.dreamlite_index/KEY.npz` in the source's folder holds the size of every picture that could be read, under
what tells its file from others without reading it (`Stamp`): a picture that was replaced, turned or that was missing
before is looked at again. Where the folder cannot be written the sizes are read anew in every run.
"""

import hashlib
import json
import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dreamlite_jax.config import to_dict
from dreamlite_jax.data import reading, transforms
from dreamlite_jax.data.buckets import Size
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.fit import fit
from dreamlite_jax.data.records import BadRecord, Stamp
from dreamlite_jax.data.sources import Source

FOLDER = ".dreamlite_index"
SAMPLE = 1000  # pictures looked at where only a summary is wanted


def bucket_table(found: np.ndarray, config: SourceConfig, sizes: list[Size]) -> np.ndarray:
    """(n,) bucket of each record with pictures of these (n, 2) sizes.

    One that cannot be used has the bucket of the record that will stand in for it.
    """
    usable = (found > 0).all(1)
    table = np.zeros(len(found), np.int32)
    fitted = fit(sizes, found[usable], config)
    table[usable] = fitted.bucket
    usable[np.flatnonzero(usable)[fitted.refused]] = False
    for index in np.flatnonzero(~usable).tolist():
        order = reading.substitutes(index, 0, len(found), None)
        table[index] = next((table[other] for other in order if usable[other]), 0)
    return table


def sampled_sizes(source: Source, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `SAMPLE` indices spread over a source, and the (n, 2) sizes of their pictures, 0 where unreadable."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return chosen, np.asarray(list(pool.map(lambda i: _size(source, i), chosen.tolist())), np.int32)


def picture_sizes(source: Source, config: SourceConfig, threads: int) -> np.ndarray:
    """(n, 2) width and height of each record's target; 0 where it cannot be read."""
    path = Path(config.path) / FOLDER / f"{_key(config)}.npz"
    known = _remembered(path)
    files = _digest([Stamp.of(file) for file in source.files])
    sizes, keys = np.zeros((len(source), 2), np.int32), [b""] * len(source)

    def look(index: int) -> None:
        try:
            stamps = source.stamps(index)
            key = _digest(stamps[0]) if stamps else _digest([files.hex(), index])
            sizes[index] = known[key] if key in known else transforms.picture_size(source[index].target)
            keys[index] = key
        except BadRecord:  # and it is looked at again next time
            pass

    started = told = time.monotonic()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for done, _ in enumerate(pool.map(look, range(len(source))), 1):
            if time.monotonic() - told > 5:
                told = time.monotonic()
                rate = done / (told - started)
                print(f"sizes of {config.path}: {done}/{len(source)}  {rate:.0f}/s", file=sys.stderr, flush=True)
    if {key for key in keys if key} != known.keys():
        _remember(path, keys, sizes)
    return sizes


def source_digest(source: Source) -> str:
    """What tells a raw source from another, without reading its pictures; the same for a copy of it elsewhere.

    The words are in it, and name and bytes of every file.
    """
    digest = hashlib.sha256()
    for path in source.files:
        words = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".jsonl" else ""
        digest.update(json.dumps([path.name, path.stat().st_size, words]).encode())
    digest.update(str(len(source)).encode())
    for index in range(len(source)):
        try:
            stamps = [(stamp.name, stamp.size) for stamp in source.stamps(index)]
        except BadRecord:
            stamps = None
        if stamps != []:
            digest.update(json.dumps([index, stamps]).encode())
    return digest.hexdigest()


def _remembered(path: Path) -> dict[bytes, Size]:
    if not path.is_file():
        return {}
    try:
        with np.load(path) as found:
            keys, sizes = found["keys"], found["sizes"]
        if keys.dtype != np.uint8 or keys.shape != (len(sizes), 16) or sizes.shape[1:] != (2,) or (sizes <= 0).any():
            raise ValueError("not an index of sizes")
    except Exception as error:  # a damaged file raises nearly anything
        print(f"{path} is damaged ({type(error).__name__}): the sizes are read again", file=sys.stderr, flush=True)
        return {}
    return {key.tobytes(): (int(width), int(height)) for key, (width, height) in zip(keys, sizes, strict=True)}


def _remember(path: Path, keys: list[bytes], sizes: np.ndarray) -> None:
    known = {key: index for index, key in enumerate(keys) if key}
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several hosts may get here at the same moment
    try:
        path.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            joined = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
            np.savez(file, keys=joined, sizes=sizes[list(known.values())])
        os.replace(temporary, path)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): every run reads the sizes anew", file=sys.stderr)


def _size(source: Source, index: int) -> Size:
    try:
        return transforms.picture_size(source[index].target)
    except BadRecord:
        return 0, 0


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()[:16]


def _key(config: SourceConfig) -> str:
    """Changes with what is read from a folder."""
    return _digest([config.form, config.name, config.split, to_dict(config.fields)]).hex()

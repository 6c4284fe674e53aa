"""Sizes of all pictures of a source, from their headers: what buckets are planned with. Kept beside the data.

The file `.dreamlite_index/KEY.npy` in the source's folder is made once, and again when the source's files change. Where
the folder cannot be written the sizes are read anew in every run.
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
from dreamlite_jax.data.buckets import Size, nearest_bucket
from dreamlite_jax.data.sources import BadRecord, Source
from dreamlite_jax.training.config import SourceConfig

FOLDER = ".dreamlite_index"


def bucket_table(source: Source, config: SourceConfig, sizes: list[Size], threads: int) -> np.ndarray:
    """(n,) bucket of each record. One that cannot be read has the bucket of the record that will stand in for it."""
    found = picture_sizes(source, config, threads)
    readable = (found > 0).all(1)
    table = np.zeros(len(found), np.int32)
    table[readable] = nearest_bucket(sizes, found[readable])
    for index in np.flatnonzero(~readable).tolist():
        order = reading.substitutes(index, 0, len(found), None)
        table[index] = next((table[other] for other in order if readable[other]), 0)
    return table


def picture_sizes(source: Source, config: SourceConfig, threads: int) -> np.ndarray:
    """(n, 2) width and height of each record's target; 0 where it cannot be read."""
    path = Path(config.path) / FOLDER / f"{_key(source, config)}.npy"
    if path.is_file():
        found = np.load(path)
        if found.shape == (len(source), 2):
            return found
    sizes, started, told = np.zeros((len(source), 2), np.int32), time.monotonic(), time.monotonic()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for index, size in enumerate(pool.map(lambda i: _size(source, i), range(len(source)))):
            sizes[index] = size
            if time.monotonic() - told > 5:
                told = time.monotonic()
                rate = (index + 1) / (told - started)
                print(f"sizes of {config.path}: {index + 1}/{len(source)}  {rate:.0f}/s", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several hosts may get here at the same moment
        with temporary.open("wb") as file:
            np.save(file, sizes)
        os.replace(temporary, path)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): every run reads the sizes anew", file=sys.stderr)
    return sizes


def _size(source: Source, index: int) -> Size:
    try:
        return transforms.picture_size(source[index].target)
    except BadRecord:
        return 0, 0


def _key(source: Source, config: SourceConfig) -> str:
    """Changes with the files that the sizes come from, and with what is read from them."""
    stats = [(path.name, stat.st_size, stat.st_mtime_ns) for path in source.files for stat in [path.stat()]]
    about = to_dict(config) | {"path": "", "weight": 1.0, "changed_levels": 0}
    return hashlib.sha256(json.dumps([about, len(source), stats]).encode()).hexdigest()[:24]

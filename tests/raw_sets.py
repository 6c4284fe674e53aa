"""Small raw sources of every kind, whose pictures say which record they are."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module
from PIL import Image


def colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each record."""
    return number % 256, number // 256, 77


def number(picture: np.ndarray) -> int:
    """The record that a picture, (H, W, 3) in [-1, 1], was made for."""
    red, green, _ = np.rint((picture[picture.shape[0] // 2, picture.shape[1] // 2] + 1) * 127.5).astype(int)
    return int(red + 256 * green)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def plain(record: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture of one colour, as a file."""
    return encoded(Image.new("RGB", size, colour(record)))


def write_folder(root: Path, count: int, sizes: Sequence[tuple[int, int]] = ((16, 16),), first: int = 0) -> Path:
    """`count` captioned pictures of these sizes in turn, and their jsonl."""
    root.mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"{i:05d}.png"
        (root / name).write_bytes(plain(first + i, sizes[i % len(sizes)]))
        rows.append({"image": name, "caption": f"number {first + i}"})
    write_rows(root, rows)
    return root


def write_rows(root: Path, rows: Sequence[dict[str, Any]]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_shards(root: Path, rows: Sequence[dict[str, Any] | bytes], shards: int = 2) -> list[Path]:
    """ArrayRecord files of msgpack maps; bytes are written as they are."""
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        paths.append(root / f"set-{shard:05d}-of-{shards:05d}.array_record")
        writer = array_record_module.ArrayRecordWriter(str(paths[-1]), "group_size:1")
        for row in rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]:
            writer.write(row if isinstance(row, bytes) else msgpack.packb(row))
        writer.close()
    return paths

"""Latents and text states of one source, for training: sprites by name, or pictures of your own.

    python -m dreamlite_jax.precompute --config configs/precompute.py:t2i_64 --output runs/quickstart/latents/t2i
    python -m dreamlite_jax.precompute --config configs/precompute.py:edit_64 --output DIR --config.source.split=heldout

    # A folder with metadata.jsonl: {"image", "caption"} or {"source", "instruction", "target"[, "mask"]} a line.
    python -m dreamlite_jax.precompute --config configs/precompute.py:folder,photos --output DIR --config.vae=VAE
    # Shards photos/train*.array_record of msgpack maps with the same fields, pictures as the bytes of their files.
    python -m dreamlite_jax.precompute --config configs/precompute.py:array_record,photos,train --output DIR …
    # A prepared data set of tensorflow-datasets (file_format="array_record"), its fields named.
    python -m dreamlite_jax.precompute --config configs/precompute.py:tfds,~/tensorflow_datasets,coco_captions \
      --config.source.fields.caption=captions.text --output DIR …

On several hosts each runs it with --host I --hosts N and the same --output on shared storage. Run again it goes on. The
size is printed before anything is written; records that cannot be used are named in DIR/bad_records.

Pictures of your own are cut to buckets of about 256 px squared, up to 2 : 1 (`config.buckets`, our choice), which
batches of training keep apart. The autoencoder shipped here is one for 64 px sprites: photographs need another, by
--config.vae.
Two CPU cores: about 300 records a second of t2i_64, 130 of edit_64; chips: unmeasured.
"""

from pathlib import Path

from ml_collections import ConfigDict

KINDS = ("folder", "array_record", "tfds")


def get_config(argument: str = "t2i_64") -> ConfigDict:
    """`argument` is a set of sprites (t2i_64, edit_64, …), or KIND,PATH or KIND,PATH,NAME (see SourceConfig)."""
    c = ConfigDict()
    kind, _, place = argument.partition(",")
    if not place:
        c.source = ConfigDict({"path": "runs/quickstart/data", "name": argument, "split": "train"})
        return c
    if kind not in KINDS:
        raise KeyError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    path, _, name = place.partition(",")
    c.source = ConfigDict({"kind": kind, "path": str(Path(path).expanduser()), "name": name})
    c.buckets = ConfigDict({"size": 256, "multiple": 32, "max_ratio": 2.0})
    return c

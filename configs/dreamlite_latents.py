"""Latents and text states for the full-size recipe (configs/dreamlite.py), from raw pictures.

    python -m dreamlite_jax.precompute --config configs/dreamlite_latents.py:t2i_256 --output /gcs/latents/t2i_256
    python -m dreamlite_jax.precompute --config configs/dreamlite_latents.py:edit_1024 --output /gcs/latents/edit_1024 \
      --host 3 --hosts 8

Reads the shards ROOT/raw/TASK/train*.array_record (msgpack records with image and caption, or source, instruction and
target; other fields, folders and tensorflow-datasets: see SourceConfig), the autoencoder and Qwen3-VL of ROOT/released.
For the pictures of the grids: --config.source.name=validation --output /gcs/latents/t2i_256_validation. Squares alone,
for ReFL (configs/dreamlite_post.py): t2i_512_square and edit_512_square.

Published: the autoencoder, the text encoder, aspect-ratio buckets. Our choice: the buckets' steps and the 2 : 1 limit.
Hours: unmeasured. The size is printed before anything is written: 0.4 to 1.3 MB a record, most of it text states.
"""

from ml_collections import ConfigDict

from dreamlite_jax.recipes import stage_and_root

SETS = [
    f"{task}_{pixels}{shape}"
    for task in ("t2i", "edit", "sft_t2i", "sft_edit")
    for pixels in (256, 512, 1024)
    for shape in ("", "_square")
]


def get_config(argument: str = "t2i_256") -> ConfigDict:
    """`argument` is TASK_PIXELS, TASK_PIXELS_square or one of them and ROOT: edit_1024,/data (default /gcs)."""
    name, root = stage_and_root(argument, SETS, "/gcs")
    task, _, pixels = name.removesuffix("_square").rpartition("_")
    c = ConfigDict()
    c.source = ConfigDict({"kind": "array_record", "path": f"{root}/raw/{task}", "name": "train"})
    c.vae = f"{root}/released/vae.safetensors"
    c.text = ConfigDict({"encoder": "qwen3_vl", "source": f"{root}/released", "max_length": 384})
    max_ratio = 1.0 if name.endswith("_square") else 2.0
    c.buckets = ConfigDict({"size": int(pixels), "multiple": int(pixels) // 8, "max_ratio": max_ratio})
    c.batch_size = 64
    c.threads = 16
    return c

"""Encodes a data set once: python -m dreamlite_jax.precompute --config configs/precompute.py:t2i_64 --output DIR.

Writes latents and text states as shards. Run again it makes only the shards that are missing; several hosts (or
processes) share the work through --host I --hosts N, each taking every N-th shard.
"""

import hashlib
import json
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax import cli, pictures
from dreamlite_jax.assets import vae_path
from dreamlite_jax.config import to_dict
from dreamlite_jax.data import latents as latent_data
from dreamlite_jax.errors import UserError
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest
from dreamlite_jax.training.config import PrecomputeConfig, load_config

CHANGED = 8  # a pixel counts as changed when any channel differs by more than this many of 255 levels


class Encoder:
    """Pictures and prompts of a batch of records, through the autoencoder and the text encoder."""

    def __init__(self, vae_file: Path, text: PromptEncoder):
        import jax

        from dreamlite_jax.model_folder import load_vae
        from dreamlite_jax.models.vae import VAE
        from dreamlite_jax.training import sharding
        from dreamlite_jax.training.config import MeshConfig

        self.config, params = load_vae(vae_file)
        vae, mesh = VAE(self.config), sharding.make_mesh(MeshConfig())
        self._batch = sharding.batch_sharding(mesh)
        self._devices = mesh.devices.size
        params = jax.device_put(params, sharding.replicated(mesh))
        self._encode = jax.jit(lambda images: vae.apply({"params": params}, images, method="encode"))
        self._put = jax.device_put
        self.text = text

    def latents(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) in [-1, 1] to latents, split over the local devices."""
        count = len(images)
        padding = -count % self._devices
        if padding:
            images = np.concatenate([images, images[-1:].repeat(padding, 0)])
        return np.asarray(self._encode(self._put(images, self._batch)))[:count]

    def examples(self, records: Sequence[dict[str, Any]]) -> list[latent_data.Example]:
        """Encoded examples of decoded records."""
        targets = pictures.to_float(np.stack([r["target"] for r in records]))
        editing = [i for i, r in enumerate(records) if r["source"] is not None]
        target_latents, source_latents, changed = self.latents(targets), {}, {}
        if editing:
            sources = pictures.to_float(np.stack([records[i]["source"] for i in editing]))
            source_latents = dict(zip(editing, self.latents(sources), strict=True))
            for i in editing:
                levels = np.abs(records[i]["source"].astype(np.int16) - records[i]["target"])
                differs = (levels > CHANGED).any(-1)
                changed[i] = pool(differs, self.config.downsampling)
        states = self.text.encode([PromptRequest(r["task"], r["text"]) for r in records])
        lengths = states.mask.sum(1).astype(int)
        return [
            latent_data.Example(
                id=r["id"],
                task=r["task"],
                text=r["text"],
                target=target_latents[i],
                source=source_latents.get(i),
                changed=changed.get(i),
                states=states.states[i, : lengths[i]],
                size=(r["target"].shape[1], r["target"].shape[0]),
            )
            for i, r in enumerate(records)
        ]


def pool(mask: np.ndarray, factor: int) -> np.ndarray:
    """(H, W) booleans to the share of true ones in each factor x factor cell."""
    h, w = mask.shape
    return mask.reshape(h // factor, factor, w // factor, factor).mean((1, 3), dtype=np.float32)


def precompute(config: PrecomputeConfig, output: Path, host: int = 0, hosts: int = 1) -> None:
    """Writes the shards of this host that are missing; whoever sees all of them writes `info.json`."""
    from dreamlite_jax.data.sprites import builder as sprites
    from dreamlite_jax.text.cache import CachedEncoder
    from dreamlite_jax.text.load import load_encoder

    cli.check_writable("--output", output)
    if not 0 <= host < hosts:
        raise UserError(f"--host {host} is not below --hosts {hosts}")
    task, _, size = config.source.name.partition("_")
    if not size.isdecimal():
        name = config.source.name
        raise UserError(f"config.source.name is {name!r}; it must be a data set and a size, such as t2i_64")
    refuse_foreign(output)
    records = sprites.open_split(config.source.path, task, int(size), config.source.split)
    vae_file = vae_path(config.vae)
    made_of = {"config": to_dict(config), "vae_sha256": sha256(vae_file), "records": len(records)}
    refuse_other(output, made_of)
    count = -(-len(records) // config.shard_size)
    todo = [i for i in range(host, count, hosts) if not latent_data.shard_path(output, i, count).is_file()]
    if not todo and (output / "info.json").is_file():
        print(f"{output}: complete, {len(records)} records", file=sys.stderr)
        return
    encoder = Encoder(vae_file, CachedEncoder(load_encoder(config.text), capacity=50_000, image_in_key=False))
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "made_of.json", made_of)
    progress = Progress(sum(min(config.shard_size, len(records) - i * config.shard_size) for i in todo), len(records))
    for i in todo:
        chunk = range(i * config.shard_size, min((i + 1) * config.shard_size, len(records)))
        examples = encode_range(records, chunk, encoder, config.batch_size, progress)
        latent_data.write_shard(latent_data.shard_path(output, i, count), examples)
    if all(latent_data.shard_path(output, i, count).is_file() for i in range(count)):
        null = encoder.text.encode([PromptRequest("null", "")])
        info = {"shards": count, **made_of, "vae": to_dict(encoder.config)}
        latent_data.write_info(output, info, null.states[0, : int(null.mask[0].sum())])


def encode_range(
    records: Sequence[Any], indices: range, encoder: Encoder, batch_size: int, progress: "Progress"
) -> Iterator[latent_data.Example]:
    from dreamlite_jax.data.sprites.builder import decode

    for start in range(indices.start, indices.stop, batch_size):
        batch = [decode(records[i]) for i in range(start, min(start + batch_size, indices.stop))]
        examples = encoder.examples(batch)
        progress.add(examples)
        yield from examples


class Progress:
    """The size to expect, then a line every few seconds."""

    def __init__(self, todo: int, total: int):
        self._todo, self._total, self._done = todo, total, 0
        self._started = self._printed = time.monotonic()

    def add(self, examples: Sequence[latent_data.Example]) -> None:
        now = time.monotonic()
        if not self._done:
            each = np.mean([len(latent_data.pack(example)) for example in examples])
            print(f"{self._total} records, about {each * self._total / 1e6:.0f} MB in all", file=sys.stderr, flush=True)
        self._done += len(examples)
        if now - self._printed > 5 or self._done == self._todo:
            rate = self._done / (now - self._started + 1e-9)
            left = (self._todo - self._done) / rate
            print(
                f"encoded {self._done}/{self._todo}  {rate:.0f} records/s  ETA {left:.0f}s", file=sys.stderr, flush=True
            )
            self._printed = now


def sha256(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"config.vae: {path} does not exist; it must be an autoencoder file made by configs/vae.py")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several hosts may get here at the same moment
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def refuse_foreign(output: Path) -> None:
    """Raises `UserError` when the folder holds what precompute did not make."""
    if not output.is_dir() or (output / "made_of.json").is_file():
        return
    if any(found.suffix != ".tmp" for found in output.iterdir()):
        raise UserError(f"--output {output} is not empty and was not made by precompute; choose another folder")


def refuse_other(output: Path, made_of: dict[str, Any]) -> None:
    """Raises `UserError` when the folder was made from other settings."""
    path = output / "made_of.json"
    if path.is_file() and json.loads(path.read_text()) != json.loads(json.dumps(made_of)):
        raise UserError(
            f"--output {output} was made with other settings (see {path}); choose another folder or remove it"
        )


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = cli.Parser(prog="python -m dreamlite_jax.precompute", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    precompute(load_config(args.config, overrides, PrecomputeConfig), args.output, args.host, args.hosts)
    return 0


if __name__ == "__main__":
    cli.run(main)

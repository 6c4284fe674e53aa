"""Encodes a data set once: python -m dreamlite_jax.precompute --config configs/precompute.py:t2i_64 --output DIR.

Writes latents and text states as shards. Run again it makes only the shards that are missing; several hosts (or
processes) share the work through --host I --hosts N, each taking every N-th shard. Records that cannot be used are left
out and named in DIR/bad_records/host_I.jsonl.
"""

import itertools
import json
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dreamlite_jax import cli, pictures
from dreamlite_jax.assets import vae_path
from dreamlite_jax.config import TextConfig, from_dict, to_dict, with_text_state
from dreamlite_jax.data import latents as latent_data
from dreamlite_jax.data import transforms
from dreamlite_jax.data.buckets import Size, check_sizes, nearest_bucket
from dreamlite_jax.data.forms import request_of
from dreamlite_jax.data.mixture import refusals, source_sizes
from dreamlite_jax.data.reading import BadRecords, log_path
from dreamlite_jax.data.sources import BadRecord, Source, open_source
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json, write_json
from dreamlite_jax.tensor_files import sha256_of
from dreamlite_jax.text.cache import load_remembering
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest, null_tails
from dreamlite_jax.training.config import PrecomputeConfig, load_config

T = TypeVar("T")
R = TypeVar("R")


class Encoder:
    """Pictures and prompts of a batch of samples, through the autoencoder and the text encoder.

    Args:
      rows: pictures to fill a batch up to, so that each size is compiled once; 0 takes batches as they come.
    """

    def __init__(self, vae_file: Path, text: PromptEncoder, rows: int = 0):
        import jax

        from dreamlite_jax.model_folder import load_vae
        from dreamlite_jax.models.vae import VAE
        from dreamlite_jax.training import sharding
        from dreamlite_jax.training.config import MeshConfig

        self.config, params = load_vae(vae_file)
        vae, mesh = VAE(self.config), sharding.make_mesh(MeshConfig(), jax.local_devices())
        self._batch = sharding.batch_sharding(mesh)
        self._devices, self._rows = mesh.devices.size, rows
        params = jax.device_put(params, sharding.replicated(mesh))
        self._encode = jax.jit(lambda images: vae.apply({"params": params}, images, method="encode"))
        self._put = jax.device_put
        self.text = text

    def latents(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) in [-1, 1] to latents, split over the local devices."""
        count = len(images)
        padding = max(self._rows, count) - count
        padding += -(count + padding) % self._devices
        if padding:
            images = np.concatenate([images, images[-1:].repeat(padding, 0)])
        return np.asarray(self._encode(self._put(images, self._batch)))[:count]

    def examples(self, items: Sequence[transforms.Item]) -> list[latent_data.Example]:
        """Encoded examples of samples of one size, whose prompts the text encoder takes."""
        targets = self.latents(pictures.to_float(np.stack([item.target for item in items])))
        editing, sources = [i for i, item in enumerate(items) if item.source is not None], {}
        if editing:
            given = self.latents(pictures.to_float(np.stack([items[i].source for i in editing])))
            sources = dict(zip(editing, given, strict=True))
        states = self.text.encode([request_of(item) for item in items])
        lengths = states.mask.sum(1).astype(int)
        nulls = null_tails(self.text, [request_of(item) for item in items]) if self.text.null_tail else None
        return [
            latent_data.Example(
                id=item.id,
                task=item.task,
                text=item.text,
                target=targets[i],
                source=sources.get(i),
                changed=latent_data.pool(item.changed, self.config.downsampling) if i in sources else None,
                states=states.states[i, : lengths[i]],
                size=(item.target.shape[1], item.target.shape[0]),
                null_tail=nulls.states[i] if nulls and i in sources else None,
                null_from=int(nulls.start[i]) if nulls else -1,
            )
            for i, item in enumerate(items)
        ]


def precompute(config: PrecomputeConfig, output: Path, host: int = 0, hosts: int = 1) -> None:
    """Writes the shards of this host that are missing; whoever sees all of them writes `info.json`."""
    cli.check_writable("--output", output)
    if not 0 <= host < hosts:
        raise UserError(f"--host {host} is not below --hosts {hosts}")
    refuse_foreign(output)
    source = open_source(config.source)
    sizes = source_sizes(config.buckets, [source])
    vae_file = vae_path(config.vae)
    made_of = {"config": to_dict(config), "vae_sha256": sha256_of([vae_file]), "records": len(source)}
    refuse_other(output, made_of)
    count = -(-len(source) // config.shard_size)
    several = len(sizes) > 1
    todo = [i for i in range(host, count, hosts) if not shard_is_done(output, i, count, several)]
    if not todo and (output / "info.json").is_file():
        print(f"{output}: complete, {len(source)} records", file=sys.stderr)
        return
    encoder = Encoder(vae_file, text_encoder(config.text), config.batch_size if several else 0)
    check_sizes("config.buckets", sizes, encoder.config.downsampling, "the autoencoder")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "made_of.json", made_of)  # first of all: it says whose folder this is
    bad = BadRecords(log_path(output, host), config.max_bad_fraction, len(source))
    bad.shards(config.source.path, source.missing, source.missing_share)
    work = Work(config, source, sizes, encoder, bad)
    progress = Progress(sum(min(config.shard_size, len(source) - i * config.shard_size) for i in todo), len(source))
    for i in todo:
        chunk = range(i * config.shard_size, min((i + 1) * config.shard_size, len(source)))
        path = latent_data.shard_path(output, i, count)
        latent_data.write_shard(path, work.examples(chunk, progress, buckets_path(path) if several else None))
    if all(shard_is_done(output, i, count, several) for i in range(count)):
        null = encoder.text.encode([PromptRequest("null", "")])
        info = {
            "shards": count, **made_of, "vae": to_dict(encoder.config), "null_tail": encoder.text.null_tail
        }  # fmt: skip
        if several:
            tables = [np.load(buckets_path(latent_data.shard_path(output, i, count))) for i in range(count)]
            write_array(output / latent_data.BUCKETS, np.concatenate(tables))
            info["buckets"] = [list(size) for size in sizes]
        latent_data.write_info(output, info, null.states[0, : int(null.mask[0].sum())])
    if bad.count:
        print(f"left out {bad.count} records; they are named in {bad.path}", file=sys.stderr)


def text_encoder(config: TextConfig) -> PromptEncoder:
    """The config's encoder, its rows spread over the local devices."""
    import jax

    from dreamlite_jax.training import sharding
    from dreamlite_jax.training.config import MeshConfig

    return load_remembering(config, mesh=sharding.make_mesh(MeshConfig(), jax.local_devices()))


def shard_is_done(output: Path, index: int, count: int, several: bool) -> bool:
    path = latent_data.shard_path(output, index, count)
    return path.is_file() and (not several or buckets_path(path).is_file())


def buckets_path(shard: Path) -> Path:
    """Where a shard's buckets are until all shards are there."""
    return shard.with_suffix(".buckets.npy")


class Work:
    """One source on its way through decoding, bucketing and encoding."""

    def __init__(
        self, config: PrecomputeConfig, source: Source, sizes: Sequence[Size], encoder: Encoder, bad: BadRecords
    ):
        self.config, self.source, self.sizes, self.encoder, self.bad = config, source, sizes, encoder, bad

    def examples(self, chunk: range, progress: "Progress", buckets: Path | None) -> Iterator[latent_data.Example]:
        """Examples of these records in batches of one size each; at the end the file `buckets` says which had which."""
        piles: dict[int, list[tuple[int, transforms.Item]]] = {}
        order: list[int] = []
        with ThreadPoolExecutor(self.config.threads) as pool:
            loaded = ahead(pool, self._load, chunk, 2 * self.config.batch_size)
            for index, (bucket, item) in zip(chunk, loaded, strict=True):
                self.bad.read(1)
                if isinstance(item, BadRecord):
                    self._leave_out(index, item)
                    progress.skip()
                    continue
                pile = piles.setdefault(bucket, [])
                pile.append((index, item))
                if len(pile) == self.config.batch_size:
                    yield from self._encoded(bucket, piles.pop(bucket), order, progress)
        for bucket in sorted(piles):
            yield from self._encoded(bucket, piles[bucket], order, progress)
        if buckets is not None:
            write_array(buckets, np.asarray(order, np.uint16))

    def _load(self, index: int) -> tuple[int, transforms.Item | BadRecord]:
        try:
            record, bucket = self.source[index], 0
            if len(self.sizes) > 1:
                bucket = int(nearest_bucket(self.sizes, np.asarray([transforms.picture_size(record.target)]))[0])
            levels = self.config.source.changed_levels
            return bucket, transforms.item(record, self.sizes[bucket], changed_levels=levels)
        except BadRecord as error:
            return 0, error

    def _leave_out(self, index: int, error: Exception) -> None:
        source = self.config.source
        self.bad.add(f"{source.path} {source.name}".strip(), self.source.name(index), str(error))

    def _encoded(
        self, bucket: int, pile: list[tuple[int, transforms.Item]], order: list[int], progress: "Progress"
    ) -> list[latent_data.Example]:
        try:
            examples = self.encoder.examples([item for _, item in pile])
        except UserError:  # a prompt that is too long; without it the others are fine
            refused = dict(refusals(self.encoder.text, [request_of(item) for _, item in pile]))
            if not refused:
                raise
            for row, error in refused.items():
                self._leave_out(pile[row][0], error)
                progress.skip()
            kept = [entry for row, entry in enumerate(pile) if row not in refused]
            return self._encoded(bucket, kept, order, progress) if kept else []
        order += [bucket] * len(examples)
        progress.add(examples)
        return examples


def ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], values: Iterable[T], count: int) -> Iterator[R]:
    """`map` over a pool that keeps at most `count` results waiting."""
    values = iter(values)
    running = deque(pool.submit(function, value) for value in itertools.islice(values, count))
    while running:
        result = running.popleft().result()
        running.extend(pool.submit(function, value) for value in itertools.islice(values, 1))
        yield result


class Progress:
    """The size to expect, then a line every few seconds."""

    def __init__(self, todo: int, total: int):
        self._todo, self._total, self._done = todo, total, 0
        self._started = self._printed = time.monotonic()

    def skip(self) -> None:
        """A record was left out."""
        self._todo -= 1

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


def write_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several hosts may get here at the same moment
    with temporary.open("wb") as file:
        np.save(file, array)
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
    if not path.is_file():
        return
    found = read_json(path)
    stored = with_text_state(found.get("config", {}))  # of an older version too
    known = to_dict(from_dict(PrecomputeConfig, stored, f"{path}: config"))
    if found | {"config": known | own_ways(made_of["config"])} != json.loads(json.dumps(made_of)):
        raise UserError(
            f"--output {output} was made with other settings (see {path}); choose another folder or remove it"
        )


def own_ways(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config may change between starts: the data are the same for it."""
    return {name: config[name] for name in ("threads", "max_bad_fraction")}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = cli.documented("dreamlite_jax.precompute", __doc__)
    cli.add_config(parser, required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    precompute(load_config(args.config, overrides, PrecomputeConfig), args.output, args.host, args.hosts)
    return 0


if __name__ == "__main__":
    cli.run(main)

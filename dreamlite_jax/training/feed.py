"""What training reads: batches and facts of the data, or their shapes where there are no data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np

from dreamlite_jax.assets import vae_path
from dreamlite_jax.config import (
    TextConfig,
    VAEConfig,
    check_image_size,
    check_text_state,
    differences,
    from_dict,
    to_dict,
    with_text_state,
)
from dreamlite_jax.data import latents as latent_data
from dreamlite_jax.data import place
from dreamlite_jax.data.buckets import Size, bucket_sizes, check_sizes
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.encoders import check_encoders
from dreamlite_jax.data.forms import Images, Latents, Pairs
from dreamlite_jax.data.mixture import check_hosts, first_items, raw_batches, source_sizes, text_fields
from dreamlite_jax.data.reading import log_path
from dreamlite_jax.data.sources import Record, open_source
from dreamlite_jax.data.transforms import Item, open_picture
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import find_model, load_vae
from dreamlite_jax.parallel import sharding
from dreamlite_jax.parallel.config import MeshConfig
from dreamlite_jax.pictures import to_float
from dreamlite_jax.tensor_files import sha256_of
from dreamlite_jax.text.cache import load_remembering
from dreamlite_jax.text.encoder import PromptRequest
from dreamlite_jax.text.templates import EDIT_CHAT
from dreamlite_jax.training.codec import Codec
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.denoiser import NullPrompt

HostBatch = dict[str, np.ndarray]
# Further fields of a batch with these texts; shapes follow from their number alone, 0 too.
Fields = Callable[[Sequence[str]], HostBatch]


@runtime_checkable
class Feed(Protocol):
    """Where batches come from."""

    def dataset(self, fields: Fields, log_folder: Path | None = None) -> grain.IterDataset:
        """Endless batches of this process, as dicts of numpy arrays; its iterator can be saved and restored.

        Process p of n has rows p·b/n to (p+1)·b/n of the global batch of b, which does not depend on n; so neither do
        the numbers. All processes get batches of the same shapes at the same step. The iterator's state is the same in
        all of them and does not depend on n either.

        Args:
          fields: see `Stage.fields`.
          log_folder: where records that cannot be used are named, if anywhere.
        """


class LatentFeed:
    """Batches of the latents and text states that `precompute` wrote.

    Raises:
      UserError: they do not fit the config, or each other.
    """

    def __init__(self, config: TrainConfig):
        self.config, data = config, config.data
        everything = (*data.sources, *data.validation)
        for source in everything:
            if source.form != "latents":
                raise UserError(
                    f"source {source.path} is of kind {source.form}; config.data.encode=on_device reads raw pictures, "
                    "precomputed reads the folders that precompute wrote"
                )
        infos = [latent_data.read_info(source.path) for source in everything]
        check_encoders(everything, infos, config.model)
        vae_file = vae_path(config.vae)
        self.codec = Codec(*load_vae(vae_file))
        own = sha256_of([vae_file])
        for source, info in zip(everything, infos, strict=True):
            if "text" in info.get("config", {}):
                text = from_dict(TextConfig, with_text_state(info["config"])["text"], f"{source.path}: config.text")
                check_text_state(f"{source.path} holds", text, config.model.text)
            if info["vae"] != to_dict(self.codec.config) or info.get("vae_sha256", own) != own:
                raise UserError(
                    f"{source.path} holds latents of another autoencoder than config.vae {vae_file}; name the one that "
                    "precompute had, or precompute again"
                )
            sizes = latent_data.LatentReader([source], data.text_length).sizes
            check_sizes(source.path, sizes, config.model.size_multiple, "the U-Net")
        tail = max(info.get("null_tail", 0) for info in infos)
        self.null_prompt = NullPrompt(np.asarray(infos[0]["null_states"], np.float32), tail)
        check_facts(config, self.codec.config, self.null_prompt)

    def dataset(self, fields: Fields, log_folder: Path | None = None) -> grain.IterDataset:
        """See `Feed`."""
        data, host = self.config.data, jax.process_index()
        return latent_data.mixture(
            data.sources,
            batch_size=data.batch_size,
            text_length=data.text_length,
            seed=self.config.seed,
            threads=data.threads,
            host=host,
            hosts=jax.process_count(),
            extend=lambda text: {name: value[0] for name, value in fields([text]).items()},
            log=log_path(log_folder, host) if log_folder else None,
            max_bad_fraction=data.max_bad_fraction,
            on_change=data.on_change,
        )

    def first(self, source: SourceConfig, count: int) -> tuple[Sequence[latent_data.Example], HostBatch]:
        """The first items of a source, of one size and task, and a batch of them."""
        items = latent_data.first_examples(source, count)
        rows = [latent_data.collate(item, self.config.data.text_length, self.null_prompt.tail) for item in items]
        return items, jax.tree.map(lambda *x: np.stack(x), *rows)


class PairFeed:
    """Batches of raw pictures, which the stage encodes, and of text states that are encoded here.

    Raises:
      UserError: the pictures' sizes or the text encoder do not fit the config.
    """

    def __init__(self, config: TrainConfig):
        self.config, data = config, config.data
        for source in (*data.sources, *data.validation):
            sizes = source_sizes(data.buckets, [] if data.buckets.size else [open_source(source)])
            check_sizes("config.data.buckets", sizes, config.model.size_multiple, "the U-Net")
        self.codec = Codec(*load_vae(vae_path(config.vae)))
        here = jax.local_devices()  # every process encodes its own part of a batch
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=len(here)), here)
        folder = find_model(config.init_from) if config.init_from else "."
        self._encoder = load_remembering(config.model.text, folder, mesh)
        states, mask = self._encoder.encode([PromptRequest("null", "")])
        self.null_prompt = NullPrompt(states[0, : int(mask[0].sum())], self._encoder.null_tail)
        check_facts(config, self.codec.config, self.null_prompt)
        self._encoded = jax.jit(self.codec.encoded)

    def dataset(self, fields: Fields, log_folder: Path | None = None) -> grain.IterDataset:
        """See `Feed`."""
        if fields([]):
            raise UserError(f"config.data.encode is 'on_device', which has no {min(fields([]))} of prompts")
        factor, host = self.codec.config.downsampling, jax.process_index()
        return raw_batches(
            self.config.data, lambda sizes: Pairs(sizes, factor), seed=self.config.seed, host=host,
            hosts=jax.process_count(), log=log_path(log_folder, host) if log_folder else None, encoder=self._encoder,
        )  # fmt: skip

    def first(self, source: SourceConfig, count: int) -> tuple[Sequence[Item], HostBatch]:
        """As `LatentFeed.first`."""
        data = self.config.data
        size, items = first_items(source, data.buckets, count)
        form = Pairs([size], self.codec.config.downsampling)
        batch = form.empty(0, len(items))
        for row, item in enumerate(items):
            form.fill(batch, row, item)
        batch |= text_fields(self._encoder, [form.request(item) for item in items], data.text_length)
        return items, jax.device_get(self._encoded(batch))


def check_facts(config: TrainConfig, vae: VAEConfig, null: NullPrompt) -> None:
    """Raises `UserError` unless the data's autoencoder and text states are those of the config's model."""
    model, width = config.model, null.states.shape[1]
    if model.vae != vae:
        found = "; ".join(map(str, differences(vae, model.vae, "config.model.vae")))
        raise UserError(f"the data's autoencoder file is of another architecture: {found}")
    if width != model.unet.text_dim:
        raise UserError(
            f"config.model.unet.text_dim is {model.unet.text_dim}, but the data have text states of width {width}"
        )


class PictureFeed:
    """Batches of `image`: targets of any raw sources, cut to buckets."""

    def __init__(self, config: TrainConfig):
        self.config = config
        if config.data.buckets.size:
            sizes, multiple = bucket_sizes(config.data.buckets), config.model.vae.downsampling
            check_sizes("config.data.buckets", sizes, multiple, "the autoencoder")

    def dataset(self, fields: Fields, log_folder: Path | None = None) -> grain.IterDataset:
        """See `Feed`; there are no prompts."""
        del fields
        data, seed, host, hosts = self.config.data, self.config.seed, jax.process_index(), jax.process_count()
        if data.buckets.size or any(source.form != "sprites" for source in data.sources):
            log = log_path(log_folder, host) if log_folder else None
            return raw_batches(data, Images, seed=seed, host=host, hosts=hosts, log=log)
        check_hosts(data.batch_size, hosts)
        sources = [open_source(source) for source in data.sources]
        streams = [
            grain.MapDataset.source(source).seed(seed + i).shuffle().repeat().map(decode_image)
            for i, source in enumerate(sources)
        ]
        weights = [source.weight for source in data.sources]
        stream = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
        digests = [place.digest_of_source(source) for source in sources]
        return place.Consecutive(
            stream, batch_size=data.batch_size, host=host, hosts=hosts, threads=data.threads,
            data=place.described(data.sources, [len(source) for source in sources], digests, seed),
            on_change=data.on_change,
        )  # fmt: skip

    def first(self, source: SourceConfig, count: int) -> tuple[Sequence[Item], HostBatch]:
        """As `LatentFeed.first`."""
        _, items = first_items(source, self.config.data.buckets, count)
        return items, {"image": to_float(np.stack([item.target for item in items]))}


def decode_image(record: Record) -> HostBatch:
    """{"image": (H, W, 3) float32 in [-1, 1]} of a record's target, as it is."""
    return {"image": to_float(np.asarray(open_picture(record.target, record=record.id)))}


class ShapesOnly:
    """Stands for a feed of latents or (`images`) of pictures where data, autoencoder and text encoder need not be.

    Steps have the shapes and, but for the states of the empty prompt, the program of the real ones.
    """

    def __init__(self, config: TrainConfig, *, images: bool = False):
        self.config, self._images, model = config, images, config.model
        self.codec = Codec.of_shapes(model.vae)
        tail = EDIT_CHAT.closing_tokens if model.text.encoder == "qwen3_vl" else 0
        self.null_prompt = NullPrompt(np.zeros((1, model.unet.text_dim), np.float32), tail)

    def batch(self, fields: Fields, width: int = 0, height: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch of pictures of this size in pixels (default: the square of the config's buckets).

        Raises:
          UserError: the network cannot take pictures of this size.
        """
        model, data = self.config.model, self.config.data
        native = data.buckets.size or model.native_size
        size = width or native, height or native
        check_image_size(model, *size)
        empty = (self._empty(size) | fields([])).items()
        return {name: jax.ShapeDtypeStruct((data.batch_size, *x.shape[1:]), x.dtype) for name, x in empty}

    def _empty(self, size: Size) -> HostBatch:
        """A batch of no rows."""
        if self._images:
            return Images([size]).empty(0, rows=0)
        model, (width, height) = self.config.model, size
        latent = (height // model.vae.downsampling, width // model.vae.downsampling, model.vae.latent_channels)
        form = Latents([latent], self.config.data.text_length, model.unet.text_dim, self.null_prompt.tail)
        return form.empty(0, rows=0)


def latent_feed(config: TrainConfig, *, shapes_only: bool = False) -> LatentFeed | PairFeed | ShapesOnly:
    """The feed of a stage that trains the U-Net."""
    if shapes_only:
        return ShapesOnly(config)
    return PairFeed(config) if config.data.encode == "on_device" else LatentFeed(config)

"""Samples to examples: pictures through the autoencoder, prompts through the text encoder, batch by batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamlite_jax import pictures
from dreamlite_jax.config import TextConfig, VAEConfig
from dreamlite_jax.data import latents as latent_data
from dreamlite_jax.data.forms import request_of
from dreamlite_jax.data.transforms import Item
from dreamlite_jax.errors import UserError
from dreamlite_jax.text.cache import load_remembering
from dreamlite_jax.text.encoder import PromptEncoder, PromptStates, null_tails


class Encoder:
    """Pictures and prompts of batches.

    Args:
      rows: pictures that each batch is filled up to, so that every size is compiled once and a picture's latents do not
        depend on how many others are encoded with it.
    """

    def __init__(self, config: VAEConfig, params: Any, text: PromptEncoder, rows: int):
        import jax

        from dreamlite_jax.models.vae import VAE
        from dreamlite_jax.parallel import sharding
        from dreamlite_jax.parallel.config import MeshConfig

        self.config, self.text = config, text
        vae, mesh = VAE(self.config), sharding.make_mesh(MeshConfig(), jax.local_devices())
        self._batch = sharding.batch_sharding(mesh)
        self._rows = -(-rows // mesh.devices.size) * mesh.devices.size
        params = jax.device_put(params, sharding.replicated(mesh))
        self._encode = jax.jit(lambda images: vae.apply({"params": params}, images, method="encode"))
        self._put = jax.device_put

    def latents(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) in [-1, 1] to latents, b at most `rows`; split over the local devices."""
        count = len(images)
        if padding := self._rows - count:
            images = np.concatenate([images, images[-1:].repeat(padding, 0)])
        return np.asarray(self._encode(self._put(images, self._batch)))[:count]

    def prompts(self, items: Sequence[Item]) -> tuple[dict[int, UserError], PromptStates]:
        """The samples whose words the text encoder does not take, and why; the states of the others' prompts."""
        requests, refused = [request_of(item) for item in items], {}
        try:
            return refused, self.text.encode(requests)
        except UserError:
            for row, request in enumerate(requests):
                try:
                    self.text.encode([request])
                except UserError as error:
                    refused[row] = error
            if not refused:
                raise
        return refused, self.text.encode([request for row, request in enumerate(requests) if row not in refused])

    def examples(self, items: Sequence[Item], states: PromptStates) -> list[latent_data.Example]:
        """Encoded examples of samples of one size, at most `rows`, and the states of their prompts."""
        if not items:
            return []
        lengths = states.mask.sum(1).astype(int)
        nulls = null_tails(self.text, [request_of(item) for item in items]) if self.text.null_tail else None
        targets = self.latents(pictures.to_float(np.stack([item.target for item in items])))
        editing, sources = [i for i, item in enumerate(items) if item.source is not None], {}
        if editing:
            given = self.latents(pictures.to_float(np.stack([items[i].source for i in editing])))
            sources = dict(zip(editing, given, strict=True))
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


def text_encoder(config: TextConfig) -> PromptEncoder:
    """The config's encoder, its rows spread over the local devices."""
    import jax

    from dreamlite_jax.parallel import sharding
    from dreamlite_jax.parallel.config import MeshConfig

    return load_remembering(config, mesh=sharding.make_mesh(MeshConfig(), jax.local_devices()))

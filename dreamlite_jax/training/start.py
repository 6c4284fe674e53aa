"""Where weights come from when a run begins: their shapes by name, or they themselves."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dreamlite_jax.config import ModelConfig, check_text_state, differences, from_dict, with_text_state
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import MANIFEST, find_model, load_config, load_params, load_vae, vae_config, weight_file
from dreamlite_jax.models.unet import dummy_inputs
from dreamlite_jax.parallel import sharding
from dreamlite_jax.training import checkpoint
from dreamlite_jax.training.config import TrainConfig


@runtime_checkable
class Weights(Protocol):
    """Parameters of a network, not read yet."""

    def shapes(self) -> Any:
        """A tree of `jax.ShapeDtypeStruct`; reads nothing."""

    def check(self) -> None:
        """Raises `UserError` for a file that `load` would refuse, as far as that shows without reading its arrays."""

    def load(self) -> Any:
        """The arrays: on the mesh or, the same in every process, on the host. Raises `UserError` for a wrong file."""


class Given:
    """Weights that are at hand, or of which nothing but shapes will ever be asked."""

    def __init__(self, tree: Any):
        self._tree = tree

    def shapes(self) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._tree)

    def check(self) -> None:
        pass

    def load(self) -> Any:
        return self._tree


class Random:
    """A network's own initial weights, of a seed."""

    def __init__(self, network: Any, inputs: tuple[Any, ...], seed: int):
        self._network, self._inputs, self._seed = network, inputs, seed

    def shapes(self) -> Any:
        return jax.eval_shape(self._network.init, jax.random.key(self._seed), *self._inputs)["params"]

    def check(self) -> None:
        pass

    def load(self) -> Any:
        return sharding.born(self._network.init, jax.random.key(self._seed), *self._inputs)["params"]


class Stored:
    """U-Net weights, on the host, of the model folder or workdir that `config.<field>` names."""

    def __init__(self, config: TrainConfig, network: Any, location: str, field: str):
        self._unet, self._network, self._location, self._field = config.model.unet, network, location, field
        self._text = config.model.text

    def shapes(self) -> Any:
        return jax.eval_shape(self._network.init, jax.random.key(0), *dummy_inputs(self._unet))["params"]

    def check(self) -> None:
        self._find()

    def load(self) -> Any:
        folder, exported = self._find()
        return load_params(folder, "unet") if exported else checkpoint.averaged(folder, self.shapes())

    def _find(self) -> tuple[Path, bool]:
        """The folder, and whether it is a model folder; else it is a workdir that has not exported."""
        folder = find_model(self._location)
        exported = (folder / MANIFEST).exists() or not checkpoint.steps_in(folder)
        try:
            stored = load_config(folder) if exported else from_dict(
                ModelConfig, with_text_state(checkpoint.saved_config(folder)["model"]), f"{folder}: config.model"
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"config.{self._field}: {error}") from None
        if found := differences(stored.unet, self._unet, "config.model.unet"):
            raise UserError(
                f"config.{self._field} {folder} holds a U-Net of another architecture: {'; '.join(map(str, found))}"
            )
        check_text_state(f"config.{self._field} {folder} holds a U-Net that was trained on", stored.text, self._text)
        return folder, exported


class StoredAutoencoder:
    """Autoencoder weights, on the host, of what `config.init_from` names: an autoencoder file, a model folder, or the
    workdir of a run, its export or (of stage vae) the averaged parameters of its newest checkpoint."""

    def __init__(self, config: TrainConfig, shapes: Any):
        self._vae, self._shapes, self._location = config.model.vae, shapes, Path(config.init_from)

    def shapes(self) -> Any:
        return self._shapes

    def check(self) -> None:
        self._find()

    def load(self) -> Any:
        place = self._find()
        return checkpoint.averaged(place, self._shapes) if place.is_dir() else load_vae(place)[1]

    def _find(self) -> Path:
        """The file, or the workdir of a run of stage vae that has not exported."""
        location, name = self._location, weight_file("vae")
        files = [file for file in (location, location / name, location / "model" / name) if file.is_file()]
        if files:
            place, stored = files[0], vae_config(files[0])
        elif checkpoint.steps_in(location) and (saved := checkpoint.saved_config(location))["stage"] == "vae":
            place, stored = location, saved["model"]["vae"]
        else:
            what = "is neither an autoencoder file, nor a model folder, nor the workdir of a run of stage vae"
            raise UserError(f"config.init_from {location} {what if location.exists() else 'does not exist'}")
        if found := differences(stored, self._vae, "config.model.vae"):
            raise UserError(
                f"config.init_from {place} holds an autoencoder of another architecture: {'; '.join(map(str, found))}"
            )
        return place


def unet(config: TrainConfig, network: Any) -> Weights:
    """Where the U-Net of a config starts: `init_from`, or at random."""
    if config.init_from:
        return Stored(config, network, config.init_from, "init_from")
    return Random(network, dummy_inputs(config.model.unet), config.seed)


def copied(tree: Any) -> Any:
    """Arrays of its own: the loop donates every part of a state."""
    return jax.tree.map(jnp.copy, tree)

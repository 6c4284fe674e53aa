"""Training configs: `ml_collections` files become frozen dataclasses here, once; nothing else reads a ConfigDict."""

import ast
import dataclasses
import importlib.util
import inspect
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import ml_collections

from dreamlite_jax import config_files
from dreamlite_jax.config import ModelConfig, TextConfig, check_bounds, from_dict, suggestion
from dreamlite_jax.data.config import BucketConfig, DataConfig, SourceConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel.config import MeshConfig
from dreamlite_jax.rewards.config import RewardConfig
from dreamlite_jax.training import unread
from dreamlite_jax.training.stages import table


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with clipping, warmup and an exponential moving average of the parameters."""

    learning_rate: float = 1e-4
    warmup_steps: int = 1000
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_fraction: float = 0.0  # of the learning rate, at the last step of a decay
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        check_bounds(self, ("learning_rate", "clip_norm"), above=0)
        check_bounds(self, ("warmup_steps", "weight_decay"), least=0)
        check_bounds(self, ("b1", "b2", "ema_decay"), least=0, below=1)
        check_bounds(self, ("final_fraction",), least=0, most=1)
        if self.decay == "constant" and self.final_fraction:
            raise UserError(
                f"final_fraction is {self.final_fraction}, but a constant decay does not read it; cosine and linear do"
            )


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Flow matching: the sigma sampler, condition drops and the edit loss (spec section 6)."""

    logit_mean: float = 0.0
    logit_std: float = 1.0
    text_drop: float = 0.1
    image_drop: float = 0.1
    region_weight: bool = True

    def __post_init__(self):
        check_bounds(self, ("logit_mean",))
        check_bounds(self, ("logit_std",), least=0)
        check_bounds(self, ("text_drop", "image_drop"), least=0, most=1)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder training: weights of the loss terms and the noise that makes the decoder forgive small errors.

    Pictures count by the power `hard_power` of their own absolute error.
    """

    latent_noise: float = 0.1
    squared_weight: float = 4.0
    latent_weight: float = 0.05
    hard_power: float = 0.0

    def __post_init__(self):
        names = ("latent_noise", "squared_weight", "latent_weight", "hard_power")
        check_bounds(self, names, least=0)


@dataclasses.dataclass(frozen=True)
class ReFLConfig:
    """Reward feedback learning (ImageReward, algorithm 1; spec section 6).

    The rollout has `steps` steps; the one with gradients is drawn from the last `late_share` of them. `push` "below"
    raises scores below the threshold, as the original does; "above" those above it. A run stops when the velocity on
    real data is more than `max_drift` (relative) away from the start model's, or when the predicted latents' spread
    over the batch falls below `min_diversity` of the real ones'.
    """

    rewards: tuple[RewardConfig, ...] = ()
    reward_weight: float = 1e-3
    flow_weight: float = 1.0
    steps: int = 28
    late_share: float = 0.25
    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    push: Literal["below", "above"] = "below"
    max_drift: float = 0.5
    min_diversity: float = 0.3

    def __post_init__(self):
        check_bounds(self, ("steps",), least=1)
        check_bounds(self, ("late_share",), above=0, most=1)
        check_bounds(self, ("max_drift",), above=0)
        names = ("reward_weight", "flow_weight", "guidance_scale", "image_guidance_scale", "min_diversity")
        check_bounds(self, names, least=0)


@dataclasses.dataclass(frozen=True)
class DMDConfig:
    """Distribution matching distillation (DMD2, arXiv 2405.14867; spec section 6).

    `teacher` is a model folder or workdir ("" means `init_from`), guided by these scales. The student takes
    `config.model.steps` steps without guidance. The fake score makes `fake_updates` updates a step, with the optimiser
    `fake`; weights of the GAN above 0 (DMD2: 5e-3 for the generator, 1e-2 for the fake score) add a head to it. Noise
    levels are uniform in `noise_range`, before the resolution's shift. `region_weight` weighs what an edit changes as
    `config.flow.region_weight` does, which must be on too. A run stops when the student's latents spread over the batch
    less than `min_diversity` of the real ones'.
    """

    teacher: str = ""
    guidance_scale: float = 3.5
    image_guidance_scale: float = 1.5
    noise_range: tuple[float, float] = (0.02, 0.98)
    fake_updates: int = 5
    fake: OptimConfig = OptimConfig(learning_rate=5e-7, warmup_steps=0)
    gan_generator_weight: float = 0.0
    gan_fake_weight: float = 0.0
    region_weight: bool = False
    min_diversity: float = 0.3

    def __post_init__(self):
        check_bounds(self, ("fake_updates",), least=1)
        names = ("guidance_scale", "image_guidance_scale", "gan_generator_weight", "gan_fake_weight", "min_diversity")
        check_bounds(self, names, least=0)
        low, high = self.noise_range
        if not 0 < low < high < 1:
            raise UserError(f"noise_range is {self.noise_range}; it must be 0 < low < high < 1")
        if (self.gan_generator_weight > 0) != (self.gan_fake_weight > 0):
            raise UserError(
                f"gan_generator_weight is {self.gan_generator_weight} and gan_fake_weight "
                f"{self.gan_fake_weight}; both or neither must be above 0"
            )


COUNTS = (
    "steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "grid_every", "grid_items",
    "grid_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage of training: one of `training.stages.table`, or a class of your own as FILE.py:CLASS
    (docs/extending.md).

    `init_from` is a model folder, or the workdir of a run of any stage: its exported model, or the averaged parameters
    of its newest checkpoint if it has not exported yet; for stage vae it may be an autoencoder file too. Without it the
    network starts from random weights. `vae` is the autoencoder file that latents were made with ("" means the shipped
    one).

    A batch is worked through in `accumulate` parts, with the same result and less memory. `dtype` is that of matmuls
    and activations; parameters, their average and the optimiser stay float32. `remat` recomputes each level of the
    network in the backward pass, all of it or (`remat_keep`) all but its matrix products. `profile_steps` steps are
    traced for the profiler into the workdir's `profile`, after the first ten steps of a start.
    """

    stage: str
    model: ModelConfig
    data: DataConfig
    steps: int
    optim: OptimConfig = OptimConfig()
    flow: FlowConfig = FlowConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    refl: ReFLConfig = ReFLConfig()
    dmd: DMDConfig = DMDConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = ""
    vae: str = ""
    seed: int = 0
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    remat_keep: Literal["nothing", "matmuls"] = "nothing"
    profile_steps: int = 0
    log_every: int = 50
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    grid_every: int = 1000
    grid_items: int = 8
    grid_steps: int = 20

    def __post_init__(self):
        stage = table.find(self.stage)
        check_bounds(self, COUNTS, least=1)
        check_bounds(self, ("profile_steps",), least=0)
        check_bounds(self, ("seed",), least=0, most=2**32 - 1)
        if self.data.batch_size % self.accumulate:
            raise UserError(
                f"data.batch_size is {self.data.batch_size}; it must be a multiple of accumulate {self.accumulate}"
            )
        if self.accumulate > 1 and not stage.accumulates:
            raise UserError(
                f"accumulate is {self.accumulate}, but the loss of stage {self.stage} is not a mean over items; "
                "it must be 1"
            )
        if self.stage == "dmd2" and self.dmd.region_weight and not self.flow.region_weight:
            raise UserError("dmd.region_weight is True, but flow.region_weight False; set both, or neither")
        if self.data.encode == "on_device" and not stage.encodes:
            raise UserError(
                f"data.encode is 'on_device'; stage {self.stage} needs 'precomputed' (python -m "
                "dreamlite_jax.precompute)"
            )
        size, multiple = self.model.native_size, self.model.size_multiple
        if self.stage != "vae" and size % multiple:
            near = max(1, round(size / multiple)) * multiple
            raise UserError(
                f"model.native_size is {size}; a model of this network cannot be sampled at other sizes than multiples "
                f"of {multiple}, such as {near}"
            )
        unread.check_training(self)


@dataclasses.dataclass(frozen=True)
class PrecomputeConfig:
    """What `precompute` encodes: one raw source, with one autoencoder and one text encoder."""

    source: SourceConfig
    vae: str = ""
    text: TextConfig = TextConfig()  # noqa: RUF009 (frozen)
    batch_size: int = 64
    shard_size: int = 4096
    buckets: BucketConfig = BucketConfig()
    max_bad_fraction: float = 0.01
    threads: int = 2

    def __post_init__(self):
        check_bounds(self, ("batch_size", "shard_size", "threads"), least=1)
        check_bounds(self, ("max_bad_fraction",), least=0, most=1)
        unread.check_precomputed(self)


ConfigT = TypeVar("ConfigT", TrainConfig, PrecomputeConfig)


def load_config(location: str, overrides: Sequence[str] = (), cls: type[ConfigT] = TrainConfig) -> ConfigT:
    """The config of `path.py[:arg]` or `name[:arg]` (`config_files`), with overrides `field.name=value`, validated.

    The file defines `get_config()` or `get_config(arg)` returning a ConfigDict.

    Raises:
      UserError: no such file, a file without `get_config`, a wrong argument, an unknown field or a bad value.
    """
    mapping = read_config_file(location)
    if cls is TrainConfig:
        named = [override.partition("=")[2].strip("'\"") for override in overrides if override.startswith("stage=")]
        try:
            cls = table.config_class([mapping.get("stage"), *named][-1], cls)
        except UserError as error:
            raise UserError(f"config.{error}") from None
    for override in overrides:
        _override(mapping, override, cls)
    return from_dict(cls, mapping, "config")


def read_config_file(location: str) -> dict[str, Any]:
    """Plain nested dict of what a config file returns."""
    path, argument = config_files.split(location)
    file = config_files.find(path)
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {path}: the file defines no get_config()")
    if argument and not inspect.signature(module.get_config).parameters:
        raise UserError(f"--config {location}: {path} takes no argument; write --config {path}")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except KeyError as error:
        raise UserError(f"--config {location}: {error.args[0]}") from error
    return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)


def _override(mapping: dict[str, Any], override: str, cls: type) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--config.{override}: an override is written --config.{name}=VALUE")
    *parents, leaf = name.split(".")
    node: Any = mapping
    for i, key in enumerate([*parents, leaf]):
        if not isinstance(node, dict | list | tuple):
            raise UserError(f"config.{name} is not a known field; config.{'.'.join(parents[:i])} has no fields")
        entries = isinstance(node, list | tuple)
        known = {str(i) for i in range(len(node))} if entries else {*node, *_fields_at(cls, parents[:i])}
        if key not in known:
            raise UserError(f"config.{name} is not a known field{suggestion(key, known)}")
        if i < len(parents):
            node = node[int(key)] if entries else node.setdefault(key, {})
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(node, dict):
        node[leaf] = value
    else:
        raise UserError(f"config.{name}: override a field of an entry, such as config.{name}.path")


def _fields_at(cls: Any, parents: Sequence[str]) -> set[str]:
    """Names of the fields at this path of the config, those included that a file leaves at their default."""
    for parent in parents:
        if typing.get_origin(cls) is tuple:  # an entry of `data.sources`
            cls = typing.get_args(cls)[0]
        elif dataclasses.is_dataclass(cls):
            cls = {f.name: f.type for f in dataclasses.fields(cls)}.get(parent)
    return {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()

"""What a kind of training is: its objective, and no more. How to write one: docs/extending.md."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dreamlite_jax.config import suggestion
from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel import sharding
from dreamlite_jax.training import flops, start
from dreamlite_jax.training.codec import Codec
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.denoiser import Batch, Denoiser
from dreamlite_jax.training.feed import Feed, ShapesOnly, latent_feed
from dreamlite_jax.training.gallery import Drawings, Gallery
from dreamlite_jax.training.state import TrainState
from dreamlite_jax.training.update import Metrics, Update, step_key


class Run(NamedTuple):
    """What the loop runs."""

    stage: "Stage"
    feed: Feed | ShapesOnly
    gallery: Gallery


class Stage:
    """Trains parameters by one `loss`; a kind of training with more to do than that has a `step` of its own.

    Attributes:
      Config: settings of a stage of one's own, a frozen dataclass: the config's section named as the class, in lower
        case.
      limits: (least, most) of some metrics by name; outside them the run has collapsed and stops.
      accumulates: the loss is a mean over the items of a batch, given as `draw` and `mean_loss`; so a batch can be
        worked through in parts (`config.accumulate`).
      encodes: batches may be raw pictures, which the stage encodes (`config.data.encode` "on_device").
      update: of the parameters.
      sources: by name, the weights that `begin` is given.
      frozen: by name, the weights that the state has as `TrainState.frozen`.
    """

    Config: type | None = None
    limits: Mapping[str, tuple[float, float]] = {}
    accumulates = False
    encodes = False
    config: TrainConfig
    update: Update
    sources: Mapping[str, start.Weights]
    frozen: Mapping[str, start.Weights]

    def __init__(self, config: TrainConfig, weights: start.Weights):
        """Reads nothing; `weights` are those that training starts from."""
        self.config = config
        self.update = Update(config.optim, config.steps, config.dtype)
        self.sources, self.frozen = {"params": weights}, {}

    @classmethod
    def assemble(cls, config: TrainConfig, *, shapes_only: bool = False) -> Run:
        """The stage of a config with its feed and gallery; `shapes_only`: for compiles, where no file need be here.

        Raises:
          UserError: files do not fit the config.
        """
        raise NotImplementedError

    # --- state

    def begin(self, weights: Mapping[str, Any], key: jax.Array) -> TrainState:
        """The state before the first step, without what is frozen; pure, of the weights of `sources`."""
        del key
        return self.update.begin(weights["params"])

    def state_shapes(self) -> TrainState:
        """The state's shapes; reads nothing."""
        weights = {name: source.shapes() for name, source in self.sources.items()}
        state = jax.eval_shape(self.begin, weights, self._key())
        return state.replace(frozen={name: source.shapes() for name, source in self.frozen.items()})

    def init_state(self) -> TrainState:
        """The state before the first step, on the mesh or, the same in every process, on the host.

        Raises:
          UserError: weights are missing, or are those of another network.
        """
        read: dict[int, Any] = {}  # one source may have two names
        for source in (*self.sources.values(), *self.frozen.values()):
            if id(source) not in read:
                read[id(source)] = source.load()
        weights = {name: read[id(source)] for name, source in self.sources.items()}
        state = sharding.born(self.begin, weights, self._key())
        shared = {id(source) for source in self.sources.values()}
        frozen = {
            name: sharding.born(start.copied, read[id(source)]) if id(source) in shared else read[id(source)]
            for name, source in self.frozen.items()
        }
        return state.replace(frozen=frozen)

    def load_frozen(self) -> dict[str, Any]:
        """`TrainState.frozen` alone, for a run that is resumed."""
        return {name: source.load() for name, source in self.frozen.items()}

    def _key(self) -> jax.Array:
        return jax.random.key(self.config.seed)

    # --- objective

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """(loss, metrics), all () float32."""
        return self.mean_loss(params, self.draw(batch, key))

    def draw(self, batch: Batch, key: jax.Array) -> Any:
        """Arrays with a row an item: all that is random, and all that looks over the whole batch."""
        raise NotImplementedError

    def mean_loss(self, params: Any, rows: Any) -> tuple[jax.Array, Metrics]:
        """(loss, metrics) as plain means over rows of what `draw` gives."""
        raise NotImplementedError

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """(next state, metrics) from a global batch; pure, compiled by the loop for each shape, `state` is donated.

        All that is random comes from `update.step_key`. Metrics are scalars; "loss" and "grad_norm" are among them.
        Those whose names end in "loss" or "norm" may never be other than finite.
        """
        key, parts = step_key(self.config.seed, state), self.config.accumulate
        if parts == 1:
            (loss, metrics), grads = self.update.gradient(self.loss, state.params, batch, key)
        else:
            rows = self.draw(batch, key)
            (loss, metrics), grads = self.update.gradient_in_parts(self.mean_loss, state.params, rows, parts)
        return self.update.apply(state, grads, {"loss": loss, **metrics})

    def flops(self, batch: Batch) -> float:
        """Of one step on a batch of these shapes, for the utilisation that the loop reports; 0: not counted."""
        del batch
        return 0.0

    def fields(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Further fields of a batch with these prompts; shapes follow from their number alone, 0 too."""
        del texts
        return {}


class DenoisingStage(Stage):
    """A stage that trains the U-Net.

    Attributes:
      denoiser: the network, and what it is conditioned on.
      codec: the autoencoder of the data.
    """

    denoiser: Denoiser
    codec: Codec

    def __init__(self, config: TrainConfig, denoiser: Denoiser, weights: start.Weights, codec: Codec):
        super().__init__(config, weights)
        self.denoiser, self.codec = denoiser, codec

    @classmethod
    def assemble(cls, config: TrainConfig, *, shapes_only: bool = False) -> Run:
        feed = latent_feed(config, shapes_only=shapes_only)
        denoiser = Denoiser(config, feed.null_prompt)
        stage = cls.build(config, denoiser, feed.codec, shapes_only=shapes_only)
        return Run(stage, feed, Drawings(config, denoiser, feed))

    @classmethod
    def build(cls, config: TrainConfig, denoiser: Denoiser, codec: Codec, *, shapes_only: bool) -> "DenoisingStage":
        """The stage alone; with further parts, where it has any."""
        del shapes_only
        return cls(config, denoiser, start.unet(config, denoiser.network), codec)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return super().step(state, self.codec.encoded(batch))

    def flops(self, batch: Batch) -> float:
        """Forward and backward pass of the U-Net on each canvas."""
        unet, (b, h, w, _) = self.config.model.unet, batch["weight"].shape
        columns = 2 * w if unet.condition_layout == "width" else w
        return flops.training_flops(unet, b, h, columns, batch["text"].shape[1])


def check(stage: Stage) -> None:
    """Raises `UserError` for a stage that lacks a loss, or has a member that is nearly the name of one it should have.

    Other names are its own; those that begin with an underscore always are.
    """
    kinds = [kind for kind in type(stage).__mro__ if kind not in (object, Stage, DenoisingStage)]
    known = {name for kind in (Stage, DenoisingStage) for name in (*vars(kind), *kind.__annotations__)}
    name = type(stage).__name__
    for member in sorted({member for kind in kinds for member in vars(kind)} | vars(stage).keys()):
        near = difflib.get_close_matches(member, known, n=1, cutoff=0.85)
        if near and member not in known and not member.startswith("_"):
            raise UserError(f"stage {name} has {member!r}, which nothing reads; did you mean {near[0]!r}?")
    kind = type(stage)
    if kind.step is Stage.step or kind.step is DenoisingStage.step:
        parts = kind.draw is not Stage.draw and kind.mean_loss is not Stage.mean_loss
        if kind.loss is Stage.loss and not parts:
            raise UserError(f"stage {name} has no loss: it needs `loss`, or `draw` and `mean_loss`, or a `step`")
        if kind.accumulates and not parts:
            raise UserError(f"stage {name} has accumulates = True, but not `draw` and `mean_loss`")
    for metric, bounds in stage.limits.items():
        if not (isinstance(bounds, tuple) and len(bounds) == 2 and bounds[0] <= bounds[1]):
            raise UserError(f"stage {name}: limits[{metric!r}] is {bounds!r}; it must be (least, most)")


def check_metrics(stage: Stage, metrics: Iterable[str]) -> None:
    """Raises `UserError` unless a step gives the loss and all metrics that have limits."""
    for metric in ("loss", *stage.limits):
        if metric not in metrics:
            raise UserError(f"stage {type(stage).__name__}: its step gives no {metric!r}{suggestion(metric, metrics)}")

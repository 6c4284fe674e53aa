"""Random torch models of diffusers and their weights as our parameter trees, for parity tests."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import diffusers_config, names
from dreamlite_jax.config import UNetConfig, VAEConfig
from dreamlite_jax.model_folder import expected_shapes, unflatten

SMALL_UNET = UNetConfig(
    block_out_channels=(32, 48, 64), layers_per_block=1, transformer_layers=(1, 1, 2), num_heads=(2, 3, 4),
    cross_attention_dim=40, text_dim=24, size_embed_dim=16, norm_groups=8,
)  # fmt: skip
SHARED_DATA = Path(os.environ.get("DREAMLITE_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")

# Layers that feed a normalisation. Scaled down, the epsilon of that normalisation shows in the output.
BEFORE_NORMS = ("conv_in.", ".proj_in.", ".to_q.", ".to_k.", "encoder_hid_proj.0.", ".conv1.", ".time_emb_proj.")
# And those that feed a nonlinearity whose variants agree near zero.
BEFORE_GELU = (".ff.net.0.",)


@dataclasses.dataclass(frozen=True)
class UNetInputs:
    """Inputs of one call, NHWC; `mask` may be ragged."""

    sample: np.ndarray
    timestep: np.ndarray
    text: np.ndarray
    mask: np.ndarray
    time_ids: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return (self.sample, self.timestep, self.text, self.mask, self.time_ids)


def unet_inputs(
    config: UNetConfig, height: int, width: int, timesteps: list[float], kept: list[int], length: int, seed: int = 0
) -> UNetInputs:
    """Random inputs for panels of height x width latent pixels; sample i has `kept[i]` of `length` text tokens."""
    rng = np.random.default_rng(seed)
    b = len(timesteps)
    columns = 2 * width if config.condition_layout == "width" else width
    sizes = [(8 * width + 8 * i, 8 * height - 4 * i) for i in range(b)]  # width and height differ, and by sample
    return UNetInputs(
        sample=rng.standard_normal((b, height, columns, config.in_channels), np.float32),
        timestep=np.asarray(timesteps, np.float32),
        text=rng.standard_normal((b, length, config.text_dim), np.float32),
        mask=(np.arange(length)[None, :] < np.asarray(kept)[:, None]).astype(np.float32),
        time_ids=np.asarray(sizes, np.float32),
    )


def torch_unet(config: UNetConfig, seed: int = 0, *, sensitive: bool = True) -> Any:
    """A `DreamLiteUNetModel` with every parameter away from its initial value.

    Args:
        sensitive: scale layers so that small differences in the architecture show: epsilons, variants of GELU.
    """
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.DreamLiteUNetModel.from_config(diffusers_config.unet_to_diffusers(config))
    return randomize(model, seed, {0.05: BEFORE_NORMS, 4.0: BEFORE_GELU} if sensitive else {})


def torch_vae(config: VAEConfig, seed: int = 0) -> Any:
    """An `AutoencoderTiny` with random parameters."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    return randomize(diffusers.AutoencoderTiny.from_config(diffusers_config.vae_to_diffusers(config)), seed, {})


def randomize(model: Any, seed: int, scales: dict[float, tuple[str, ...]]) -> Any:
    """Adds noise to every parameter: norms and biases are otherwise ones and zeros, and would not be compared.

    Then multiplies those whose name has one of the parts of a scale.
    """
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.1 if parameter.ndim == 1 else 0.1 * parameter.std()
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
            for scale, parts in scales.items():
                if any(part in name for part in parts):
                    parameter.mul_(scale)
    return model.eval()


def flax_params(model: Any, component: str, config: UNetConfig | VAEConfig) -> dict[str, Any]:
    """Parameters of a torch model as our tree, through the name table."""
    table = {"unet": names.UNET, "vae": names.VAE}[component]
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    wanted = table.tensors(expected_shapes(component, config))
    assert {tensor.name for tensor in wanted.values()} == set(state)
    return unflatten({path: names.to_our_layout(path, state[tensor.name]) for path, tensor in wanted.items()})


def torch_velocity(model: Any, inputs: UNetInputs) -> np.ndarray:
    """The oracle's output for NHWC inputs, NHWC."""
    import torch

    with torch.no_grad():
        output = model(
            torch.from_numpy(inputs.sample).permute(0, 3, 1, 2),
            torch.from_numpy(inputs.timestep),
            encoder_hidden_states=torch.from_numpy(inputs.text),
            encoder_attention_mask=torch.from_numpy(inputs.mask),
            added_cond_kwargs={"time_ids": torch.from_numpy(inputs.time_ids)},
        ).sample
    return output.permute(0, 2, 3, 1).numpy()

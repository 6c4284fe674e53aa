"""Weights of ours that travel with the package."""

from pathlib import Path

SPRITES_VAE = Path(__file__).parent / "assets" / "sprites_vae.safetensors"


def vae_path(path: str) -> Path:
    """The autoencoder file that a config names; "" is the one shipped with the package."""
    return Path(path) if path else SPRITES_VAE


DEMO = Path(__file__).parent / "assets" / "demo"  # model folder of a small distilled model, see README.md

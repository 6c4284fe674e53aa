"""DreamLite in JAX: text-to-image and instruction editing in one network. `load_model(DIR)` is the way in."""

__version__ = "0.1.0"


def load_model(directory, **options):
    """The model of a folder that `train` or `conversion.from_torch` wrote; see `dreamlite_jax.model.Model`."""
    from dreamlite_jax.model import load_model as load

    return load(directory, **options)

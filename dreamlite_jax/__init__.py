"""DreamLite in JAX: text-to-image and instruction editing in one network. `load_model()` is the way in."""

__version__ = "0.1.0"


def load_model(directory=None, **options):
    """The model of a folder that `train` or `conversion.from_torch` wrote; see `dreamlite_jax.model.Model`.

    Without a folder: the small model of sprites that travels with the package.
    """
    from dreamlite_jax.assets import DEMO
    from dreamlite_jax.model import load_model as load

    return load(DEMO if directory is None else directory, **options)

"""The run-time type checker of the tests; `conftest.py` has the import hook put it on signatures.

It is beartype: typeguard 4.4 fails on strings inside nested annotations.
"""

import warnings

import jax
import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

# What JAX takes too where a signature names its own type: the class jnp.float32 as a dtype, a numpy array as an array.
LENIENT = {np.dtype: np.dtype | type, jax.Array: jax.Array | np.ndarray}

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(LENIENT)))

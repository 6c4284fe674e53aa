"""The run-time type checker of the tests; `conftest.py` has the import hook put it on signatures.

It is beartype: typeguard 4.4 fails on strings inside nested annotations.
"""

import warnings

import numpy as np
from beartype import BeartypeConf, BeartypeHintOverrides, beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

# Signatures say `jnp.dtype` where JAX takes what makes a dtype too, such as the class jnp.float32.
check = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({np.dtype: np.dtype | type})))

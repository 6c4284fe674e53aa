"""Weights and graphs between dreamlite_jax and everything else. Installed as `dreamlite_jax.conversion`."""

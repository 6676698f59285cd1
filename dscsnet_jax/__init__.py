"""dscsnet_jax: tell closely spaced infrared point targets apart.

Rooms, in the order the data walks through them: `physics` (grid, optics, scenes,
sensor, limits), `unfolding` (ADMM unfolded into DSCSNet), `estimation` (map to
targets), `evaluation` (scores), `training`, `io`, `cli`. Importing the package
changes no global state and touches no device.
"""

__version__ = "0.1.0"

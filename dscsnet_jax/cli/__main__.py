"""`python -m dscsnet_jax.cli`: the same as `dscsnet`."""

import sys

from dscsnet_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())

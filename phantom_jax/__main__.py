"""`python -m phantom_jax VERB` is the console script `phantom-jax VERB`."""

import sys

from phantom_jax.cli import main

sys.exit(main())

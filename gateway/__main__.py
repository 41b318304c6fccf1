"""`python -m gateway`: the same as `corral`."""

import sys

from gateway.cli import main

sys.exit(main())

"""`python -m deconstruct VERB ...` is `deconstruct VERB ...`."""

import sys

from deconstruct.cli import main

sys.exit(main())

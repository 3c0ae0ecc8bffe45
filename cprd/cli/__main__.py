"""python -m cprd.cli: cprctl from a checkout."""

import sys

from cprd.cli import main

sys.exit(main())

"""`python -m harness.cost '<cell as JSON>'` measures one cost cell and prints a JSON line."""

import sys

from harness.cost.cell import main

sys.exit(main(sys.argv[1:]))

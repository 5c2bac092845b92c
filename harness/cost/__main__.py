"""`python -m harness.cost '<cell as JSON>'` measures one cost cell and prints a JSON line; without a cell, those of its input."""

import sys

from harness.cost.cell import main
from harness.cost.forks import serve

sys.exit(main(sys.argv[1:]) if len(sys.argv) > 1 else serve(main))

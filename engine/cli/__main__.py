"""python -m fusedrl.engine.cli: the same as the command fusedrl."""

import sys

from fusedrl.engine.cli.main import main

sys.exit(main())

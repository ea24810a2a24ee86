"""python -m fusedrl, torchrun -m fusedrl: the same as the command fusedrl."""

import sys

from fusedrl.engine.cli.main import main

sys.exit(main())

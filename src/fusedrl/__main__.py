"""python -m fusedrl, torchrun -m fusedrl: the same as the command fusedrl."""

import sys

try:
    from fusedrl.engine.cli.main import main
except KeyboardInterrupt:  # while it is being imported
    print("fusedrl: interrupted", file=sys.stderr)
    sys.exit(130)

sys.exit(main())

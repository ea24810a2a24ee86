"""python -m fusedrl.engine.cli: the same as the command fusedrl."""

from fusedrl.engine.cli.program import program

program()

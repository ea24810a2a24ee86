"""python -m fusedrl, torchrun -m fusedrl: the same as the command fusedrl."""

from fusedrl.engine.cli.program import program

program()

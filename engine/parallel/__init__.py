"""Several devices of one machine: who trains together, and whose the parts of the work are."""

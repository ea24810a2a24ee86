"""Whether the kernels and the engine compute on this machine what they promise: the oracles of every op, and what tries them. `fusedrl verify`."""

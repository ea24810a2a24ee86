"""Whether the kernels and the engine compute on this machine what they promise: the oracles of every op, and what tries them. `fusedrl verify`.

The oracle of an op is its torch implementation in float64; that it computes what it should is the tests' part, by definitions of their own."""

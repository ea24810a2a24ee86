"""fusedrl verify: checks that the kernels and the engine compute correctly on this machine.

Every implementation of an op, also the torch one, is compared with the op's definition in float64
(definitions/), which shares no code with it. The engine's promises are checked on a tiny model. The
reference is the same engine on the CPU with the torch implementations, which were checked
before."""

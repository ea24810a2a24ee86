"""Whether the kernels and the engine compute on this machine what they promise. `fusedrl verify`.

Every implementation of an op, the torch one too, is compared with the op's definition in float64
(definitions/), which shares no code with it. The engine's promises are tried on a tiny model
against the same engine on the CPU, all of whose ops are then the torch implementations that were
compared before."""

"""Code shared by all ops: the choice of an implementation (dispatch), the compiled kernels (native,
nvrtc), checks of arguments, and faults of GPU kernels."""

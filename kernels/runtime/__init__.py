"""What ops share: which implementation serves a call (dispatch), the compiled kernels (native,
nvrtc), checks of arguments, and faults of GPU kernels."""

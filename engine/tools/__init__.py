"""Programs besides training: demo, doctor, bench, verify."""

"""What a person runs beside training: demo, doctor, bench, verify."""

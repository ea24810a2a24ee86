"""What looks at runs: evaluation, monitors, the alarm, the judge, reports, memory plans."""

"""Tools that observe or plan runs: evaluation, monitoring, the alarm, judging, reports, memory."""

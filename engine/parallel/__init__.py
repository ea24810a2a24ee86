"""Training on several devices of one machine: its processes, and how they divide the work."""

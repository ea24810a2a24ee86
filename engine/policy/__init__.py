"""The parts of a policy update: advantages, objectives, control, critic, TRPO."""

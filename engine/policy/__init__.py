"""What one update of a policy is made of: advantages, objectives, control, critic, TRPO."""

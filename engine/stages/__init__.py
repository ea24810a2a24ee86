"""The training loops: SFT, reward model, policy."""

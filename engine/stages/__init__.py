"""The training loops: SFT, reward model, DPO, rejection sampling, policy."""

"""What the baselines do over the sequence, in plain PyTorch: a file for each operation, which also has its recurrence."""

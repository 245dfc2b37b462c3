"""The operations of the baselines in plain PyTorch: any device, exact in fp64, sums in fp32 or wider."""

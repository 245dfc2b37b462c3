"""Operations of the mixers, the MLP and the loss: one folder each, with a PyTorch reference, Triton kernels and one public door.

    kernels/<operation>/__init__.py    the public functions: shapes, dtypes, an example; they pick the backend
    kernels/<operation>/reference.py   plain PyTorch, any device, exact in fp64, memory linear in tokens
    kernels/<operation>/triton_*.py    the kernels, the functions that launch them, and their gradients
    kernels/{layout,exchange,packing}.py, triton_{operand,overlap}.py    what operations share

The package imports nothing of ours but the errors. Tensor names carry their shape, and each file has a legend. The conventions of
the kernels (names of operands, sizes, tiles, flags and masks) are in CONTRIBUTING.md, "Kernels: the written dialect".
"""

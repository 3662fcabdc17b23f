"""Blocks and head that torch.compile joins into few kernels: what --compile asks for."""

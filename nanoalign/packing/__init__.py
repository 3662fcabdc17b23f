"""The default layout of rows: one behind the other without padding, each prompt computed once.

The attention of packed rows on CPU and CUDA, the plan of micro-batches, and the self-checks before
the first step.
"""

"""Arithmetic that needs care: unfused products, keep masks, sign election, the exact k-th magnitude."""

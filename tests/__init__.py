"""Tests and benchmarks. Each of their processes imports this first."""

from sp_core.torchvision_operators import declare_missing_operators

declare_missing_operators()

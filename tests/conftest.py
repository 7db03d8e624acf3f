"""What holds for every test: nothing is kept between runs, and our own deprecated calls are errors."""

import jax
import pytest

from zhixing import runtime

# Before JAX computes: runs in this process and those in processes of their own are compared to the bit, and XLA's
# settings decide in which order sums are rounded.
runtime.fit_processor(seeds=1)

# The persistent cache would hide that a program compiles twice, and leave files behind.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:zhixing(\..*)?")

"""What holds for every test: nothing is kept between runs, and our own deprecated calls are errors."""

import jax
import pytest

# The persistent cache would hide that a program compiles twice, and leave files behind.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:zhixing(\..*)?")

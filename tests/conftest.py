"""What holds for every test: nothing is kept between runs, and our own deprecated calls are errors."""

import jax
import pytest

from zhixing import runtime

# Before JAX computes: runs in this process and those in processes of their own are compared to the bit, and XLA's
# settings decide in which order sums are rounded.
runtime.fit_processor(rows=1)

# The persistent cache would hide that a program compiles twice, and leave files behind.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:zhixing(\..*)?")


# These compile much and run little: without XLA's optimisations they take half the time. Everything that trains, or
# compares runs of several processes to the bit, is compiled as for a user.
ARITHMETIC = (
    *(
        "a2c",
        "ac",
        "acer",
        "continuous_control",
        "contract",
        "convolution",
        "distributed",
        "distributions",
        "double_q_learning",
        "dqn",
    ),
    *(
        "emphasis",
        "features",
        "frames",
        "kfac",
        "maddpg",
        "mappo",
        "n_step_td",
        "networks",
        "optimisers",
        "ppo",
        "priorities",
    ),
    *(
        "q_learning",
        "reinforce",
        "replay",
        "returns",
        "sarsa",
        "sarsa_lambda",
        "sharded",
        "shared",
        "transforms",
        "trpo",
    ),
)


@pytest.fixture(scope="module", autouse=True)
def compilation(request: pytest.FixtureRequest) -> None:
    module = request.module.__name__.removeprefix("test_")
    jax.config.update("jax_disable_most_optimizations", module in ARITHMETIC)

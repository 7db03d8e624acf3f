"""Every algorithm on every probe environment: the known value, the right action."""

import jax.numpy as jnp
import numpy as np
import pytest
from probes import (
    CASES,
    DEFAULT_TOTAL_STEPS,
    PROBES,
    REWARDED,
    TOTAL_STEPS,
    accepts,
    ask,
    continuous_probe,
    known_values,
    make_algorithm,
    probe_environment,
    train,
    train_on_probes,
    variant,
)

from zhixing.core import Algorithm

SEEDS = 2
TOLERANCE = 0.1  # values are of the order of 1; a wrong bootstrap is off by at least 0.25


# All probes of an algorithm in one worker: they are one run.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES])
def learned(request):
    """-> of each probe the values and greedy actions [seeds, states] that were learned on it, and its known values."""
    algorithm = make_algorithm(request.param)
    steps = TOTAL_STEPS.get(variant(request.param)[0], DEFAULT_TOTAL_STEPS)
    run = train_on_probes(algorithm, steps, SEEDS)
    observations = probe_environment(algorithm).environment.observations
    answers = ask(algorithm.value, run, observations), ask(algorithm.policy, run, observations)
    # A policy with a memory answers for the start of an episode; later states depend on what came before them.
    # MADDPG's only remembers which of its policies plays.
    remembers = type(algorithm).play is not Algorithm.play and not hasattr(algorithm, "ensemble")
    states = [probe.starts if remembers else len(probe.successor) for probe in PROBES.values()]
    values, actions = (answer.reshape(len(PROBES), SEEDS, -1) for answer in answers)
    if np.issubdtype(actions.dtype, np.floating):  # nearer to the one at -1 or to that at 1
        actions = (actions > 0).astype(np.int32)
    return {
        name: (values[i, :, : states[i]], actions[i, :, : states[i]], known_values(algorithm, probe)[: states[i]])
        for i, (name, probe) in enumerate(PROBES.items())
    }


@pytest.mark.parametrize("name", PROBES)
def test_probe(learned, name):
    """Both seeds, in every state that the probe has."""
    best, (values, actions, known) = PROBES[name].actions, learned[name]
    np.testing.assert_allclose(values, [known] * SEEDS, atol=TOLERANCE)
    if best is not None:
        np.testing.assert_array_equal(actions, [best[: len(known)]] * SEEDS)


def takes_continuous_probe(name):
    algorithm = make_algorithm(name)
    return accepts(algorithm, continuous_probe(algorithm))


@pytest.mark.parametrize("name", [*filter(takes_continuous_probe, REWARDED)])
def test_continuous_probe(name):
    algorithm = make_algorithm(name)
    probe = continuous_probe(algorithm)
    run = train(algorithm, probe, 2 * TOTAL_STEPS.get(name, DEFAULT_TOTAL_STEPS))
    observations = np.asarray(probe.environment.observations)

    actions = ask(algorithm.policy, run, jnp.asarray(observations))  # [S, 2, 1], in the algorithm's units, [-1, 1]
    np.testing.assert_allclose(actions, np.broadcast_to(observations / 2, actions.shape), atol=TOLERANCE)
    values = ask(algorithm.value, run, jnp.asarray(observations))
    assert np.all(values > -0.4) and np.all(values < TOLERANCE)  # 0 but for the noise that explores

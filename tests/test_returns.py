"""Generalised advantage estimation and Retrace against their definitions in float64, and against rlax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zhixing.returns import generalized_advantages, retrace

T, N = 37, 3  # not a multiple of the unrolled part of the loop
DISCOUNT = 0.97


def random_rollout(seed=0):
    generator = np.random.default_rng(seed)
    reward, value, next_value = generator.normal(size=(3, T, N))
    terminated = generator.random((T, N)) < 0.1
    truncated = (generator.random((T, N)) < 0.1) & ~terminated
    assert terminated.any(0).all() and truncated.any(0).all()
    return reward, value, next_value, terminated, truncated


def advantages_by_definition(reward, value, next_value, terminated, truncated, discount, gae_lambda):
    """Â = sum over l of (γλ)^l δ, from each step forward to the end of its episode or of the rollout."""
    advantage = np.zeros_like(reward)
    for n in range(reward.shape[1]):
        for t in range(reward.shape[0]):
            for step in range(t, reward.shape[0]):
                following = 0.0 if terminated[step, n] else discount * next_value[step, n]
                delta = reward[step, n] + following - value[step, n]
                advantage[t, n] += (discount * gae_lambda) ** (step - t) * delta
                if terminated[step, n] or truncated[step, n]:
                    break
    return advantage


def ours(reward, value, next_value, terminated, truncated, discount, gae_lambda):
    arguments = reward, discount * (1.0 - terminated), terminated | truncated, value, next_value
    arguments = (jnp.asarray(x, bool if x.dtype == bool else jnp.float32) for x in arguments)
    return np.asarray(jax.jit(generalized_advantages)(*arguments, gae_lambda))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_definition(gae_lambda):
    rollout = random_rollout()
    expected = advantages_by_definition(*rollout, DISCOUNT, gae_lambda)
    np.testing.assert_allclose(ours(*rollout, DISCOUNT, gae_lambda), expected, rtol=1e-5, atol=1e-5)


def test_lambda_one_is_the_return_less_the_value():
    """Where nothing ends: Σ γ^l r + γ^T V(s_T) - V(s_t)."""
    reward, value, _, never, _ = random_rollout()
    never = np.zeros_like(never)
    next_value = np.concatenate([value[1:], np.full((1, N), 2.0)])
    target, expected = np.full(N, 2.0), np.zeros_like(reward)
    for t in reversed(range(T)):
        target = reward[t] + DISCOUNT * target
        expected[t] = target - value[t]
    np.testing.assert_allclose(ours(reward, value, next_value, never, never, DISCOUNT, 1.0), expected, atol=1e-5)


def test_what_follows_an_end():
    """After a termination nothing counts; after a truncation the successor's value alone."""
    reward, value, next_value, _, _ = random_rollout()
    terminated, truncated = np.zeros((2, T, N), bool)
    terminated[10], truncated[20] = True, True
    before = ours(reward, value, next_value, terminated, truncated, DISCOUNT, 0.9)

    changed = next_value.copy()
    changed[10] += 100.0  # of a terminal state: in no use
    later = reward.copy()
    later[21:] += 100.0  # of the next episode
    after = ours(later, value, changed, terminated, truncated, DISCOUNT, 0.9)
    np.testing.assert_array_equal(after[:21], before[:21])

    changed[20] += 1.0
    after = ours(later, value, changed, terminated, truncated, DISCOUNT, 0.9)
    np.testing.assert_allclose(after[20] - before[20], DISCOUNT, rtol=1e-4)
    np.testing.assert_array_equal(after[:11], before[:11])  # an earlier episode


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_rlax(gae_lambda):
    rlax = pytest.importorskip("rlax")
    # Comparable where the successor is the next row, and episodes only terminate.
    reward, value, _, terminated, _ = random_rollout(1)
    values = np.concatenate([value, np.ones((1, N))])
    discount = DISCOUNT * (1.0 - terminated)
    estimate = jax.vmap(rlax.truncated_generalized_advantage_estimation, (1, 1, None, 1), 1)
    expected = estimate(*(jnp.asarray(x, jnp.float32) for x in (reward, discount, gae_lambda, values)))
    actual = ours(reward, value, values[1:], terminated, np.zeros_like(terminated), DISCOUNT, gae_lambda)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- Retrace


def random_retrace(seed=0):
    """-> reward, q, next_value, trace, terminated, truncated; next_value is one of its own everywhere."""
    reward, q, next_value, terminated, truncated = random_rollout(seed)
    trace = np.random.default_rng(seed + 1).uniform(0, 1, size=(T, N))
    return reward, q, next_value, trace, terminated, truncated


def retrace_by_definition(reward, q, next_value, trace, terminated, truncated, discount):
    """Q + Σₖ γᵏ c₁ ... cₖ δₖ, from each step forward: Munos et al. 2016, eq. (3)."""
    result = q.copy()
    for n in range(reward.shape[1]):
        for t in range(reward.shape[0]):
            weight = 1.0
            for step in range(t, reward.shape[0]):
                following = 0.0 if terminated[step, n] else discount * next_value[step, n]
                result[t, n] += weight * (reward[step, n] + following - q[step, n])
                if terminated[step, n] or truncated[step, n] or step + 1 == reward.shape[0]:
                    break
                weight *= discount * trace[step + 1, n]
    return result


def retrace_by_recursion(reward, q, next_value, trace, terminated, truncated, discount):
    """Wang et al. 2017, eq. (5), backwards; Algorithm 2's bootstrap where the segment or the episode ends."""
    result = np.zeros_like(reward)
    for n in range(reward.shape[1]):
        for t in reversed(range(reward.shape[0])):
            result[t, n] = reward[t, n]
            if terminated[t, n]:
                continue
            result[t, n] += discount * next_value[t, n]
            if not truncated[t, n] and t + 1 < reward.shape[0]:
                result[t, n] += discount * trace[t + 1, n] * (result[t + 1, n] - q[t + 1, n])
    return result


def our_retrace(reward, q, next_value, trace, terminated, truncated, discount):
    arguments = reward, discount * (1.0 - terminated), terminated | truncated, q, next_value, trace
    arguments = (jnp.asarray(x, bool if x.dtype == bool else jnp.float32) for x in arguments)
    return np.asarray(jax.jit(retrace)(*arguments))


@pytest.mark.parametrize("form", [retrace_by_definition, retrace_by_recursion])
def test_retrace_by_both_forms(form):
    rollout = random_retrace()
    np.testing.assert_allclose(our_retrace(*rollout, DISCOUNT), form(*rollout, DISCOUNT), rtol=1e-5, atol=1e-5)


def test_retrace_without_traces_is_the_one_step_target():
    reward, q, next_value, trace, terminated, truncated = random_retrace()
    expected = reward + DISCOUNT * next_value * ~terminated
    actual = our_retrace(reward, q, next_value, 0 * trace, terminated, truncated, DISCOUNT)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_retrace_with_full_traces_of_its_own_values_is_the_return():
    """c = 1 and V(s) = Q(s, a): every correction telescopes, and the discounted return remains."""
    reward, q, _, trace, _, _ = random_retrace()
    never = np.zeros((T, N), bool)
    next_value = np.concatenate([q[1:], np.full((1, N), 2.0)])
    expected, target = np.zeros_like(reward), np.full(N, 2.0)
    for t in reversed(range(T)):
        target = expected[t] = reward[t] + DISCOUNT * target
    actual = our_retrace(reward, q, next_value, np.ones_like(trace), never, never, DISCOUNT)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_follows_an_end_does_not_reach_retrace():
    """After a termination nothing counts; after a truncation the successor's value alone."""
    reward, q, next_value, trace, _, _ = random_retrace()
    terminated, truncated = np.zeros((2, T, N), bool)
    terminated[10], truncated[20] = True, True
    before = our_retrace(reward, q, next_value, trace, terminated, truncated, DISCOUNT)

    later, changed = reward.copy(), next_value.copy()
    later[21:] += 100.0  # of the next episode
    changed[10] += 100.0  # of a terminal state: in no use
    after = our_retrace(later, q, changed, trace, terminated, truncated, DISCOUNT)
    np.testing.assert_array_equal(after[:21], before[:21])

    changed[20] += 1.0
    after = our_retrace(later, q, changed, trace, terminated, truncated, DISCOUNT)
    np.testing.assert_allclose(after[20] - before[20], DISCOUNT, rtol=1e-4)
    np.testing.assert_array_equal(after[:11], before[:11])  # an earlier episode


def test_retrace_rlax():
    rlax = pytest.importorskip("rlax")
    # Comparable where the successor is the next row, and episodes only terminate.
    reward, q, _, trace, terminated, _ = random_retrace(1)
    value = np.random.default_rng(3).normal(size=(T + 1, N))
    discount = DISCOUNT * (1.0 - terminated)
    returns = jax.vmap(rlax.general_off_policy_returns_from_q_and_v, 1, 1)
    expected = returns(*(jnp.asarray(x, jnp.float32) for x in (q[1:], value[1:], reward, discount, trace[1:])))
    actual = our_retrace(reward, q, value[1:], trace, terminated, np.zeros_like(terminated), DISCOUNT)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

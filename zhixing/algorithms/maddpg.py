"""Multi-agent deep deterministic policy gradient (MADDPG), for rivals and for teams, discrete and continuous actions.

Lowe et al., "Multi-agent actor-critic for mixed cooperative-competitive environments", arXiv:1706.02275, Algorithm 1.
o = (o₁, ..., o_A) and a = (a₁, ..., a_A) are what all agents see and do; every agent i has an actor that sees oᵢ alone,
and a critic that sees everything.

    (MADDPG.1)  aᵢ = μᵢ(oᵢ; θᵢ), with noise; of discrete actions aᵢ ~ softmax(μᵢ(oᵢ; θᵢ));  store (o, a, r, o')
    (MADDPG.2)  sample a minibatch of transitions; for each agent i:
    (MADDPG.3)  yᵢ = rᵢ + γ Qᵢ(o', μ₁(o'₁; θ₁⁻), ..., μ_A(o'_A; θ_A⁻); wᵢ⁻)                          paper, eq. (6)
    (MADDPG.4)  a gradient step on (yᵢ - Qᵢ(o, a; wᵢ))² with respect to wᵢ
    (MADDPG.5)  a gradient step on -Qᵢ(o, a₁, ..., μᵢ(oᵢ; θᵢ), ..., a_A; wᵢ) with respect to θᵢ       paper, eq. (5)
    (MADDPG.6)  wᵢ⁻ ← (1 - τ) wᵢ⁻ + τ wᵢ;  θᵢ⁻ ← (1 - τ) θᵢ⁻ + τ θᵢ

    (MADDPG.7)  discrete: the gradient of a sample aᵢ is that of softmax((μᵢ + Gumbel noise) / T): straight through
    (MADDPG.8)  inferring the others: in yᵢ stands in the place of μⱼ what agent i makes of it, μ̂ᵢⱼ, which follows
                log μ̂ᵢⱼ(aⱼ | oⱼ) + λ H[μ̂ᵢⱼ] upwards                                                   paper, eq. (7)
    (MADDPG.9)  ensembles: μᵢ is one of K policies, drawn at the start of each episode; each learns from the steps of
                its own episodes                                                                     paper, eq. (9)
    (MADDPG.10) twins (MATD3): the lesser of two critics in (MADDPG.3), whose target actions are noisy; actors and
                targets follow every d updates       Ackermann et al., arXiv:1910.01465

Departures: one minibatch for all agents; a policy of an ensemble finds its own steps in a replay that all share.
"""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing.continuous import GAIN
from zhixing.core import ANY, ActionSpaces, Clock, Spec, hyperparameters, require_between, require_positive
from zhixing.distributions import NEVER
from zhixing.errors import UsageError
from zhixing.exploration import ActionNoise, first_noise, noisy
from zhixing.learned import Learned, Vector
from zhixing.networks import MLP, Ensemble, regression
from zhixing.off_policy import OffPolicyActorCritic
from zhixing.optimisers import clip_by_norm
from zhixing.transition import Experience


class Policy(eqx.Module):
    """μᵢ(oᵢ): actions within [-1, 1], or logits."""

    mlp: MLP
    discrete: bool = eqx.field(static=True)

    def __call__(self, observation: jax.Array, allowed: jax.Array) -> jax.Array:
        """`observation` [B, d]; `allowed` [m] bool, what the agent has of all that any has -> [B, m]."""
        outputs = self.mlp(observation)
        return jnp.where(allowed, outputs, NEVER) if self.discrete else jnp.where(allowed, jnp.tanh(outputs), 0.0)


class JointValue(eqx.Module):
    """Qᵢ(o, a)."""

    mlp: MLP

    def __call__(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        """`observation` [B, A, d], `action` [B, A, m] -> [B]."""
        both = (x.reshape(len(x), -1) for x in (observation, action))
        return self.mlp(jnp.concatenate([*both], -1))[..., 0]


class State(NamedTuple):
    actors: Learned  # [A, K], μᵢ(·; θᵢ)
    critics: Learned  # [A], Qᵢ(·; wᵢ), one or two side by side
    guesses: Any  # Learned [A, A], μ̂ᵢⱼ, where others are inferred
    actor_target: Vector  # [A, K], μᵢ(·; θᵢ⁻)
    critics_target: Vector  # [A], Qᵢ(·; wᵢ⁻)
    guesses_target: Any  # Vector [A, A]
    allowed: jax.Array  # [A, m] bool, which actions an agent has
    clock: Clock


class Carry(NamedTuple):
    noise: Any  # of Ornstein and Uhlenbeck, [N, A m]
    member: jax.Array  # [N, A] int32, which of its K policies an agent plays this episode


@hyperparameters
class MADDPG(OffPolicyActorCritic):
    """Multi-agent deep deterministic policy gradient."""

    action_spaces: ClassVar[ActionSpaces] = ANY
    many_agents: ClassVar[bool] = True

    discount: float = 0.95  # γ
    batch_size: int = 1024  # B
    hidden: tuple[int, ...] = (64, 64)  # units of each hidden layer, of actors and critics
    learning_rate: float = 1e-3  # of the actors
    critic_learning_rate: float = 1e-3
    polyak: float = 0.01  # τ
    max_gradient_norm: float | None = 0.5  # each agent's gradients are scaled down to this norm
    noise: ActionNoise = "gaussian"  # on top of continuous actions
    noise_std: float = 0.1  # σ, in units of half the range of the actions
    noise_theta: float = 0.15  # θ of the Ornstein-Uhlenbeck noise
    noise_dt: float = 0.01  # Δt of the Ornstein-Uhlenbeck noise
    gumbel_temperature: float = 1.0  # T
    logit_penalty: float = 1e-3  # on the mean square of an actor's outputs
    ensemble: int = 1  # K, policies of each agent
    infer_others: bool = False  # what others will do is what the agent makes of them, not what they would
    guess_entropy: float = 1e-3  # λ
    twin_critics: bool = False  # MATD3's
    policy_delay: int = 1  # d, updates of the critics for one of the actors and targets
    smoothing_std: float = 0.0  # of the noise on continuous target actions
    smoothing_clip: float = 0.5  # the most that it moves them

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "ensemble", "policy_delay", "gumbel_temperature", "noise_dt", "max_gradient_norm")
        require_between(self, 0, np.inf, "noise_std", "noise_theta", "logit_penalty", "guess_entropy")
        require_between(self, 0, np.inf, "smoothing_std", "smoothing_clip")
        boxes = () if spec.agents is None or spec.agents.discrete else spec.agents.action_spaces
        if not all(space.is_bounded() for space in boxes):  # type: ignore[attr-defined]
            raise UsageError("MADDPG needs actions with finite bounds; wrap the environment, or use MAPPO")
        if self.n_step > 1:
            raise UsageError(f"algorithm.n_step is {self.n_step}; MADDPG's targets are of one step, set it to 1")

    # ------------------------------------------------------------------------------------------ acting

    def init(self, key: jax.Array, spec: Spec) -> State:
        agents = spec.agents
        assert agents is not None
        count, d, m, clock = agents.count, agents.observation_size, agents.action_size, Clock.start(spec)
        actor_key, critic_key, guess_key = jax.random.split(key, 3)

        def mlp(key: jax.Array, *sizes: int) -> MLP:
            return MLP.create(key, *sizes, activation=self.activation, hidden_scale=GAIN, output_scale=GAIN)

        def actor(key: jax.Array) -> Learned:
            return Learned.create(Policy(mlp(key, d, *self.hidden, m), agents.discrete), self.optimiser(clock))

        def critic(key: jax.Array) -> Learned:
            one = lambda key: JointValue(mlp(key, count * (d + m), *self.hidden, 1))  # noqa: E731
            return Learned.create(Ensemble.create(one, key, 1 + self.twin_critics), self.critic_optimiser(clock))

        actors = jax.vmap(jax.vmap(actor))(split(actor_key, count, self.ensemble))
        critics = jax.vmap(critic)(split(critic_key, count))
        guesses: Any = jax.vmap(jax.vmap(actor))(split(guess_key, count, count)) if self.infer_others else ()
        targets = actors.frozen, critics.frozen, guesses.frozen if self.infer_others else ()
        return State(actors, critics, guesses, *targets, jnp.asarray(agents.allowed), clock)

    def carry(self, spec: Spec, key: jax.Array) -> Carry:
        assert spec.agents is not None
        shape = spec.num_environments, spec.agents.count
        noise = () if spec.agents.discrete else first_noise(self, shape[0], shape[1] * spec.agents.action_size)
        return Carry(noise, jax.random.randint(key, shape, 0, self.ensemble))

    def act(self, state: State, carry: Carry, observation: jax.Array, key: jax.Array):  # (MADDPG.1)
        outputs = self.outputs(state.actors.net, state, observation, carry.member)
        random = state.clock.steps < self.learning_starts
        extras = carry.member if self.ensemble > 1 else ()
        if state.actors.net.discrete:
            logits = jnp.where(random & state.allowed, 0.0, outputs)
            return jax.random.categorical(key, logits).astype(jnp.int32), carry, extras
        flat = outputs.reshape(len(outputs), -1)
        action, noise = noisy(self, carry.noise, flat, random, key)
        return action.reshape(outputs.shape), carry._replace(noise=noise), extras

    def play(self, state: State, carry: Carry, observation: jax.Array) -> tuple[jax.Array, Carry]:
        outputs = self.outputs(state.actors.net, state, observation, carry.member)
        return outputs.argmax(-1).astype(jnp.int32) if state.actors.net.discrete else outputs, carry

    def policy(self, state: State, observation: jax.Array) -> jax.Array:
        """Of the first policy of each ensemble."""
        return self.play(state, Carry((), jnp.zeros(observation.shape[:2], jnp.int32)), observation)[0]

    def value(self, state: State, observation: jax.Array) -> jax.Array:
        """Qᵢ(o, μ(o)) of every agent, [B, A]; with twins the lesser."""
        action = self.one_hot(state, self.policy(state, observation))
        return jax.vmap(lambda q: q(observation, action).min(0), out_axes=-1)(state.critics.net)

    def outputs(self, policies: Policy, state: State, observation: jax.Array, member: jax.Array) -> jax.Array:
        """What the policies [A, K] say, of each agent the one that plays: `member` [B, A] -> [B, A, m]."""

        def of_agent(policies: Policy, observation: jax.Array, member: jax.Array, allowed: jax.Array) -> jax.Array:
            said = jax.vmap(lambda policy: policy(observation, allowed))(policies)  # [K, B, m]
            return said[0] if self.ensemble == 1 else jnp.take_along_axis(said, member[None, :, None], 0)[0]

        return jax.vmap(of_agent, (0, 1, 1, 0), 1)(policies, observation, member, state.allowed)

    def one_hot(self, state: State, action: jax.Array) -> jax.Array:
        """Actions as critics read them: [B, A] or [B, A, m] -> [B, A, m]."""
        return jax.nn.one_hot(action, state.allowed.shape[-1]) if state.actors.net.discrete else action

    def sampled(self, outputs: jax.Array, discrete: bool, key: jax.Array) -> jax.Array:
        """Actions [..., m] of a policy that says `outputs`: these, or one-hot samples with a gradient, (MADDPG.7)."""
        if not discrete:
            return outputs
        noise = jax.random.gumbel(key, outputs.shape)
        soft = jax.nn.softmax((outputs + noise) / self.gumbel_temperature)
        hard = jax.nn.one_hot(soft.argmax(-1), outputs.shape[-1])
        return hard + soft - jax.lax.stop_gradient(soft)

    # ---------------------------------------------------------------------------------------- learning

    def update(self, state: State, batch: Experience, key: jax.Array) -> tuple[State, dict]:
        target_key, actor_key = jax.random.split(key)
        batch = batch._replace(action=self.one_hot(state, batch.action))
        state, metrics = self.guess(state, batch) if self.infer_others else (state, {})
        next_action = self.expected(state, batch, target_key)  # [A, B, A, m]
        weight = batch.weight[:, None] * batch.active  # [B, A]

        def criticise(critics: Learned, target: Vector, reward: Any, discount: Any, next_action: Any, weight: Any):
            next_value = target(batch.next_observation, next_action).min(0)
            y = reward + discount * next_value  # (MADDPG.3)
            loss = lambda critics: regression(critics(batch.observation, batch.action), y, weight)  # noqa: E731
            return critics.minimise(loss, self.critic_optimiser(state.clock))  # (MADDPG.4)

        of_agents = batch.reward.T, batch.discount.T, next_action, weight.T
        critics, found = jax.vmap(criticise)(state.critics, state.critics_target, *of_agents)
        metrics |= found | {"td_error": found["td_error"].mean(0)}

        def delayed(state: State) -> tuple[State, jax.Array]:
            actors, loss = self.improve(state, critics, batch, weight, actor_key)  # (MADDPG.5)
            targets = {
                name: optax.incremental_update(new.frozen, getattr(state, name), self.polyak)  # (MADDPG.6)
                for name, new in (("actor_target", actors), ("critics_target", critics))
            }
            return state._replace(actors=actors, **targets), loss

        if self.policy_delay == 1:
            state, loss = delayed(state)
        else:
            due = (state.clock.updates + 1) % self.policy_delay == 0
            state, loss = jax.lax.cond(due, delayed, lambda state: (state, jnp.float32(0)), state)
        return state._replace(critics=critics), metrics | {"actor_loss": loss}

    def expected(self, state: State, batch: Experience, key: jax.Array) -> jax.Array:
        """What each agent takes for the next actions of all: [A, B, A, m]."""
        policies, count = state.actor_target.net, len(state.allowed)
        sample_key, noise_key, guess_key = jax.random.split(key, 3)
        outputs = self.outputs(policies, state, batch.next_observation, self.members(batch))
        action = self.sampled(outputs, policies.discrete, sample_key)
        if not policies.discrete:  # (MADDPG.10)
            noise = self.smoothing_std * jax.random.normal(noise_key, action.shape)
            noise = jnp.clip(noise, -self.smoothing_clip, self.smoothing_clip)
            action = jnp.where(state.allowed, jnp.clip(action + noise, -1.0, 1.0), 0.0)
        expected = jnp.broadcast_to(action, (count, *action.shape))
        if not self.infer_others:
            return expected
        guessed = self.sampled(
            self.guessed(state.guesses_target.net, state, batch.next_observation), policies.discrete, guess_key
        )
        own = jnp.eye(count, dtype=bool)[:, None, :, None]
        return jnp.where(own, expected, guessed)  # (MADDPG.8)

    def improve(
        self, state: State, critics: Learned, batch: Experience, weight: jax.Array, key: jax.Array
    ) -> tuple[Learned, jax.Array]:
        """A step of every policy up its agent's critic."""
        count, discrete, members = len(state.allowed), state.actors.net.discrete, self.members(batch)

        def of_policy(actor: Learned, member: jax.Array, agent: jax.Array, q: JointValue, key: jax.Array):
            mine = jnp.arange(count) == agent
            observation, allowed = batch.observation[:, agent], state.allowed[agent]
            share = weight[:, agent] * (members[:, agent] == member)  # (MADDPG.9)

            def loss(policy: Policy) -> tuple[jax.Array, dict]:
                outputs = policy(observation, allowed)
                own = self.sampled(outputs, discrete, key)
                value = q(batch.observation, jnp.where(mine[:, None], own[:, None], batch.action))
                loss = -(share * value).sum() / jnp.maximum(share.sum(), 1.0)
                penalty = jnp.square(jnp.where(allowed, outputs, 0.0)).mean() if discrete else 0.0
                return loss + self.logit_penalty * penalty, {"loss": loss}

            actor, metrics = actor.minimise(loss, self.optimiser(state.clock))
            return actor, metrics["loss"]

        of_ensemble = jax.vmap(of_policy, (0, 0, None, None, 0))
        keys = split(key, count, self.ensemble)
        q = jax.vmap(lambda critics: critics.net.first)(critics)
        actors, loss = jax.vmap(of_ensemble, (0, None, 0, 0, 0))(
            state.actors, jnp.arange(self.ensemble), jnp.arange(count), q, keys
        )
        return actors, loss.mean()

    def guess(self, state: State, batch: Experience) -> tuple[State, dict]:
        """A step of what agents make of each other towards what these did, (MADDPG.8)."""

        def follow(guess: Learned, observation: jax.Array, action: jax.Array, allowed: jax.Array):
            def loss(policy: Policy) -> tuple[jax.Array, dict]:
                outputs = policy(observation, allowed)
                if not policy.discrete:  # of a normal distribution around them, whose entropy is what it is
                    loss = jnp.square(outputs - action).sum(-1).mean()
                else:
                    log_p = jax.nn.log_softmax(outputs)
                    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
                    loss = -((action * log_p).sum(-1) + self.guess_entropy * entropy).mean()
                return loss, {"guess_loss": loss}

            return guess.minimise(loss, self.optimiser(state.clock))

        by_all = jax.vmap(jax.vmap(follow, (0, 1, 1, 0)), (0, None, None, None))
        guesses, metrics = by_all(state.guesses, batch.observation, batch.action, state.allowed)
        target = optax.incremental_update(guesses.frozen, state.guesses_target, self.polyak)
        return state._replace(guesses=guesses, guesses_target=target), {"guess_loss": metrics["guess_loss"].mean()}

    def guessed(self, guesses: Policy, state: State, observation: jax.Array) -> jax.Array:
        """What each agent thinks that all will say: [A, B, A, m]."""
        by_one = jax.vmap(lambda guess, o, allowed: guess(o, allowed), (0, 1, 0), 1)
        return jax.vmap(by_one, (0, None, None))(guesses, observation, state.allowed)

    def members(self, batch: Experience) -> jax.Array:
        """[B, A], which of its policies an agent played."""
        return batch.extras if self.ensemble > 1 else jnp.zeros(batch.reward.shape, jnp.int32)

    def optimiser(self, clock: Clock) -> optax.GradientTransformation:
        return self.clipped(super().optimiser(clock))

    def critic_optimiser(self, clock: Clock) -> optax.GradientTransformation:
        return self.clipped(super().critic_optimiser(clock))

    def clipped(self, optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
        if self.max_gradient_norm is None:
            return optimiser
        return optax.chain(clip_by_norm(self.max_gradient_norm), optimiser)


def split(key: jax.Array, *shape: int) -> jax.Array:
    """Keys [*shape, 2]."""
    return jax.random.split(key, int(np.prod(shape))).reshape(*shape, 2)

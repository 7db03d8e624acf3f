"""What benchmarks/speed.py measures: the tasks, and what runs inside each measured process."""

import importlib
import time
from collections.abc import Callable
from typing import Any

OFF_POLICY: dict[str, Any] = {"num_environments": 1, "hidden": (256, 256), "replay_capacity": 100_000,
                              "learning_starts": 1_000, "discount": 0.99}  # fmt: skip
CONTINUOUS: dict[str, Any] = OFF_POLICY | {"environment": "Pendulum-v1", "batch_size": 256, "polyak": 0.005}
TASKS: dict[str, dict[str, Any]] = {
    "ppo": {"environment": "CartPole-v1", "num_environments": 8, "rollout_length": 32, "epochs": 4, "minibatches": 4,
            "hidden": (64, 64), "learning_rate": 3e-4, "discount": 0.98, "gae_lambda": 0.8, "max_gradient_norm": 0.5},
    "a2c": {"environment": "CartPole-v1", "num_environments": 8, "rollout_length": 5, "hidden": (64, 64),
            "learning_rate": 7e-4, "discount": 0.99, "gae_lambda": 1.0, "max_gradient_norm": 0.5},
    "trpo": {"environment": "CartPole-v1", "num_environments": 8, "rollout_length": 128, "epochs": 10, "minibatches": 8,
             "hidden": (64, 64), "learning_rate": 1e-3, "discount": 0.99, "gae_lambda": 0.95, "max_kl": 0.01,
             "damping": 0.1, "conjugate_gradient_steps": 15, "fisher_stride": 1, "backtracks": 10,
             "backtrack_factor": 0.8},
    "dqn": OFF_POLICY | {"environment": "CartPole-v1", "batch_size": 64, "target_period": 200, "learning_rate": 1e-3,
                         "epsilon_start": 0.05, "epsilon_end": 0.05, "max_gradient_norm": 10.0},
    "sac": CONTINUOUS | {"learning_rate": 3e-4, "critic_learning_rate": 3e-4},
    "td3": CONTINUOUS | {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "noise_std": 0.1, "policy_delay": 2,
                         "smoothing_std": 0.2, "smoothing_clip": 0.5},
    "ddpg": CONTINUOUS | {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "noise_std": 0.1},
    "q_learning": {"environment": "FrozenLake-v1", "num_environments": 1},
}  # fmt: skip
TASKS["dqn_64"] = TASKS["dqn"] | {"algorithm": "dqn", "hidden": (64, 64)}  # "algorithm": where the task's name is not
for name in ("sac", "td3", "ddpg"):
    TASKS[f"{name}_64"] = TASKS[name] | {"algorithm": name, "hidden": (64, 64), "batch_size": 64}
    TASKS[f"{name}_halfcheetah"] = TASKS[name] | {"algorithm": name, "environment": "HalfCheetah-v5",
                                                  "backend": "envpool"}  # fmt: skip
WARM_UP = 1_100  # environment steps; the off-policy algorithms are learning by then
TOTAL_STEPS = 8_000_000  # what the schedules are told; more than a measurement makes


def timed(function: Callable, *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def measure_zhixing(task: str, seconds: float, seeds: int = 1, **more: Any) -> dict[str, float]:
    settings = TASKS[task] | more

    def load() -> tuple:
        import jax

        from zhixing import assembly, config, runtime
        from zhixing.algorithms import algorithm_class
        from zhixing.drivers.compiled import CompiledDriver

        runtime.fit_processor(seeds)  # as `zhixing train` does; NPROC is set already
        return jax, assembly, config, algorithm_class(settings.pop("algorithm", task)), CompiledDriver

    (jax, assembly, config, algorithm_class, CompiledDriver), import_seconds = timed(load)
    backend = settings.pop("backend", "jax")
    environment_config = config.EnvironmentConfig(id=settings.pop("environment"), backend=backend)
    n = settings.pop("num_environments")
    algorithm = algorithm_class(**settings)
    run_config = config.Config(algorithm, environment_config, TOTAL_STEPS, n, seeds=seeds)
    length = algorithm.steps_per_iteration

    environment = assembly.build_environment(run_config)
    loop = assembly.build_loop(run_config, environment)
    driver = CompiledDriver(loop, environment.batch(loop.seeds, n), environment.saves_state)

    def advance(run: Any, iterations: int) -> Any:
        return jax.block_until_ready(driver.advance(algorithm, run, iterations, length))

    run, first_seconds = timed(lambda: advance(driver.start(algorithm), 1))
    run = advance(run, -(-WARM_UP // (length * n)))
    iterations, took = 1, 0.0
    while took < 0.2:  # long enough that calling the program costs nothing
        iterations *= 2
        run, took = timed(advance, run, iterations)
    started, cpu_started, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        run = advance(run, iterations)
        steps += iterations * length * n * seeds
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return {"rate": steps / wall, "cores": cpu / wall, "import": import_seconds, "first": first_seconds}


def peer_model(package: str, task: str) -> Any:
    """The model of Stable-Baselines3, of its contrib package or of SBX that learns as zhixing's does."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise

    s = TASKS[task]
    algorithm = s.get("algorithm", task)
    environment = make_vec_env(s["environment"], s["num_environments"], seed=0)
    settings = {"learning_rate": s["learning_rate"], "gamma": s["discount"], "seed": 0, "device": "cpu"}
    if "max_gradient_norm" in s:
        settings["max_grad_norm"] = s["max_gradient_norm"]
    if "rollout_length" in s:  # on-policy
        settings |= {"n_steps": s["rollout_length"], "gae_lambda": s["gae_lambda"],
                     "policy_kwargs": {"net_arch": {"pi": list(s["hidden"]), "vf": list(s["hidden"])}}}  # fmt: skip
    else:
        settings |= {"buffer_size": s["replay_capacity"], "learning_starts": s["learning_starts"],
                     "batch_size": s["batch_size"], "tau": s.get("polyak", 1.0), "train_freq": 1, "gradient_steps": 1,
                     "policy_kwargs": {"net_arch": list(s["hidden"])}}  # fmt: skip
    if "minibatches" in s:
        settings["batch_size"] = s["num_environments"] * s["rollout_length"] // s["minibatches"]
    if "noise_std" in s:
        (size,) = environment.action_space.shape
        settings["action_noise"] = NormalActionNoise([0.0] * size, [s["noise_std"]] * size)
    if package == "sbx":  # which has a second learning rate, as zhixing has
        settings["qf_learning_rate"] = s["critic_learning_rate"]
    match algorithm:
        case "ppo":
            settings |= {"n_epochs": s["epochs"], "ent_coef": 0.0, "vf_coef": 0.5, "clip_range": 0.2}
        case "a2c":
            settings |= {"ent_coef": 0.0, "vf_coef": 0.5, "rms_prop_eps": 1e-5}
        case "trpo":
            settings |= {"target_kl": s["max_kl"], "cg_damping": s["damping"], "n_critic_updates": s["epochs"],
                         "cg_max_steps": s["conjugate_gradient_steps"], "sub_sampling_factor": s["fisher_stride"],
                         "line_search_max_iter": s["backtracks"],
                         "line_search_shrinking_factor": s["backtrack_factor"]}  # fmt: skip
        case "dqn":
            settings |= {"target_update_interval": s["target_period"], "exploration_initial_eps": s["epsilon_start"],
                         "exploration_final_eps": s["epsilon_end"]}  # fmt: skip
        case "td3":
            settings |= {"policy_delay": s["policy_delay"], "target_policy_noise": s["smoothing_std"],
                         "target_noise_clip": s["smoothing_clip"]}  # fmt: skip
    return getattr(importlib.import_module(package), algorithm.upper())("MlpPolicy", environment, **settings)


def measure_peer(package: str, task: str, seconds: float, threads: int) -> dict[str, float]:
    def load() -> tuple:
        import torch
        from stable_baselines3.common.callbacks import BaseCallback

        importlib.import_module(package)
        return torch, BaseCallback

    (torch, BaseCallback), import_seconds = timed(load)
    torch.set_num_threads(threads)

    class Timer(BaseCallback):
        """Notes the time at the start of each rollout, when all before it has been learned from."""

        def __init__(self):
            super().__init__()
            self.marks: list[tuple[int, float, float]] = []
            self.counted, self.end = 0, float("inf")

        def _on_rollout_start(self) -> None:
            self.marks.append((self.num_timesteps, time.perf_counter(), time.process_time()))
            if self.num_timesteps >= WARM_UP:
                self.counted += 1
                self.end = min(self.end, time.perf_counter() + seconds)

        def _on_step(self) -> bool:
            return time.perf_counter() < self.end or self.counted < 2  # one whole rollout at least

    started = time.perf_counter()
    model, timer = peer_model(package, task), Timer()
    model.learn(TOTAL_STEPS, callback=timer)
    first, last = next(mark for mark in timer.marks if mark[0] >= WARM_UP), timer.marks[-1]
    steps, wall, cpu = (b - a for a, b in zip(first, last, strict=True))
    first_seconds = timer.marks[1][1] - started
    learning_starts = TASKS[task].get("learning_starts")
    if learning_starts is not None:  # two updates are of the first call: SBX compiles then, TD3 with and without actor
        begins = next(i for i, mark in enumerate(timer.marks) if mark[0] >= learning_starts)
        first_seconds += timer.marks[begins + 2][1] - timer.marks[begins][1]
    return {"rate": steps / wall, "cores": cpu / wall, "import": import_seconds, "first": first_seconds}


def measure_products(sizes: list[tuple[int, int, int]]) -> list[float]:
    """Seconds of each matrix product [m, k] x [k, n] inside a compiled loop, the best of five."""
    import jax
    import jax.numpy as jnp

    from zhixing import runtime

    runtime.fit_processor(rows=1)

    def repeat(x: jax.Array, w: jax.Array, times: int) -> Any:
        def once(_: Any, carry: tuple) -> tuple:
            x, y = carry
            x = x.at[0, 0].add(1e-9 * y[0, 0])  # so that no product can be left out
            return x, x @ w

        return jax.lax.fori_loop(0, times, once, (x, x @ w))

    program, best = jax.jit(repeat), []
    for m, k, n in sizes:
        x, w = jnp.full((m, k), 0.01), jnp.full((k, n), 0.01)
        times = max(5, int(2e8 / (m * k * n)) if m * k * n > 1e5 else 2_000)
        jax.block_until_ready(program(x, w, times))
        runs = [timed(lambda *a: jax.block_until_ready(program(*a)), x, w, times)[1] for _ in range(5)]
        best.append(min(runs) / (times + 1))
    return best

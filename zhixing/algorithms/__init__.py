"""The algorithms, by name. One file each; importing this package imports none of them."""

from importlib import import_module

from zhixing.errors import unknown

ALGORITHMS = {
    "q_learning": "QLearning",
    "double_q_learning": "DoubleQLearning",
    "sarsa": "Sarsa",
    "expected_sarsa": "ExpectedSarsa",
    "n_step_td": "NStepTD",
    "sarsa_lambda": "SarsaLambda",
    "dqn": "DQN",
    "reinforce": "Reinforce",
    "ac": "OneStepActorCritic",
    "a2c": "A2C",
    "a3c": "A3C",
    "acer": "ACER",
    "trpo": "TRPO",
    "ppo": "PPO",
    "dppo": "DPPO",
    "recurrent_ppo": "RecurrentPPO",
    "ddpg": "DDPG",
    "td3": "TD3",
    "sac": "SAC",
    "discrete_sac": "DiscreteSAC",
    "diayn": "DIAYN",
    "discrete_diayn": "DiscreteDIAYN",
    "mappo": "MAPPO",
    "recurrent_mappo": "RecurrentMAPPO",
    "ippo": "IPPO",
    "maddpg": "MADDPG",
}


def algorithm_class(name: str) -> type:
    """The class of the algorithm called `name`; hyphens do for underscores, and case does not count."""
    module = name.lower().replace("-", "_")
    if module not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)
    return getattr(import_module(f"zhixing.algorithms.{module}"), ALGORITHMS[module])


def name_of(algorithm: object) -> str:
    """The name of an algorithm object, "custom" for a user's own."""
    home, _, name = type(algorithm).__module__.rpartition(".")
    return name if home == __name__ and name in ALGORITHMS else "custom"

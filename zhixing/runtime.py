"""How JAX is set up before it computes anything: the cache of compiled programs, the threads, the other hosts."""

import os
from pathlib import Path

from zhixing.errors import UsageError

HOSTS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def cache_directory() -> Path:
    """Where compiled programs are kept between processes: `zhixing` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zhixing" / "compiled"


def keep_compiled_programs() -> None:
    """Turn on JAX's persistent cache, unless the user has set one or the folder cannot be written."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def join_hosts() -> int:
    """The number of this process among those that make one run; 0 where it is alone.

    The same command is given on every host, with the variables HOSTS: the first host's "address:port", how many
    processes there are, and which of them this one is. Raises UsageError where some are missing or nobody answers.
    """
    import jax

    given = {name: os.environ[name] for name in HOSTS if os.environ.get(name)}
    if jax.distributed.is_initialized():
        return jax.process_index()
    if not given:
        return 0  # without asking JAX, which would begin with the settings that it has so far
    if len(given) < len(HOSTS) or not all(given[name].isdecimal() for name in HOSTS[1:]):
        raise UsageError(f"a run on several hosts needs {', '.join(HOSTS)}: an address:port and two numbers")
    address, count, index = (given[name] for name in HOSTS)
    try:
        jax.distributed.initialize(address, int(count), int(index), initialization_timeout=120)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the hosts of the run do not find each other at {address}: {str(error)[:200]}") from None
    return jax.process_index()


def fit_processor(rows: int) -> None:
    """Settings of XLA for small networks, where the user has made none; call it before JAX computes anything.

    One thread for a single row, `rows` being the seeds times the workers of this process: its products are so small
    that handing them from thread to thread costs more than it gives (PPO on CartPole makes a third more steps with one
    than with two). With many the second core pays.
    Vectors of 512 bits where the processor has them: XLA takes 256 by itself (a tenth more steps). Copies within loops
    only where a finer analysis still asks for them, as XLA does on GPUs by itself (a twenty-fifth).
    """
    if rows == 1:
        os.environ.setdefault("NPROC", "1")
    wanted = {"--xla_cpu_copy_insertion_use_region_analysis": "true"}
    if has_512_bit_vectors():
        wanted["--xla_cpu_prefer_vector_width"] = "512"
    flags = os.environ.get("XLA_FLAGS", "")
    ours = [f"{flag}={value}" for flag, value in wanted.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()


def has_512_bit_vectors() -> bool:
    """Whether Linux says so of its processor."""
    try:
        return " avx512f " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False

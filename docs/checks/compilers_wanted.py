"""Prints the packages that compile for chips which are not here, in the versions that the installed JAX asks for."""

from __future__ import annotations

from importlib import metadata

_EXTRAS = ("tpu", "cuda12-local")


def main() -> None:
    asked = [line.partition(";") for line in metadata.requires("jax") or ()]
    wanted = {what.strip() for what, _, when in asked if any(f'"{x}"' in when for x in _EXTRAS)}
    version = metadata.version("jax")
    # The plugin brings its compiler as a package of its own, of the same version.
    found = {what for what in wanted if what.startswith(("libtpu", "jax-cuda12-plugin"))}
    print(*sorted(found), f"jax-cuda12-pjrt=={version}")


if __name__ == "__main__":
    main()

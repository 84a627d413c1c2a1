"""YAML files, read with every way in which one can be unreadable told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from s2d_jax.errors import UserError
from s2d_jax.files import read_text


def read_yaml(path: Path, remedy: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """What a YAML file holds; None if it is empty.

    Args:
        path: the file.
        remedy: the end of the messages.
        loader: a safe loader.

    Raises:
        UserError: as `read_text`, and if it is not valid YAML, is nested too deeply, or holds a number of thousands of digits
            or a date that is none.
    """
    text = read_text(path, remedy)
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:
        reason = "a number of thousands of digits, or a date that is none"
    raise UserError(f"{path}: not valid YAML: {reason[:160]}; {remedy}")

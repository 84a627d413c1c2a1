"""The wrong rules that `planted_faults.py` plants, by the part of the project that they are in."""

from __future__ import annotations

from faults.commands import CALIBRATION, COMMANDS
from faults.decoding import ACCEPTANCE, DECODING, DRAFTING, SAMPLING, TREES
from faults.fault import Fault as Fault
from faults.files import FILES, MODELS, TEXT
from faults.training import DATA, RUNS, SHARDING, TRAINING

FAULTS = [
    *(*ACCEPTANCE, *SAMPLING, *TREES, *DRAFTING, *DECODING, *TEXT, *MODELS, *FILES),
    *(*DATA, *TRAINING, *SHARDING, *RUNS, *CALIBRATION, *COMMANDS),
]

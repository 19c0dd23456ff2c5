"""Settings that count when torch and triton are imported: without a GPU kernels are interpreted; a worker of several
computes with one thread, as do the processes it starts (sums over more threads round otherwise)."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
from hypothesis import settings

settings.register_profile("same", derandomize=True)  # .ci/run asks for it: every run tries the same examples
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

transformers.logging.disable_progress_bar()  # what a command prints is its own

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

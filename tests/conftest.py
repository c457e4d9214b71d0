"""What holds for every test: no network, no deadlines on a shared machine."""

import os
from importlib.util import find_spec

# Read by libraries when they are first imported, hence before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Every core has a worker: threads that spin while they wait would take turns with the threads they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "QUIRE_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `make test-gpu` is what tests a GPU; all else is the same everywhere

if find_spec("hypothesis"):  # a machine that is lent to test its GPU may lack it, and those tests do without
    from hypothesis import settings

    # A slow neighbour must not fail a test, and a failure must print what reproduces it.
    settings.register_profile("quire", deadline=None, print_blob=True)
    settings.load_profile("quire")

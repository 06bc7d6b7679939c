"""Fixtures for all tests."""

import gc
import signal

import hypothesis
import pytest
from makers import checkpoints
from tools import schemas

from gap_runtime.cli import options as command_options

# Before any command takes it by its name: what one prints with --json in any test is what its
# documented schema says.
command_options.print_json = schemas.hold_to_schemas(command_options.print_json)

# Torch and the libraries beside it are hundreds of thousands of objects that never die; looking
# through them again and again is a tenth of the run.
gc.set_threshold(100_000, 20, 50)

# The same draws everywhere, and no folder of past failures in the checkout.
hypothesis.settings.register_profile("here", database=None, derandomize=True, deadline=None)
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True)
def polite_kills_end_no_test():
    """Commands that run in this process make an interrupt of SIGTERM, which outlives their test.

    One that came later, meant for a process that a test had started, would end the whole run.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def graphs_traced_once():
    """Exports of this process trace graphs that are the same once; see `shared_graphs`."""
    from makers.families import shared_graphs

    with shared_graphs():
        yield


@pytest.fixture(scope="session")
def make_llava_checkpoint():
    """The maker of small random checkpoints; see tests/makers/checkpoints.py for its options."""
    return checkpoints.make_llava_checkpoint


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """A small random LLaVA in one file: 5x5 patches, two layers, grouped heads. Read only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llava"
    return checkpoints.make_llava_checkpoint(folder, image_size=70, kv_heads=2)

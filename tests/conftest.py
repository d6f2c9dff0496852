import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module or class draws where it is imported does not depend on what was imported before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "long: larger draws, left out unless asked for by -m long")
    config.addinivalue_line("markers", "peers: other projects' cases, which are to be at hand; asked for by -m peers")
    config.addinivalue_line("markers", "models: models of optional libraries, some minutes for all of them")

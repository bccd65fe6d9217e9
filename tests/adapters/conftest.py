"""The engines that products are computed by, for the tests of adapters, too."""

from tests.ops.conftest import engine

__all__ = ["engine"]

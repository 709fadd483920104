"""A process group of this process alone, for tests that take optimizer steps."""

import pytest

from refine_titan.inference import join_process_group, leave_process_group


@pytest.fixture(scope="module")
def process_group():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what joining sets is taken back
            patch.delenv(name)
        join_process_group()
        yield
        leave_process_group()

"""The faults of `tests.mutations` can still be put in, and one of them is found."""

import pytest

from tests import mutations


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: fault.name)
def test_the_text_to_replace_is_there_once(fault):
    assert mutations.occurrences(fault) == 1, f"{fault.path} must hold the text that the fault replaces once"
    assert fault.new != fault.old


def test_names_differ():
    assert len({fault.name for fault in mutations.FAULTS}) == len(mutations.FAULTS)


@pytest.mark.slow
def test_a_fault_is_found():
    (fault,) = (fault for fault in mutations.FAULTS if fault.name == "CPU: lost diagonal of K_xx")
    assert mutations.run(fault)[0] == "found"

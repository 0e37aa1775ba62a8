"""The harnesses of `fuzz.py` for a moment each, and label files cut at every length."""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.ass.data import InputError
from tests.reliability.fuzz import TARGETS, main
from tests.reliability.fuzz_files import LABELS, read_label
from tests.reliability.fuzz_tensors import documented


@pytest.mark.parametrize("name", TARGETS)
def test_no_crash(name):
    harness = given(st.data())(TARGETS[name])
    settings(max_examples=60, suppress_health_check=list(HealthCheck))(harness)()


@pytest.mark.parametrize("layout", LABELS)
def test_a_label_file_cut_at_any_length_is_refused_or_whole(layout, tmp_path):
    whole = read_label(tmp_path, layout, LABELS[layout])
    refused = 0
    for length in range(len(LABELS[layout])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample = documented(lambda at=length: read_label(tmp_path, layout, LABELS[layout][:at]), InputError)
        refused += sample is None
        # Where all pixels were there, what was cut off is the mark of the end.
        assert sample is None or np.array_equal(sample.label, whole.label)
    # Behind the pixels come the end of their stream, two checksums, and a part of 12 bytes that ends the file.
    assert refused >= len(LABELS[layout]) - 22


def test_the_command_runs_for_as_long_as_it_is_told(capsys):
    assert main(["--seconds", "0.01", "class_shares"]) == 0
    assert "no crash" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["none"])

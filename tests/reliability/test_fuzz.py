"""The harnesses of `fuzz.py` for a moment each, what they have found, and label files cut at every length."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.reliability.fuzz import TARGETS, main

from examples.workbench.errors import InputError
from examples.workbench.training.checkpoints import load_checkpoint
from tests.errors import refuses
from tests.reliability.fuzz_files import CHECKPOINT, LABELS, RUN, STATE, parts, read_label, signed
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


# What the loaders let through as an error of PyTorch's or Python's when they were first fuzzed behind the checksum.
UNFIT = {
    "no group": lambda state: state["stateful"]["optimiser"].update(param_groups=[]),
    "another group": lambda state: state["stateful"]["optimiser"]["param_groups"][0].update(params=[0]),
    "a list of states": lambda state: state["stateful"]["optimiser"].update(state=[]),
    "no weight": lambda state: state["stateful"]["segmenter"].update({"0.weight": None}),
    "half a best": lambda state: state.update(best=(1,)),
    "no run": lambda state: state.update(run=[]),
    "no step": lambda state: state.update(step=None),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_a_checkpoint_of_another_kind_is_told_in_a_line(change, tmp_path):
    state, file = copy.deepcopy(STATE), io.BytesIO()
    change(state)
    torch.save(state, file)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000007.pt").write_bytes(signed(file.getvalue()))
    with refuses(InputError, tmp_path / "checkpoints/step-00000007.pt", "checkpoint of this run"):
        load_checkpoint(tmp_path, *parts(), RUN)


def test_a_checkpoint_of_other_settings_keeps_its_own_words(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000007.pt").write_bytes(CHECKPOINT)
    with refuses(InputError, "--resume", "seed 1", 0):
        load_checkpoint(tmp_path, *parts(), RUN | {"seed": 1})
    assert load_checkpoint(tmp_path, *parts(), RUN).step == 7


def test_the_command_runs_for_as_long_as_it_is_told(capsys):
    assert main(["--seconds", "0.01", "class_shares"]) == 0
    assert "no crash" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["none"])

"""Crashes looked for with drawn input: any other outcome than a result or a documented error is one.

The draws are the same in each run; `FUZZ_EXAMPLES=20000` before the command draws more of them.
"""

import copy
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from examples.workbench.errors import InputError
from examples.workbench.training.checkpoints import load_checkpoint
from tests.errors import refuses
from tests.reliability.fuzz_files import LABELS, RUN, STATE, fuzz_checkpoints, fuzz_label_files, parts, read_label
from tests.reliability.fuzz_tensors import documented, fuzz_class_shares, fuzz_class_sums, fuzz_resize_labels

HARNESSES = [fuzz_class_sums, fuzz_resize_labels, fuzz_class_shares, fuzz_label_files, fuzz_checkpoints]


@pytest.mark.parametrize("harness", HARNESSES)
def test_no_crash(harness):
    examples = int(os.environ.get("FUZZ_EXAMPLES", 60))
    phases = [Phase.generate, Phase.shrink]
    settings(max_examples=examples, phases=phases, suppress_health_check=list(HealthCheck))(given(st.data())(harness))()


@pytest.mark.parametrize("layout", LABELS)
def test_a_label_file_cut_at_any_length_is_refused_or_whole(layout, tmp_path):
    whole = read_label(tmp_path, layout, LABELS[layout])
    refused = 0
    for length in range(len(LABELS[layout])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample = documented(lambda at=length: read_label(tmp_path, layout, LABELS[layout][:at]), InputError)
        refused += sample is None
        # Where all pixels were there, only the mark of the end was cut off.
        assert sample is None or np.array_equal(sample.label, whole.label)
    # Behind the pixels come the end of their stream, two checksums, and a part of 12 bytes that ends the file.
    assert refused >= len(LABELS[layout]) - 22


# Contents of other kinds, whose errors of PyTorch or Python once came through.
UNFIT = {
    "no group": lambda state: state["stateful"]["optimiser"].update(param_groups=[]),
    "another group": lambda state: state["stateful"]["optimiser"]["param_groups"][0].update(params=[0]),
    "a list of states": lambda state: state["stateful"]["optimiser"].update(state=[]),
    "no weight": lambda state: state["stateful"]["segmenter"].update({"0.weight": None}),
    "half a best": lambda state: state.update(best=(1,)),
    "no run": lambda state: state.update(run=[]),
    "no step": lambda state: state.update(step=None),
    "nothing": lambda state: state.clear(),
}


@pytest.mark.parametrize("change", [*UNFIT.values(), None], ids=[*UNFIT, "as it was"])
def test_a_checkpoint_of_another_kind_is_refused(change, tmp_path):
    state = copy.deepcopy(STATE)
    path = tmp_path / "checkpoints/step-00000007.pt"
    path.parent.mkdir()
    if change is None:
        torch.save(state, path)
        assert load_checkpoint(tmp_path, parts(), RUN).step == 7
        return
    change(state)
    torch.save(state, path)
    with refuses(InputError, path, "checkpoint of this run"):
        load_checkpoint(tmp_path, parts(), RUN)

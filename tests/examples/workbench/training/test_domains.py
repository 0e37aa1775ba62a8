"""Which images a step draws, for each method and for the parts of ass-plus."""

import dataclasses

import pytest

from examples.workbench.training.learners import discriminator_settings
from examples.workbench.training.domains import choose_domains, segments_unlabelled
from examples.workbench.data.images import open_images
from examples.workbench.settings import Data, GlobalSettings, OptimiserSettings, SceneSettings, SelfTraining, SemanticSettings, Settings

SETTINGS = Settings(
    labelled=2,
    data=Data(size=(32, 32), scenes=SceneSettings(source=5, target=4, validation=1, test=1)),
    optimiser=OptimiserSettings(images=3, unlabelled=2),
)
NO_GLOBAL = GlobalSettings(weight=0)


@pytest.mark.parametrize(
    ("changes", "per_batch", "segmented"),
    [
        ({"method": "source-only"}, {"source": 3}, False),
        ({"method": "labelled-only"}, {"labelled": 3}, False),
        ({"method": "oracle"}, {"labelled": 3}, False),
        ({"method": "joint"}, {"source": 3, "labelled": 3}, False),
        ({"method": "semantic"}, {"source": 3, "labelled": 3}, False),
        ({"method": "global"}, {"source": 3, "labelled": 3, "unlabelled": 2}, True),
        ({"method": "ass", "global_alignment": NO_GLOBAL}, {"source": 3, "labelled": 3}, False),
        # Pooled by the teacher's probabilities; mixed alone, seen by the teacher only; and neither.
        ({"method": "ass-plus", "global_alignment": NO_GLOBAL}, {"source": 3, "labelled": 3, "unlabelled": 2}, True),
        (
            {"method": "ass-plus", "global_alignment": NO_GLOBAL, "self_training": SelfTraining(soft_pooling=False)},
            {"source": 3, "labelled": 3, "unlabelled": 2},
            False,
        ),
        (
            {
                "method": "ass-plus",
                "global_alignment": NO_GLOBAL,
                "self_training": SelfTraining(soft_pooling=False, weight=0),
            },
            {"source": 3, "labelled": 3},
            False,
        ),
        # Nothing to pool for.
        (
            {
                "method": "ass-plus",
                "global_alignment": NO_GLOBAL,
                "semantic_alignment": SemanticSettings(weight=0),
                "self_training": SelfTraining(weight=0),
            },
            {"source": 3, "labelled": 3},
            False,
        ),
    ],
)
def test_what_a_step_draws(changes, per_batch, segmented):
    settings = dataclasses.replace(SETTINGS, **changes)
    images = open_images(settings, None)
    chosen = choose_domains(settings, images, [3, 1], discriminators=discriminator_settings(settings), progress=False)
    assert list(chosen.per_batch.items()) == list(per_batch.items())
    assert segments_unlabelled(settings, discriminator_settings(settings)) is segmented
    assert chosen.sizes == {d: {"source": 5, "labelled": 2, "unlabelled": 4}[d] for d in per_batch}
    assert set(chosen.weights) == ({"source", "labelled"} if settings.method == "ass-plus" else set())

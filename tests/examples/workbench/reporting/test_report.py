import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text

from examples.workbench.reporting.prototypes import draw_prototypes
from examples.workbench.reporting.report import Prototypes, Shown, draw_report
from tests.errors import refuses

CLASSES = ["road", "sky_", "$ign"]
KEYS = [
    f"{kind}/{view}{suffix}"
    for view in ("global", "semantic")
    for kind, suffixes in (("loss", ["", "_discriminator"]), ("accuracy", ["_source", "_target"]), ("weight", [""]))
    for suffix in suffixes
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(style, "_DPI", 30)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The bytes of the report without changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "_DPI", 30)
        return draw(tmp_path_factory.mktemp("usual") / "a.png")


def shown(name="a", *, height=12, width=16):
    random = np.random.default_rng(0)
    label = random.integers(0, len(CLASSES), (height, width))
    label[:3] = 255
    image = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Shown(name, image, label, np.zeros_like(label), np.where(label == 255, 1, label))


def prototypes(seed=0, *, channels=5):
    random = np.random.default_rng(seed)
    source, target = random.normal(size=(2, len(CLASSES), channels)).astype(np.float32)
    return Prototypes(source, target)


def history(keys=KEYS, rows=60):
    random = np.random.default_rng(0)
    return [{"step": 10 * i, "loss/segmentation": 1.0} | {key: random.random() for key in keys} for i in range(rows)]


def draw(path, **changes):
    arguments = {
        "title": "A run",
        "before_name": "source-only",
        "after_name": "ass",
        "shown": [shown()],
        "classes": CLASSES,
        "history": history(),
        "before": prototypes(0),
        "after": prototypes(1),
    }
    draw_report(path, **(arguments | changes))
    return path.read_bytes()


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """The figure of a report, not rendered."""

    def drawn(**changes):
        figures = []
        monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
        (tmp_path / "a.png").touch()
        draw(tmp_path / "a.png", **changes)
        return figures[0]

    return drawn


def test_the_same_run_gives_the_same_bytes(tmp_path, usual):
    assert usual.startswith(b"\x89PNG")
    assert draw(tmp_path / "b.png") == usual
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    "changes",
    [
        {"shown": [shown()._replace(before=shown().after)]},
        {"shown": [shown()._replace(after=shown().before)]},
        {"after": prototypes(2)},
        {"after": prototypes(1)._replace(target=prototypes(3).target)},
        {"history": history(rows=50)},
        {"title": "Another run"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_whatever_changes_can_be_seen(tmp_path, usual, changes):
    assert draw(tmp_path / "b.png", **changes) != usual


def test_every_key_of_the_history_is_a_curve(figure_of):
    keys = ["loss/segmentation", *KEYS]
    values = np.random.default_rng(0).random((40, len(keys)))
    rows = [{"step": i} | dict(zip(keys, row, strict=True)) for i, row in enumerate(values)]
    curves = [line.get_ydata() for line in figure_of(history=rows).findobj(Line2D)]
    for key, column in zip(keys, values.T, strict=True):
        assert sum(np.array_equal(curve, column) for curve in curves) == 1, key


def test_curves_are_running_means_of_two_batches(figure_of):
    # Of 60 rows, 60 // 25 = 2 make a point: itself and the one before; the first has none before it.
    rows = [{"step": i, "loss/segmentation": float(i % 2)} for i in range(60)]
    curves = [list(line.get_ydata()) for line in figure_of(history=rows).findobj(Line2D)]
    assert [0.0] + [0.5] * 59 in curves


def test_another_ignore_index_draws_the_same(tmp_path, usual):
    moved = shown()._replace(label=np.where(shown().label == 255, 7, shown().label))
    assert draw(tmp_path / "b.png", shown=[moved], ignore_index=7) == usual


def test_masks_are_painted_in_the_colours_of_their_classes(figure_of):
    item = shown()
    image, label, before, after = (picture.get_array() for picture in figure_of(shown=[item]).findobj(AxesImage))
    np.testing.assert_array_equal(image, item.image)
    colours = style.class_colours(len(CLASSES))
    classed = item.label != 255
    for painted, ids in ((label, item.label), (before, item.before), (after, item.after)):
        np.testing.assert_array_equal(painted[classed], colours[ids[classed]])
    hatching = {tuple(colour) for colour in label[~classed]}
    assert hatching == {tuple(style.IGNORED), tuple(style.STRIPE)}


def test_gaps_in_the_history_leave_gaps(tmp_path):
    rows = history()
    for row in rows[::2]:
        row |= {"loss/global": float("nan"), "accuracy/global_source": None, "loss/semantic": float("inf")}
        del row["loss/semantic_discriminator"]
    without = [{key: value for key, value in row.items() if value is not None and np.isfinite(value)} for row in rows]
    assert draw(tmp_path / "a.png", history=rows) == draw(tmp_path / "b.png", history=without)


def test_rows_of_absent_classes_are_not_drawn(tmp_path):
    some = prototypes()
    some.source[0], some.target[2] = np.nan, np.nan
    other = Prototypes(some.source.copy(), some.target.copy())
    other.target[0], other.source[2] = 9.0, 9.0
    assert draw(tmp_path / "a.png", before=some) == draw(tmp_path / "b.png", before=other)


SEMANTIC_ONLY = history([key for key in KEYS if "semantic" in key])
NO_WEIGHTS = history([key for key in KEYS if "accuracy" in key])
NO_SOURCE = Prototypes(np.full((3, 5), np.nan), np.ones((3, 5)))
GLOBAL, SEMANTIC = "Accuracy of the global discriminator", "Accuracy of the semantic discriminator"
NONE = "no discriminator in this method"


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, ["0 road", "1 sky_", "2 $ign", "no class", "source-only", "ass", "A run"], []),
        ({}, [GLOBAL, SEMANTIC, "chance", "Segmentation loss", "Adversarial losses"], [NONE, "not in the log"]),
        ({"history": history([])}, [NONE, "Segmentation loss"], ["chance", "Adversarial losses"]),
        ({"history": SEMANTIC_ONLY}, [SEMANTIC], [GLOBAL, NONE]),
        ({"history": NO_WEIGHTS}, ["not in the log"], []),
        ({"history": []}, ["not in the log", NONE], []),
        ({"history": history(rows=1)}, ["chance"], []),
        ({"before": NO_SOURCE}, ["no class has a prototype in both domains"], []),
        ({"shown": [shown()._replace(label=np.full((12, 16), 255))]}, ["no labelled pixel"], []),
        ({"shown": [shown()._replace(after=shown().label)]}, ["100 % of pixels right"], []),
        ({"shown": [shown("x" * 30 + "y" * 30)]}, ["x" * 12 + "…" + "y" * 25], []),
    ],
)
def test_the_report_says(figure_of, changes, said, unsaid):
    found = [text.get_text() for text in figure_of(**changes).findobj(Text)]
    assert set(said) <= set(found)
    assert not set(unsaid) & set(found)


def test_images_of_any_shape(tmp_path):
    images = [shown(height=height, width=width) for height, width in [(40, 8), (8, 80), (1, 1)]]
    assert draw(tmp_path / "a.png", shown=images)


def test_nineteen_classes(tmp_path):
    names = [f"class of a name that is very long {k}" for k in range(19)]
    none = np.full((19, 2), np.nan)
    assert draw(tmp_path / "a.png", classes=names, before=Prototypes(none, none), after=Prototypes(none, none))


def test_prototypes_lie_on_their_principal_axes():
    # Four classes of two domains on a plane in a space of six: all variance is in two.
    random = np.random.default_rng(0)
    plane, _ = np.linalg.qr(random.normal(size=(6, 2)))
    flat = random.normal(size=(2, 4, 2)) * [5, 1]
    source, target = flat @ plane.T + 3
    axes = Figure().add_subplot()
    draw_prototypes(axes, source, target)
    drawn = np.array([line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"])
    crosses = np.array([line.get_xydata()[0] for line in axes.lines if line.get_marker() == "X"])
    before, after = np.concatenate([flat[0], flat[1]]), np.concatenate([drawn, crosses])

    def distances(points):
        return np.linalg.norm(points[:, None] - points, axis=-1)

    # An isometry of the plane keeps every distance; eight points of size ten, a handful of roundings each.
    np.testing.assert_allclose(distances(after), distances(before), atol=1e-12)
    assert np.var(after[:, 0]) > np.var(after[:, 1])
    assert np.abs(np.cov(after.T)[0, 1]) < 1e-12
    shares = np.var(after, axis=0) / np.var(after, axis=0).sum()
    assert axes.get_xlabel() == f"first principal axis, {100 * shares[0]:.0f} % of the variance"
    assert axes.get_ylabel() == f"second, {100 * shares[1]:.0f} %"
    assert [text.get_text() for text in axes.texts][:4] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("seed", range(6))
def test_axes_never_flip(seed):
    # Along a line on which every channel grows, further is to the right.
    steps = np.random.default_rng(seed).normal(size=(2, 5, 1))
    axes = Figure().add_subplot()
    draw_prototypes(axes, *(steps * [1.0, 2.0, 3.0]))
    right = [line.get_xydata()[0, 0] for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(np.argsort(right), np.argsort(steps[0, :, 0]))


def test_domain_gap_by_hand():
    # Each class's domains are 2 apart; the classes' centres 3, 4 and 5, a mean of 4.
    source = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [9.0, 9.0, 9.0]])
    target = source + np.array([0.0, 0.0, 2.0])
    target[3] = np.nan
    axes = Figure().add_subplot()
    draw_prototypes(axes, source, target)
    assert axes.texts[-1].get_text() == "domain gap 0.50 of class gap"
    assert [text.get_text() for text in axes.texts[:-1]] == ["0", "1", "2"]


def test_one_class_and_one_channel_are_drawn():
    axes = Figure().add_subplot()
    draw_prototypes(axes, np.array([[1.0], [np.nan]]), np.array([[3.0], [0.0]]))
    assert [text.get_text() for text in axes.texts] == ["0"]
    ends = axes.lines[0].get_xydata()
    np.testing.assert_array_equal(np.abs(ends[1] - ends[0]), [2.0, 0.0])


def test_equal_prototypes_are_drawn():
    axes = Figure().add_subplot()
    draw_prototypes(axes, np.ones((2, 3)), np.ones((2, 3)))
    assert [text.get_text() for text in axes.texts] == ["0", "1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shown": []}, ("shown", "none")),
        ({"shown": [shown()._replace(image=np.zeros((12, 16), np.uint8))]}, ("image", "[H, W, 3]", [12, 16])),
        ({"shown": [shown()._replace(image=np.zeros((12, 16, 3)))]}, ("image", "uint8", "float64", [12, 16, 3])),
        ({"shown": [shown()._replace(after=np.zeros((11, 16), int))]}, ("after", [12, 16], [11, 16])),
        ({"shown": [shown()._replace(before=np.full((12, 16), 3))]}, ("before", "below 3", 255, "got 3")),
        ({"shown": [shown()._replace(label=np.full((12, 16), -1))]}, ("label", "below 3", 255, "got -1")),
        ({"history": [{"loss/global": 1.0}]}, ("history", "step", {"loss/global": 1.0})),
        ({"before": Prototypes(np.ones((2, 5)), np.ones((2, 5)))}, ("before", "[3, C]", [2, 5])),
        ({"after": Prototypes(np.ones((3, 5)), np.ones((3, 4)))}, ("after", "[3, C]", [3, 5], [3, 4])),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, changes, words):
    with refuses(ValueError, *words):
        draw(tmp_path / "a.png", **changes)
    assert not list(tmp_path.iterdir())

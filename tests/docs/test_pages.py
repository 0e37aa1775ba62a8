"""Pages and README: every code block runs or is marked as output, every picture has its source, no link is broken."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import semshift
from docs.drawings.__main__ import DRAWINGS, FIGURES, RESULTS, STUDIES
from docs.pages import read_blocks
from examples.workbench.__main__ import main as trainer

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Only .ci/run tests these pages: they take too long.
SLOW = {"tutorial.md"}
# test_labels.py runs these recipes: they need exports of labelling tools.
ELSEWHERE = {"labels.md"}
CODE = [
    pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in SLOW else ())
    for page in PAGES
    if page.name not in ELSEWHERE and any(block.language == "python" for block in read_blocks(page))
]


@pytest.mark.parametrize("page", CODE)
def test_blocks_run(page, capsys, monkeypatch, tmp_path):
    """Run the blocks in order, as a reader pastes them. A `text` block right below a block is its output."""
    monkeypatch.chdir(tmp_path)
    names, blocks, printed = {"__name__": "__main__"}, read_blocks(page), ""
    for block, below in zip(blocks, [*blocks[1:], None]):
        if block.language == "python":
            exec(compile(block.code, f"{page.name}:{block.line}", "exec"), names)
            out = capsys.readouterr().out
            printed += out
            if below is not None and below.language == "text" and is_right_below(page, block, below):
                assert out == below.code, f"{page.name}:{below.line}"
    if page.name == "tutorial.md":
        # The page makes these claims about its two runs. Its numbers are those of one machine.
        plain, aligned = (float(apart) for apart in re.findall(r"prototypes ([\d.]+) apart", printed))
        assert aligned < 0.6 * plain
        right, plain_right = (
            np.nanmean([row["source_accuracy"] for row in names[rows][-10:]]) for rows in ("aligned_rows", "plain_rows")
        )
        assert right < plain_right


def is_right_below(page, block, below):
    between = page.read_text().splitlines()[block.line + block.code.count("\n") + 1 : below.line - 1]
    return not any(line.strip() for line in between)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_block_is_run_or_output(page):
    # `text` and `console` are output. test_labels.py reads `yaml`. .ci/run runs the `bash` commands of README. A diff
    # shows files that tests run. Every fence must name its language.
    allowed = {"python", "text", "console", "yaml", "diff"} | ({"bash"} if page.name == "README.md" else set())
    assert {block.language for block in read_blocks(page)} <= allowed
    fences = re.findall(r"^ *(`{3,})(.*)$", page.read_text(), flags=re.MULTILINE)
    assert all(info.strip() for _, info in fences[::2])
    assert not any(info.strip() for _, info in fences[1::2])


class Twice(torch.nn.Conv2d):
    """A segmenter whose features are its logits."""

    def forward(self, images):
        return [super().forward(images)] * 2


def test_the_loop_of_scaling_trains():
    """In one process. tests/test_alignment_ranks.py tests the alignment modules on two ranks."""
    names = {}
    for block in read_blocks(ROOT / "docs" / "scaling.md"):
        if block.language == "python":
            exec(block.code, names)
    network, align = Twice(3, 8, 4, 4), semshift.SemanticAlignment(8, 4)
    before = [parameter.clone() for parameter in (*network.parameters(), *align.parameters())]
    images, labels = torch.randn(2, 3, 16, 24), torch.randint(0, 4, (2, 4, 6))
    names["train"](network, align, [(images, labels, images, labels)] * 2, semshift.Constant(0.1))
    assert not any(map(torch.equal, before, (*network.parameters(), *align.parameters())))


def test_the_template_fits_the_folders_of_its_page(tmp_path, capsys):
    """docs/your-images.md: twelve target images, masks for four of them."""
    template = ROOT / "examples" / "workbench" / "template.yaml"
    folders = re.findall(r"^  (\w+): \{images: ([\w/]+), labels: ([\w/]+)\}", template.read_text(), flags=re.MULTILINE)
    assert [split for split, *_ in folders] == ["source", "target"]
    page = (ROOT / "docs" / "your-images.md").read_text()
    rng = np.random.default_rng(0)
    for split, *pair in folders:
        assert all(f"\u2500 {part}" in page for folder in pair for part in folder.split("/"))
        for folder, shape, count in zip(pair, ((96, 128, 3), (96, 128)), (12, 4 if split == "target" else 12)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 5, shape, dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    arguments = ["train", "--config", str(template), "--data-root", str(tmp_path)]
    assert trainer([*arguments, "--check"]) == 0
    out = capsys.readouterr().out
    assert "labelled: 4 images" in out
    assert "target: 12 images, 4 with a label file" in out
    assert out.splitlines()[-1].startswith("no problem")
    run = ["--out", str(tmp_path / "run"), "--steps", "1", "--data.size", "[32,32]"]
    assert trainer([*arguments, *run]) == 0
    assert sorted((tmp_path / "run" / "labelled.txt").read_text().split()) == ["0", "1", "2", "3"]
    assert (tmp_path / "run" / "report.png").exists()


def test_every_fault_has_its_test():
    """The tests that docs/faults.md names."""
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / "reliability" / f"{file}.py").read_text()


def test_every_picture_has_its_source():
    assert {path.name for path in FIGURES.iterdir()} == set(DRAWINGS)
    for path in RESULTS.glob("*.png"):
        studies = [path.stem if (STUDIES / f"{path.stem}.yaml").exists() else path.stem.removesuffix("-curves")]
        if path.stem == "summary":
            # The last line of the summary is the command that wrote it.
            studies = path.with_suffix(".md").read_text().rstrip("`\n").split(" study ")[-1].split()
        for study in studies:
            assert json.loads(path.with_name(f"{study}.json").read_text())
            assert (STUDIES / f"{study}.yaml").exists()


@pytest.mark.parametrize("name", ["logo-light.svg", "logo-dark.svg"])
def test_logos_match_the_code_that_draws_them(name, tmp_path):
    DRAWINGS[name](tmp_path / name)
    assert (tmp_path / name).read_text() == (FIGURES / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shifts.png", "pooling.png", "transpose.png", "modes.png", "schedules.png"])
def test_pictures_match_the_code_that_draws_them(name, tmp_path):
    DRAWINGS[name](tmp_path / name)
    drawn, kept = (np.asarray(Image.open(folder / name).convert("RGB"), dtype=float) for folder in (tmp_path, FIGURES))
    assert drawn.shape == kept.shape
    # Versions of Matplotlib place letters slightly differently. A changed curve or word differs far more.
    assert np.abs(drawn - kept).mean() < 0.5


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_to_files_are_not_broken(page):
    # Code may look like a link: `discriminators[\"semantic\"](target.means)`.
    text = re.sub(r"^(`{3,}).*?^\1|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for alternative, target in re.findall(r"(!?\[[^\]]*\])\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target
        assert alternative != "![]", f"{target} has no alternative text"

"""Draws docs/how-it-works.png: a softmax as sparse as a trained model's, and the tiles of it that gradients need.

python docs/how_it_works_figure.py
"""

import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torchtune_lce.commands.bench.statistics import EPS, TILE, order_of_use
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.commands.shared.trained_batches import trained_batch

PICTURE = Path(__file__).parent / "how-it-works.png"
SHAPE = Shape(tokens=512, hidden=256, vocab=131_072)
_SHOWN = 1024  # entries whose softmax is drawn one by one


def draw(path: Path) -> tuple[float, float]:
    """Writes the picture; returns the fraction of tiles kept in the order of the vocabulary, and in that of use."""
    batch = trained_batch(SHAPE, torch.float32, torch.device("cpu"))
    softmax = (batch.hidden @ batch.weight.T).softmax(-1)
    needed = (softmax >= EPS).scatter_(1, batch.targets[:, None], True)
    blocks = needed.view(-1, TILE, SHAPE.vocab).any(1)  # [row blocks, entries]
    sorted_blocks = blocks[:, order_of_use(blocks)]
    tiles, sorted_tiles = (x.view(len(blocks), -1, TILE).any(-1) for x in (blocks, sorted_blocks))
    kept = tuple(x.float().mean().item() for x in (tiles, sorted_tiles))

    # Without pyplot: no display is touched and no global state stays behind.
    figure = Figure(figsize=(11, 6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    above, middle, below = figure.subplots(3, 1, height_ratios=(2, 1, 1))
    logarithm = softmax[:, :_SHOWN].log10()
    image = above.imshow(logarithm, aspect="auto", cmap="Blues", vmin=-7, vmax=0, interpolation="nearest")
    figure.colorbar(image, ax=above, label="log10 of the softmax")
    above.set_title(f"The softmax of {SHAPE.tokens:,} tokens: {_SHOWN:,} of {SHAPE.vocab:,} entries", loc="left")
    for axis, shown, title in (
        (middle, tiles, f"Tiles of {TILE} x {TILE} that gradients need: {kept[0]:.0%}"),
        (
            below,
            sorted_tiles,
            f"The same, the vocabulary sorted by how many row blocks need it, and which: {kept[1]:.0%}",
        ),
    ):
        axis.imshow(shown, aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
        axis.set_title(title, loc="left")
        axis.set_ylabel("row block")
    above.set_ylabel("token")
    above.set_xlabel("vocabulary entry")
    below.set_xlabel("tile of the vocabulary")
    figure.savefig(path)
    return kept


if __name__ == "__main__":
    print("kept: {:.1%} in the order of the vocabulary, {:.1%} sorted".format(*draw(PICTURE)))
    sys.exit(0)

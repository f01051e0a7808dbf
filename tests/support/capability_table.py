"""The table of docs/choosing-an-impl.md, from the code's: `python tests/support/capability_table.py` prints it.

``--write`` puts it there.
"""

import sys

from project import ROOT

from torchtune_lce.implementations.capabilities import CAPABILITIES, Capabilities

PAGE = ROOT / "docs" / "choosing-an-impl.md"
BEGIN, END = "<!-- table: tests/support/capability_table.py -->", "<!-- end of table -->"
HEAD = (
    "`impl`",
    "filters the gradient of",
    "float64",
    "second derivatives",
    "`torch.func`, forward mode",
    "needs",
    "runs on",
)


def row(name: str, can: Capabilities) -> tuple[str, ...]:
    return (
        f"`{name}`",
        _filtered(can),
        *map(_answer, (can.float64, can.second_derivative, can.transforms)),
        _needs(can),
        _devices(can),
    )


def _answer(has: bool) -> str:
    return "yes" if has else "refused"


def _filtered(can: Capabilities) -> str:
    named = {"hidden states": can.filtering.hidden, "weight": can.filtering.weight}
    return ", ".join(name for name, filtered in named.items() if filtered) or "none"


def _needs(can: Capabilities) -> str:
    if can.needs_triton:
        return "Triton"
    return "Triton on a card, a C++ compiler elsewhere" if can.needs_compiler else "nothing"


def _devices(can: Capabilities) -> str:
    cards = "CUDA cards of {}.{} and newer".format(*can.compute_capability)
    if can.cuda_only:
        return cards
    return "anything" if can.compute_capability == (0, 0) else f"anything; {cards}"


def table() -> str:
    rows = [row(name, can) for name, can in CAPABILITIES.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *rows))


def written() -> str:
    """The table that the page holds."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(table())

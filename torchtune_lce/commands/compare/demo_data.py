"""Rows of tokens for any model, made on the spot from the source of Python's library: full rows, so nothing is padded.

Not packed: torchtune's Gemma 2 refuses packed rows on a card, and full rows of one text each need no packing.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchtune_lce.commands.shared import chats, records, tokenizer
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.vocabulary import spread

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LEAST_VOCABULARY = 256 + len(_SPECIAL)  # every byte is an entry
_ROWS, _REST, _TOKENIZER, _MADE = "rows.pt", "rest.pt", "tokenizer", "made.json"
_VOCABULARY, _MERGES = f"{_TOKENIZER}/vocab.json", f"{_TOKENIZER}/merges.txt"


@dataclass(frozen=True)
class DemoData:
    """What to make. ``vocabulary`` counts the special tokens.

    With ``model_entries`` the ids spread over a model's vocabulary of that many, as those of a tokenizer that was made
    for all languages, and the files of which no row has anything are kept, to train on.
    """

    rows: int
    sequence: int  # tokens in a row, the label of the last one among them ignored
    vocabulary: int
    pairs: bool = False  # two rows are a chosen and a rejected answer
    model_entries: int | None = None

    def sections(self, folder: Path) -> dict:
        """The ``tokenizer`` and ``dataset`` of a config that reads them from ``folder``."""
        ordinary = self.vocabulary - len(_SPECIAL)
        return {
            "tokenizer": {
                "_component_": "torchtune.models.qwen2.Qwen2Tokenizer",
                "path": str(folder / _VOCABULARY),
                "merges_file": str(folder / _MERGES),
                "special_tokens": {name: ordinary + i for i, name in enumerate(_SPECIAL)},
                "max_seq_len": self.sequence,
            },
            "dataset": {
                "_component_": f"{__name__}.{'TokenPairs' if self.pairs else 'TokenRows'}",
                "path": str(folder / _ROWS),
            },
        }

    def make(self, folder: Path, sources: dict[str, str] | None = None) -> bool:
        """Writes them into ``folder``, from ``sources`` or Python's library; False if the same are there already.

        Raises CommandError if there is too little text.
        """
        made = folder / _MADE
        wanted = asdict(self)
        written = [_ROWS, _VOCABULARY, _MERGES, *([] if self.model_entries is None else [_REST])]
        if records.read(made) == wanted and all((folder / name).exists() for name in written):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        sources = sources or chats.read_sources()
        texts = list(sources.values())
        random.Random(0).shuffle(texts)
        trained = tokenizer.train(texts, self.vocabulary - len(_SPECIAL), folder / _TOKENIZER)
        needed, ids, unread = self.rows * self.sequence, [], iter(texts)
        for text in unread:
            ids += trained.encode(text).ids
            if len(ids) >= needed:
                break
        if len(ids) < needed:
            raise CommandError(
                f"--demo-data: the runs need {self.rows:,} rows of {self.sequence:,} tokens, the text of this Python's "
                f"library has {len(ids):,} tokens; take fewer --steps, a smaller batch_size, or shorter rows "
                "(--sequence-length)"
            )
        torch.save(self._placed(ids[:needed]).view(self.rows, self.sequence), folder / _ROWS)
        if self.model_entries is not None:
            rest = [token for encoding in trained.encode_batch(list(unread)) for token in encoding.ids]
            torch.save(self._placed(rest), folder / _REST)
        records.write(wanted, made)
        return True

    def _placed(self, ids: list[int]) -> Tensor:
        """[tokens] int32, where they are in the model's vocabulary."""
        tokens = torch.tensor(ids, dtype=torch.int32)
        if self.model_entries is None:
            return tokens
        return spread(self.vocabulary, self.model_entries).int()[tokens]


def rows_and_rest(folder: Path) -> tuple[Tensor, Tensor]:
    """[rows, sequence] and [tokens], int32: what is fine-tuned on, and the text that is left, of other files."""
    return tuple(torch.load(folder / name, weights_only=True) for name in (_ROWS, _REST))


class TokenRows(Dataset):
    """Rows as torchtune's recipes take them, each token also a label; the recipes shift those."""

    def __init__(self, tokenizer, path: str):
        self._rows = torch.load(path, weights_only=True)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self._rows[index].tolist()
        return {"tokens": row, "labels": list(row)}


class TokenPairs(Dataset):
    """Rows two by two as torchtune's DPO recipes take them: what each is compared with is another text."""

    def __init__(self, tokenizer, path: str):
        self._rows = TokenRows(tokenizer, path)

    def __len__(self) -> int:
        return len(self._rows) // 2

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        chosen, rejected = self._rows[2 * index], self._rows[2 * index + 1]
        return {
            "chosen_input_ids": chosen["tokens"],
            "chosen_labels": chosen["labels"],
            "rejected_input_ids": rejected["tokens"],
            "rejected_labels": rejected["labels"],
        }

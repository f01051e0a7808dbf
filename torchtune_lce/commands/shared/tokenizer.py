"""A byte-level BPE tokenizer trained on the spot, in the two files that torchtune's Qwen2Tokenizer reads."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torchtune_lce.commands.shared.errors import CommandError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def train(texts: Iterable[str], entries: int, folder: Path) -> "Tokenizer":
    """Writes ``vocab.json`` with ids 0 to ``entries`` - 1 and ``merges.txt`` into ``folder``; returns the tokenizer.

    Special tokens are not among them: the config numbers those from ``entries`` on. Raises CommandError if the texts
    give fewer entries.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from torchtune.models.qwen2._tokenizer import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    # Text must be split here as torchtune will split it, or merges across its borders would never be used.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((unicodedata.normalize("NFC", text) for text in texts), trainer)
    if tokenizer.get_vocab_size() != entries:
        raise CommandError(
            f"the demo needs a vocabulary of {entries} entries, the sources of this Python's library give only "
            f"{tokenizer.get_vocab_size()}; run it with a Python that was installed with its library's sources"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    return tokenizer

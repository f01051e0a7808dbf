"""Text that is on the machine, as tokens whose ids spread over a vocabulary as those of a real tokenizer do."""

import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.vocabulary import spread

_SUFFIXES = {".py", ".md", ".rst", ".txt"}
_SMALLEST, _LARGEST = 1_000, 400_000  # bytes: below is boilerplate, above are tables
# A vocabulary made for all languages holds about this many entries that source code and documentation ever use.
_LEARNED_ENTRIES = 40_000


def read_texts(characters: int, folders: Iterable[Path] | None = None) -> list[str]:
    """Sources and documentation of Python's library and the installed packages, in a fixed random order.

    Stops at ``characters``, or where there is no more; raises CommandError where there is nothing.
    """
    if folders is None:
        folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    paths = {path for folder in folders for path in folder.rglob("*") if path.suffix in _SUFFIXES}
    paths = sorted(paths)
    random.Random(0).shuffle(paths)
    texts, beginnings, count = [], set(), 0
    for path in paths:
        if count >= characters:
            break
        if path.is_symlink() or not path.is_file() or not _SMALLEST < path.stat().st_size < _LARGEST:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, PermissionError):
            continue
        if text[:2000] in beginnings:  # copies of licences and of vendored packages
            continue
        beginnings.add(text[:2000])
        texts.append(text)
        count += len(text)
    if not texts:
        raise CommandError(
            f"the probe's text is Python sources and documentation, none are in {', '.join(map(str, folders))}"
        )
    return texts


def tokenize(texts: list[str], vocab: int) -> Tensor:
    """Ids [tokens] int64 of the texts, one after the other with an end mark after each, all below ``vocab``.

    The tokenizer is a byte-level BPE trained on the texts. Its entries, in the order in which it learned them, get ids
    all over the vocabulary, in the same order, denser at the start; the rest of the vocabulary is never used.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|end|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    entries = max(min(vocab, _LEARNED_ENTRIES), len(alphabet) + 1)
    if entries > vocab:
        raise CommandError(f"the probe needs a vocabulary of at least {entries} entries, got {vocab}")
    trainer = trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=alphabet, special_tokens=[end], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = []
    for encoding in tokenizer.encode_batch(texts):
        pieces.append(torch.tensor(encoding.ids + [tokenizer.token_to_id(end)]))
    return spread(tokenizer.get_vocab_size(), vocab)[torch.cat(pieces)]

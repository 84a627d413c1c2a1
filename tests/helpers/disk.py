"""A disk that refuses, without root: a limit on the size of files makes real writes of real libraries fail."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

from s2d_jax.text.tokenizer import Tokenizer


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes beyond `num_bytes` of a file fail with EFBIG, "File too large", in every thread of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def tokenizer_refused(monkeypatch) -> Iterator[None]:
    """The disk refuses the files of tokenizers."""
    save = Tokenizer.save

    def limited(self, directory):
        with file_size_limit(1000):
            save(self, directory)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", limited)
        yield

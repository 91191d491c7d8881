"""Files that are whole or not there."""

import os
import threading
import time
from pathlib import Path

import pytest

from perception.files import atomic_write


def test_writers_at_once_leave_the_umask_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.umask
    before = real(0o027)

    def slow(mask: int) -> int:  # the other threads get their turn between the two calls
        found = real(mask)
        time.sleep(0.002)
        return found

    def write(number: int) -> None:
        with atomic_write(tmp_path / f"{number}.txt") as path:
            path.write_text("x")

    monkeypatch.setattr(os, "umask", slow)
    try:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        after = real(before)
    assert after == 0o027
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}

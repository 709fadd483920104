"""A conversion says how far it is, on a terminal and in a log."""

from types import SimpleNamespace

from refine_titan.conversion import progress


def test_lines_without_a_terminal(monkeypatch, capsys):
    seconds = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with progress.progress_bar("reading", 4_000_000_000) as advance:
        for _ in range(4):
            advance(1_000_000_000)
    captured = capsys.readouterr()
    assert captured.err == "reading: 2.0 of 4.0 GB\nreading: 4.0 of 4.0 GB\n" and captured.out == ""

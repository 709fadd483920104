"""What a rank leaves to its launcher."""

import json

from refine_titan.distributed.launched_rank import ERROR_FILE_VARIABLE, FOLDER_VARIABLE, leave_error_to_launcher
from refine_titan.errors import UserError


def test_error_appears_whole(tmp_path, monkeypatch):
    """The launcher may look for it at any moment."""
    path, seen, dump = tmp_path / "error.json", [], json.dump

    def watched(value, file):
        seen.append(path.exists())
        dump(value, file)

    monkeypatch.setattr("json.dump", watched)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    assert leave_error_to_launcher(UserError("a message"))
    assert seen == [False] and list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["message"]["message"] == "UserError: a message"

"""What is a name of the Hub and what a path, and which folders of the cache belong to which name."""

import pytest

from refine_titan.hub.names import HubName, hub_name, name_of_folder, with_names

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("owner/name", HubName("owner/name")),
        ("Qwen/Qwen3.5-0.8B", HubName("Qwen/Qwen3.5-0.8B")),
        ("owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", HubName("owner/name", "refs/pr/3")),
        (f"owner/name@{COMMIT}", HubName("owner/name", COMMIT)),
    ],
)
def test_names(text, expected):
    assert hub_name(text) == expected and str(expected) == text and expected.is_pinned == (expected.revision == COMMIT)


@pytest.mark.parametrize(
    "text",
    ["", None, "gpt2", "/owner/name", "./owner/name", "~/name", "a/b/c", "owner/", "owner/name@", "own er/name", "owner/na..me", "a--b/c"]
    + ["data/books.jsonl", "data/books.txt.gz", "configs/my.toml", "../name", "owner/.name", "owner/name-", "owner/name\n", "https://x/y"],
)
def test_paths(text):
    assert hub_name(text) is None


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/name") is not None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_name("owner/name") is None and hub_name("owner/name@main") == HubName("owner/name", "main")


def test_folders_of_the_cache_have_names():
    folder = f"/cache/hub/models--owner--my-name.v2/snapshots/{COMMIT}"
    assert name_of_folder(folder) == HubName("owner/my-name.v2", COMMIT)
    assert name_of_folder(folder).short() == "owner--my-name.v2-01234567"
    assert name_of_folder("/cache/models--owner--name") is name_of_folder("outputs/run/checkpoint/step-10") is None
    settings = {"model": {"hf_assets_path": folder, "name": "x"}, "data": {"source": "/books"}, "hub": 3}
    assert with_names(settings)["model"] == {"hf_assets_path": f"owner/my-name.v2@{COMMIT}", "name": "x"}
    assert with_names(settings)["data"] == {"source": "/books"} and settings["model"]["hf_assets_path"] == folder

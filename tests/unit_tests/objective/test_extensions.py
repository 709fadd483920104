"""Rewards and selections of installed packages: which one a name finds, and what is refused of what they return."""

import sys
import traceback
from dataclasses import replace

import pytest
import torch

from refine_titan.errors import ExtensionError, UserError
from refine_titan.objective.extensions import find_reward, find_selection, packages_of
from refine_titan.objective.positions import SELECTIONS, select_positions
from refine_titan.objective.rewards import REWARDS, RewardInputs
from refine_titan.seeding import generator
from refine_titan.validation import load_config
from tests.packages import write_package

TOKENS_NK = torch.tensor([[104, 105, 33], [104, 101, 121]])
TRUE_TOKENS_NK = torch.tensor([[104, 105, 46], [121, 111, 117]])


def inputs(decode=lambda tokens: bytes(tokens).decode()) -> RewardInputs:
    hidden_nkD = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return RewardInputs(TOKENS_NK.clone(), TRUE_TOKENS_NK, hidden_nkD, -hidden_nkD, -torch.ones(2, 3), decode)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on Python's path for packages, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write_reward(site, body: str, name: str = "mine") -> None:
    """A package with a reward `mine` of the given body."""
    code = f"import torch\n\ndef {name}(inputs):\n    n = len(inputs.tokens_nk)\n    {body}\n"
    write_package(site, "reward_package", code, rewards={name: name})


def write_selection(site, body: str) -> None:
    write_package(site, "selection_package", f"import torch\n\ndef mine(candidates):\n    {body}\n", selections={"mine": "mine"})


def test_texts_are_decoded_on_demand_and_once():
    decoded = []
    given = inputs(lambda tokens: decoded.append(tokens) or str(tokens))
    assert not decoded
    assert given.texts() == given.texts() == ("[104, 105, 33]", "[104, 101, 121]") and len(decoded) == 2
    assert given.true_texts() == ("[104, 105, 46]", "[121, 111, 117]") and len(decoded) == 4


def test_built_in_names_find_the_functions_of_the_tables():
    assert all(find_reward(name) is reward for name, reward in REWARDS.items()) and packages_of("cosine", "entropy") == []
    assert all(find_selection(name) is selection for name, selection in SELECTIONS.items())


def test_reward_of_a_package_is_found_by_its_name_and_only_that_package_is_imported(site):
    write_reward(site, "return torch.tensor([len(text) for text in inputs.texts()], dtype=torch.float32) + inputs.logprobs_nk.sum(1)")
    write_package(site, "other_package", "raise RuntimeError('imported')", rewards={"other": "other"}, selections={"mine": "mine"})
    assert find_reward("mine")(inputs()).tolist() == [0.0, 0.0]
    assert "reward_package" in sys.modules and "other_package" not in sys.modules
    assert packages_of("mine", "entropy") == ["reward_package"] and packages_of("mine", "mine") == ["other_package", "reward_package"]


def test_selection_of_a_package_chooses_positions(site):
    write_selection(site, "return candidates.allowed_C.nonzero()[-1]")
    starts = select_positions(
        torch.rand(400),
        (0, 330, 400),
        num_chunks=4,
        rollout_length=5,
        selection=find_selection("mine"),
        temperature=1.0,
        generator=generator(0),
    )
    assert starts == [100, 200, 300, 380]


def test_unknown_name_is_refused_with_all_that_there_are(site):
    write_reward(site, "return None", name="edit_distance")
    with pytest.raises(UserError) as caught:
        find_reward("edit_distanse")
    assert str(caught.value) == (
        "refine.reward is 'edit_distanse'; allowed: 'cosine', 'binary', 'hybrid' (built in), and what installed packages give as "
        "refine_titan.rewards: 'edit_distance' (package reward_package 1.0); did you mean 'edit_distance'?"
    )
    with pytest.raises(UserError, match="refine.selection is 'x'; allowed: .* give as refine_titan.selections: nothing$"):
        find_selection("x")
    assert "reward_package" not in sys.modules


def test_settings_are_refused_before_anything_is_built(site):
    write_selection(site, "return 0")
    assert load_config(["--refine.selection", "mine"]).refine.selection == "mine"
    for setting in ("reward", "selection"):
        with pytest.raises(UserError, match=f"refine.{setting} is 'nothing'; allowed: "):
            load_config([f"--refine.{setting}", "nothing"])


def test_name_given_twice_is_refused(site):
    write_package(site, "first", "", rewards={"mine": "mine", "cosine": "mine"})
    write_package(site, "second", "", rewards={"mine": "mine"})
    with pytest.raises(UserError, match="refine.reward is 'mine', a name that is given by package (first|second) 1.0 and by package"):
        find_reward("mine")
    with pytest.raises(UserError, match="refine.reward is 'cosine', a name that is given by refine_titan itself and by package first 1.0"):
        find_reward("cosine")
    assert find_reward("binary") is REWARDS["binary"]


@pytest.mark.parametrize(
    "code, message",
    [
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("raise RuntimeError('no licence\\nfound')", "RuntimeError: no licence found$"),
        ("mine: = 3", "SyntaxError: invalid syntax"),
        ("yours = 3", "AttributeError: module 'broken' has no attribute 'mine'"),
    ],
)
def test_package_that_cannot_be_imported_is_named(site, code, message):
    write_package(site, "broken", code, rewards={"mine": "mine"})
    with pytest.raises(
        ExtensionError, match=f"^refine.reward = 'mine' of package broken 1.0 cannot be imported from 'broken:mine': {message}"
    ):
        find_reward("mine")


def test_name_of_something_that_is_no_function_is_refused(site):
    write_package(site, "broken", "mine = 3", rewards={"mine": "mine"})
    with pytest.raises(ExtensionError, match="of package broken 1.0 is an object of type int .'broken:mine'.; wanted is a function"):
        find_reward("mine")


@pytest.mark.parametrize(
    "body, message",
    [
        ("return [0.0] * n", r"returned an object of type list; wanted is a tensor \[2\], torch.float32, on cpu: one number a rollout"),
        ("return None", "returned an object of type NoneType"),
        ("return torch.zeros(n, 1)", r"returned a tensor \[2, 1\], torch.float32, on cpu; wanted is a tensor \[2\]"),
        ("return torch.tensor(0.0)", r"returned a tensor \[\], torch.float32, on cpu"),
        ("return torch.zeros(n + 1)", r"returned a tensor \[3\], torch.float32"),
        ("return torch.zeros(n, dtype=torch.float64)", r"returned a tensor \[2\], torch.float64, on cpu"),
        ("return torch.zeros(n, device='meta')", r"returned a tensor \[2\], torch.float32, on meta"),
        (
            "return torch.tensor([1.0, float('nan')])",
            r"returned nan for rollout 1, tokens \[104, 101, 121\], true tokens \[121, 111, 117\]; wanted is a finite number$",
        ),
        ("return torch.full([n], float('-inf'))", "returned -inf for rollout 0, .*; 2 of 2 rewards are not finite"),
        ("return inputs.tokens_nk.clamp_(max=3).float().mean(1)", "has changed tokens_nk in place"),
        ("inputs.hidden_nkD.zero_(); return torch.zeros(n)", "has changed hidden_nkD in place"),
        ("inputs.tokens_nk = 3", "failed in line 5 of .*reward_package.py with FrozenInstanceError: cannot assign to field 'tokens_nk'"),
        ("return 1 / 0", "failed in line 5 of .*reward_package.py with ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_result_of_a_reward_is_refused_by_name(site, body, message):
    write_reward(site, body)
    reward = find_reward("mine")
    with pytest.raises(ExtensionError, match=f"^refine.reward = 'mine' of package reward_package 1.0 {message}"):
        reward(inputs())


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 2.5", "returned 2.5; wanted is the index of a token, a whole number"),
        ("return None", "returned None; wanted is the index of a token"),
        ("return torch.tensor([1, 2])", r"returned tensor\(\[1, 2\]\); wanted is the index"),
        ("return -1", "returned -1; wanted is the index of one of the chunk's tokens, 0 to 99"),
        ("return len(candidates.entropy_C)", "returned 100; wanted is the index of one of the chunk's tokens, 0 to 99"),
        ("return 35", "returned 35, a token at which allowed_C is false"),
        ("raise KeyError('x')", "failed in line 4 of .*selection_package.py with KeyError: 'x'"),
    ],
)
def test_wrong_result_of_a_selection_is_refused_by_name(site, body, message):
    write_selection(site, body)
    with pytest.raises(ExtensionError, match=f"^refine.selection = 'mine' of package selection_package 1.0 {message}"):
        select_positions(
            torch.rand(100),
            (0, 20, 50, 100),
            num_chunks=1,
            rollout_length=5,
            selection=find_selection("mine"),
            temperature=1.0,
            generator=torch.Generator(),
        )


def test_cause_of_a_failure_is_shown_from_the_packages_code_on(site):
    write_reward(site, "return helper(inputs)\n\ndef helper(inputs):\n    return inputs.nothing")
    with pytest.raises(ExtensionError) as caught:
        find_reward("mine")(inputs())
    assert "failed in line 8 of " in str(caught.value)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    assert frames == ["mine", "helper"]


def test_function_of_other_arguments_is_refused(site):
    write_package(site, "reward_package", "def mine(tokens, truth):\n    pass", rewards={"mine": "mine"})
    with pytest.raises(ExtensionError, match="of package reward_package 1.0 failed with TypeError: mine.. missing 1 required positional"):
        find_reward("mine")(inputs())


def test_results_may_be_inference_tensors_and_views_of_what_is_given(site):
    write_reward(site, "return inputs.logprobs_nk[:, 0]")
    with torch.inference_mode():
        given = inputs()
        assert torch.equal(find_reward("mine")(replace(given, tokens_nk=given.tokens_nk + 0)), given.logprobs_nk[:, 0])
